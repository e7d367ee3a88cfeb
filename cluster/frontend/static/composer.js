/** The field in which the user writes, with the buttons that send and stop. */

import { byId } from "./dom.js";

const MAX_HEIGHT_PX = 260;

export class Composer {
  /**
   * @param {{ send: (text: string) => boolean, stop: () => void, editLast: () => void }} actions `send`
   *   returns whether the text was taken
   */
  constructor({ send, stop, editLast }) {
    /** @private */ this.area = /** @type {HTMLTextAreaElement} */ (byId("message"));
    /** @private */ this.sendButton = /** @type {HTMLButtonElement} */ (byId("send"));
    /** @private */ this.stopButton = /** @type {HTMLButtonElement} */ (byId("stop"));
    const submit = () => {
      const text = this.area.value.trim();
      if (!text || !send(text)) return;
      this.fill("");
    };
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.area.addEventListener("input", () => this.grow());
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      } else if (event.key === "ArrowUp" && !this.area.value) {
        event.preventDefault();
        editLast();
      }
    });
    this.stopButton.addEventListener("click", () => {
      stop();
      this.focus();
    });
  }

  /** Whether the focus is here, or nowhere, and nothing is written. */
  get isIdle() {
    return !this.area.value && [this.area, document.body, null].includes(/** @type {any} */ (document.activeElement));
  }

  focus() {
    this.area.focus();
  }

  /** @param {string} text */
  fill(text) {
    this.area.value = text;
    this.grow();
  }

  /** @param {boolean} running an answer arrives */
  show(running) {
    this.stopButton.hidden = !running;
    this.sendButton.hidden = running;
    this.grow();
  }

  /** @private */
  grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, MAX_HEIGHT_PX)}px`;
    this.sendButton.disabled = !this.area.value.trim();
  }
}
