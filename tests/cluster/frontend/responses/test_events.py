"""Streams of responses: every event fits the models of the openai package and of Open Responses,
and is a function of the record and the tokens."""

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.events import Usage
from cluster.frontend.responses.events import Event, ResponseEvents, sse_frame
from cluster.frontend.responses.views import ResponseRecord
from cluster.generation.choices import ChatChoice
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.gateway import make_encoding
from tests.support.response_events import read_stream, text_of
from workers.errors import ContextLengthExceeded, EngineDead, InvalidRequest, Overloaded
from workers.request import EngineOutput, FinishReason, TokenLogprobs

FIELDS: dict[str, Any] = {
    "background": False,
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": "m",
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
RECORD = ResponseRecord("resp_0123", 1_750_000_000, FIELDS)
START = "<|start|>assistant"
REASONING = "<|channel|>analysis<|message|>Hm, a wörld 🎉.<|end|>"
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|>"
FINAL = "<|channel|>final<|message|>Here it is.<|return|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
NO_ARGUMENTS = "<|channel|>commentary to=functions.f <|constrain|>json<|message|><|call|>"


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> HarmonyEncoding:
    return make_encoding(tmp_path_factory.mktemp("tokenizer"))


def made(
    encoding: HarmonyEncoding,
    turn: str | list[int],
    record: ResponseRecord = RECORD,
    *,
    size: int = 1,
    finish: FinishReason = "stop",
    stop: tuple[str, ...] = (),
) -> list[Event]:
    ids = encoding.encode_with_special(turn) if isinstance(turn, str) else turn
    choice = ChatChoice(0, encoding, stop, tools=["f", "c", "ns__g"], per_token=True)
    events = ResponseEvents(record, lambda: 1_750_000_009, lambda text: f"sealed({text})")
    found = events.begin()
    for start in range(0, len(ids), size):
        if not choice.finished:
            step = tuple(ids[start : start + size])
            entries = tuple(TokenLogprobs(-1.0, ((5, -2.0),)) for _ in step) if record.shows_logprobs else ()
            last = start + size >= len(ids)
            for event in choice.push(EngineOutput(step, entries, finish if last else None)):
                found += events.add(event)
    if not choice.finished:
        for event in choice.push(EngineOutput((), (), finish)):
            found += events.add(event)
    return [*found, *events.add(Usage(7, 3, len(ids), 2))]


def checked(events: list[Event]) -> list[dict[str, Any]]:
    return read_stream((sse_frame(events) + b"data: [DONE]\n\n").decode())


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Return the types without `response.`, repeated deltas once."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not (kind.endswith(".delta") and found and found[-1] == kind):
            found.append(kind)
    return found


def test_reasoning_and_answer(encoding: HarmonyEncoding) -> None:
    events = checked(made(encoding, REASONING + START + FINAL))
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    response = events[-1]["response"]
    reasoning, message = response["output"]
    assert (reasoning["type"], text_of(reasoning), reasoning["status"]) == (
        "reasoning",
        "Hm, a wörld 🎉.",
        "completed",
    )
    assert "encrypted_content" not in reasoning
    assert (message["phase"], text_of(message)) == ("final_answer", "Here it is.")
    assert (response["status"], response["completed_at"]) == ("completed", 1_750_000_009)
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert response["usage"]["total_tokens"] == 7 + response["usage"]["output_tokens"]
    assert (reasoning["id"], message["id"]) == ("rs_0123_0", "msg_0123_1")


def test_a_preamble_and_a_call(encoding: HarmonyEncoding) -> None:
    events = checked(made(encoding, PREAMBLE + START + CALL))
    message, call = events[-1]["response"]["output"]
    assert (message["phase"], text_of(message)) == ("commentary", "I look.")
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "f", '{"a": 1}')
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert (done["name"], done["arguments"]) == ("f", '{"a": 1}')
    again = checked(made(encoding, PREAMBLE + START + CALL))
    assert again[-1]["response"]["output"][1]["call_id"] == call["call_id"]
    other = checked(made(encoding, CALL, dataclasses.replace(RECORD, id="resp_4567")))
    assert other[-1]["response"]["output"][0]["call_id"] != call["call_id"]


@pytest.mark.parametrize("turn", [NO_ARGUMENTS, "<|channel|>final<|message|><|return|>"])
def test_items_without_deltas_are_done_too(encoding: HarmonyEncoding, turn: str) -> None:
    events = checked(made(encoding, turn))
    assert not [kind for kind in kinds(events) if kind.endswith(".delta")]
    assert kinds(events)[-2:] == ["output_item.done", "completed"]
    (item,) = events[-1]["response"]["output"]
    assert (item["status"], text_of(item)) == ("completed", "")


