/** The tab with the chat: ties the conversation, its store and what is shown of it. */

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { newConversation, showVersion } from "./conversation.js";
import { byId, download } from "./dom.js";
import { announce, dismiss, notify } from "./notices.js";
import { EXAMPLE_TOOLS } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { StoreFull } from "./store.js";
import { Transcript } from "./transcript.js";

/**
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {import("./conversation.js").Conversation} Conversation
 */

const SAVE_MS = 1000;
/** Time between two times that an answer which arrives is stored. */
const NEAR_END_PX = 80;
const IDLE_SHARE = 3;
/** Rendering takes at most one part in this and one of the time. */

export class ChatTab {
  /**
   * @param {import("./api.js").Api} api
   * @param {import("./store.js").Store} store
   * @param {{ openKey: () => void, openSettings: () => void }} page
   */
  constructor(api, store, page) {
    /** @private */ this.store = store;
    /** @private */ this.page = page;
    /** @private */ this.scroller = byId("scroller");
    this.chat = new Chat(api, newConversation(store.loadSettings()), {
      shown: () => this.show(),
      arrived: (turn) => this.arrived(turn),
      ended: (turn, conversation) => this.ended(turn, conversation),
    });
    /** @private */ this.composer = new Composer({
      send: (text) => this.send(text),
      stop: () => this.stop(),
      editLast: () => this.transcript.editLast(),
    });
    /** @private */ this.settings = new SettingsPanel((settings) => {
      this.chat.conversation.settings = settings;
      this.store.saveSettings(settings);
      this.save();
    });
    /** @private */ this.transcript = new Transcript(byId("turns"), {
      retry: (turn) => this.isSound() && void this.chat.retry(turn),
      edit: (turn, text) => this.isSound() && void this.chat.edit(turn, text),
      sendResults: (turn, results) => this.isSound() && void this.chat.sendResults(turn, results),
      show: (turn) => {
        this.stop();
        showVersion(this.chat.conversation, turn);
        this.show();
        this.transcript.focusPager(turn);
      },
      reopen: (turn) => {
        this.stop();
        this.chat.conversation.leaf = turn.id;
        this.show();
        this.transcript.focusResult(turn);
      },
      openKey: page.openKey,
    });
    /** @private */ this.sidebar = new Sidebar({ open: (id) => this.open(id), remove: (id) => this.remove(id) });
    /** @private Whether the end of the conversation stays in view. */ this.follows = true;
    /** @private @type {ReturnType<typeof setTimeout> | undefined} */ this.saveTimer = undefined;
    /** @private */ this.drawing = false;
    /** @private Whether the page is being closed: the answer that arrives then only seems to fail. */ this.isLeft = false;
    /** @private Whether the user's finger was the last pointer. */ this.isTouched = false;
    /** @private Time that the last rendering took. */ this.costMs = 0;
    this.listen();
    this.tellAside();
    const [latest] = store.list();
    if (latest) this.open(latest.id);
    else this.show();
  }

