/** An answer of the model: reasoning, text, calls, how it ended, and how fast it was. */

import { answerableCalls } from "./conversation.js";
import { copyText, el, icon, iconButton } from "./dom.js";
import { codeBlock, MarkdownView } from "./markdown.js";
import { showPager } from "./pager.js";

/**
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {import("./conversation.js").Call} Call
 */

export class AnswerView {
  /**
   * @param {Turn} turn
   * @param {import("./transcript.js").Actions} actions
   */
  constructor(turn, actions) {
    this.turn = turn;
    /** @private */ this.actions = actions;
    /** @private */ this.text = new MarkdownView();
    /** @private */ this.thought = new MarkdownView();
    /** @private @type {HTMLElement | null} */ this.json = null;
    /** @private @type {CallView[]} */ this.calls = [];
    this.thoughtTitle = el("span", {}, "Thinking");
    this.reasoning = el(
      "details",
      { class: "reasoning", hidden: true, toggle: () => this.update() },
      el("summary", {}, icon("right"), this.thoughtTitle),
      this.thought.element,
    );
    this.waiting = el("div", { class: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i"));
    this.callList = el("div", { class: "calls" });
    this.sendResults = el("form", { class: "results", hidden: true, submit: (event) => this.submit(event) });
    this.resultPager = el("span", { class: "pager" });
    this.note = el("div", { class: "note", hidden: true });
    this.figures = el("span", { class: "figures" });
    this.pager = el("span", { class: "pager" });
    this.tools = el(
      "div",
      { class: "tools" },
      this.pager,
      iconButton({ name: "copy", label: "Copy answer", class: "quiet small", press: () => void copyText(turn.content) }),
      iconButton({ name: "retry", label: "Retry answer", class: "quiet small", press: () => actions.retry(turn) }),
      this.figures,
    );
    this.element = el(
      "li",
      { class: "turn answer", "aria-label": "Answer" },
      this.reasoning,
      this.waiting,
      this.text.element,
      this.callList,
      this.sendResults,
      this.resultPager,
      this.note,
      this.tools,
    );
    this.update();
  }

  /** Show where the turn stands. @param {import("./transcript.js").Place} place */
  place({ all, isLast, results, allResults }) {
    showPager(this.pager, this.turn, all, this.actions);
    this.resultPager.hidden = results.length === 0;
    if (results.length) showPager(this.resultPager, results[0], allResults, this.actions);
    /** @private */ this.isLast = isLast;
    /** @private */ this.results = new Map(results.map((result) => [result.callId, result]));
    /** @private */ this.before = allResults.at(-1);
    this.update();
  }

  /** Let the user type the result of a call, if the answer waits for one. */
  focusResult() {
    if (!this.sendResults.hidden) this.calls[0]?.result.focus();
  }

  /** Show the turn as it is now. */
  update() {
    const turn = this.turn;
    const arriving = turn.status === "arriving";
    this.element.setAttribute("aria-busy", String(arriving));
    const hasText = Boolean(turn.content || turn.calls?.length);
    this.waiting.hidden = !arriving || hasText;
    this.showReasoning(arriving && !hasText);
    this.showText();
    this.showCalls();
    this.showNote();
    this.tools.hidden = arriving && !turn.content;
    this.element.classList.toggle("arriving", arriving);
    this.figures.textContent = figuresText(turn);
  }

  /** @private @param {boolean} goesOn */
  showReasoning(goesOn) {
    const turn = this.turn;
    this.reasoning.hidden = !turn.reasoning;
    if (!turn.reasoning) return;
    const seconds = (turn.figures?.thoughtMs ?? 0) / 1000;
    this.thoughtTitle.textContent = goesOn ? "Thinking" : `Thought for ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
    this.reasoning.classList.toggle("goes-on", goesOn);
    if (this.reasoning.open) this.thought.update(turn.reasoning);
  }

  /** @private */
  showText() {
    const { content, isJson, status } = this.turn;
    if (!isJson) {
      this.text.update(content);
      return;
    }
    const shown = status === "done" ? indented(content) : content;
    const code = this.json?.querySelector("code");
    if (code && code.textContent === shown) return;
    this.json = shown ? codeBlock(shown, "json") : null;
    this.text.element.replaceChildren(...(this.json ? [this.json] : []));
  }

  /** @private */
  showCalls() {
    const calls = this.turn.calls ?? [];
    while (this.calls.length < calls.length) {
      const view = new CallView(calls[this.calls.length], () => this.actions.reopen(this.turn));
      this.calls.push(view);
      this.callList.append(view.element);
    }
    const open = answerableCalls(this.turn);
    const waits = Boolean(this.isLast) && open.length > 0;
    for (const view of this.calls) view.update(this.results?.get(view.call.id) ?? null, waits, this.turn.status === "arriving");
    if (waits === !this.sendResults.hidden) return;
    this.sendResults.hidden = !waits;
    const id = `results-${this.turn.id}`;
    this.sendResults.id = id;
    for (const view of this.calls) view.result.setAttribute("form", id);
    const parts = waits
        ? [
            el("span", { class: "hint" }, open.length > 1 ? "Type what each tool returned." : "Type what the tool returned."),
            this.before && el("button", { type: "button", class: "button", click: () => this.before && this.actions.show(this.before) }, "Cancel"),
            el("button", { type: "submit", class: "button primary" }, open.length > 1 ? "Send results" : "Send result"),
          ]
        : [];
    this.sendResults.replaceChildren(.../** @type {Node[]} */ (parts.filter(Boolean)));
  }

  /** @private @param {SubmitEvent} event */
  submit(event) {
    event.preventDefault();
    const results = this.calls.map(({ call, result }) => ({ id: call.id, content: result.value }));
    this.actions.sendResults(this.turn, results);
  }

  /** @private */
  showNote() {
    const { status, finish, failure } = this.turn;
    const parts = [];
    if (status === "failed") {
      const details = [failure?.param && `field ${failure.param}`, failure?.code, failure?.requestId && `request ${failure.requestId}`];
      const kept = this.turn.content || this.turn.reasoning || this.turn.calls?.length ? " What arrived before is kept." : "";
      parts.push(
        icon("warning"),
        el(
          "div",
          { class: "grow" },
          el("p", {}, `${failure?.message ?? "The answer failed."}${kept}`),
          el("p", { class: "details" }, details.filter(Boolean).join(" · ")),
        ),
        failure?.status === 401 &&
          el("button", { type: "button", class: "button", click: () => this.actions.openKey() }, "Enter a key"),
        el("button", { type: "button", class: "button", click: () => this.actions.retry(this.turn) }, "Retry"),
      );
    } else if (status === "stopped") {
      parts.push(el("p", {}, "Stopped."));
    } else if (status === "done" && finish === "length") {
      parts.push(el("p", {}, "Cut off: the limit of tokens was reached."));
    } else if (status === "done" && !this.turn.content && !this.turn.calls?.length) {
      parts.push(el("p", {}, "The answer has no text."));
    }
    const key = `${status} ${finish} ${failure?.message}`;
    if (this.note.dataset.key === key) return;
    this.note.dataset.key = key;
    this.note.hidden = parts.length === 0;
    this.note.className = `note ${status === "failed" ? "failed" : "quiet"}`;
    this.note.replaceChildren(.../** @type {Node[]} */ (parts.filter(Boolean)));
  }
}

/** A call of a tool, and its result. */
class CallView {
  /**
   * @param {Call} call
   * @param {() => void} reopen let the user type another result
   */
  constructor(call, reopen) {
    this.call = call;
    this.name = el("code", {}, call.name);
    this.arguments = el("pre", { tabindex: 0, role: "region", "aria-label": `Arguments of ${call.name}` });
    this.state = el("span", { class: "state" });
    this.result = el("textarea", { rows: 2, placeholder: "Result, such as JSON or a sentence", "aria-label": `Result of ${call.name}` });
    this.shown = el("pre", { class: "result", tabindex: 0, role: "region", "aria-label": `Result of ${call.name}` });
    this.change = iconButton({ name: "edit", label: `Change the result of ${call.name}`, class: "quiet small", press: reopen });
    this.element = el(
      "section",
      { class: "call", "aria-label": `Call of ${call.name}` },
      el("header", {}, icon("tool"), el("span", { class: "grow" }, "Calls ", this.name), this.state, this.change),
      this.arguments,
      this.shown,
      this.result,
    );
    this.result.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.result.form?.requestSubmit();
    });
  }

  /**
   * @param {Turn | null} result
   * @param {boolean} waits for a result that the user types
   * @param {boolean} arriving
   */
  update(result, waits, arriving) {
    const text = arriving ? this.call.arguments : indented(this.call.arguments);
    if (this.arguments.textContent !== text) this.arguments.textContent = text;
    this.state.textContent = arriving ? "arriving" : result ? "answered" : waits ? "waits for its result" : "no result";
    this.result.hidden = !waits;
    this.shown.hidden = !result;
    this.change.hidden = !result;
    if (result && this.shown.textContent !== result.content) this.shown.textContent = result.content;
  }
}

/**
 * Return JSON with a line for each value; another text as it is.
 * @param {string} text
 */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** @param {Turn} turn */
function figuresText({ figures = {} }) {
  const { tokens, tokensPerSecond, firstTokenMs, promptTokens, cachedTokens } = figures;
  return [
    tokensPerSecond !== undefined && `${tokensPerSecond < 10 ? tokensPerSecond.toFixed(1) : Math.round(tokensPerSecond)} tokens/s`,
    firstTokenMs !== undefined && `first token ${firstTokenMs < 1000 ? `${Math.round(firstTokenMs)} ms` : `${(firstTokenMs / 1000).toFixed(1)} s`}`,
    tokens !== undefined && `${tokens} tokens`,
    promptTokens ? `prompt ${promptTokens}${cachedTokens ? `, ${cachedTokens} cached` : ""}` : false,
  ]
    .filter(Boolean)
    .join(" · ");
}
