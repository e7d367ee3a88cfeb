"""One choice: tokens in any grouping give the same answer; stop strings, stop tokens, logprobs and
tool calls."""

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.events import ChoiceDelta, ChoiceFinish, Usage
from cluster.frontend import chat, grpc_messages
from cluster.frontend.fold import AnswerDelta, Finish, Fold, ReasoningDelta, TextDelta, ToolCallDelta
from cluster.frontend.schema import ChatCompletionRequest
from cluster.generation import Generation
from cluster.generation.choices import ChatChoice, Choice, CompletionChoice
from cluster.generation.event_log import EventLog
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message, MessageDelta, MessageEnd, MessageEvent, MessageStart
from cluster.harmony.stop import StopStrings
from cluster.rpc import inference_pb2 as pb
from tests.support.gateway import make_encoding, turn
from workers.request import EngineOutput, FinishReason, TokenLogprobs


@pytest.fixture
def encoding(tmp_path: Path) -> HarmonyEncoding:
    return make_encoding(tmp_path)


def events_of(
    choice: Choice,
    ids: list[int],
    *,
    size: int = 1,
    finish: FinishReason = "stop",
    stop_token: int | None = None,
    logprobs: bool = False,
) -> list[ChoiceDelta | ChoiceFinish]:
    events: list[ChoiceDelta | ChoiceFinish] = []
    for start in range(0, len(ids), size):
        if choice.finished:
            break
        step = tuple(ids[start : start + size])
        last = start + size >= len(ids)
        entries = tuple(TokenLogprobs(-float(token_id), ()) for token_id in step) if logprobs else ()
        events += choice.push(
            EngineOutput(
                step,
                entries,
                finish_reason=finish if last else None,
                stop_token_id=stop_token if last else None,
            )
        )
    return events


def run(
    choice: Choice,
    ids: list[int],
    *,
    size: int = 1,
    finish: FinishReason = "stop",
    stop_token: int | None = None,
    logprobs: bool = False,
) -> list[AnswerDelta]:
    """Return the deltas that a client sees."""
    events = events_of(choice, ids, size=size, finish=finish, stop_token=stop_token, logprobs=logprobs)
    fold = Fold()
    return [shown for event in events if (shown := fold.add(event)) is not None]


def text_of(events: list[AnswerDelta]) -> str:
    return "".join(event.delta.text for event in events if isinstance(event.delta, TextDelta))


def finish_of(events: list[AnswerDelta]) -> Finish:
    assert isinstance(events[-1].delta, Finish)
    assert sum(isinstance(event.delta, Finish) for event in events) == 1
    return events[-1].delta


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_grouping_of_tokens_changes_nothing(encoding: HarmonyEncoding, size: int) -> None:
    ids = turn(encoding, reasoning="Let me see.", text="Grüße 🎉 und mehr.")
    choice = ChatChoice(0, encoding)
    events = run(choice, ids, size=size, stop_token=ids[-1])
    assert text_of(events) == "Grüße 🎉 und mehr."
    reasoning = [event.delta.text for event in events if isinstance(event.delta, ReasoningDelta)]
    assert "".join(reasoning) == "Let me see."
    assert (finish_of(events).reason, finish_of(events).stop_reason) == ("stop", None)
    assert [token_id for event in events for token_id in event.token_ids] == ids
    assert choice.num_tokens == len(ids)
    assert choice.num_reasoning_tokens == len(encoding.encode("Let me see."))
    assert not choice.repairs


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_stop_string_ends_the_text_before_it_and_is_not_looked_for_in_reasoning(
    encoding: HarmonyEncoding, size: int
) -> None:
    ids = turn(encoding, reasoning="One STOP two.", text="alpha STOP beta")
    events = run(
        ChatChoice(0, encoding, ["STOP", "never"]), ids, size=size, stop_token=ids[-1], logprobs=True
    )
    assert text_of(events) == "alpha "
    assert (finish_of(events).reason, finish_of(events).stop_reason) == ("stop", "STOP")
    shown = [entry.chosen.text for event in events for entry in event.logprobs]
    assert "".join(shown).startswith("alpha")
    assert "beta" not in "".join(shown)


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(encoding: HarmonyEncoding) -> None:
    ids = turn(encoding, text="alpha STO")
    assert text_of(run(ChatChoice(0, encoding, ["STOP"]), ids, stop_token=ids[-1])) == "alpha STO"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_logprobs_are_those_of_the_text_tokens(encoding: HarmonyEncoding, size: int) -> None:
    ids = turn(encoding, reasoning="hm", text="Grüße 🎉!")
    events = run(ChatChoice(0, encoding), ids, size=size, stop_token=ids[-1], logprobs=True)
    entries = [entry for event in events for entry in event.logprobs]
    assert b"".join(entry.chosen.token_bytes for entry in entries).decode() == "Grüße 🎉!"
    for entry in entries:
        assert entry.chosen.logprob == -float(entry.chosen.token_id)
    for event in events:
        if not isinstance(event.delta, TextDelta):
            assert not event.logprobs


