/**
 * Conversations in the browser's local storage, an entry each, for the address of this page alone.
 * What cannot be read is set aside, not deleted: other versions of the page may have written it.
 */

import { conversationOf, VERSION } from "./conversation.js";
import { settingsOf } from "./settings.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const MAX_CHARS = 4_000_000;
/** Maximum size of all conversations; browsers allow about 5 million characters. */
const MAX_CONVERSATIONS = 500;

/** The store has no room for a conversation; what it held before is still there. */
export class StoreFull extends Error {}

export class Store {
  /**
   * @param {Storage | null} storage null: the browser keeps nothing for this page
   * @param {string} path of the page
   */
  constructor(storage, path) {
    /** @private */ this.storage = storage;
    /** @private */ this.prefix = `cantata:${path}:`;
    /** @private @type {Map<string, { title: string, changed: number, chars: number }>} */ this.known = new Map();
    /** Keys of entries that were set aside. @type {string[]} */
    this.setAside = [];
    this.read();
  }

  get keepsAnything() {
    return this.storage !== null;
  }

  /** Read what is stored now, also by other tabs. */
  read() {
    this.known.clear();
    this.setAside = [];
    for (const key of this.keys()) {
      if (key.startsWith(`${this.prefix}aside:`) && !this.setAside.includes(key)) this.setAside.push(key);
      if (!key.startsWith(`${this.prefix}chat:`)) continue;
      const text = this.storage?.getItem(key) ?? "";
      const conversation = this.parse(key, text);
      if (!conversation) continue;
      const { id, title, changed } = conversation;
      this.known.set(id, { title, changed, chars: text.length });
    }
  }

  /** Return ids and titles, the newest first. */
  list() {
    return [...this.known]
      .map(([id, { title, changed }]) => ({ id, title, changed }))
      .sort((one, other) => other.changed - one.changed);
  }

  /**
   * @param {string} id
   * @returns {Conversation | null}
   */
  load(id) {
    const text = this.storage?.getItem(this.key(id));
    return text ? this.parse(this.key(id), text) : null;
  }

  /**
   * @param {Conversation} conversation
   * @throws {StoreFull}
   */
  save(conversation) {
    if (!this.storage) return;
    const text = JSON.stringify(conversation);
    let others = text.length;
    for (const [id, { chars }] of this.known) if (id !== conversation.id) others += chars;
    const isNew = !this.known.has(conversation.id);
    if (others > MAX_CHARS || (isNew && this.known.size >= MAX_CONVERSATIONS)) throw new StoreFull();
    try {
      this.storage.setItem(this.key(conversation.id), text);
    } catch {
      throw new StoreFull();
    }
    const { id, title, changed } = conversation;
    this.known.set(id, { title, changed, chars: text.length });
  }

  /** @param {string} id */
  remove(id) {
    this.storage?.removeItem(this.key(id));
    this.known.delete(id);
  }

  /** Return what was set aside, as text to download. */
  asideText() {
    return JSON.stringify(Object.fromEntries(this.setAside.map((key) => [key, this.storage?.getItem(key)])), null, 2);
  }

  dropAside() {
    for (const key of this.setAside) this.storage?.removeItem(key);
    this.setAside = [];
  }

  /** Return the settings of new conversations: the last ones. */
  loadSettings() {
    try {
      return settingsOf(JSON.parse(this.storage?.getItem(`${this.prefix}settings`) ?? "null"));
    } catch {
      return settingsOf(null);
    }
  }

  /** @param {import("./settings.js").Settings} settings */
  saveSettings(settings) {
    try {
      this.storage?.setItem(`${this.prefix}settings`, JSON.stringify(settings));
    } catch {
      // Full: the conversation itself says so.
    }
  }

  /** @param {string | null} key of a change in another tab; null: of all */
  concerns(key) {
    return key === null || key.startsWith(`${this.prefix}chat:`);
  }

  /** @private @param {string} id */
  key(id) {
    return `${this.prefix}chat:${id}`;
  }

  /** @private @returns {string[]} */
  keys() {
    const storage = this.storage;
    return storage ? Array.from({ length: storage.length }, (_, index) => storage.key(index) ?? "") : [];
  }

  /**
   * Return the conversation of an entry; null if it is set aside.
   * @private
   * @param {string} key
   * @param {string} text
   */
  parse(key, text) {
    try {
      const value = JSON.parse(text);
      if (value?.version === VERSION && this.key(value.id) === key) return conversationOf(value);
    } catch {
      // Set aside, as an entry of another version.
    }
    this.putAside(key, text);
    return null;
  }

  /** @private @param {string} key @param {string} text */
  putAside(key, text) {
    const aside = key.replace(`${this.prefix}chat:`, `${this.prefix}aside:`);
    try {
      this.storage?.removeItem(key);
      this.storage?.setItem(aside, text);
      if (!this.setAside.includes(aside)) this.setAside.push(aside);
    } catch {
      this.storage?.setItem(key, text);
    }
  }
}

/**
 * Return the browser's local storage, or null where it refuses it.
 * @returns {Storage | null}
 */
export function browserStorage() {
  try {
    localStorage.setItem("cantata:probe", "1");
    localStorage.removeItem("cantata:probe");
    return localStorage;
  } catch (error) {
    // Full is not refused: what is there can be read and deleted.
    return error instanceof DOMException && error.name === "QuotaExceededError" ? localStorage : null;
  }
}