  /** @private */
  listen() {
    byId("new-chat").addEventListener("click", () => this.startNew());
    byId("to-end").addEventListener("click", () => {
      this.follows = true;
      this.scrollToEnd();
    });
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      this.follows = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
      byId("to-end").hidden = this.follows;
    });
    new ResizeObserver(() => this.follows && this.scrollToEnd()).observe(this.scroller);
    for (const button of document.querySelectorAll("[data-example]")) {
      button.addEventListener("click", () => this.tryExample(/** @type {HTMLElement} */ (button)));
    }
    byId("download").addEventListener("click", () => this.download());
    addEventListener("pointerdown", ({ pointerType }) => (this.isTouched = pointerType === "touch"));
    addEventListener("pagehide", () => {
      this.save();
      this.isLeft = true;
    });
    addEventListener("pageshow", () => (this.isLeft = false));
    addEventListener("storage", (event) => this.store.concerns(event.key) && this.changedElsewhere());
  }

  startNew() {
    this.open(null);
    this.composer.focus();
  }

  stop() {
    this.chat.stop();
  }

  focus() {
    this.composer.focus();
  }

  /** @param {{ id: string, max_model_len: number }} model */
  setModel(model) {
    this.chat.model = model.id;
  }

  /** @private @param {string | null} id null: a new one */
  open(id) {
    const before = this.chat.conversation;
    if (this.chat.isRunning) this.save();
    this.follows = true;
    const conversation = (id && this.store.load(id)) || newConversation(before.settings);
    this.chat.open(conversation);
    this.settings.show(conversation.settings);
  }

  /** @private @param {string} id */
  remove(id) {
    const removed = id === this.chat.conversation.id ? this.chat.conversation : this.store.load(id);
    if (removed === this.chat.conversation) this.open(null);
    this.store.remove(id);
    dismiss("full");
    this.show();
    if (!removed) return;
    notify("removed", `“${removed.title}” is deleted.`, {
      passes: true,
      actions: {
        Undo: () => {
          this.store.save(removed);
          this.show();
        },
      },
    });
  }

  /** @private @param {string} text */
  send(text) {
    if (!this.isSound()) return false;
    this.follows = true;
    void this.chat.send(text);
    return true;
  }

  /** @private Return whether the settings can be sent; if not, show what is wrong. */
  isSound() {
    const wrong = this.settings.check();
    if (!wrong) return true;
    this.page.openSettings();
    wrong.focus();
    announce("A setting is wrong, so nothing was sent.");
    return false;
  }

  /** @private @param {HTMLElement} button */
  tryExample(button) {
    if (button.dataset.example === "tool" && !this.chat.conversation.settings.tools.trim()) {
      this.settings.fill("tools", EXAMPLE_TOOLS);
    }
    this.send(button.querySelector(".prompt")?.textContent ?? "");
    this.composer.focus();
  }

  /** @private */
  show() {
    const { conversation, path, isRunning } = this.chat;
    byId("empty").hidden = path.length > 0;
    byId("download").hidden = path.length === 0;
    this.transcript.show(conversation, path);
    this.composer.show(isRunning);
    this.sidebar.show(this.entries(), conversation.id);
    document.title = path.length ? `${conversation.title} · Cantata` : "Cantata";
    if (isRunning) announce("The answer is arriving.");
    this.save();
    if (this.follows) this.scrollToEnd();
    // What had the focus may be gone. On a touch screen the focus would open the keyboard.
    if (document.activeElement === document.body && !this.isTouched) this.composer.focus();
  }

  /** @private Return the stored conversations, and the open one if it could not be stored. */
  entries() {
    const entries = this.store.list();
    const { id, title, changed, turns } = this.chat.conversation;
    const others = entries.filter((entry) => entry.id !== id);
    return turns.length ? [{ id, title, changed }, ...others].sort((one, other) => other.changed - one.changed) : others;
  }

  /** @private @param {Turn} turn */
  arrived(turn) {
    this.saveTimer ??= setTimeout(() => this.save(), SAVE_MS);
    if (this.drawing) return;
    this.drawing = true;
    setTimeout(() => requestAnimationFrame(() => this.draw(turn)), this.costMs * IDLE_SHARE);
  }

  /** @private @param {Turn} turn */
  draw(turn) {
    const start = performance.now();
    this.drawing = false;
    this.transcript.update(turn);
    if (this.follows) this.scrollToEnd();
    this.costMs = performance.now() - start;
  }

  /** @private @param {Turn} turn @param {Conversation} conversation */
  ended(turn, conversation) {
    if (conversation !== this.chat.conversation) {
      this.save(conversation);
      return;
    }
    this.show();
    const words = { done: "The answer is complete.", stopped: "Stopped.", failed: turn.failure?.message ?? "The answer failed." };
    const calls = turn.status === "done" && turn.finish === "tool_calls";
    if (calls && this.composer.isIdle) this.transcript.focusResult(turn);
    announce(calls ? "The model calls a tool and waits for its result." : words[turn.status === "arriving" ? "done" : (turn.status ?? "done")]);
    if (turn.failure?.status === 401) this.page.openKey();
  }

  /** @private */
  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** @private */
  save(conversation = this.chat.conversation) {
    clearTimeout(this.saveTimer);
    this.saveTimer = undefined;
    if (!conversation.turns.length || this.isLeft) return;
    try {
      this.store.save(conversation);
      dismiss("full");
    } catch (error) {
      if (!(error instanceof StoreFull)) throw error;
      this.tellFull();
    }
  }

  /** @private */
  tellFull() {
    const oldest = this.store.list().filter(({ id }) => id !== this.chat.conversation.id).at(-1);
    notify("full", "This browser has no room for more conversations. This one is not stored: it is lost when the page is closed.", {
      actions: {
        Download: () => this.download(),
        ...(oldest
          ? {
              "Delete the oldest": () => {
                this.store.remove(oldest.id);
                this.show();
              },
            }
          : {}),
      },
    });
  }

  /** @private */
  tellAside() {
    if (!this.store.keepsAnything) {
      notify("no-store", "This browser keeps nothing for this page: conversations are lost when it is closed.");
    }
    const number = this.store.setAside.length;
    if (!number) return;
    const what = number === 1 ? "One stored conversation" : `${number} stored conversations`;
    notify("aside", `${what} could not be read, perhaps from another version of this page, and ${number === 1 ? "was" : "were"} set aside.`, {
      actions: {
        Download: () => download("cantata-set-aside.json", this.store.asideText()),
        Delete: () => this.store.dropAside(),
      },
    });
  }

  /** @private */
  download() {
    const { conversation } = this.chat;
    download(`cantata-${conversation.id}.json`, JSON.stringify(conversation, null, 2));
  }

  /** @private Another tab changed the store. */
  changedElsewhere() {
    this.store.read();
    const { conversation, isRunning } = this.chat;
    const stored = this.store.load(conversation.id);
    if (stored && !isRunning && stored.changed > conversation.changed) {
      this.chat.open(stored);
      this.settings.show(stored.settings);
    } else {
      this.sidebar.show(this.entries(), conversation.id);
    }
  }
}