def test_a_tool_call_has_an_id_with_its_first_piece_only(encoding: HarmonyEncoding) -> None:
    ids = turn(encoding, reasoning="call it", text="One moment.", call=("add", '{"a": 1}'))
    events = run(ChatChoice(3, encoding, tools=["add"]), ids, stop_token=ids[-1])
    calls = [event.delta for event in events if isinstance(event.delta, ToolCallDelta)]
    assert calls[0].name == "add"
    assert calls[0].id is not None
    assert calls[0].id.startswith("call_")
    assert all(call.id is None and call.name is None for call in calls[1:])
    assert "".join(call.arguments for call in calls) == '{"a": 1}'
    assert text_of(events) == "One moment."
    assert finish_of(events).reason == "tool_calls"
    assert {event.choice for event in events} == {3}


def test_without_parallel_calls_the_turn_ends_before_the_second(encoding: HarmonyEncoding) -> None:
    first = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>"
    ids = encoding.encode_with_special(first + "<|start|>assistant" + first)
    events = run(ChatChoice(0, encoding, tools=["f"], parallel_tool_calls=False), ids)
    calls = [event.delta for event in events if isinstance(event.delta, ToolCallDelta)]
    assert {call.call_index for call in calls} == {0}
    assert finish_of(events).reason == "tool_calls"
    both = run(ChatChoice(0, encoding, tools=["f"]), ids)
    assert sum(isinstance(event.delta, ToolCallDelta) and event.delta.name == "f" for event in both) == 2


def several(encoding: HarmonyEncoding, *arguments: str, end: str = "") -> list[int]:
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    return encoding.encode_with_special(
        "<|start|>assistant".join(f"{call}{text}<|call|>" for text in arguments) + end
    )


def arguments_of(events: Sequence[AnswerDelta]) -> list[str]:
    """Return the arguments of each call."""
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(call := event.delta, ToolCallDelta):
            texts[call.call_index] = texts.get(call.call_index, "") + call.arguments
    return list(texts.values())


@pytest.mark.parametrize(
    ("end", "reason"),
    [("<|return|>", "stop"), ("<|start|>functions<|return|>", "stop"), ("<|start|>assistant", "length")],
)
def test_several_calls_are_one_turn(encoding: HarmonyEncoding, end: str, reason: FinishReason) -> None:
    ids = several(encoding, '{"a": 1}', '{"a": 12}', '{"a": 1, "b": 2}', end=end)
    choice = ChatChoice(0, encoding, tools=["f"], max_calls=4)
    events = run(choice, ids, finish=reason, stop_token=ids[-1] if reason == "stop" else None)
    assert arguments_of(events) == ['{"a": 1}', '{"a": 12}', '{"a": 1, "b": 2}']
    assert finish_of(events).reason == ("tool_calls" if reason == "stop" else "length")
    assert not choice.repairs


def test_the_last_of_several_calls_ends_the_turn(encoding: HarmonyEncoding) -> None:
    ids = several(encoding, "{}", '{"a": 1}', '{"a": 2}')
    choice = ChatChoice(0, encoding, tools=["f"], max_calls=2)
    events = run(choice, ids)
    assert arguments_of(events) == ["{}", '{"a": 1}']
    assert finish_of(events).reason == "tool_calls"
    assert choice.num_tokens == len(several(encoding, "{}", '{"a": 1}'))
    assert not choice.repairs


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_call_that_repeats_another_is_left_out_and_ends_the_turn(
    encoding: HarmonyEncoding, stop: Sequence[str]
) -> None:
    ids = several(encoding, '{"a": 1}', '{"a": 2}', '{"a": 1}', '{"a": 3}')
    choice = ChatChoice(0, encoding, stop, tools=["f"], max_calls=16)
    events = run(choice, ids)
    assert arguments_of(events) == ['{"a": 1}', '{"a": 2}']
    assert finish_of(events).reason == "tool_calls"
    assert choice.num_tokens == len(several(encoding, '{"a": 1}', '{"a": 2}', '{"a": 1}'))


