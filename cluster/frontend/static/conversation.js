/**
 * A conversation: a tree of turns, since a message that is edited and an answer that is retried
 * stand beside the one before. What is shown, and sent, is the path to `leaf`.
 */

import { randomId } from "./dom.js";
import { requestFields, settingsOf } from "./settings.js";

/**
 * @typedef {{ id: string, type: "function" | "custom", name: string, arguments: string }} Call
 * @typedef {{ message: string, status: number, code: string | null, param: string | null, requestId: string | null }} Failure
 * @typedef {object} Figures
 * @property {number} [firstTokenMs]
 * @property {number} [thoughtMs]
 * @property {number} [tokensPerSecond]
 * @property {number} [tokens]
 * @property {number} [promptTokens]
 * @property {number} [cachedTokens]
 *
 * @typedef {object} Turn
 * @property {string} id
 * @property {string | null} parent
 * @property {"user" | "assistant" | "tool"} role
 * @property {string} content
 * @property {string} [callId] the call that a tool's result answers
 * @property {string} [reasoning]
 * @property {Call[]} [calls]
 * @property {"arriving" | "done" | "stopped" | "failed"} [status] of an answer
 * @property {string | null} [finish]
 * @property {Failure | null} [failure]
 * @property {boolean} [isJson] the answer was asked for as JSON
 * @property {Figures} [figures]
 *
 * @typedef {object} Conversation
 * @property {number} version
 * @property {string} id
 * @property {string} title
 * @property {number} changed milliseconds since 1970
 * @property {string | null} leaf
 * @property {Turn[]} turns each after its parent
 * @property {import("./settings.js").Settings} settings
 */

/** The version of stored conversations. */
export const VERSION = 1;
const MAX_TITLE = 80;

/**
 * @param {import("./settings.js").Settings} settings
 * @returns {Conversation}
 */
export function newConversation(settings) {
  return {
    version: VERSION,
    id: randomId(),
    title: "New conversation",
    changed: Date.now(),
    leaf: null,
    turns: [],
    settings: { ...settings },
  };
}

/**
 * Return the turns from the first to a turn.
 * @param {Conversation} conversation
 * @param {string | null} leaf
 * @returns {Turn[]}
 */
export function pathTo(conversation, leaf) {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]));
  const path = [];
  for (let turn = byId.get(leaf ?? ""); turn; turn = byId.get(turn.parent ?? "")) path.push(turn);
  return path.reverse();
}

/**
 * Add a turn after another one, and show it.
 * @param {Conversation} conversation
 * @param {Omit<Turn, "id">} fields
 * @returns {Turn}
 */
export function addTurn(conversation, fields) {
  const turn = { id: randomId(), ...fields };
  conversation.turns.push(turn);
  conversation.leaf = turn.id;
  conversation.changed = Date.now();
  const first = conversation.turns.find((each) => each.role === "user");
  if (first) conversation.title = titleOf(first.content);
  return turn;
}

/**
 * Return a turn and those that stand beside it, oldest first.
 * @param {Conversation} conversation
 * @param {Turn} turn
 */
export function versions(conversation, turn) {
  return conversation.turns.filter((each) => each.parent === turn.parent);
}

/**
 * Show another version of a turn, with the newest of what follows it.
 * @param {Conversation} conversation
 * @param {Turn} turn
 */
export function showVersion(conversation, turn) {
  let last = turn;
  for (let next = newestChild(conversation, turn); next; next = newestChild(conversation, next)) last = next;
  conversation.leaf = last.id;
}

/** @param {Conversation} conversation @param {Turn} turn */
function newestChild(conversation, turn) {
  return conversation.turns.findLast((each) => each.parent === turn.id);
}

/**
 * Return the calls of an answer that can be answered: those of a turn that arrived as a whole.
 * @param {Turn} turn
 * @returns {Call[]}
 */
export function answerableCalls(turn) {
  return turn.status === "done" && turn.finish === "tool_calls" ? (turn.calls ?? []) : [];
}

/**
 * Return the body of the request whose answer follows a turn.
 * @param {Conversation} conversation
 * @param {string | null} leaf
 * @param {string | null} model
 */
