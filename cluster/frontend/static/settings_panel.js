/** The fields of a conversation's settings: those of the panel, and the effort beside the message. */

import { byId } from "./dom.js";
import { DEFAULTS, EXAMPLE_SCHEMA, EXAMPLE_TOOLS, requestFields } from "./settings.js";

/** @typedef {import("./settings.js").Settings} Settings */

const NAMES = /** @type {(keyof Settings)[]} */ (Object.keys(DEFAULTS));

export class SettingsPanel {
  /** @param {(settings: Settings) => void} changed */
  constructor(changed) {
    /** @private */ this.changed = changed;
    /** @private */ this.fields = new Map(
      NAMES.map((name) => [name, /** @type {HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement} */ (byId(`set-${name}`))]),
    );
    for (const field of this.fields.values()) field.addEventListener("input", () => this.emit());
    byId("example-tools").addEventListener("click", () => this.fill("tools", EXAMPLE_TOOLS));
    byId("example-schema").addEventListener("click", () => this.fill("schema", EXAMPLE_SCHEMA));
    byId("reset-settings").addEventListener("click", () => {
      this.show({ ...DEFAULTS });
      this.emit();
    });
  }

  /** @param {Settings} settings */
  show(settings) {
    for (const [name, field] of this.fields) field.value = settings[name];
    this.check();
  }

  /** @returns {Settings} */
  get value() {
    return /** @type {Settings} */ (Object.fromEntries([...this.fields].map(([name, field]) => [name, field.value])));
  }

  /**
   * Show what is wrong, beside each field.
   * @returns {HTMLElement | null} the first field that is wrong
   */
  check() {
    const { problems } = requestFields(this.value);
    let first = null;
    for (const [name, field] of this.fields) {
      const problem = problems[name] ?? "";
      const place = document.getElementById(`problem-${name}`);
      if (!place) continue;
      if (place.textContent !== problem) place.textContent = problem;
      place.hidden = !problem;
      field.setAttribute("aria-invalid", String(Boolean(problem)));
      if (problem) first ??= field;
    }
    byId("settings-count").textContent = this.summary();
    return first;
  }

  /** @private Return how many settings differ from the defaults. */
  summary() {
    const settings = this.value;
    const number = NAMES.filter((name) => name !== "effort" && settings[name].trim() !== DEFAULTS[name]).length;
    return number ? String(number) : "";
  }

  /** @param {"tools" | "schema"} name @param {string} text */
  fill(name, text) {
    const field = this.fields.get(name);
    if (!field) return;
    field.value = text;
    this.emit();
  }

  /** @private */
  emit() {
    this.check();
    this.changed(this.value);
  }
}
