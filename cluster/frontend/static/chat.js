/** The running conversation: what the user does to it, and the answer that arrives. */

import { Arriving } from "./answer.js";
import { ApiError } from "./api.js";
import { addTurn, failureOf, pathTo, requestBody } from "./conversation.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {object} Listener
 * @property {() => void} shown the path has other turns
 * @property {(turn: Turn) => void} arrived an answer has more
 * @property {(turn: Turn, conversation: Conversation) => void} ended an answer is over
 */

export class Chat {
  /**
   * @param {import("./api.js").Api} api
   * @param {Conversation} conversation
   * @param {Listener} listener
   */
  constructor(api, conversation, listener) {
    this.api = api;
    this.conversation = conversation;
    this.listener = listener;
    /** The served model's name, once it is known. @type {string | null} */
    this.model = null;
    /** @private @type {AbortController | null} */ this.running = null;
  }

  get isRunning() {
    return this.running !== null;
  }

  get path() {
    return pathTo(this.conversation, this.conversation.leaf);
  }

  /** @param {Conversation} conversation */
  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.listener.shown();
  }

  /**
   * Send a message after what is shown.
   * @param {string} content
   */
  send(content) {
    return this.sendAfter(this.conversation.leaf, content);
  }

  /**
   * Send another text instead of a message; the one before stays as another version.
   * @param {Turn} turn
   * @param {string} content
   */
  edit(turn, content) {
    return this.sendAfter(turn.parent, content);
  }

  /**
   * Answer the calls of an answer, and let the model go on.
   * @param {Turn} turn
   * @param {{ id: string, content: string }[]} results
   */
  sendResults(turn, results) {
    this.stop();
    let parent = turn.id;
    for (const { id, content } of results) {
      parent = addTurn(this.conversation, { parent, role: "tool", callId: id, content }).id;
    }
    return this.answer(parent);
  }

  /**
   * Ask again for an answer; the one before stays as another version.
   * @param {Turn} turn
   */
  retry(turn) {
    this.stop();
    return this.answer(turn.parent);
  }

  /** End the answer that arrives, if there is one; what arrived is kept. */
  stop() {
    this.running?.abort();
  }

  /** @private @param {string | null} parent @param {string} content */
  sendAfter(parent, content) {
    this.stop();
    return this.answer(addTurn(this.conversation, { parent, role: "user", content }).id);
  }

  /** @private @param {string | null} parent */
  async answer(parent) {
    const conversation = this.conversation;
    const body = requestBody(conversation, parent, this.model);
    const turn = addTurn(conversation, {
      parent,
      role: "assistant",
      content: "",
      reasoning: "",
      calls: [],
      status: "arriving",
      finish: null,
      failure: null,
      isJson: conversation.settings.schema.trim() !== "",
    });
    const running = new AbortController();
    this.running = running;
    this.listener.shown();
    const arriving = new Arriving(turn);
    try {
      for await (const chunk of this.api.chat(body, running.signal)) {
        arriving.add(chunk);
        this.listener.arrived(turn);
      }
      turn.status = "done";
    } catch (error) {
      turn.status = running.signal.aborted ? "stopped" : "failed";
      if (turn.status === "failed") turn.failure = failureOf(asFailure(error));
    } finally {
      arriving.end();
      conversation.changed = Date.now();
      if (this.running === running) this.running = null;
      this.listener.ended(turn, conversation);
    }
  }
}

/** @param {unknown} error */
function asFailure(error) {
  if (error instanceof ApiError) return error;
  return { message: "The page could not read the answer." };
}
