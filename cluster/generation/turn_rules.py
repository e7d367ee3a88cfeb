"""What a chat asks of the form of its turns: the grammar of a turn, before it is known whether its
bodies compile."""

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.chat_options import ToolArguments
from cluster.generation.requests import ChatRequest, CompletionRequest, Structure
from cluster.generation.settings import ChatDefaults
from cluster.harmony.tools import ToolDefinition, ToolFields
from cluster.harmony.turn_grammar import Calls, ToolBody, TurnGrammar
from workers.errors import InvalidRequest
from workers.grammars import grammar as grammars
from workers.grammars.grammar import Grammar
from workers.rpc.validate import MAX_GRAMMAR_CHARS, MAX_GRAMMARS

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function without parameters."""
_MAX_LISTED = 8
"""Maximum number of fields that the sentence of an error names."""


@dataclass(frozen=True, slots=True)
class WantedBody:
    """A tool's body.

    Attributes:
        param: what its grammar comes from, as the client's API names it.
        promised: the client asked for this grammar; else it is a default, and any JSON object takes
            its place if it does not compile.
        looser: grammars to try before that, the strictest first.
        fell_back: the body's own is such a one, as a stricter one could not be made.
    """

    body: ToolBody
    param: str
    promised: bool
    looser: tuple[Grammar, ...] = ()
    fell_back: bool = False


@dataclass(frozen=True, slots=True)
class WantedTurn:
    """The grammar of a turn as it is asked for.

    Attributes:
        base: all but the tools.
        structure: the form of the answer.
        bodies: of the tools that may be called.
    """

    base: TurnGrammar
    structure: Structure | None
    bodies: tuple[WantedBody, ...]
    calls: Calls

    def grammar(self, bodies: Iterable[ToolBody]) -> TurnGrammar:
        """Return the grammar with these bodies of the tools."""
        return replace(self.base, tools=tuple(bodies), calls=self.calls)

    def key(self) -> Hashable:
        """Return what decides which automaton is made."""
        rest = tuple((tool.promised, tool.looser) for tool in self.bodies)
        return self.grammar(tool.body for tool in self.bodies), rest

    def num_chars(self) -> int:
        """Return the number of characters of the grammars."""
        grammars_ = [self.base.answer, *(tool.body.arguments for tool in self.bodies)]
        return sum(len(grammar.text) for grammar in grammars_ if grammar is not None)


def promises(request: ChatRequest) -> Iterator[str]:
    """Yield the fields that ask for what only a constraint can give, as the client's API names
    them."""
    if request.structure is not None:
        yield request.structure.param
    choice = request.tool_choice
    if choice.required or choice.names is not None:
        yield choice.param
    if choice.max_calls > 1:
        yield "max_parallel_tool_calls"
    if request.max_reasoning_tokens is not None:
        yield request.names.max_reasoning_tokens
    for index, tool in enumerate(request.tools):
        if tool.strict:
            yield tool.names(index).strict
        if tool.text is not None and tool.text.grammar is not None:
            yield tool.names(index).grammar


def check_promises(request: ChatRequest) -> None:
    """Refuse what contradicts a promise.

    Raises:
        InvalidRequest: with `param`.
    """
    asked = [*promises(request)]
    if asked and request.harmony_constraint == "off":
        raise InvalidRequest(
            f"harmony_constraint 'off' lets the model write anything, which contradicts {_listed(asked)}: "
            f"leave one or the other out.",
            "harmony_constraint",
        )
    _refuse_ignore_eos(request, asked)


def check_text_promise(request: CompletionRequest) -> None:
    """Refuse what contradicts the form of a completion.

    Raises:
        InvalidRequest: with `param`.
    """
    _refuse_ignore_eos(request, [] if request.structure is None else [request.structure.param])


def _refuse_ignore_eos(request: ChatRequest | CompletionRequest, asked: Sequence[str]) -> None:
    if asked and request.sampling.ignore_eos:
        raise InvalidRequest(
            f"ignore_eos goes on after the end of the answer, which contradicts {_listed(asked)}: leave one "
            f"or the other out.",
            "ignore_eos",
        )


def _listed(fields: Sequence[str]) -> str:
    """Return the first fields as part of a sentence."""
    shown, others = fields[:_MAX_LISTED], len(fields) - _MAX_LISTED
    if others > 0:
        return f"{', '.join(shown)} and {others} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def wanted_turn(request: ChatRequest, defaults: ChatDefaults) -> WantedTurn:
    """Return the grammar of a chat's turns. Tools are in the order of their names.

    Raises:
        InvalidRequest: the schema of a tool whose arguments are promised is no schema.
    """
    choice = request.tool_choice
    bodies = tuple(
        _body(tool, tool.names(index), defaults.tool_arguments, forced=choice.required)
        for index, tool in sorted(enumerate(request.tools), key=lambda entry: entry[1].name)
        if choice.names is None or tool.name in choice.names
    )
    no_reasoning = (request.skips_reasoning and not bodies) or request.max_reasoning_tokens == 0
    base = TurnGrammar(
        answer=None if request.structure is None else request.structure.grammar,
        reasoning="none" if no_reasoning else "free",
        max_calls=choice.max_calls,
        wrap_up=defaults.wrap_up,
    )
    calls: Calls = "forbidden" if not bodies else "required" if choice.required else "allowed"
    return WantedTurn(base, request.structure, bodies, calls)


def bounded(grammar: TurnGrammar, promised: Collection[str]) -> TurnGrammar:
    """Return a grammar that engines accept: if there are too many grammars of bodies, those that no
    one was promised become that of any JSON object.

    Args:
        promised: names of the tools whose grammars were promised.
    Raises:
        InvalidRequest: the promised ones are too many, or too long together.
    """
    if _fits(grammar):
        return grammar
    any_object = grammars.json_object()
    bodies = tuple(
        body
        if body.arguments is None or body.name in promised
        else ToolBody(body.name, any_object, body.content)
        for body in grammar.tools
    )
    grammar = replace(grammar, tools=bodies)
    if not _fits(grammar):
        raise InvalidRequest(
            f"tools has schemas that are too many or too long to be enforced: at most {MAX_GRAMMARS} of "
            f"them, with {MAX_GRAMMAR_CHARS} characters together. Send fewer tools, or without strict.",
            "tools",
        )
    return grammar


def _fits(grammar: TurnGrammar) -> bool:
    texts = {body.arguments.text for body in grammar.tools if body.arguments is not None}
    if grammar.answer is not None:
        texts.add(grammar.answer.text)
    return len(texts) <= MAX_GRAMMARS and sum(map(len, texts)) <= MAX_GRAMMAR_CHARS


def _body(tool: ToolDefinition, fields: ToolFields, arguments: ToolArguments, *, forced: bool) -> WantedBody:
    if tool.text is not None:
        return WantedBody(ToolBody(tool.name, tool.text.grammar, "text"), fields.grammar, promised=True)
    param = fields.parameters
    if tool.strict:
        return WantedBody(ToolBody(tool.name, _arguments(tool, param)), param, promised=True)
    if not forced and arguments == "free":
        return WantedBody(ToolBody(tool.name), param, promised=False)
    types = forced or arguments == "schema_types"
    options = [grammars.schema_types(tool.parameters or {}) if types else grammars.json_object()]
    fell_back = False
    if forced:
        try:
            options.insert(0, _arguments(tool, param))
        except InvalidRequest:
            fell_back = True
    body, looser = ToolBody(tool.name, options[0]), tuple(options[1:])
    return WantedBody(body, param, promised=False, looser=looser, fell_back=fell_back)


def _arguments(tool: ToolDefinition, param: str) -> Grammar:
    """Return the grammar of a function's arguments, which are an object whatever the schema says.

    Raises:
        InvalidRequest: the schema is none.
    """
    schema = NO_ARGUMENTS if tool.parameters is None else {**tool.parameters, "type": "object"}
    return grammars.json_schema(schema, param)