def test_a_call_that_was_cut_off_before_it_differed_is_shown(encoding: HarmonyEncoding) -> None:
    ids = several(encoding, '{"a": 1}', '{"a": 1}')[:-2]
    events = run(ChatChoice(0, encoding, tools=["f"], max_calls=2), ids, finish="length")
    whole, cut = arguments_of(events)
    assert whole == '{"a": 1}'
    assert cut
    assert whole.startswith(cut)
    assert finish_of(events).reason == "length"


def test_length_inside_a_call_is_length(encoding: HarmonyEncoding) -> None:
    ids = turn(encoding, call=("f", '{"a": 1}'))[:-3]
    events = run(ChatChoice(0, encoding, tools=["f"]), ids, finish="length")
    assert finish_of(events).reason == "length"


def test_length_inside_a_header_shows_nothing_of_it(encoding: HarmonyEncoding) -> None:
    ids = encoding.encode_with_special("<|channel|>commentary to=functions.f")
    assert run(ChatChoice(0, encoding), ids, finish="length") == [
        AnswerDelta(0, Finish("length"), (), tuple(ids))
    ]


def test_a_stop_token_of_the_client_is_reported_and_is_no_text(encoding: HarmonyEncoding) -> None:
    ids = turn(encoding, text="alpha beta")[:-1]
    events = run(ChatChoice(0, encoding), ids, stop_token=ids[-1])
    assert text_of(events) == encoding.decode(ids[3:-1])
    assert finish_of(events).stop_reason == ids[-1]


def test_a_turn_ends_when_the_model_speaks_for_the_user_unless_eos_is_ignored(
    encoding: HarmonyEncoding,
) -> None:
    ids = encoding.encode_with_special(
        "<|channel|>final<|message|>Hi.<|end|><|start|>user<|message|>More<|end|>"
    )
    choice = ChatChoice(0, encoding)
    assert finish_of(run(choice, ids, finish="length")).reason == "stop"
    assert choice.num_tokens < len(ids)
    endless = ChatChoice(0, encoding, ends_with_turn=False)
    assert finish_of(run(endless, ids, finish="length")).reason == "length"
    assert endless.num_tokens == len(ids)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "stop", [(), ("look",), ("it.\n\n",), ("\n\n",), ("it.\n\nThere",), ("\nThe",), ("re two",), ("nowhere",)]
)
def test_every_message_that_starts_ends_as_what_was_shown_of_it(
    encoding: HarmonyEncoding, stop: tuple[str, ...], size: int
) -> None:
    ids = encoding.encode_with_special(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look at "
        "it.<|end|><|start|>assistant<|channel|>final<|message|>There are two.<|return|>"
    )
    contents: list[str] = []
    content: str | None = None
    for event in events_of(ChatChoice(0, encoding, stop), ids, size=size, stop_token=ids[-1]):
        if isinstance(event, ChoiceFinish):
            break
        match event.event:
            case MessageStart(index, message, text):
                assert content is None
                assert index == len(contents)
                content = text
            case MessageDelta(text):
                assert content is not None
                content += text
            case MessageEnd(message):
                assert content == message.content
                assert (message.end is None) == (message.token_ids is None)
                contents.append(content)
                content = None
    assert content is None
    whole = ["Hm.", "I look at it.", "There are two."]
    if not stop or stop == ("nowhere",):
        assert contents == whole
    else:
        cut = "\n\n".join(whole[1:]).index(stop[0])
        assert contents[0] == whole[0]
        shown = [whole[1][:cut], whole[2][: max(0, cut - len(whole[1]) - 2)]]
        assert contents[1:] == (shown if cut >= len(whole[1]) else shown[:1])


