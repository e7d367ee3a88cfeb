/** The server's API, with addresses relative to the page, which may be under a prefix. */

const STATUS_TIMEOUT_MS = 10_000;
const MAX_SILENCE_MS = 300_000;
/** Time without a byte after which a stream counts as lost; the server comments into silence. */

/**
 * A refusal of the server, or a failure to reach it (`status` 0).
 */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{ status?: number, code?: string | null, param?: string | null, requestId?: string | null }} [details]
   */
  constructor(message, { status = 0, code = null, param = null, requestId = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.requestId = requestId;
  }
}

/**
 * The key that requests carry; kept for the tab, or for this browser if the user wants that.
 */
export class Key {
  constructor() {
    this.value = read(() => sessionStorage.getItem("cantata:key")) ?? read(() => localStorage.getItem("cantata:key")) ?? "";
  }

  /** Whether it is kept when the tab is closed. */
  get isKept() {
    return read(() => localStorage.getItem("cantata:key")) !== null;
  }

  /**
   * @param {string} value empty: forget the key
   * @param {boolean} keep keep it when the tab is closed
   */
  set(value, keep) {
    this.value = value;
    read(() => sessionStorage.removeItem("cantata:key"));
    read(() => localStorage.removeItem("cantata:key"));
    if (value) read(() => (keep ? localStorage : sessionStorage).setItem("cantata:key", value));
  }
}

export class Api {
  /** @param {Key} key */
  constructor(key) {
    /** @private */ this.key = key;
  }

  /**
   * Return the JSON of a GET.
   * @param {string} path
   */
  async json(path) {
    return (await this.get(path)).json();
  }

  /**
   * Return the text of a GET.
   * @param {string} path
   */
  async text(path) {
    return (await this.get(path)).text();
  }

  /**
   * Yield the chunks of a chat's answer.
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any, void>}
   * @throws {ApiError} refused, or lost before its end
   */
  async *chat(body, signal) {
    const silence = new Silence(signal);
    try {
      const response = await this.send("v1/chat/completions", {
        method: "POST",
        headers: { "content-type": "application/json", ...this.authorization() },
        body: JSON.stringify(body),
        signal: silence.signal,
      });
      if (!response.body) throw new ApiError("The server answered without a body.");
      for await (const data of events(response.body, silence)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw refusal(chunk.error, { requestId: response.headers.get("x-request-id") });
        yield chunk;
      }
      throw new ApiError("The connection ended before the answer was complete.");
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ApiError("The connection to the server was lost.");
    } finally {
      silence.end();
    }
  }

  /** @private @param {string} path */
  get(path) {
    return this.send(path, { headers: this.authorization(), signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) });
  }

  /** @private @returns {Record<string, string>} */
  authorization() {
    return this.key.value ? { authorization: `Bearer ${this.key.value}` } : {};
  }

  /** @private @param {string} path @param {RequestInit} init */
  async send(path, init) {
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...init, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (init.signal?.aborted && init.method === "POST") throw error;
      throw new ApiError("The server cannot be reached.");
    }
    if (response.ok) return response;
    const details = { status: response.status, requestId: response.headers.get("x-request-id") };
    let body = null;
    try {
      body = await response.json();
    } catch {
      // Not the gateway's own answer, as of a proxy before it.
    }
    throw refusal(body?.error, details);
  }
}

/**
 * @param {any} error OpenAI's error object, if there is one
 * @param {{ status?: number, requestId?: string | null }} details
 */
function refusal(error, details) {
  /** @param {unknown} value */
  const text = (value) => (typeof value === "string" ? value : null);
  const message = text(error?.message) ?? `The server answered with status ${details.status ?? "unknown"}.`;
  return new ApiError(message, { ...details, code: text(error?.code), param: text(error?.param) });
}

/**
 * Yield the data of server-sent events.
 * @param {ReadableStream<Uint8Array>} stream
 * @param {Silence} silence
 */
async function* events(stream, silence) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      silence.isOver();
      buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const whole = buffer.split(/\r?\n\r?\n/);
      buffer = whole.pop() ?? "";
      for (const event of whole) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Aborts a request that its user aborts, or that receives nothing for too long. */
class Silence {
  /** @param {AbortSignal} signal the user's */
  constructor(signal) {
    this.abort = new AbortController();
    this.user = signal;
    this.stop = () => this.abort.abort();
    signal.addEventListener("abort", this.stop);
    this.timer = setTimeout(this.stop, MAX_SILENCE_MS);
  }

  get signal() {
    return this.abort.signal;
  }

  isOver() {
    clearTimeout(this.timer);
    this.timer = setTimeout(this.stop, MAX_SILENCE_MS);
  }

  end() {
    clearTimeout(this.timer);
    this.user.removeEventListener("abort", this.stop);
  }
}

/**
 * @template T
 * @param {() => T} access
 * @returns {T | null} null where the browser keeps nothing for this page
 */
function read(access) {
  try {
    return access();
  } catch {
    return null;
  }
}
