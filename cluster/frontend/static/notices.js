/** Sentences that the page tells the user, and those that only screen readers get. */

import { byId, el, iconButton } from "./dom.js";

const TIME_MS = 10_000;

/**
 * Let a screen reader say a sentence.
 * @param {string} text
 */
export function announce(text) {
  byId("announce").textContent = text;
}

/**
 * Show a sentence until the user closes it; one at a time for a key.
 * @param {string} key
 * @param {string} text
 * @param {{ actions?: Record<string, () => void>, passes?: boolean }} [options] `actions`: what the user
 *   can do, by its button's text; `passes`: it goes away by itself
 */
export function notify(key, text, { actions = {}, passes = false } = {}) {
  dismiss(key);
  const close = () => notice.remove();
  const notice = el(
    "div",
    { class: "notice", "data-key": key },
    el("p", { class: "grow" }, text),
    ...Object.entries(actions).map(([label, act]) =>
      el(
        "button",
        {
          type: "button",
          class: "button",
          click: () => {
            close();
            act();
          },
        },
        label,
      ),
    ),
    iconButton({ name: "close", label: "Dismiss", class: "quiet small", press: close }),
  );
  byId("notices").append(notice);
  if (passes) setTimeout(close, TIME_MS);
}

/** @param {string} key */
export function dismiss(key) {
  for (const notice of byId("notices").querySelectorAll(".notice")) {
    if (notice instanceof HTMLElement && notice.dataset.key === key) notice.remove();
  }
}