export function requestBody(conversation, leaf, model) {
  const { fields } = requestFields(conversation.settings);
  const system = conversation.settings.system.trim();
  const path = pathTo(conversation, leaf);
  const answered = new Set(path.flatMap((turn) => (turn.callId ? [turn.callId] : [])));
  return {
    ...(model ? { model } : {}),
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...path.flatMap((turn) => message(turn, answered)),
    ],
    ...fields,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

/**
 * Return the message of a turn; none for an answer of which nothing arrived that can be sent back.
 * @param {Turn} turn
 * @param {Set<string>} answered ids of calls with a result
 * @returns {object[]}
 */
function message(turn, answered) {
  if (turn.role === "user") return [{ role: "user", content: turn.content }];
  if (turn.role === "tool") return [{ role: "tool", tool_call_id: turn.callId, content: turn.content }];
  const calls = answerableCalls(turn).filter((call) => answered.has(call.id));
  if (!turn.content && !calls.length) return [];
  return [
    {
      role: "assistant",
      content: turn.content || null,
      ...(turn.reasoning ? { reasoning: turn.reasoning } : {}),
      ...(calls.length ? { tool_calls: calls.map(callBody) } : {}),
    },
  ];
}

/** @param {Call} call */
function callBody({ id, type, name, arguments: text }) {
  return type === "custom"
    ? { id, type, custom: { name, input: text } }
    : { id, type, function: { name, arguments: text } };
}

/** @param {string} text */
function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line || "New conversation";
}

/**
 * Return a stored conversation, as far as it can be trusted: whatever the store holds, what the
 * page works on has this form.
 * @param {any} value
 * @returns {Conversation}
 * @throws {Error} it is not a conversation
 */
export function conversationOf(value) {
  const isSound =
    typeof value?.id === "string" && typeof value.title === "string" && Number.isFinite(value.changed) && Array.isArray(value.turns);
  if (!isSound) throw new Error("not a conversation");
  /** @type {Set<string | null>} */
  const known = new Set([null]);
  const turns = value.turns.map((/** @type {any} */ each) => {
    const turn = turnOf(each);
    if (!known.has(turn.parent) || known.has(turn.id)) throw new Error("a turn without its parent");
    known.add(turn.id);
    return turn;
  });
  const leaf = value.leaf ?? null;
  if (!known.has(leaf)) throw new Error("a path to no turn");
  const { id, title, changed } = value;
  return { version: VERSION, id, title, changed, leaf, turns, settings: settingsOf(value.settings) };
}

/**
 * @param {any} value
 * @returns {Turn}
 */
function turnOf(value) {
  /** @param {unknown} text */
  const isText = (text) => typeof text === "string";
  if (!isText(value?.id) || !isText(value.content) || !["user", "assistant", "tool"].includes(value.role)) {
    throw new Error("not a turn");
  }
  const base = { id: value.id, parent: value.parent ?? null, role: value.role, content: value.content };
  if (value.role === "user") return base;
  if (value.role === "tool") return { ...base, callId: String(value.callId) };
  const calls = (value.calls ?? []).map((/** @type {any} */ call) => {
    if (![call?.id, call?.name, call?.arguments].every(isText)) throw new Error("not a call");
    return { id: call.id, type: call.type === "custom" ? "custom" : "function", name: call.name, arguments: call.arguments };
  });
  const arrived = ["done", "stopped", "failed"].includes(value.status);
  return {
    ...base,
    reasoning: isText(value.reasoning) ? value.reasoning : "",
    calls,
    status: arrived ? value.status : "failed",
    finish: isText(value.finish) ? value.finish : null,
    failure: arrived ? failureOf(value.failure) : failureOf({ message: "The page was closed while this answer arrived." }),
    isJson: value.isJson === true,
    figures: figuresOf(value.figures),
  };
}

/**
 * @param {any} value
 * @returns {Failure | null}
 */
export function failureOf(value) {
  if (typeof value?.message !== "string") return null;
  /** @param {unknown} text */
  const text = (text) => (typeof text === "string" ? text : null);
  return {
    message: value.message,
    status: Number(value.status) || 0,
    code: text(value.code),
    param: text(value.param),
    requestId: text(value.requestId),
  };
}

/**
 * @param {any} value
 * @returns {Figures}
 */
function figuresOf(value) {
  /** @type {Figures} */
  const figures = {};
  for (const name of /** @type {const} */ (["firstTokenMs", "thoughtMs", "tokensPerSecond", "tokens", "promptTokens", "cachedTokens"])) {
    if (Number.isFinite(value?.[name])) figures[name] = value[name];
  }
  return figures;
}
