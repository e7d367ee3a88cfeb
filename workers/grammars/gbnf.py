"""Grammars in llama.cpp's form (GBNF), converted to llguidance's variant of Lark.

llguidance parses them; names, characters and terminals are made here (`gbnf_terminals` decides
which parts are terminals).
"""

import re
from collections.abc import Iterator

from llguidance.gbnf_to_lark import (
    ASTNode,
    GbnfToLarkError,
    GrammarParser,
    LiteralNode,
    Position,
    RuleNode,
    RuleRefNode,
)

from workers.grammars.gbnf_terminals import LAST_CHAR, Chars, lark_text, nodes

MAX_CHARS = 2**15
"""Maximum length of a grammar in characters."""

_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([nrt\"\\\[\]]))|([^\\])", re.DOTALL
)
_NUMBER = re.compile("[0-9]+")
_MAX_DIGITS = 9
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


def gbnf_to_lark(text: str) -> str:
    """Return a grammar in llguidance's variant of Lark. Whether it compiles is not checked.

    Raises:
        ValueError: it is no GBNF, or too long; one sentence without its end.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"has {len(text)} characters; at most {MAX_CHARS} are allowed for GBNF")
    try:
        rules = _Parser().parse(text)
        _resolve(rules)
        return lark_text(rules)
    except GbnfToLarkError as error:
        raise ValueError(f"is no valid GBNF: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


class _Parser(GrammarParser):
    """llguidance's parser, with characters as llama.cpp reads them."""

    def _parse_char(self, pos: Position) -> tuple[str, Position]:
        """Return the character that stands at a position, escaped or not; an escaped one with a
        backslash before it, so that it ends nothing."""
        found = _ESCAPE.match(pos.text, pos.pos)
        if found is None:
            problem = "Invalid escape sequence" if pos.current() else "Unexpected end of input"
            raise GbnfToLarkError(pos, problem)
        *codes, named, plain = found.groups()
        after = Position(pos.text, found.end())
        if plain is not None:
            return plain, after
        if named is not None:
            return f"\\{_NAMED.get(named, named)}", after
        code = int(next(filter(None, codes)), 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise GbnfToLarkError(pos, "This is no character")
        return f"\\{chr(code)}", after

    @staticmethod
    def _parse_int(pos: Position) -> tuple[int, Position]:
        found = _NUMBER.match(pos.text, pos.pos)
        if found is None:
            raise GbnfToLarkError(pos, "Expected integer")
        if len(found[0]) > _MAX_DIGITS:
            raise GbnfToLarkError(pos, f"A number has more than {_MAX_DIGITS} digits")
        return int(found[0]), Position(pos.text, found.end())

    def _parse_literal(self, pos: Position) -> tuple[ASTNode, Position]:
        chars, char, pos = [], "", pos.advance()
        while True:
            char, pos = self._parse_char(pos)
            if char == '"':
                break
            chars.append(char[-1])
        return LiteralNode("".join(chars)), pos

    def _parse_char_class(self, pos: Position) -> tuple[ASTNode, Position]:
        start, pos = pos, pos.advance()
        negated = pos.current() == "^"
        pos = pos.advance() if negated else pos
        spans: list[tuple[int, int]] = []
        while True:
            char, pos = self._parse_char(pos)
            if char == "]":
                break
            first = last = char[-1]
            if pos.current() == "-" and pos.peek(2)[1:] != "]":
                last, pos = self._parse_char(pos.advance())
                last = last[-1]
            if last < first:
                raise GbnfToLarkError(pos, "A range ends before it begins")
            spans.append((ord(first), ord(last)))
        if not spans and not negated:
            raise GbnfToLarkError(start, "No character is in this class")
        return Chars(tuple(_complement(spans) if negated else spans)), pos


def _complement(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the spans of all other characters."""
    start = 0
    for low, high in sorted(spans):
        if low > start:
            yield start, low - 1
        start = max(start, high + 1)
    if start <= LAST_CHAR:
        yield start, LAST_CHAR


def _resolve(rules: dict[str, RuleNode]) -> None:
    """Let all references have the rules that they name.

    Raises:
        ValueError: a rule that is named is missing.
    """
    if "root" not in rules:
        raise ValueError("has no rule called root")
    for rule in rules.values():
        rule.alternatives = rule.alternatives.simplify()
        for node in nodes(rule):
            if isinstance(node, RuleRefNode):
                if node.name not in rules:
                    raise ValueError(f"has no rule called {node.name[:100]}")
                node.target = rules[node.name]
