"""One fold under every API: messages as an answer, whole and in deltas."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.events import ChoiceDelta, ChoiceFinish
from cluster.frontend.fold import (
    AnswerDelta,
    Finish,
    Fold,
    PartDelta,
    PartDone,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    call_id,
    is_call_id,
)
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message, MessageDelta, MessageEnd, MessageEvent, MessageStart
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway

TURN = (
    "<|channel|>analysis<|message|>First.<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>Second.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I will look it up.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>There are two.<|return|>"
)
CONTENT, REASONING = "I will look it up.\n\nThere are two.", "First.\n\nSecond."


@pytest.mark.parametrize("per_message", [1, 3, 1000])
async def test_a_blank_line_between_two_messages_of_one_kind(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    stub: inference_pb2_grpc.InferenceStub,
    per_message: int,
) -> None:
    engine.answer = lambda request: Script(encoding.encode_with_special(TURN), per_message=per_message)
    messages = [{"role": "user", "content": "How many?"}]
    body = {"messages": messages, "logprobs": True}
    whole = (await gateway.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert (whole["message"]["content"], whole["message"]["reasoning"]) == (CONTENT, REASONING)
    assert "".join(entry["token"] for entry in whole["logprobs"]["content"]) == CONTENT.replace("\n\n", "")
    stream = await gateway.client.chat.completions.create(
        model="gpt-oss-test", messages=messages, stream=True
    )  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta.model_dump() async for chunk in stream]
    assert "".join(delta.get("content") or "" for delta in deltas) == CONTENT
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == REASONING
    request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="How many?")])
    (choice,) = (await stub.Chat(request)).choices
    assert (choice.message.content, choice.message.reasoning) == (CONTENT, REASONING)
    events = [event async for event in stub.ChatStream(request)]
    assert "".join(event.text.text for event in events) == CONTENT
    assert "".join(event.reasoning.text for event in events) == REASONING


async def test_a_stop_string_is_looked_for_in_the_content_as_it_is_shown(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(encoding.encode_with_special(TURN))
    for stop, content in (("up.\n\nThere", "I will look it "), ("up.There", CONTENT)):
        body = {"messages": [{"role": "user", "content": "How many?"}], "stop": stop}
        choice = (await gateway.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert choice["message"]["content"] == content
        assert choice["stop_reason"] == (stop if content != CONTENT else None)


def folded(*events: MessageEvent) -> list[AnswerDelta]:
    fold = Fold()
    numbered: Sequence[ChoiceDelta | ChoiceFinish] = [
        *(ChoiceDelta(0, event, token_ids=(number,)) for number, event in enumerate(events)),
        ChoiceFinish(0, "stop", token_ids=(len(events),)),
    ]
    return [shown for event in numbered if (shown := fold.add(event)) is not None]


def message(channel: str | None, recipient: str | None = None) -> Message:
    return Message("assistant", channel=channel, recipient=recipient)  # type: ignore[arg-type]


def test_token_ids_of_what_is_not_shown_come_with_the_next() -> None:
    analysis, final = message("analysis"), message("final")
    assert folded(
        MessageStart(0, analysis),
        MessageDelta("Hm."),
        MessageEnd(analysis),
        MessageStart(1, final),
        MessageDelta("Hi"),
        MessageDelta("!"),
        MessageEnd(final),
    ) == [
        AnswerDelta(0, ReasoningDelta("Hm."), (), (0, 1)),
        AnswerDelta(0, TextDelta("Hi"), (), (2, 3, 4)),
        AnswerDelta(0, TextDelta("!"), (), (5,)),
        AnswerDelta(0, Finish("stop"), (), (6, 7)),
    ]


@pytest.mark.parametrize(
    ("recipient", "name"),
    [
        ("functions.f", "f"),
        ("f", "f"),
        ("browser.search", "browser.search"),
        ("python", "python"),
        ("functions.a.b", "a.b"),
    ],
)
@pytest.mark.parametrize("channel", [None, "analysis", "commentary", "final"])
def test_the_recipient_makes_a_call_on_every_channel(channel: str | None, recipient: str, name: str) -> None:
    call = message(channel, recipient)
    first, second, third, _ = [
        shown.delta
        for shown in folded(
            MessageStart(0, call),
            MessageDelta("{}"),
            MessageEnd(call),
            MessageStart(1, call, "{"),
            MessageEnd(call),
        )
    ]
    assert isinstance(first, ToolCallDelta)
    assert isinstance(third, ToolCallDelta)
    assert (first.call_index, first.name, first.arguments) == (0, name, "")
    assert second == ToolCallDelta(0, arguments="{}")
    assert (third.call_index, third.name, third.arguments) == (1, name, "{")
    assert first.id is not None
    assert third.id is not None
    assert first.id != third.id


def test_choices_do_not_share_a_fold() -> None:
    fold = Fold()
    final = message("final")
    for choice in (0, 1):
        shown = fold.add(ChoiceDelta(choice, MessageStart(0, final, "x")))
        assert shown == AnswerDelta(choice, TextDelta("x"), (), ())
    assert fold.add(ChoiceDelta(1, MessageStart(1, final, "y"))) == AnswerDelta(1, TextDelta("\n\ny"), (), ())


def parts(*events: MessageEvent, id: str = "resp_1") -> list[PartDelta]:
    fold = Fold(["c"], id)
    numbered: Sequence[ChoiceDelta | ChoiceFinish] = [
        *(ChoiceDelta(0, event, token_ids=(number,)) for number, event in enumerate(events)),
        ChoiceFinish(0, "stop", token_ids=(len(events),)),
    ]
    return [shown for event in numbered if (shown := fold.add_part(event)) is not None]


def test_a_part_for_each_message() -> None:
    analysis, preamble, final = message("analysis"), message("commentary"), message("final")
    empty, call = message("analysis"), message("commentary", "functions.c")
    ended = message("final")
    assert parts(
        MessageStart(0, analysis),
        MessageDelta("Hm."),
        MessageEnd(replace(analysis, end="end")),
        MessageStart(1, empty),
        MessageEnd(empty),
        MessageStart(2, preamble, "I "),
        MessageDelta("look."),
        MessageEnd(replace(preamble, end="end")),
        MessageStart(3, call),
        MessageEnd(call),
        MessageStart(4, final),
        MessageEnd(ended),
    ) == [
        PartDelta(0, ReasoningDelta("Hm."), (), (0, 1)),
        PartDelta(0, PartDone("end"), (), (2,)),
        PartDelta(2, TextDelta("I ", "commentary"), (), (3, 4, 5)),
        PartDelta(2, TextDelta("look.", "commentary"), (), (6,)),
        PartDelta(2, PartDone("end"), (), (7,)),
        PartDelta(3, ToolCallDelta(0, "c", "", call_id("resp_1", 0, 0), custom=True), (), (8,)),
        PartDelta(3, PartDone(None), (), (9,)),
        PartDelta(4, TextDelta(""), (), (10,)),
        PartDelta(4, PartDone(None), (), (11,)),
        PartDelta(4, Finish("stop"), (), (12,)),
    ], "an empty final message shows, empty reasoning does not; no blank lines"


def test_ids_of_calls_follow_from_the_generation() -> None:
    call = message("commentary", "functions.f")
    events = (MessageStart(0, call), MessageEnd(call), MessageStart(1, call), MessageEnd(call))

    def ids(id: str) -> list[str | None]:
        shown = [part.delta for part in parts(*events, id=id)]
        return [delta.id for delta in shown if isinstance(delta, ToolCallDelta)]

    assert ids("resp_1") == ids("resp_1")
    assert len({*ids("resp_1"), *ids("resp_2")}) == 4
    assert all(is_call_id(id or "") for id in ids("resp_1"))
    assert len({call_id("g", choice, index) for choice in range(3) for index in range(3)}) == 9
