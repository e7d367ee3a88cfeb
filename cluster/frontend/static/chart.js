/** A small chart of lines over the last minutes. */

import { el, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 96;
const TOP = 6;
const MIN_SPAN_MS = 30_000;

/**
 * @typedef {{ atMs: number, values: (number | null)[] }} Point
 * @typedef {object} Options
 * @property {string} title
 * @property {string[]} names of the lines
 * @property {(value: number) => string} format
 * @property {number} [top] greatest value of the axis; by default that of the data
 */

export class Chart {
  /**
   * @param {Options} options
   */
  constructor(options) {
    /** @private */ this.options = options;
    /** @private Time that the chart shows. */ this.spanMs = MIN_SPAN_MS;
    /** @private @type {Point[]} */ this.points = [];
    this.now = options.names.map(() => el("span", { class: "now" }));
    this.none = el("p", { class: "none" }, "Nothing yet");
    this.axis = el("span", { class: "axis" });
    this.when = el("span", { class: "axis when" });
    this.area = svg("path", { class: "area" });
    this.lines = options.names.map((_, index) => svg("path", { class: `line line-${index}` }));
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.plot = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }),
      this.area,
      ...this.lines,
      this.cursor,
    );
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
    const legend = options.names.map((name, index) => el("span", { class: `key key-${index}` }, `${name} `, this.now[index]));
    this.element = el(
      "figure",
      { class: "chart" },
      el("figcaption", {}, el("h3", {}, options.title), this.when),
      el("div", { class: "plot" }, this.axis, this.plot, this.none),
      el("div", { class: "legend" }, ...legend),
    );
  }

  /** @param {Point[]} points the oldest first */
  show(points) {
    this.points = points;
    const latest = points.at(-1);
    if (!latest) return;
    this.spanMs = Math.max(MIN_SPAN_MS, latest.atMs - points[0].atMs);
    if (this.cursor.getAttribute("visibility") === "hidden") this.when.textContent = this.spanText();
    const { names, title, format } = this.options;
    const greatest = Math.max(0, ...points.flatMap((point) => point.values.map((value) => value ?? 0)));
    const top = this.options.top ?? (greatest || 1);
    const texts = latest.values.map((value) => (value === null ? "–" : format(value)));
    texts.forEach((text, index) => (this.now[index].textContent = text));
    this.none.hidden = points.some((point) => point.values.some((value) => value !== null));
    this.axis.textContent = this.none.hidden ? format(top) : "";
    this.plot.setAttribute(
      "aria-label",
      `${title}: ${names.map((name, index) => `${name} ${texts[index]}`).join(", ")}; up to ${format(greatest)} in this time`,
    );
    this.lines.forEach((line, index) => line.setAttribute("d", this.path(index, top, latest.atMs)));
    const first = this.path(0, top, latest.atMs);
    this.area.setAttribute("d", first && names.length === 1 && !first.includes("M", 1) ? `${first}V${HEIGHT}H${Number.parseFloat(first.slice(1))}Z` : "");
  }

  /** @private */
  spanText() {
    const seconds = Math.round(this.spanMs / 1000);
    return seconds < 120 ? `last ${seconds} s` : `last ${Math.round(seconds / 60)} min`;
  }

  /** @private @param {Point} point @param {number} endMs */
  x(point, endMs) {
    return Math.max(0, WIDTH * (1 - (endMs - point.atMs) / this.spanMs));
  }

  /**
   * Return the path of a line, with gaps where there is no value.
   * @private
   * @param {number} index
   * @param {number} top
   * @param {number} endMs
   */
  path(index, top, endMs) {
    let path = "";
    let command = "M";
    for (const point of this.points) {
      const value = point.values[index];
      if (value === null || value === undefined) {
        command = "M";
        continue;
      }
      const y = HEIGHT - (HEIGHT - TOP) * Math.min(1, value / top) - 1;
      path += `${command}${this.x(point, endMs).toFixed(1)} ${y.toFixed(1)}`;
      if (command === "M") path += "h0"; // a dot, where no other value is beside it
      command = "L";
    }
    return path;
  }

  /** @private @param {PointerEvent | null} event */
  point(event) {
    const latest = this.points.at(-1);
    this.cursor.setAttribute("visibility", event && latest ? "visible" : "hidden");
    this.when.textContent = this.spanText();
    if (!event || !latest) return;
    const box = this.plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const distance = (/** @type {Point} */ point) => Math.abs(this.x(point, latest.atMs) - at);
    const nearest = this.points.reduce((one, other) => (distance(other) < distance(one) ? other : one));
    const x = this.x(nearest, latest.atMs);
    this.cursor.setAttribute("x1", String(x));
    this.cursor.setAttribute("x2", String(x));
    const values = nearest.values.map((value) => (value === null ? "–" : this.options.format(value))).join(" / ");
    this.when.textContent = `${Math.round((latest.atMs - nearest.atMs) / 1000)} s ago: ${values}`;
  }
}
