/** Prometheus' text format, as far as this server writes it. */

/** @typedef {{ name: string, labels: Record<string, string>, value: number }} Sample */

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/**
 * Return the samples of a page of metrics.
 * @param {string} text
 * @returns {Sample[]}
 */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    /** @type {Record<string, string>} */
    const labels = Object.create(null);
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, "$1");
    samples.push({ name: found[1], labels, value: numberOf(found[3]) });
  }
  return samples;
}

/** @param {string} text */
function numberOf(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

/**
 * Return the quantile of a histogram's increase, interpolated in its bucket as Prometheus does it;
 * null if nothing was counted.
 * @param {Map<number, number>} before cumulative counts by upper bound
 * @param {Map<number, number>} after
 * @param {number} quantile 0 to 1
 */
export function quantileOf(before, after, quantile) {
  const bounds = [...after.keys()].sort((one, other) => one - other);
  const counts = bounds.map((bound) => Math.max(0, (after.get(bound) ?? 0) - (before.get(bound) ?? 0)));
  const total = counts.at(-1) ?? 0;
  if (!total) return null;
  const rank = quantile * total;
  const index = counts.findIndex((count) => count >= rank);
  const low = index > 0 ? bounds[index - 1] : 0;
  const high = bounds[index];
  if (high === Infinity) return low;
  const below = index > 0 ? counts[index - 1] : 0;
  return low + ((high - low) * (rank - below)) / (counts[index] - below || 1);
}
