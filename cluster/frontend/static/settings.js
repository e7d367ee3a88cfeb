/** What a conversation sends beside its messages: texts as the user typed them, and as fields. */

/**
 * @typedef {object} Settings
 * @property {string} system
 * @property {string} effort
 * @property {string} temperature
 * @property {string} topP
 * @property {string} maxTokens
 * @property {string} seed
 * @property {string} constraint
 * @property {string} tools JSON
 * @property {string} toolChoice
 * @property {string} schema JSON
 */

/** @type {Readonly<Settings>} */
export const DEFAULTS = Object.freeze({
  system: "",
  effort: "",
  temperature: "",
  topP: "",
  maxTokens: "",
  seed: "",
  constraint: "",
  tools: "",
  toolChoice: "auto",
  schema: "",
});

export const EXAMPLE_TOOLS = JSON.stringify(
  [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "Gets the weather of a place.",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    },
  ],
  null,
  2,
);

export const EXAMPLE_SCHEMA = JSON.stringify(
  {
    type: "object",
    properties: { name: { type: "string" }, age: { type: "integer" } },
    required: ["name", "age"],
    additionalProperties: false,
  },
  null,
  2,
);

const MAX_CHARS = 200_000;
/** Maximum length of one setting's text. */
const TOOL_NAME = /^[a-zA-Z0-9_.-]{1,128}$/;
/** @type {Record<string, readonly string[]>} */
const WORDS = {
  effort: ["", "none", "low", "medium", "high"],
  constraint: ["", "headers", "off"],
  toolChoice: ["auto", "required", "none"],
};

/**
 * Return stored settings, with the default for each that is missing or of another kind.
 * @param {any} value
 * @returns {Settings}
 */
export function settingsOf(value) {
  const names = /** @type {(keyof Settings)[]} */ (Object.keys(DEFAULTS));
  const settings = { ...DEFAULTS };
  for (const name of names) {
    const text = value?.[name];
    if (typeof text !== "string" || text.length > MAX_CHARS) continue;
    if (WORDS[name] && !WORDS[name].includes(text)) continue;
    settings[name] = text;
  }
  return settings;
}

/**
 * Return the fields of a request, and what is wrong, by setting.
 * @param {Settings} settings
 * @returns {{ fields: Record<string, unknown>, problems: Partial<Record<keyof Settings, string>> }}
 */
export function requestFields(settings) {
  /** @type {Record<string, unknown>} */
  const fields = {};
  /** @type {Partial<Record<keyof Settings, string>>} */
  const problems = {};
  /** @param {keyof Settings} name @param {() => void} read */
  const attempt = (name, read) => {
    try {
      read();
    } catch (error) {
      problems[name] = error instanceof Error ? error.message : String(error);
    }
  };
  attempt("temperature", () => set(fields, "temperature", number(settings.temperature, 0, 2)));
  attempt("topP", () => set(fields, "top_p", number(settings.topP, 0, 1)));
  attempt("maxTokens", () => set(fields, "max_completion_tokens", integer(settings.maxTokens, 1)));
  attempt("seed", () => set(fields, "seed", integer(settings.seed, Number.MIN_SAFE_INTEGER)));
  attempt("tools", () => {
    const tools = toolsOf(settings.tools);
    if (!tools.length) return;
    fields.tools = tools;
    fields.tool_choice = settings.toolChoice;
  });
  attempt("schema", () => {
    if (!settings.schema.trim()) return;
    const schema = json(settings.schema);
    if (!isObject(schema)) throw new Error("A JSON schema is an object, such as {\"type\": \"object\"}.");
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  });
  if (settings.effort) fields.reasoning_effort = settings.effort;
  if (settings.constraint) fields.harmony_constraint = settings.constraint;
  return { fields, problems };
}

/**
 * Return the tools of a JSON text: a list of OpenAI's tools, of bare functions, or one of them.
 * @param {string} text
 * @returns {object[]}
 * @throws {Error} a sentence that says what to change
 */
function toolsOf(text) {
  if (!text.trim()) return [];
  const value = json(text);
  const entries = Array.isArray(value) ? value : [value];
  const names = new Set();
  return entries.map((entry, index) => {
    const place = `Tool ${index + 1}`;
    if (!isObject(entry)) throw new Error(`${place} is ${kind(entry)}; a tool is an object.`);
    const tool = entry.type === undefined ? { type: "function", function: entry } : entry;
    if (tool.type !== "function" && tool.type !== "custom") {
      throw new Error(`${place}: type is ${JSON.stringify(tool.type)}; use "function" or "custom".`);
    }
    const definition = tool[tool.type];
    if (!isObject(definition)) throw new Error(`${place}: ${tool.type} is missing; it is an object with a name.`);
    const name = definition.name;
    if (typeof name !== "string" || !TOOL_NAME.test(name)) {
      throw new Error(`${place}: name must have 1 to 128 characters out of a-z, A-Z, 0-9, _, - and dots.`);
    }
    if (names.has(name)) throw new Error(`${place}: there is already a tool with the name ${name}.`);
    names.add(name);
    if (definition.parameters !== undefined && !isObject(definition.parameters)) {
      throw new Error(`${place}: parameters is ${kind(definition.parameters)}; it is a JSON schema, an object.`);
    }
    return tool;
  });
}

/** @param {string} text */
function json(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new Error(`This is not JSON: ${reason}${reason.includes("line") ? "" : lineOf(text, reason)}`);
  }
}

/** @param {string} text @param {string} reason */
function lineOf(text, reason) {
  const position = /position (\d+)/.exec(reason);
  return position ? ` (line ${text.slice(0, Number(position[1])).split("\n").length})` : "";
}

/** @param {string} text @param {number} least @param {number} greatest */
function number(text, least, greatest) {
  if (!text.trim()) return undefined;
  const value = Number(text);
  if (!(value >= least && value <= greatest)) throw new Error(`Use a number from ${least} to ${greatest}.`);
  return value;
}

/** @param {string} text @param {number} least */
function integer(text, least) {
  if (!text.trim()) return undefined;
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < least) {
    throw new Error(least > 0 ? `Use a whole number from ${least}.` : "Use a whole number of at most 15 digits.");
  }
  return value;
}

/** @param {Record<string, unknown>} fields @param {string} name @param {unknown} value */
function set(fields, name, value) {
  if (value !== undefined) fields[name] = value;
}

/**
 * @param {any} value
 * @returns {value is Record<string, any>}
 */
export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @param {unknown} value */
function kind(value) {
  return value === null ? "null" : Array.isArray(value) ? "a list" : `a ${typeof value}`;
}
