/** The list of conversations. */

import { byId, el, iconButton } from "./dom.js";

export class Sidebar {
  /** @param {{ open: (id: string) => void, remove: (id: string) => void }} actions */
  constructor(actions) {
    /** @private */ this.actions = actions;
    /** @private */ this.list = byId("conversations");
    /** @private */ this.shown = "";
  }

  /**
   * @param {{ id: string, title: string, changed: number }[]} entries
   * @param {string} current id of the open one
   */
  show(entries, current) {
    const text = JSON.stringify([entries.map(({ id, title }) => [id, title]), current]);
    if (text === this.shown) return;
    this.shown = text;
    byId("no-conversations").hidden = entries.length > 0;
    this.list.replaceChildren(
      ...entries.map(({ id, title }) =>
        el(
          "li",
          { class: id === current ? "current" : "" },
          el(
            "button",
            {
              type: "button",
              class: "conversation",
              "aria-current": id === current && "true",
              "data-conversation": id,
              title,
              click: () => this.actions.open(id),
            },
            title,
          ),
          iconButton({ name: "trash", label: `Delete ${title}`, class: "quiet small", press: () => this.actions.remove(id) }),
        ),
      ),
    );
  }
}
