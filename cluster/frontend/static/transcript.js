/** The turns of a conversation on the page. */

import { AnswerView } from "./answer_view.js";
import { versions } from "./conversation.js";
import { copyText, el, iconButton } from "./dom.js";
import { showPager } from "./pager.js";

/**
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {object} Actions what a user can do to a turn
 * @property {(turn: Turn) => void} retry
 * @property {(turn: Turn, text: string) => void} edit
 * @property {(turn: Turn, results: { id: string, content: string }[]) => void} sendResults
 * @property {(turn: Turn) => void} show a version
 * @property {(turn: Turn) => void} reopen the calls of an answer, for other results
 * @property {() => void} openKey
 */

/**
 * @typedef {object} Place
 * @property {Turn[]} all versions of the turn
 * @property {boolean} isLast
 * @property {Turn[]} results those of its calls that are shown
 * @property {Turn[]} allResults the first of each version of them
 */

/** The list of turns. Views of turns that stay on the path are kept. */
export class Transcript {
  /**
   * @param {HTMLElement} list
   * @param {Actions} actions
   */
  constructor(list, actions) {
    /** @private */ this.list = list;
    /** @private */ this.actions = actions;
    /** @private @type {Map<string, UserView | AnswerView>} */ this.views = new Map();
  }

  /**
   * Show a path of turns.
   * @param {import("./conversation.js").Conversation} conversation
   * @param {Turn[]} path
   */
  show(conversation, path) {
    const views = new Map();
    path.forEach((turn, index) => {
      if (turn.role === "tool") return;
      const known = this.views.get(turn.id);
      const view = known?.turn === turn ? known : this.make(turn);
      const rest = path.slice(index + 1);
      const end = rest.findIndex((each) => each.role !== "tool");
      view.place({
        all: versions(conversation, turn),
        isLast: rest.length === 0,
        results: end < 0 ? rest : rest.slice(0, end),
        allResults: conversation.turns.filter((each) => each.parent === turn.id && each.role === "tool"),
      });
      views.set(turn.id, view);
    });
    for (const [id, view] of this.views) if (views.get(id) !== view) view.element.remove();
    this.views = views;
    [...views.values()].forEach((view, index) => {
      if (this.list.children[index] !== view.element) this.list.insertBefore(view.element, this.list.children[index] ?? null);
    });
  }

  /** Show an answer as it is now. @param {Turn} turn */
  update(turn) {
    const view = this.views.get(turn.id);
    if (view instanceof AnswerView) view.update();
  }

  /** Let the user type the result of an answer's call. @param {Turn} turn */
  focusResult(turn) {
    const view = this.views.get(turn.id);
    if (view instanceof AnswerView) view.focusResult();
  }

  /** Give the focus to the buttons that show other versions of a turn. @param {Turn} turn */
  focusPager(turn) {
    const pager = this.views.get(turn.id)?.pager;
    /** @type {HTMLElement | null | undefined} */ (pager?.querySelector("button:not(:disabled)"))?.focus();
  }

  /** Let the user change the last message that the user wrote. */
  editLast() {
    const views = [...this.views.values()].filter((view) => view instanceof UserView);
    views.at(-1)?.edit();
  }

  /** @private @param {Turn} turn */
  make(turn) {
    return turn.role === "user" ? new UserView(turn, this.actions) : new AnswerView(turn, this.actions);
  }
}

/** A message of the user. */
class UserView {
  /**
   * @param {Turn} turn
   * @param {Actions} actions
   */
  constructor(turn, actions) {
    this.turn = turn;
    /** @private */ this.actions = actions;
    this.text = el("div", { class: "bubble" }, turn.content);
    this.pager = el("span", { class: "pager" });
    this.tools = el(
      "div",
      { class: "tools" },
      this.pager,
      iconButton({ name: "copy", label: "Copy message", class: "quiet small", press: () => void copyText(turn.content) }),
      iconButton({ name: "edit", label: "Edit message", class: "quiet small", press: () => this.edit() }),
    );
    this.element = el("li", { class: "turn user", "aria-label": "You" }, this.text, this.tools);
  }

  /** @param {Place} place */
  place({ all }) {
    showPager(this.pager, this.turn, all, this.actions);
  }

  /** Put an editor in place of the text. */
  edit() {
    if (!this.text.isConnected) return;
    const area = el("textarea", { "aria-label": "Edit message", rows: Math.min(12, this.turn.content.split("\n").length + 1) });
    area.value = this.turn.content;
    const close = () => {
      editor.replaceWith(this.text);
      this.tools.hidden = false;
    };
    const submit = () => {
      const text = area.value.trim();
      close();
      if (text) this.actions.edit(this.turn, text);
    };
    const editor = el(
      "form",
      {
        class: "editor",
        submit: (event) => {
          event.preventDefault();
          submit();
        },
        keydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
            this.tools.querySelector("button")?.focus();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            submit();
          }
        },
      },
      area,
      el(
        "div",
        { class: "row end" },
        el("button", { type: "button", class: "button", click: close }, "Cancel"),
        el("button", { type: "submit", class: "button primary" }, "Send"),
      ),
    );
    this.tools.hidden = true;
    this.text.replaceWith(editor);
    area.focus();
  }
}
