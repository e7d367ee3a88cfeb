/** Which version of a turn is shown, and a way to the others. */

import { el, icon } from "./dom.js";

/** @typedef {import("./conversation.js").Turn} Turn */

/**
 * Show which version of a turn this is, with buttons that show the others.
 * @param {HTMLElement} pager
 * @param {Turn} turn
 * @param {Turn[]} all
 * @param {{ show: (turn: Turn) => void }} actions
 */
export function showPager(pager, turn, all, actions) {
  const index = all.indexOf(turn);
  pager.hidden = all.length < 2;
  if (pager.hidden) return;
  /** @param {string} name @param {string} label @param {Turn | undefined} target */
  const step = (name, label, target) =>
    el(
      "button",
      {
        type: "button",
        class: "button square quiet small",
        "aria-label": label,
        title: label,
        disabled: !target,
        click: () => target && actions.show(target),
      },
      icon(name),
    );
  pager.replaceChildren(
    step("left", "Version before", all[index - 1]),
    el("span", { class: "count" }, `${index + 1} of ${all.length}`),
    step("right", "Next version", all[index + 1]),
  );
}
