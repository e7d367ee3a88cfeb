/** Markdown within a line: emphasis, code, links. */

import { el } from "./dom.js";

const MAX_DEPTH = 12;
/** Number of nested spans after which marks are shown as they are. */
const MAX_LABEL = 500;
/** Maximum number of characters of a link's text. */
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`]+/y;
const AUTOLINK = /<(https?:\/\/[^\s<>]+)>/y;
const MARKS = ["**", "__", "~~", "*", "_"];
/** @type {Record<string, "strong" | "em" | "s">} */
const TAGS = { "**": "strong", __: "strong", "~~": "s", "*": "em", _: "em" };

/**
 * Append a text to an element, with its marks as elements.
 * @template {HTMLElement} E
 * @param {E} parent
 * @param {string} text
 * @returns {E} `parent`
 */
export function inline(parent, text) {
  render(parent, text, 0);
  return parent;
}

/**
 * @param {HTMLElement} parent
 * @param {string} text
 * @param {number} depth
 */
function render(parent, text, depth) {
  let plain = "";
  let at = 0;
  /** Marks that no later place of this text closes. @type {Set<string>} */
  const unclosed = new Set();
  /** @param {Node} node @param {number} next */
  const put = (node, next) => {
    if (plain) parent.append(plain);
    plain = "";
    parent.append(node);
    at = next;
  };
  while (at < text.length) {
    const character = text[at];
    if (character === "\n") {
      let end = plain.length;
      while (" \\".includes(plain[end - 1] ?? "x")) end -= 1;
      plain = plain.slice(0, end);
      put(el("br"), at + 1);
      continue;
    }
    if (character === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found =
      depth < MAX_DEPTH &&
      (codeAt(text, at, unclosed) ?? linkAt(text, at, depth) ?? spanAt(text, at, depth, unclosed));
    if (found) {
      put(found.node, found.next);
    } else {
      const run = runAt(text, at);
      plain += run;
      at += run.length;
    }
  }
  if (plain) parent.append(plain);
}

/**
 * Return the characters from here that are text: all of a run of one mark, else one.
 * @param {string} text
 * @param {number} at
 */
function runAt(text, at) {
  let end = at + 1;
  if ("*_~`".includes(text[at])) while (text[end] === text[at]) end += 1;
  return text.slice(at, end);
}

/**
 * @param {string} text
 * @param {number} at
 * @param {Set<string>} unclosed
 */
function codeAt(text, at, unclosed) {
  if (text[at] !== "`") return null;
  const mark = runAt(text, at);
  if (unclosed.has(mark)) return null;
  let end = at + mark.length;
  while ((end = text.indexOf(mark, end)) >= 0) {
    const run = runAt(text, end);
    if (run === mark) {
      const code = text.slice(at + mark.length, end).replaceAll("\n", " ");
      const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
      return { node: el("code", {}, isPadded ? code.slice(1, -1) : code), next: end + mark.length };
    }
    end += run.length;
  }
  unclosed.add(mark);
  return null;
}

/**
 * @param {string} text
 * @param {number} at
 * @param {number} depth
 */
function linkAt(text, at, depth) {
  const character = text[at];
  if (character === "<") {
    AUTOLINK.lastIndex = at;
    const found = AUTOLINK.exec(text);
    return found && linkTo(found[1], [found[1]], AUTOLINK.lastIndex);
  }
  if (character === "h" && !/\w/.test(text[at - 1] ?? "")) {
    ADDRESS.lastIndex = at;
    const found = ADDRESS.exec(text);
    if (!found) return null;
    const address = withoutEnd(found[0]);
    return linkTo(address, [address], at + address.length);
  }
  const isImage = character === "!" && text[at + 1] === "[";
  if (character !== "[" && !isImage) return null;
  const start = isImage ? at + 2 : at + 1;
  const close = closingBracket(text, start);
  if (close < 0 || text[close + 1] !== "(") return null;
  const target = /^\(\s*<?([^\s<>]*?)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)$/.exec(targetAt(text, close + 1));
  if (!target) return null;
  const label = el("span");
  render(label, text.slice(start, close), depth + 1);
  const shown = label.childNodes.length ? [...label.childNodes] : [target[1]];
  return linkTo(target[1], shown, close + 1 + target[0].length);
}

/**
 * Return a link, or what it would show if its address is of another kind than http and https.
 * @param {string} address
 * @param {(Node | string)[]} shown
 * @param {number} next
 */
function linkTo(address, shown, next) {
  const url = parseUrl(address);
  if (!url || (url.protocol !== "https:" && url.protocol !== "http:")) {
    return { node: el("span", { title: "This link's address is not shown as a link." }, ...shown), next };
  }
  return {
    node: el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...shown),
    next,
  };
}

/** @param {string} address */
function parseUrl(address) {
  try {
    return new URL(address);
  } catch {
    return null;
  }
}

/**
 * Return the text of a link's target with its parentheses, which may have pairs of them inside.
 * @param {string} text
 * @param {number} at
 */
function targetAt(text, at) {
  let depth = 0;
  for (let end = at; end < Math.min(text.length, at + 4000); end += 1) {
    if (text[end] === "\n") break;
    if (text[end] === "(") depth += 1;
    if (text[end] === ")" && --depth === 0) return text.slice(at, end + 1);
  }
  return "";
}

/** @param {string} text @param {number} at */
function closingBracket(text, at) {
  let depth = 1;
  for (let end = at; end < Math.min(text.length, at + MAX_LABEL); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]" && --depth === 0) return end;
  }
  return -1;
}

/**
 * Return an address in a sentence without the sentence's punctuation.
 * @param {string} address
 */
function withoutEnd(address) {
  let numUnopened = address.split(")").length - address.split("(").length;
  let end = address.length;
  for (; ; end -= 1) {
    const last = address[end - 1];
    if (last === ")" && numUnopened > 0) numUnopened -= 1;
    else if (!".,;:!?*_~".includes(last)) return address.slice(0, end);
  }
}

/**
 * @param {string} text
 * @param {number} at
 * @param {number} depth
 * @param {Set<string>} unclosed
 */
function spanAt(text, at, depth, unclosed) {
  const mark = MARKS.find((each) => text.startsWith(each, at));
  if (!mark || unclosed.has(mark)) return null;
  const start = at + mark.length;
  if (/\s|^$/.test(text[start] ?? "")) return null;
  if (mark.includes("_") && /\w/.test(text[at - 1] ?? "")) return null;
  const end = endOfSpan(text, start, mark);
  if (end < 0) {
    unclosed.add(mark);
    return null;
  }
  const node = el(TAGS[mark]);
  render(node, text.slice(start, end), depth + 1);
  return { node, next: end + mark.length };
}

/**
 * Return the place of the mark that closes a span, or -1.
 * @param {string} text
 * @param {number} start
 * @param {string} mark
 */
function endOfSpan(text, start, mark) {
  for (let end = start + 1; end < text.length; end += 1) {
    const character = text[end];
    if (character === "\\") {
      end += 1;
    } else if (character === "`") {
      const run = runAt(text, end);
      const close = text.indexOf(run, end + run.length);
      end = close < 0 ? end + run.length - 1 : close + run.length - 1;
    } else if (character === mark[0]) {
      const run = runAt(text, end);
      const fits = mark.length === 1 ? run.length === 1 || run.length >= 3 : run.length >= mark.length;
      const closes = !/\s/.test(text[end - 1]) && !(mark.includes("_") && /\w/.test(text[end + run.length] ?? ""));
      if (fits && closes) return end + run.length - mark.length;
      end += run.length - 1;
    }
  }
  return -1;
}
