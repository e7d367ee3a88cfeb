"""Conversion of the Messages API's messages to harmony messages: each block is one.

`cluster.frontend.anthropic.blocks` converts the other way. Errors have the words of Anthropic's API
where clients look for them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import orjson

from cluster.frontend.anthropic.schema import (
    TOOL_USE,
    Block,
    MessageTurn,
    RedactedThinkingBlock,
    ResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from cluster.frontend.anthropic.signatures import Signatures
from cluster.frontend.chat_messages import CALLED_NAME
from cluster.harmony.message import BLANK_LINE, FUNCTIONS, Message
from cluster.sealing import BrokenSeal
from workers.errors import InvalidRequest

_ATTRIBUTION = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
"""The line with which Claude Code's system prompt begins. It changes from request to request and
says nothing to the model; with it no prefix would be found in the cache again."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A block and its path in the body, such as `messages.0.content.1`."""

    block: Block
    place: str


def harmony_messages(
    system: str | Sequence[ResultBlock] | None, turns: Sequence[MessageTurn], signatures: Signatures
) -> tuple[Message, ...]:
    """Return the messages that the model sees.

    Raises:
        InvalidRequest: a block in a message of another role, thinking without a valid signature, a
            result without its call or a second one, a call without a name.
    """
    if not turns:
        raise InvalidRequest("messages: at least one message is required", "messages")
    messages = [Message("developer", text) for text in _instructions(system)]
    calls = _Calls()
    numbered = enumerate(turns)
    for role, group in groupby(numbered, key=lambda entry: entry[1].role):
        if role == "assistant":
            blocks = [placed for index, turn in group for placed in _placed(turn, index)]
            messages += _assistant(blocks, calls, signatures)
            continue
        for index, turn in group:
            if role == "system":
                messages.append(Message("developer", _system_text(_placed(turn, index))))
            else:
                messages += _user(_placed(turn, index), calls)
    if turns[-1].role == "assistant" and messages[-1].channel != "final":
        raise InvalidRequest(
            f"messages.{len(turns) - 1}: the final `assistant` message must end with text, which the answer "
            f"continues, and have no `tool_use` blocks; else the conversation must end with a user message"
        )
    return tuple(messages)


def _instructions(system: str | Sequence[ResultBlock] | None) -> Iterator[str]:
    """Yield the texts of the system prompt without the attribution of a client."""
    texts = [system] if isinstance(system, str) else [_text_of(block) for block in system or ()]
    for text in texts:
        if kept := _ATTRIBUTION.sub("", text, count=1) if text.startswith("x-anthropic-") else text:
            yield kept


def _text_of(block: ResultBlock) -> str:
    return block.text if isinstance(block, TextBlock) else ""


def _placed(turn: MessageTurn, index: int) -> list[_Placed]:
    if isinstance(turn.content, str):
        return [_Placed(TextBlock(type="text", text=turn.content), f"messages.{index}.content")]
    return [
        _Placed(block, f"messages.{index}.content.{position}") for position, block in enumerate(turn.content)
    ]


def _system_text(blocks: Sequence[_Placed]) -> str:
    for placed in blocks:
        if not isinstance(placed.block, TextBlock):
            raise _wrong_role(placed, "system")
    return _joined([placed.block for placed in blocks])


def _user(blocks: Sequence[_Placed], calls: "_Calls") -> Iterator[Message]:
    """Yield the messages of one user message: neighbouring texts are one, neighbouring results
    stand in the order of their calls, which harmony has no ids for."""
    for kind, run in groupby(blocks, key=lambda placed: type(placed.block)):
        if kind is TextBlock:
            yield Message("user", _joined([placed.block for placed in run]))
        elif kind is ToolResultBlock:
            results = [(calls.take(placed), placed.block) for placed in run]
            for call, block in sorted(results, key=lambda result: result[0].number):
                yield Message(
                    "tool",
                    _result_text(block),
                    name=FUNCTIONS + call.name,
                    recipient="assistant",
                    channel="commentary",
                )
        else:
            raise _wrong_role(next(run), "user")
    if not blocks:
        yield Message("user")


