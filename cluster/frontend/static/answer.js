/** An answer as its chunks arrive, and how fast they do. */

/** @typedef {import("./conversation.js").Turn} Turn */

/**
 * Put the chunks of a stream into a turn.
 */
export class Arriving {
  /**
   * @param {Turn} turn
   * @param {() => number} nowMs
   */
  constructor(turn, nowMs = () => performance.now()) {
    this.turn = turn;
    /** @private */ this.nowMs = nowMs;
    /** @private */ this.startMs = nowMs();
    /** @private @type {{ ms: number, tokens: number } | null} */ this.first = null;
    turn.figures = {};
  }

  /**
   * @param {any} chunk
   */
  add(chunk) {
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const turn = this.turn;
    const usage = chunk.usage;
    if (typeof delta.reasoning === "string" && delta.reasoning) {
      this.seen(usage);
      turn.reasoning = (turn.reasoning ?? "") + delta.reasoning;
    }
    if (typeof delta.content === "string" && delta.content) {
      this.seen(usage);
      this.endThought();
      turn.content += delta.content;
    }
    for (const call of Array.isArray(delta.tool_calls) ? delta.tool_calls : []) {
      this.seen(usage);
      this.endThought();
      this.addCall(call);
    }
    if (choice?.finish_reason) turn.finish = String(choice.finish_reason);
    if (usage) this.count(usage);
  }

  /** Note that the stream is over, perhaps in the middle of its reasoning. */
  end() {
    this.endThought();
  }

  /** @private @param {any} usage */
  seen(usage) {
    if (this.first) return;
    this.first = { ms: this.nowMs(), tokens: usage?.completion_tokens ?? 0 };
    this.figures.firstTokenMs = this.first.ms - this.startMs;
  }

  /** @private */
  get figures() {
    return (this.turn.figures ??= {});
  }

  /** @private */
  endThought() {
    if (this.turn.reasoning && this.figures.thoughtMs === undefined) {
      this.figures.thoughtMs = this.nowMs() - this.startMs;
    }
  }

  /** @private @param {any} delta */
  addCall(delta) {
    const calls = (this.turn.calls ??= []);
    const index = Number.isInteger(delta.index) ? delta.index : calls.length;
    const body = delta.custom ?? delta.function ?? {};
    if (index >= calls.length) {
      calls.push({
        id: String(delta.id ?? ""),
        type: delta.custom ? "custom" : "function",
        name: String(body.name ?? ""),
        arguments: "",
      });
    }
    calls[Math.min(index, calls.length - 1)].arguments += String(body.arguments ?? body.input ?? "");
  }

  /** @private @param {any} usage */
  count(usage) {
    const figures = this.figures;
    figures.tokens = Number(usage.completion_tokens) || 0;
    figures.promptTokens = Number(usage.prompt_tokens) || 0;
    figures.cachedTokens = Number(usage.prompt_tokens_details?.cached_tokens) || 0;
    if (!this.first) return;
    const seconds = (this.nowMs() - this.first.ms) / 1000;
    const tokens = figures.tokens - this.first.tokens;
    if (seconds > 0 && tokens > 0) figures.tokensPerSecond = tokens / seconds;
  }
}
