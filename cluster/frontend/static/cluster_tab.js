/** The tab with the cluster: what `/metrics`, `/ready` and `/load` say, every two seconds while it is seen. */

import { ApiError } from "./api.js";
import { Chart } from "./chart.js";
import { byId, el } from "./dom.js";
import { parseMetrics, quantileOf } from "./prometheus.js";

/** @typedef {import("./prometheus.js").Sample} Sample */

const PERIOD_MS = 2000;
const MAX_PERIOD_MS = 30_000;
const SPAN_MS = 300_000;
/** Time that the charts go back. */

const whole = (/** @type {number} */ value) => (value >= 100 ? Math.round(value).toLocaleString("en") : String(Math.round(value * 10) / 10));
const percent = (/** @type {number} */ value) => `${Math.round(value * 1000) / 10} %`;
const seconds = (/** @type {number} */ value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

/** The charts: how each is shown, and what it shows of two reports of which the first may be missing. */
const CHARTS = [
  { title: "Tokens per second", names: ["generated", "prompt"], format: whole, of: rates },
  { title: "Requests", names: ["running", "waiting"], format: whole, of: queue },
  { title: "KV cache in use", names: ["full layers", "sliding layers"], format: percent, top: 1, of: kvUse },
  { title: "Prefix cache hits", names: ["share of prompt tokens"], format: percent, top: 1, of: prefixHits },
  { title: "Time to first token", names: ["median", "95th percentile"], format: seconds, of: quantiles("cantata_gateway_time_to_first_token_seconds_bucket") },
  { title: "Time between tokens", names: ["median", "95th percentile"], format: seconds, of: quantiles("cantata_gateway_inter_token_latency_seconds_bucket") },
];

/** A page of metrics, and when it came. */
class Report {
  /** @param {Sample[]} samples @param {number} atMs */
  constructor(samples, atMs) {
    this.samples = samples;
    this.atMs = atMs;
  }

  /**
   * Return the samples of a metric whose labels have these values.
   * @param {string} name
   * @param {Record<string, string>} labels
   */
  all(name, labels = {}) {
    return this.samples.filter(
      (sample) => sample.name === name && Object.entries(labels).every(([label, value]) => sample.labels[label] === value),
    );
  }

  /** @param {string} name @param {Record<string, string>} labels */
  sum(name, labels = {}) {
    return this.all(name, labels).reduce((sum, { value }) => sum + value, 0);
  }

  /** @param {string} name @param {Record<string, string>} labels */
  mean(name, labels = {}) {
    const found = this.all(name, labels);
    return found.length ? this.sum(name, labels) / found.length : null;
  }

  /** Return cumulative counts by upper bound. @param {string} name */
  buckets(name) {
    /** @type {Map<number, number>} */
    const counts = new Map();
    for (const { labels, value } of this.all(name)) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return counts;
  }
}

export class ClusterTab {
  /**
   * @param {import("./api.js").Api} api
   * @param {{ openKey: () => void }} page
   */
  constructor(api, page) {
    /** @private */ this.api = api;
    /** @private */ this.page = page;
    /** @private */ this.charts = CHARTS.map((options) => new Chart(options));
    /** @private @type {import("./chart.js").Point[][]} */ this.points = CHARTS.map(() => []);
    /** @private @type {Report | null} */ this.latest = null;
    /** @private */ this.isShown = false;
    /** @private */ this.failures = 0;
    /** @private @type {ReturnType<typeof setTimeout> | undefined} */ this.timer = undefined;
    byId("charts").replaceChildren(...this.charts.map((chart) => chart.element));
    document.addEventListener("visibilitychange", () => this.arrange(0));
  }

  /** @param {boolean} isShown */
  show(isShown) {
    this.isShown = isShown;
    this.arrange(0);
  }

  /** Poll after some time, if this can be seen. @private @param {number} waitMs */
  arrange(waitMs) {
    clearTimeout(this.timer);
    if (this.isShown && !document.hidden) this.timer = setTimeout(() => void this.poll(), waitMs);
  }

  /** @private */
  async poll() {
    if (this.isPolling) return;
    this.isPolling = true;
    try {
      const [text, ready, load] = await Promise.all([
        this.api.text("metrics"),
        this.api.json("ready").then(() => true, () => false),
        this.api.json("load"),
      ]);
      this.failures = 0;
      this.take(new Report(parseMetrics(text), performance.now()), ready, Number(load.server_load) || 0);
    } catch (error) {
      this.failures += 1;
      this.tell(error);
    } finally {
      this.isPolling = false;
      this.arrange(Math.min(PERIOD_MS * 2 ** this.failures, MAX_PERIOD_MS));
    }
  }

  /** @private @param {Report} report @param {boolean} ready @param {number} load */
  take(report, ready, load) {
    const before = this.latest;
    this.latest = report;
    const since = report.atMs - SPAN_MS;
    CHARTS.forEach(({ of }, index) => {
      const point = { atMs: report.atMs, values: of(report, before) };
      this.points[index] = [...this.points[index].filter(({ atMs }) => atMs >= since), point];
      this.charts[index].show(this.points[index]);
    });
    const state = byId("cluster-state");
    state.dataset.state = ready ? "ready" : "waiting";
    say(state, ready ? "Ready: requests are taken." : "Not ready: no replica takes requests.");
    const { wanted, answering } = replicaCounts(report);
    const facts = [
      ["Replicas", `${answering} of ${wanted}`],
      ["Running here", String(load)],
      ["Answers", whole(report.sum("cantata_gateway_finished_choices_total"))],
      ["Tokens generated", whole(report.sum("cantata_gateway_output_tokens_total"))],
      ["Preemptions", whole(report.sum("cantata_engine_preemptions_total"))],
      ["Continued elsewhere", whole(report.sum("cantata_gateway_resumptions_total"))],
    ];
    byId("facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    byId("replicas").replaceChildren(...replicaRows(report, before));
  }

  /** @private @param {unknown} error */
  tell(error) {
    const state = byId("cluster-state");
    state.dataset.state = "failed";
    const needsKey = error instanceof ApiError && (error.status === 401 || error.status === 403);
    say(state, needsKey ? "This tab needs a key that may read the metrics." : "The server cannot be reached; trying again.");
    if (needsKey && this.failures === 1) this.page.openKey();
  }
}

/** Change a text only if it is another, so that a screen reader says it once. @param {HTMLElement} element @param {string} text */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Return the increase of a counter per second; null where it started again.
 * @param {Report} report
 * @param {Report | null} before
 * @param {string} name
 * @param {Record<string, string>} [labels]
 */
function rate(report, before, name, labels = {}) {
  if (!before) return null;
  const increase = report.sum(name, labels) - before.sum(name, labels);
  return increase < 0 ? null : (1000 * increase) / (report.atMs - before.atMs);
}

/** @param {Report} report @param {Report | null} before */
function rates(report, before) {
  return [
    rate(report, before, "cantata_gateway_output_tokens_total"),
    rate(report, before, "cantata_gateway_prompt_tokens_total"),
  ];
}

/** @param {Report} report */
function queue(report) {
  return [report.sum("cantata_engine_running_requests"), report.sum("cantata_engine_waiting_requests")];
}

/** @param {Report} report */
function kvUse(report) {
  return ["full", "sliding"].map((group) => report.mean("cantata_engine_kv_usage_ratio", { group }));
}

/** @param {Report} report @param {Report | null} before */
function prefixHits(report, before) {
  const prompt = rate(report, before, "cantata_engine_prompt_tokens_total");
  const cached = rate(report, before, "cantata_engine_cached_tokens_total");
  return [prompt && cached !== null ? cached / prompt : null];
}

/**
 * Return a function that gives median and 95th percentile of a histogram's increase.
 * @param {string} name of its buckets
 */
function quantiles(name) {
  return (/** @type {Report} */ report, /** @type {Report | null} */ before) => {
    if (!before) return [null, null];
    const [earlier, later] = [before.buckets(name), report.buckets(name)];
    return [quantileOf(earlier, later, 0.5), quantileOf(earlier, later, 0.95)];
  };
}

/** @param {Report} report */
function replicaCounts(report) {
  return { wanted: report.sum("cantata_replicas_wanted"), answering: report.sum("cantata_replicas_ready") };
}

/** @param {Report} report @param {Report | null} before */
function replicaRows(report, before) {
  return report.all("cantata_process_up", { process: "engine" }).map(({ labels: { replica }, value }) => {
    const of = { replica };
    const speed = rate(report, before, "cantata_engine_output_tokens_total", of);
    const [full, sliding] = ["full", "sliding"].map((group) => report.mean("cantata_engine_kv_usage_ratio", { ...of, group }));
    const cells = value
      ? [
          "answers",
          whole(report.sum("cantata_engine_running_requests", of)),
          whole(report.sum("cantata_engine_waiting_requests", of)),
          full === null ? "–" : percent(full),
          sliding === null ? "–" : percent(sliding),
          speed === null ? "–" : whole(speed),
          whole(report.sum("cantata_engine_preemptions_total", of)),
        ]
      : ["does not answer", "–", "–", "–", "–", "–", "–"];
    return el("tr", { class: value ? "" : "down" }, el("th", { scope: "row" }, replica), ...cells.map((cell) => el("td", {}, cell)));
  });
}