def _assistant(blocks: Sequence[_Placed], calls: "_Calls", signatures: Signatures) -> Iterator[Message]:
    """Yield the messages of one turn. Its last texts are final if nothing follows that belongs to
    the turn and it has no calls, as final is what ends a turn."""
    last_other = max(
        (index for index, placed in enumerate(blocks) if not isinstance(placed.block, TextBlock)), default=-1
    )
    has_calls = any(isinstance(placed.block, ToolUseBlock) for placed in blocks)
    if not blocks:
        yield Message("assistant", channel="final")
    numbered = enumerate(blocks)
    for is_text, run in groupby(numbered, key=lambda entry: isinstance(entry[1].block, TextBlock)):
        if is_text:
            entries = list(run)
            is_final = not has_calls and entries[-1][0] > last_other
            text = _joined([placed.block for _, placed in entries])
            if text or is_final:
                yield Message("assistant", text, channel="final" if is_final else "commentary")
            continue
        for _, placed in run:
            yield _assistant_message(placed, calls, signatures)


def _assistant_message(placed: _Placed, calls: "_Calls", signatures: Signatures) -> Message:
    match placed.block:
        case ThinkingBlock() as block:
            return Message("assistant", _thinking(block, placed.place, signatures), channel="analysis")
        case ToolUseBlock() as block:
            calls.add(placed.place, block)
            return Message(
                "assistant",
                _arguments(block, placed.place),
                recipient=FUNCTIONS + block.name,
                channel="commentary",
                content_type="json",
                end="call",
                call_id=f"call_{block.id.removeprefix(TOOL_USE)}",
            )
        case RedactedThinkingBlock():
            raise InvalidRequest(f"{placed.place}: Invalid `data` in `redacted_thinking` block")
        case _:
            raise _wrong_role(placed, "assistant")


def _thinking(block: ThinkingBlock, place: str, signatures: Signatures) -> str:
    if block.signature is None:
        raise InvalidRequest(f"{place}.thinking.signature: Field required")
    try:
        return signatures.signed_thinking(block.thinking, block.signature)
    except BrokenSeal:
        raise InvalidRequest(f"{place}: Invalid `signature` in `thinking` block") from None


def _arguments(block: ToolUseBlock, place: str) -> str:
    try:
        return orjson.dumps(block.input).decode()
    except orjson.JSONEncodeError:
        raise InvalidRequest(f"{place}.input is nested too deeply.") from None


def _result_text(block: Block) -> str:
    assert isinstance(block, ToolResultBlock)
    content = block.content or ""
    text = content if isinstance(content, str) else BLANK_LINE.join(map(_text_of, content))
    return text if not block.is_error else f"Error: {text}" if text else "Error"


def _joined(blocks: Sequence[Block]) -> str:
    return BLANK_LINE.join(block.text for block in blocks if isinstance(block, TextBlock) and block.text)


def _wrong_role(placed: _Placed, role: str) -> InvalidRequest:
    return InvalidRequest(f"{placed.place}: `{placed.block.type}` blocks cannot be in `{role}` messages")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the history; `number` is its index among all of them."""

    number: int
    name: str


class _Calls:
    """The calls of a conversation that have no result yet. An id may be used again once its call
    has one."""

    def __init__(self) -> None:
        self._open: dict[str, _Call] = {}
        self._num_calls = 0

    def add(self, place: str, block: ToolUseBlock) -> None:
        if block.id in self._open:
            raise InvalidRequest(f"{place}.id: `tool_use` ids must be unique")
        if not block.id:
            raise InvalidRequest(f"{place}.id is empty: a result could not name the call.")
        if not re.fullmatch(CALLED_NAME, block.name):
            raise InvalidRequest(
                f"{place}.name must have 1 to 128 characters, without blanks and without < > and |."
            )
        self._open[block.id] = _Call(self._num_calls, block.name)
        self._num_calls += 1

    def take(self, placed: _Placed) -> _Call:
        block = placed.block
        assert isinstance(block, ToolResultBlock)
        call = self._open.pop(block.tool_use_id, None)
        if call is None:
            raise InvalidRequest(
                f"{placed.place}: unexpected `tool_use_id` found in `tool_result` blocks: "
                f"{block.tool_use_id[:128]}. Each `tool_result` block must have a corresponding `tool_use` "
                f"block in an earlier message, and be its only result."
            )
        return call