def test_a_custom_tool_of_a_namespace(encoding: HarmonyEncoding) -> None:
    namespaces = {"ns__g": ("ns", "g")}
    record = dataclasses.replace(RECORD, custom_tools=("c", "ns__g"), namespaces=namespaces)
    turn = "<|channel|>commentary to=functions.{} code<|message|>*** Begin<|call|>"
    for name, shown in (("c", ("c", None)), ("ns__g", ("g", "ns"))):
        events = checked(made(encoding, turn.format(name), record))
        (item,) = events[-1]["response"]["output"]
        assert (item["type"], item["input"]) == ("custom_tool_call", "*** Begin")
        assert (item["name"], item.get("namespace")) == shown
        assert "custom_tool_call_input.done" in kinds(events)


def test_reasoning_as_summary_and_sealed(encoding: HarmonyEncoding) -> None:
    record = dataclasses.replace(RECORD, summarizes=True, seals_reasoning=True)
    events = checked(made(encoding, REASONING + START + FINAL, record))
    assert kinds(events)[2:8] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    reasoning = events[-1]["response"]["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hm, a wörld 🎉."}]
    assert reasoning["content"] == []
    assert reasoning["encrypted_content"] == "sealed(Hm, a wörld 🎉.)"


def test_log_probabilities_of_the_text(encoding: HarmonyEncoding) -> None:
    record = dataclasses.replace(RECORD, shows_logprobs=True)
    events = checked(made(encoding, REASONING + START + FINAL, record))
    (part,) = events[-1]["response"]["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == "Here it is."
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    assert all(entry["logprob"] == -1.0 and len(entry["top_logprobs"]) == 1 for entry in part["logprobs"])


@pytest.mark.parametrize("turn", [REASONING + START + FINAL, PREAMBLE + START + CALL])
def test_cut_off_anywhere_the_last_item_is_incomplete(encoding: HarmonyEncoding, turn: str) -> None:
    ids = encoding.encode_with_special(turn)
    for length in range(1, len(ids)):
        events = checked(made(encoding, ids[:length], finish="length"))
        response = events[-1]["response"]
        assert (response["status"], response["completed_at"]) == ("incomplete", None)
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert all(item["status"] == "completed" for item in response["output"][:-1])


def test_a_stop_string_completes_the_response(encoding: HarmonyEncoding) -> None:
    events = checked(made(encoding, FINAL, stop=("it",)))
    (item,) = events[-1]["response"]["output"]
    assert (item["status"], text_of(item)) == ("completed", "Here ")
    assert events[-1]["type"] == "response.completed"


@pytest.mark.parametrize("after", [None, 0, 1, 5, 12])
def test_a_failure_is_one_terminal_event(encoding: HarmonyEncoding, after: int | None) -> None:
    """Before the first event, and in the middle of an item."""
    ids = encoding.encode_with_special(REASONING + START + FINAL)
    choice = ChatChoice(0, encoding, per_token=True)
    events = ResponseEvents(RECORD, lambda: 0)
    found: list[Event] = [] if after is None else events.begin()
    for token_id in ids[: after or 0]:
        for event in choice.push(EngineOutput((token_id,))):
            found += events.add(event)
    found += events.fail(EngineDead("The engine died."))
    assert events.fail(EngineDead("Again.")) == []
    stream = checked(found)
    response = stream[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert [item["status"] for item in response["output"]] == (["incomplete"] if (after or 0) > 4 else [])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContextLengthExceeded("Too long.", "input"), "context_length_exceeded"),
        (Overloaded("Full.", retry_after_s=2.0), "rate_limit_exceeded"),
        (InvalidRequest("Wrong.", "input"), "invalid_prompt"),
        (EngineDead("Dead."), "server_error"),
    ],
)
def test_the_codes_by_which_clients_decide_whether_to_try_again(error: Any, code: str) -> None:
    events = ResponseEvents(RECORD, lambda: 0)
    events.fail(error)
    assert events.response is not None
    assert events.response["error"]["code"] == code
    assert ("try again in 2s" in events.response["error"]["message"]) == (code == "rate_limit_exceeded")


PIECES = [START, REASONING, PREAMBLE, FINAL, CALL, "<|channel|>", "<|message|>", "<|end|>", "x", " to=f"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_in_any_grouping_give_the_same_bytes(
    encoding: HarmonyEncoding, data: st.DataObject
) -> None:
    pieces = st.sampled_from(PIECES)
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    record = dataclasses.replace(RECORD, shows_logprobs=data.draw(st.booleans()))
    finish: FinishReason = data.draw(st.sampled_from(["stop", "length"]))
    expected = made(encoding, text, record, finish=finish)
    checked(expected)
    for size in (2, 5, 1000):
        assert made(encoding, text, record, size=size, finish=finish) == expected
