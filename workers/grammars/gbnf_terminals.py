"""Which parts of a GBNF grammar become terminals of Lark, and its text in that form.

GBNF has no terminals: every way to divide a text counts. llguidance reads a terminal as far as it
goes, which is quick, and needed for long texts. A part without recursion is therefore a terminal
where no character that may come after it could also belong to it; else it is a rule, down to single
characters if need be. Where it is not certain that characters cannot belong to both, it is assumed.
What is left of the difference: where two terminals are possible at a place, and one begins with the
other, the longer one is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import orjson
from llguidance.gbnf_to_lark import (
    AlternativeNode,
    ASTNode,
    LiteralNode,
    RegexNode,
    RepetitionNode,
    RuleNode,
    RuleRefNode,
    SequenceNode,
)

LAST_CHAR = 0x10FFFF
MAX_STEPS = 60_000
"""Maximum number of nodes that are looked at, again and again where rules are recursive, and of
characters in literals."""


class Chars(ASTNode):
    """One character out of several.

    Attributes:
        spans: first and last code points, both included.
    """

    def __init__(self, spans: tuple[tuple[int, int], ...]) -> None:
        self.spans = spans

    def __str__(self) -> str:
        return f"/[{''.join(f'{_escaped(low)}-{_escaped(high)}' for low, high in self.spans)}]/"


_ANY = Chars(((0, LAST_CHAR),))


def _escaped(code: int) -> str:
    return f"\\u{{{code:X}}}"


def nodes(node: ASTNode) -> Iterator[ASTNode]:
    """Yield all nodes below one, without those of the rules that they name."""
    waiting = node.children()[::-1]
    while waiting:
        child = waiting.pop()
        yield child
        waiting += child.children()[::-1]


@dataclass(slots=True)
class _Facts:
    """What is known of the texts of a node. Characters are bits.

    Attributes:
        nullable: the empty text is one.
        first: characters that they begin with.
        chars: characters in them.
        ext: characters that can come after a whole text, and be part of a longer one.
    """

    nullable: bool = False
    first: int = 0
    chars: int = 0
    ext: int = 0


class _Alphabet:
    """The characters of a grammar, in classes that no part of it tells apart; each class is a bit.

    Args:
        rules: by name.
    """

    def __init__(self, rules: dict[str, RuleNode]) -> None:
        edges = {0, LAST_CHAR + 1}
        for rule in rules.values():
            for node in nodes(rule):
                for low, high in _spans(node):
                    edges |= {low, high + 1}
        self._index = {edge: index for index, edge in enumerate(sorted(edges))}

    def bits(self, spans: Sequence[tuple[int, int]]) -> int:
        """Return the classes of these characters."""
        return reduce(or_, ((1 << self._index[high + 1]) - (1 << self._index[low]) for low, high in spans), 0)


def _spans(node: ASTNode) -> Sequence[tuple[int, int]]:
    match node:
        case Chars(spans=spans):
            return spans
        case LiteralNode(value=text):
            return [(ord(char), ord(char)) for char in text]
        case RegexNode():  # the parser makes one of `.` alone
            return _ANY.spans
        case _:
            return ()


class _Grammar:
    """A grammar whose rules are looked at as a whole."""

    def __init__(self, rules: dict[str, RuleNode]) -> None:
        self._rules = rules
        self._alphabet = _Alphabet(rules)
        self._num_steps = 0
        self._known: dict[int, _Facts] = {}
        self._known_regular: dict[int, bool] = {}
        self._is_settled = False
        self._users: dict[str, set[str]] = {name: set() for name in rules}
        for name, rule in rules.items():
            for node in nodes(rule):
                if isinstance(node, RuleRefNode):
                    self._users[node.name].add(name)
        order = self._named_first()
        self.regular = self._regular()
        self._facts = {name: _Facts() for name in rules}
        self._settle(order)
        self.follow = dict.fromkeys(rules, 0)
        self._settle_follow(order[::-1])

    def _regular(self) -> set[str]:
        """Return the rules without recursion in them."""
        num_open = {
            name: len({node.name for node in nodes(rule) if isinstance(node, RuleRefNode)})
            for name, rule in self._rules.items()
        }
        ready = [name for name, number in num_open.items() if not number]
        found = set()
        while ready:
            found.add(name := ready.pop())
            for user in self._users[name]:
                num_open[user] -= 1
                if not num_open[user]:
                    ready.append(user)
        return found

    def _named_first(self) -> list[str]:
        """Return the rules, each after those that it names as far as recursion allows it."""
        order: dict[str, None] = {}
        seen: set[str] = set()
        waiting = [(name, False) for name in reversed(self._rules)]
        while waiting:
            name, is_done = waiting.pop()
            if is_done:
                order[name] = None
            elif name not in seen:
                seen.add(name)
                waiting.append((name, True))
                named = (node.name for node in nodes(self._rules[name]) if isinstance(node, RuleRefNode))
                waiting += [(target, False) for target in named if target not in seen]
        return list(order)

    def _settle(self, order: Sequence[str]) -> None:
        """Find the facts of all rules: those of a rule are looked at again when they change in a
        rule that it names."""
        waiting = dict.fromkeys(order)
        while waiting:
            name = next(iter(waiting))
            del waiting[name]
            facts = self.facts(self._rules[name].alternatives)
            if facts != self._facts[name]:
                self._facts[name] = facts
                waiting |= dict.fromkeys(self._users[name])
        self._is_settled = True

    def _settle_follow(self, order: Sequence[str]) -> None:
        waiting = dict.fromkeys(order)
        while waiting:
            name = next(iter(waiting))
            del waiting[name]
            for target, after in self._after(self._rules[name].alternatives, self.follow[name]):
                if after & ~self.follow[target]:
                    self.follow[target] |= after
                    waiting[target] = None

    def _after(self, node: ASTNode, follow: int) -> Iterator[tuple[str, int]]:
        """Yield the rules that a node names, with the characters that may come after each."""
        waiting = [(node, follow)]
        while waiting:
            node, follow = waiting.pop()
            self._count(1)
            if isinstance(node, RuleRefNode):
                yield node.name, follow
            waiting += self.followed(node, follow)

    def followed(self, node: ASTNode, follow: int) -> list[tuple[ASTNode, int]]:
        """Return the children of a node, with the characters that may come after each."""
        match node:
            case SequenceNode(nodes=children):
                found = []
                for child in reversed(children):
                    found.append((child, follow))
                    facts = self.facts(child)
                    follow = facts.first | (follow if facts.nullable else 0)
                return found[::-1]
            case RepetitionNode(node=child, max_times=most):
                return [(child, follow | (0 if most == 1 else self.facts(child).first))]
            case _:
                return [(child, follow) for child in node.children()]

    def facts(self, node: ASTNode) -> _Facts:
        """Return what is known of the texts of a node. It is found once, or, as long as rules are
        being settled, once for each time that the node's rule is looked at.

        Raises:
            ValueError: too many nodes have been looked at.
        """
        found = self._known.get(id(node))
        if found is None:
            found = self._found(node)
            if self._is_settled or isinstance(node, LiteralNode | Chars | RegexNode):
                self._known[id(node)] = found
        return found

    def _found(self, node: ASTNode) -> _Facts:
        self._count(1)
        match node:
            case RuleRefNode(name=name):
                return self._facts[name]
            case LiteralNode(value=text):
                self._count(len(text))
                first = self._alphabet.bits([(ord(char), ord(char)) for char in text[:1]])
                chars = self._alphabet.bits([(ord(char), ord(char)) for char in set(text)])
                return _Facts(not text, first, chars)
            case SequenceNode(nodes=children):
                return _sequence([self.facts(child) for child in children])
            case AlternativeNode(alternatives=children):
                return _alternatives([self.facts(child) for child in children])
            case RepetitionNode(node=child):
                return _repetition(self.facts(child), node)
            case _:
                bits = self._alphabet.bits(_spans(node))
                return _Facts(False, bits, bits)

    def _count(self, num_steps: int) -> None:
        self._num_steps += num_steps
        if self._num_steps > MAX_STEPS:
            raise ValueError("has too many rules that are recursive, or nested too deeply")

    def is_regular(self, node: ASTNode) -> bool:
        """Return whether no part of a node is recursive."""
        found = self._known_regular.get(id(node))
        if found is None:
            if isinstance(node, RuleRefNode):
                found = node.name in self.regular
            else:
                found = all(map(self.is_regular, node.children()))
            self._known_regular[id(node)] = found
        return found


def _sequence(parts: Sequence[_Facts]) -> _Facts:
    whole = _Facts(nullable=True)
    for part in parts:
        chars = whole.chars | part.chars
        # Where it is open whether a character belongs to one part or to the next, any may go on.
        unclear = whole.ext & part.first or (part.nullable and part.ext & whole.first)
        ext = part.ext | ((whole.ext | part.first) if part.nullable else 0)
        if whole.nullable and whole.first & part.first:
            unclear = 1
        first = whole.first | (part.first if whole.nullable else 0)
        whole = _Facts(whole.nullable and part.nullable, first, chars, chars if unclear else ext)
        if whole.nullable:
            whole.ext |= whole.first
    return whole


def _alternatives(parts: Sequence[_Facts]) -> _Facts:
    whole = _Facts()
    for part in parts:
        unclear = whole.first & part.first
        whole = _Facts(
            whole.nullable or part.nullable,
            whole.first | part.first,
            whole.chars | part.chars,
            whole.ext | part.ext,
        )
        if unclear:
            whole.ext |= whole.chars
    if whole.nullable:
        whole.ext |= whole.first
    return whole


def _repetition(part: _Facts, node: RepetitionNode) -> _Facts:
    again = node.max_times != node.min_times or part.nullable
    ext = part.chars if part.ext & part.first and node.max_times != 1 else part.ext
    nullable = part.nullable or node.min_times == 0
    return _Facts(nullable, part.first, part.chars, ext | (part.first if again else 0))


class _Writer:
    """The writer of the text; terminals are made as they are needed."""

    def __init__(self, rules: dict[str, RuleNode]) -> None:
        self._rules = rules
        self._grammar = _Grammar(rules)
        self._index = {name: index for index, name in enumerate(rules)}
        self._terminals: dict[str, str] = {}
        self._wanted: dict[str, None] = {}
        self._num_parts = 0

    def text(self) -> str:
        """Return the whole grammar."""
        lines = []
        self._wanted["root"] = None
        written: set[str] = set()
        while self._wanted:
            name = next(iter(self._wanted))
            del self._wanted[name]
            if name not in written:
                written.add(name)
                body = self._rule(self._rules[name].alternatives, self._grammar.follow[name])
                lines.append(f"{'start' if name == 'root' else f'r{self._index[name]}'}: {body}")
        return "".join(f"{line}\n" for line in (*lines, *self._terminals.values()))

    def _rule(self, node: ASTNode, follow: int) -> str:
        """Return a node as part of a rule."""
        if not isinstance(node, LiteralNode) and self._is_terminal(node, follow):
            return self._terminal_name(node)
        if isinstance(node, RuleRefNode):
            self._wanted[node.name] = None
            return "start" if node.name == "root" else f"r{self._index[node.name]}"
        return _joined(node, [self._rule(*part) for part in self._grammar.followed(node, follow)])

    def _is_terminal(self, node: ASTNode, follow: int) -> bool:
        return self._grammar.is_regular(node) and not self._grammar.facts(node).ext & follow

    def _terminal_name(self, node: ASTNode) -> str:
        if isinstance(node, RuleRefNode):
            return self._terminal_of_rule(node.name)
        if isinstance(node, Chars | RegexNode):
            return self._terminal(node)
        self._num_parts += 1
        name = f"P{self._num_parts}"
        self._terminals[name] = f"{name}: {self._terminal(node)}"
        return name

    def _terminal_of_rule(self, name: str) -> str:
        terminal = f"T{self._index[name]}"
        if terminal not in self._terminals:
            self._terminals[terminal] = ""  # no recursion comes back here
            self._terminals[terminal] = f"{terminal}: {self._terminal(self._rules[name].alternatives)}"
        return terminal

    def _terminal(self, node: ASTNode) -> str:
        """Return a node as part of a terminal."""
        if isinstance(node, RuleRefNode):
            return self._terminal_of_rule(node.name)
        return _joined(node, [self._terminal(child) for child in node.children()])


def _joined(node: ASTNode, children: Sequence[str]) -> str:
    """Return the text of a node with these texts of its children, as a unit."""
    match node:
        case LiteralNode(value=text):
            # A string of Lark is one of JSON, but without U+007F.
            return orjson.dumps(text).decode().replace("\x7f", r"\u007f")
        case SequenceNode():
            return f"({' '.join(children)})" if children else '""'
        case AlternativeNode():
            return f"({' | '.join(children)})"
        case RepetitionNode(min_times=least, max_times=most):
            times = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
            return f"({children[0]}){times or f'{{{least},{most if most is not None else str()}}}'}"
        case Chars():
            return str(node)
        case _:
            return str(_ANY)


def lark_text(rules: dict[str, RuleNode]) -> str:
    """Return a grammar in llguidance's variant of Lark.

    Args:
        rules: by name, with one called `root`; every rule that is named is there.
    Raises:
        ValueError: it is too complex; one sentence without its end.
    """
    return _Writer(rules).text()
