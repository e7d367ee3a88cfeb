/**
 * Markdown as DOM nodes. Whatever the text is, it becomes text nodes in elements that are made
 * here; markup in it is shown as it is written. Links lead to http and https only, images are
 * links: nothing is loaded.
 */

import { copyText, el, iconButton } from "./dom.js";
import { inline } from "./markdown_inline.js";

/**
 * @typedef {{ kind: "paragraph", from: number, text: string }
 *   | { kind: "heading", from: number, level: number, text: string }
 *   | { kind: "code", from: number, language: string, text: string }
 *   | { kind: "quote", from: number, lines: string[] }
 *   | { kind: "list", from: number, ordered: boolean, start: number, loose: boolean, items: string[][] }
 *   | { kind: "table", from: number, head: string[], align: string[], rows: string[][] }
 *   | { kind: "rule", from: number }} Block
 */

const MAX_DEPTH = 8;
/** Number of nested lists and quotes after which their text is shown as it is. */

// None of these has two parts that can divide a run of one character in many ways: the time would
// grow with the square of its length.
const FENCE = /^ {0,3}(`{3,}|~{3,}(?!~))([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( {0,3}(?:[-*+]|\d{1,9}[.)]))(?:([ \t]+)(?![ \t])(.*))?$/;
const DELIMITERS = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

/**
 * A text that grows, as Markdown. What is complete is left alone; only the last blocks are made
 * again when text comes.
 */
export class MarkdownView {
  constructor() {
    this.element = el("div", { class: "prose" });
    /** @private */ this.text = "";
    /** @private Number of characters in blocks that are complete. */ this.done = 0;
    /** @private @type {{ block: Block, node: HTMLElement }[]} */ this.open = [];
  }

  /**
   * Show a text, usually the last one with more at its end.
   * @param {string} text
   */
  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      this.element.replaceChildren();
      this.done = 0;
      this.open = [];
    }
    this.text = text;
    const lines = text.slice(this.done).split("\n");
    const blocks = parseBlocks(lines);
    // While the last block is less than a line, what it is may still change, and whether it belongs
    // to the one before.
    const last = blocks.at(-1);
    const numOpen = last && last.from === lines.length - 1 ? 2 : 1;
    const firstOpen = Math.max(0, blocks.length - numOpen);
    const shown = this.open;
    this.open = blocks.map((block, index) => ({ block, node: this.place(block, shown[index]) }));
    for (const left of shown.slice(blocks.length)) left.node.remove();
    const start = blocks[firstOpen];
    if (start && firstOpen > 0) {
      this.done += lines.slice(0, start.from).reduce((sum, line) => sum + line.length + 1, 0);
      this.open = this.open.slice(firstOpen);
    }
  }

  /**
   * Return the element of a block, put where `shown` stands.
   * @private
   * @param {Block} block
   * @param {{ block: Block, node: HTMLElement } | undefined} shown
   */
  place(block, shown) {
    if (shown && sameText(block, shown.block)) return shown.node;
    if (shown && block.kind === "code" && shown.block.kind === "code" && grows(block, shown.block)) {
      const code = /** @type {HTMLElement} */ (shown.node.querySelector("code"));
      code.append(block.text.slice(shown.block.text.length));
      return shown.node;
    }
    const node = renderBlock(block, 0);
    if (shown) shown.node.replaceWith(node);
    else this.element.append(node);
    return node;
  }
}

/**
 * Return a block of code with its language and a button that copies it.
 * @param {string} text
 * @param {string} language
 */
export function codeBlock(text, language) {
  const code = el("code", {}, text);
  const name = language || "text";
  const copy = iconButton({
    name: "copy",
    label: "Copy code",
    text: "Copy",
    class: "quiet small",
    press: async () => {
      const label = /** @type {HTMLElement} */ (copy.lastElementChild);
      label.textContent = (await copyText(code.textContent ?? "")) ? "Copied" : "Not copied";
      setTimeout(() => (label.textContent = "Copy"), 2000);
    },
  });
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", { class: "language" }, name), copy),
    el("pre", { tabindex: 0, role: "region", "aria-label": `Code, ${name}` }, code),
  );
}

/**
 * Return the blocks of lines; `from` is the number of a block's first line.
 * @param {string[]} lines
 * @returns {Block[]}
 */
export function parseBlocks(lines) {
  /** @type {Block[]} */
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const [block, next] = parseBlock(lines, at);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/**
 * Return the block that begins at a line, and the line after it.
 * @param {string[]} lines
 * @param {number} at
 * @returns {[Block, number]}
 */
function parseBlock(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return parseFence(lines, at, fence[1], fence[2]);
  const heading = HEADING.exec(line);
  if (heading) {
    return [
      { kind: "heading", from: at, level: heading[1].length, text: headingText(heading[2] ?? "") },
      at + 1,
    ];
  }
  if (RULE.test(line)) return [{ kind: "rule", from: at }, at + 1];
  if (QUOTE.test(line)) return parseQuote(lines, at);
  if (ITEM.test(line)) return parseList(lines, at);
  if (isTable(lines, at)) return parseTable(lines, at);
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !startsBlock(lines, next)) next += 1;
  const text = lines.slice(at, next).map((each) => each.trim()).join("\n");
  return [{ kind: "paragraph", from: at, text }, next];
}

/**
 * Return the text of a heading without the marks at its end, which are a word of their own.
 * @param {string} text
 */
function headingText(text) {
  const whole = text.trim();
  let end = whole.length;
  while (whole[end - 1] === "#") end -= 1;
  return end === 0 || " \t".includes(whole[end - 1]) ? whole.slice(0, end).trim() : whole;
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {string} mark
 * @param {string} info
 * @returns {[Block, number]}
 */
function parseFence(lines, at, mark, info) {
  const indent = lines[at].length - lines[at].trimStart().length;
  let next = at + 1;
  while (next < lines.length && !isEnd(lines[next], mark)) next += 1;
  const body = lines.slice(at + 1, next).map((line) => dedent(line, indent));
  return [
    { kind: "code", from: at, language: info.trim().split(/\s+/)[0] ?? "", text: body.join("\n") },
    Math.min(next + 1, lines.length),
  ];
}

/** @param {string} line @param {string} mark */
function isEnd(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && [...text].every((character) => character === mark[0]);
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[Block, number]}
 */
function parseQuote(lines, at) {
  const inside = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const quoted = QUOTE.exec(lines[next]);
    if (quoted) inside.push(quoted[1]);
    else if (lines[next].trim() && !startsBlock(lines, next)) inside.push(lines[next]);
    else break;
  }
  return [{ kind: "quote", from: at, lines: inside }, next];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[Block, number]}
 */
function parseList(lines, at) {
  const first = /** @type {RegExpExecArray} */ (ITEM.exec(lines[at]));
  const mark = kindOfMark(first[1]);
  /** @type {string[][]} */
  const items = [];
  let indent = 0;
  let loose = false;
  let blank = false;
  let next = at;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    const item = RULE.test(line) ? null : ITEM.exec(line);
    if (!line.trim()) {
      blank = true;
      items.at(-1)?.push("");
      continue;
    }
    const inside = items.length > 0 && indentOf(line) >= indent;
    if (!inside && item && kindOfMark(item[1]) === mark) {
      loose ||= blank && items.length > 0;
      const gap = item[2]?.length ?? 1;
      indent = item[1].length + (gap > 4 ? 1 : gap);
      items.push([item[3] ?? ""]);
    } else if (inside) {
      items.at(-1)?.push(dedent(line, indent));
    } else if (!blank && !startsBlock(lines, next)) {
      items.at(-1)?.push(line.trim()); // goes on with the paragraph
    } else {
      break;
    }
    blank = false;
  }
  const start = Number.parseInt(first[1], 10);
  return [
    { kind: "list", from: at, ordered: mark !== "-" && mark !== "*" && mark !== "+", start, loose, items },
    next,
  ];
}

/** @param {string} mark */
function kindOfMark(mark) {
  return mark.trim().replace(/\d+/, "");
}

/**
 * @param {string[]} lines
 * @param {number} at
 */
function isTable(lines, at) {
  const rule = lines[at + 1];
  return (
    lines[at].includes("|") &&
    rule !== undefined &&
    rule.includes("-") &&
    DELIMITERS.test(rule.trim()) &&
    cells(rule).length === cells(lines[at]).length
  );
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[Block, number]}
 */
function parseTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start",
  );
  const rows = [];
  let next = at + 2;
  while (next < lines.length && lines[next].trim() && (lines[next].includes("|") || !startsBlock(lines, next))) {
    const row = cells(lines[next]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
    next += 1;
  }
  return [{ kind: "table", from: at, head, align, rows }, next];
}

/** @param {string} row */
function cells(row) {
  const text = row.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/**
 * @param {string[]} lines
 * @param {number} at
 */
function startsBlock(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    Boolean(item && item[3] && (/[-*+]/.test(item[1]) || Number.parseInt(item[1], 10) === 1)) ||
    isTable(lines, at)
  );
}

/** @param {string} line */
function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** @param {string} line @param {number} indent */
function dedent(line, indent) {
  return line.slice(Math.min(indent, indentOf(line)));
}

/**
 * @param {Block} block
 * @param {number} depth
 * @returns {HTMLElement}
 */
function renderBlock(block, depth) {
  switch (block.kind) {
    case "paragraph":
      return inline(el("p"), block.text);
    case "heading":
      // Under the headings of the page itself.
      return inline(el("h3", { class: `level-${block.level}`, "aria-level": Math.min(block.level + 2, 6) }), block.text);
    case "code":
      return codeBlock(block.text, block.language);
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...renderInside(block.lines, depth, true));
    case "list": {
      const items = block.items.map((lines) => renderItem(lines, depth, block.loose));
      return block.ordered ? el("ol", { start: block.start }, ...items) : el("ul", {}, ...items);
    }
    case "table":
      return renderTable(block);
  }
}

/**
 * @param {string[]} lines
 * @param {number} depth
 * @param {boolean} loose
 */
function renderItem(lines, depth, loose) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0] ?? "");
  if (!task) return el("li", {}, ...renderInside(lines, depth, loose));
  const rest = [lines[0].slice(task[0].length), ...lines.slice(1)];
  const done = task[1] !== " ";
  const box = el("input", { type: "checkbox", disabled: true, checked: done, "aria-label": done ? "done" : "to do" });
  return el("li", { class: "task" }, box, el("div", {}, ...renderInside(rest, depth, loose)));
}

/**
 * @param {string[]} lines
 * @param {number} depth
 * @param {boolean} paragraphs whether a paragraph is an element of its own
 * @returns {Node[]}
 */
function renderInside(lines, depth, paragraphs) {
  if (depth >= MAX_DEPTH) return [document.createTextNode(lines.join("\n"))];
  return parseBlocks(lines).map((block) =>
    block.kind === "paragraph" && !paragraphs
      ? inline(el("span", { class: "line" }), block.text)
      : renderBlock(block, depth + 1),
  );
}

/** @param {Extract<Block, { kind: "table" }>} table */
function renderTable(table) {
  /** @param {"th" | "td"} tag @param {string[]} row */
  const renderRow = (tag, row) =>
    el(
      "tr",
      {},
      ...row.map((cell, index) =>
        inline(el(tag, { class: table.align[index], scope: tag === "th" && "col" }), cell),
      ),
    );
  return el(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    el(
      "table",
      {},
      el("thead", {}, renderRow("th", table.head)),
      el("tbody", {}, ...table.rows.map((row) => renderRow("td", row))),
    ),
  );
}

/** @param {Block} one @param {Block} other */
function sameText(one, other) {
  return JSON.stringify({ ...one, from: 0 }) === JSON.stringify({ ...other, from: 0 });
}

/**
 * @param {Extract<Block, { kind: "code" }>} block
 * @param {Extract<Block, { kind: "code" }>} before
 */
function grows(block, before) {
  return block.language === before.language && block.text.startsWith(before.text);
}