def flat_text(messages: list[tuple[str, str]], stops: list[str]) -> tuple[str, str, str | None]:
    """Return the content and reasoning of a turn, two messages of one kind joined by a blank line,
    and the stop string that ends the content. Text is searched up to a message of another kind."""
    content = reasoning = ""
    search = StopStrings(stops)
    num_chars = 0
    blank_lines: list[int] = []
    for kind, text in messages:
        if kind == "final":
            if num_chars and text:
                blank_lines.append(num_chars)
                text = "\n\n" + text
            num_chars += len(text)
            result = search.push(text)
            content += result.text
            if result.matched is not None:
                # A blank line comes with the text after it, or not at all.
                cut = next((start for start in blank_lines if start < len(content) <= start + 2), None)
                return content[:cut], reasoning, result.matched
        elif kind == "analysis":
            content += search.flush() if text else ""
            reasoning += ("\n\n" if reasoning and text else "") + text
        else:
            content += search.flush()
    return content + search.flush(), reasoning, None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(
        st.tuples(st.sampled_from(["final", "final", "analysis", "call"]), st.text("ab.\né", max_size=6)),
        max_size=5,
    ),
    stops=st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=2),
    size=st.sampled_from([1, 2, 5, 1000]),
)
@example(messages=[("final", "I will look it up."), ("final", "There are two.")], stops=[], size=1)
@example(messages=[("final", "a"), ("final", "b")], stops=["\n\n"], size=1)
@example(messages=[("final", "a"), ("final", "."), ("final", "b")], stops=[".\n\nb"], size=1)
@example(messages=[("final", "a"), ("final", ""), ("final", "b")], stops=["a\n\nb"], size=2)
@example(messages=[("analysis", "a"), ("analysis", "b"), ("final", "c")], stops=[], size=1000)
def test_two_messages_of_one_kind_are_joined_by_a_blank_line(
    encoding: HarmonyEncoding, messages: list[tuple[str, str]], stops: list[str], size: int
) -> None:
    headers = {"final": "final", "analysis": "analysis", "call": "commentary to=functions.f"}
    ids: list[int] = []
    for kind, text in messages:
        ids += encoding.encode_with_special(
            f"{'<|start|>assistant' if ids else ''}<|channel|>{headers[kind]}<|message|>"
        )
        ids += [*encoding.encode(text), encoding.end]
    choice = ChatChoice(0, encoding, stops, tools=["f"], ends_with_turn=False)
    events = run(choice, ids, size=size, finish="length", logprobs=True) if ids else []
    content, reasoning, matched = flat_text(messages, stops)
    assert text_of(events) == content
    assert "".join(e.delta.text for e in events if isinstance(e.delta, ReasoningDelta)) == reasoning
    calls = [e.delta for e in events if isinstance(e.delta, ToolCallDelta) and e.delta.name is not None]
    assert matched is not None or len(calls) == sum(kind == "call" for kind, _ in messages)
    if events:
        assert finish_of(events).stop_reason == matched
    for event in events:
        for entry in event.logprobs:
            if not entry.chosen.text.startswith("bytes:"):
                shown = content[entry.text_offset :][: len(entry.chosen.text)]
                assert shown
                assert entry.chosen.text.startswith(shown)
                assert shown == entry.chosen.text or matched is not None


def test_repairs_are_counted(encoding: HarmonyEncoding) -> None:
    choice = ChatChoice(0, encoding)
    run(choice, encoding.encode("Just text without any markup at all, as some models do."), finish="length")
    assert choice.repairs["no_markup"] == 1


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_completion_text_offsets_point_at_the_tokens(encoding: HarmonyEncoding, size: int) -> None:
    ids = encoding.encode_with_special("<|channel|>Grüße 🎉!<|end|>")
    events = run(
        CompletionChoice(0, encoding, echo="ab", skip_special_tokens=False),
        ids,
        size=size,
        logprobs=True,
        finish="length",
    )
    text = text_of(events)
    assert text == "ab<|channel|>Grüße 🎉!<|end|>"
    entries = [entry for event in events for entry in event.logprobs]
    assert [entry.chosen.token_id for entry in entries] == ids
    for entry in entries:
        if not entry.chosen.text.startswith("bytes:"):
            assert text[entry.text_offset :].startswith(entry.chosen.text)


def test_completion_leaves_special_tokens_out_and_stops_at_a_string(encoding: HarmonyEncoding) -> None:
    ids = encoding.encode_with_special("<|channel|>one<|message|> two END three")
    events = run(CompletionChoice(0, encoding, ["END"]), ids, size=2, logprobs=True)
    assert text_of(events) == "one two "
    assert finish_of(events).stop_reason == "END"
    reported = [token_id for event in events for token_id in event.token_ids]
    assert reported == ids[: len(reported)]
    assert [entry.chosen.token_id for event in events for entry in event.logprobs] == reported


HEADERS = {
    "text": Message("assistant", channel="final"),
    "reasoning": Message("assistant", channel="analysis"),
    "tool_call": Message("assistant", channel="commentary", recipient="functions.f"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_what_comes_at_once_is_joined_in_one_pass(kind: str) -> None:
    """A push of 200,000 tokens: joined pair by pair, this would copy four terabytes."""
    log = EventLog(0)
    piece = MessageDelta("x" * 200)
    events: list[MessageEvent] = [MessageStart(0, HEADERS[kind], "x" * 200), *[piece] * 200_000]
    for event in events:
        log.add(event)
    (joined,) = log.take()
    assert isinstance(joined, ChoiceDelta)
    assert isinstance(joined.event, MessageStart)
    assert len(joined.event.text) == 200 * 200_001
    shown = Fold().add(joined)
    assert shown is not None
    if isinstance(shown.delta, ToolCallDelta):
        assert shown.delta.name == "f"
        assert shown.delta.id is not None


class Answer:
    """A generation that makes one long call in many pieces."""

    id, model, created_unix_s, prompts = "chatcmpl-1", "m", 0, ((5,),)

    def __init__(self) -> None:
        self._events = self._make()

    def _make(self) -> Iterator[ChoiceDelta | ChoiceFinish | Usage]:
        yield ChoiceDelta(0, MessageStart(0, HEADERS["tool_call"]))
        piece = ChoiceDelta(0, MessageDelta("x" * 200))
        for _ in range(200_000):
            yield piece
        yield ChoiceDelta(0, MessageEnd(HEADERS["tool_call"]))
        yield ChoiceFinish(0, "tool_calls")
        yield Usage(1, 0, 200_000, 0)

    async def __aiter__(self) -> AsyncIterator[ChoiceDelta | ChoiceFinish | Usage]:
        for event in self._events:
            yield event


async def test_whole_answers_join_arguments_in_one_pass() -> None:
    """The arguments of a whole answer are joined once, not again for each piece."""
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})
    over_http = await chat.answer(cast(Generation, Answer()), body, "")
    (call,) = over_http["choices"][0]["message"]["tool_calls"]
    assert (call["id"][:5], call["function"]["name"], len(call["function"]["arguments"])) == (
        "call_",
        "f",
        200 * 200_000,
    )
    over_grpc = await grpc_messages.chat_response(cast(Generation, Answer()), pb.ChatRequest(), "fp")
    (message,) = over_grpc.choices[0].message.tool_calls
    assert (message.id[:5], message.name, len(message.arguments)) == ("call_", "f", 200 * 200_000)


TURNS = (
    "<|channel|>analysis<|message|>Hm, a wörld 🎉.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
    "<|channel|>final<|message|>Stop here, please.<|return|>",
    "text without a header",
)


@pytest.mark.parametrize("text", TURNS)
@pytest.mark.parametrize("stop", [(), ("here,",)])
@pytest.mark.parametrize("cut", [0, 3])
def test_per_token_the_events_do_not_depend_on_how_many_tokens_come_at_once(
    encoding: HarmonyEncoding, text: str, stop: tuple[str, ...], cut: int
) -> None:
    """Parts too are a function of the tokens, also where the end comes by itself."""
    ids = encoding.encode_with_special(text)
    ids = ids[: len(ids) - cut]

    def read(size: int, *, end_alone: bool = False) -> list[object]:
        choice = ChatChoice(0, encoding, stop, tools=["f"], per_token=True)
        events: list[ChoiceDelta | ChoiceFinish] = []
        finish: FinishReason = "length" if cut else "stop"
        for start in range(0, len(ids), size):
            last = start + size >= len(ids) and not end_alone
            if not choice.finished:
                entries = tuple(TokenLogprobs(-1.0, ()) for _ in ids[start : start + size])
                events += choice.push(
                    EngineOutput(tuple(ids[start : start + size]), entries, finish if last else None)
                )
        if not choice.finished:
            events += choice.push(EngineOutput((), (), finish))
        fold = Fold(id="resp_1")
        return [events, [fold.add_part(event) for event in events]]

    expected = read(1)
    for size in (2, 3, 7, 1000):
        assert read(size) == expected
    assert read(1000, end_alone=True) == expected
