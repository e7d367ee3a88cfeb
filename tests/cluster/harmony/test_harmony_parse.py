"""Parsing of generated tokens: as oss-harmony where the output is well formed, total everywhere
else."""

import random
from collections.abc import Iterable
from dataclasses import replace

import openai_harmony as oh
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.header import MAX_HEADER_TOKENS
from cluster.harmony.message import Message, MessageDelta, MessageEnd, MessageEvent, MessageStart
from cluster.harmony.parse import HarmonyParser
from tests.cluster.harmony.harmony_conversations import TEXTS


def joined(events: Iterable[MessageEvent]) -> list[tuple[str, ...]]:
    """Return neighbouring messages of one kind as one item: ("reasoning", text), ("text", text) or
    ("call", name, arguments)."""
    items: list[list[str]] = []
    message = None
    for event in events:
        match event:
            case MessageStart(_, message, _) if message.kind == "tool_call":
                assert message.recipient is not None
                items.append(["call", message.recipient.removeprefix("functions."), ""])
            case MessageEnd():
                continue
        assert message is not None
        if message.kind == "tool_call":
            items[-1][2] += event.text
        elif event.text:
            if not items or items[-1][0] != message.kind:
                items.append([message.kind, ""])
            items[-1][1] += event.text
    return [tuple(item) for item in items]


def check_shape(events: list[MessageEvent]) -> None:
    """Check that messages start in order, end before the next starts, and consist of the events
    between."""
    num_messages = 0
    start: MessageStart | None = None
    content = ""
    for event in events:
        match event:
            case MessageStart():
                assert start is None
                assert event.index == num_messages
                start, content = event, event.text
                num_messages += 1
            case MessageDelta(text):
                assert start is not None
                assert text
                content += text
            case MessageEnd(message):
                assert start is not None
                assert replace(message, content="", end=None) == start.message
                assert message.content == content
                start = None
    assert start is None


def parse(
    encoding: HarmonyEncoding, ids: Iterable[int], tools: list[str] | None = None
) -> tuple[HarmonyParser, list[tuple[str, ...]]]:
    parser = HarmonyParser(encoding, tools)
    events = [event for token_id in ids for event in parser.push(token_id)]
    events += parser.finish()
    assert parser.finish() == []
    check_shape(events)
    return parser, joined(events)


def text_of(events: Iterable[MessageEvent]) -> str:
    return "".join(event.text for event in events if not isinstance(event, MessageEnd))


# Well-formed output against the oracle.

HEADERS = (
    "<|channel|>analysis",
    "<|channel|>final",
    "<|channel|>commentary",
    "<|channel|>commentary to=functions.get_weather <|constrain|>json",
    "<|channel|>commentary to=functions.get_weather<|constrain|>json",
    "<|channel|>commentary to=functions.get_weather",
    "<|channel|>commentary to=functions.get_weather json",
    " to=functions.a-b_2<|channel|>commentary json",
    " to=functions.f<|channel|>analysis <|constrain|>json",
    "<|channel|>analysis to=functions.f code",
)


def well_formed_turn(rng: random.Random) -> str:
    messages = []
    for index in range(rng.randint(1, 5)):
        header = rng.choice(HEADERS)
        body = rng.choice([text for text in TEXTS if "<|" not in text])
        messages.append(
            f"{'<|start|>assistant' if index else ''}{header}<|message|>{body}"
            f"{'<|call|>' if 'to=' in header else '<|end|>'}"
        )
    return "".join(messages)


def spelled(encoding: HarmonyEncoding, ids: list[int], rng: random.Random) -> list[int]:
    """Return the same bytes in other tokens: some tokens are replaced by one token per byte."""
    byte_ids = {encoding.token_bytes(token_id): token_id for token_id in range(256)}
    out: list[int] = []
    for token_id in ids:
        data = encoding.token_bytes(token_id)
        out += [byte_ids[bytes([byte])] for byte in data] if data and rng.random() < 0.3 else [token_id]
    return out


def test_every_state_of_a_well_formed_turn_is_the_oracles(
    gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding
) -> None:
    rng = random.Random(1)
    num_states = 0
    for _ in range(150):
        ids = spelled(gpt_oss, gpt_oss.encode_with_special(well_formed_turn(rng)), rng)
        ours, theirs = HarmonyParser(gpt_oss), oh.StreamableParser(oracle, role=oh.Role.ASSISTANT)
        bodies: list[str] = []
        for token_id in ids:
            num_before = ours.num_messages
            events = ours.push(token_id)
            theirs.process(token_id)
            bodies += [""] * (ours.num_messages - num_before)
            bodies[-1:] = [bodies[-1] + text_of(events)] if bodies else []
            if theirs.state is oh.StreamState.CONTENT:
                assert ours.message is not None
                assert (ours.message.channel, ours.message.recipient) == (
                    theirs.current_channel,
                    theirs.current_recipient,
                )
                assert bodies[-1] == theirs.current_content
                num_states += 1
            else:
                assert ours.message is None
        assert ours.finish() == []
        assert bodies == [message.content[0].text for message in theirs.messages]
        assert set(ours.repairs) <= {"after_turn"}, (
            "some of these turns go on behind a <|call|>; nothing else is unusual"
        )
    assert num_states > 3000


def test_kinds_of_a_well_formed_turn(gpt_oss: HarmonyEncoding) -> None:
    text = (
        "<|channel|>analysis<|message|>Think é.<|end|><|start|>assistant<|channel|>commentary<|message|>I "
        "will look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    parser, items = parse(gpt_oss, gpt_oss.encode_with_special(text), ["f"])
    assert items == [("reasoning", "Think é."), ("text", "I will look."), ("call", "f", '{"a": 1}')]
    assert parser.num_reasoning_tokens == len(gpt_oss.encode("Think é."))
    assert parser.num_messages == 3
    assert parser.turn_over
    assert not parser.repairs


def test_part_of_each_token(gpt_oss: HarmonyEncoding) -> None:
    text = "<|channel|>analysis<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>c d<|end|>"
    text += "<|start|>assistant to=functions.f<|channel|>commentary<|message|>e<|call|>"
    parser = HarmonyParser(gpt_oss)
    parts = []
    for token_id in gpt_oss.encode_with_special(text):
        parser.push(token_id)
        parts.append((gpt_oss.decode([token_id], skip_special_tokens=False), parser.part))
    shown = [part for part in parts if part[1] != "markup"]
    assert shown == [
        ("a", "reasoning"),
        (" b", "reasoning"),
        ("c", "text"),
        (" d", "text"),
        ("e", "tool_call"),
    ]


def test_arguments_stream_as_they_come(gpt_oss: HarmonyEncoding) -> None:
    parser = HarmonyParser(gpt_oss)
    for token_id in gpt_oss.encode_with_special("<|channel|>commentary to=functions.f <|constrain|>json"):
        assert parser.push(token_id) == []
    header = Message("assistant", channel="commentary", recipient="functions.f", content_type="json")
    assert parser.push(gpt_oss.message) == [MessageStart(0, header)]
    assert parser.push(gpt_oss.encode('{"')[0]) == [MessageDelta('{"')]


# Shapes that models produce, and what they mean here.

ANALYSIS = ("reasoning", "t")
SHAPES: list[tuple[str, list[tuple[str, ...]], dict[str, int]]] = [
    (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {},
    ),
    (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", [("call", "f", "{}")], {}),
    ("<|channel|>analysis to=functions.f code<|message|>{}<|call|>", [("call", "f", "{}")], {}),
    ("<|channel|>final to=functions.f<|message|>{}<|call|>", [("call", "f", "{}")], {}),
    ("<|channel|>commentary to=functions.f<|constrain|>JSON<|message|>{}<|call|>", [("call", "f", "{}")], {}),
    ("<|channel|>commentary to=functions.f<|message|><|call|>", [("call", "f", "")], {}),
    (
        " to=functions.f<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"repeated_recipient": 1},
    ),
    (
        " to=functions.f<|channel|>commentary to=functions.g<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"repeated_recipient": 1},
    ),
    (
        "<|channel|>commentary to=f<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"recipient_without_namespace": 1},
    ),
    (
        "<|channel|>commentary functions.f<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"recipient_without_to": 1},
    ),
    (
        "<|channel|>commentary to=functions.f<|channel|>commentary<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"repeated_channel": 1},
    ),
    (
        "<|channel|>commentary to=functions.fcommentary<|message|>{}<|call|>",
        [("call", "f", "{}")],
        {"recipient_cut": 1},
    ),
    ("<|channel|>commentaryto=functions.f<|message|>{}<|call|>", [("call", "f", "{}")], {}),
    (
        "<|channel|>commentary to=functions.nope<|message|>{}<|call|>",
        [("call", "nope", "{}")],
        {"unknown_tool": 1},
    ),
    ("<|channel|>commentary to=user<|message|>hi<|end|>", [("text", "hi")], {"recipient_not_a_tool": 1}),
    (
        "<|channel|>commentary to=functions.<|message|>hi<|end|>",
        [("text", "hi")],
        {"recipient_not_a_tool": 1},
    ),
    (
        "<|channel|>commentary to=functions.f<|message|>{}<|end|>",
        [("call", "f", "{}")],
        {"call_not_closed": 1},
    ),
    (
        "<|channel|>commentary to=functions.f <|constrain|>json<|call|>",
        [("call", "f", "")],
        {"missing_message": 1},
    ),
    ("<|channel|>commentary to=functions.f json{}<|call|>", [("call", "f", "{}")], {"missing_message": 1}),
    ("<|channel|>commentary<|message|>hi<|call|>", [("text", "hi")], {"call_without_recipient": 1}),
    (
        '<|channel|>analysis<|message|>t<|end|>{"a": 1}<|return|>',
        [ANALYSIS, ("text", '{"a": 1}')],
        {"missing_start": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|>Some prose.<|return|>",
        [ANALYSIS, ("text", "Some prose.")],
        {"missing_start": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|><|end|><|start|>assistant<|channel|>final<|message|>x<|return|>",
        [ANALYSIS, ("text", "x")],
        {"stray_token": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|><|channel|>final<|message|>x<|return|>",
        [ANALYSIS, ("text", "x")],
        {"missing_start": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|>assistant<|channel|>final<|message|>x",
        [ANALYSIS, ("text", "x")],
        {"missing_start": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|channel|>final<|message|>x<|return|>",
        [ANALYSIS, ("text", "x")],
        {"missing_end": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|start|>assistant<|channel|>final<|message|>x",
        [ANALYSIS, ("text", "x")],
        {"missing_end": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|><|start|><|channel|>final<|message|>x",
        [ANALYSIS, ("text", "x")],
        {"missing_role": 1},
    ),
    ("assistant<|channel|>final<|message|>x<|return|>", [("text", "x")], {"repeated_role": 1}),
    ("Just text.<|return|>", [("text", "Just text.")], {"no_markup": 1}),
    ("final answer: 42<|return|>", [("text", "final answer: 42")], {"no_markup": 1}),
    ("assistants help", [("text", "assistants help")], {"no_markup": 1}),
    ("<|message|>x<|return|>", [("text", "x")], {"missing_channel": 1}),
    ("final<|message|>x<|return|>", [("text", "x")], {"channel_without_token": 1}),
    ("<|channel|>final some text<|return|>", [("text", "some text")], {"missing_message": 1}),
    (
        "<|channel|>analysis<|constrain|>json<|message|>t<|end|>",
        [ANALYSIS],
        {"constrain_without_recipient": 1},
    ),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", [("text", "{}")], {}),
    ("<|channel|>commentary––commentary<|message|>x<|end|>", [("text", "x")], {"unknown_channel": 1}),
    ("<|channel|>analysi<|message|>t<|end|>", [ANALYSIS], {"unknown_channel": 1}),
    ("<|channel|>xyzzy<|message|>x<|end|>", [("text", "x")], {"unknown_channel": 1}),
    ("<|channel|>final what is this<|message|>x<|end|>", [("text", "x")], {"unknown_header_text": 1}),
    (
        "<|channel|>final<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>y<|return|>",
        [("text", "xy")],
        {},
    ),
    (
        "<|channel|>final<|message|>x<|end|><|start|>user<|message|>y<|end|><|start|>assistant",
        [("text", "x")],
        {"foreign_role": 1},
    ),
    (
        "<|channel|>final<|message|>x<|end|><|start|>functions.f "
        "to=assistant<|channel|>commentary<|message|>y",
        [("text", "x")],
        {"foreign_role": 1},
    ),
    (
        "<|channel|>final<|message|>x<|startoftext|>y<|reserved_3900|><|message|><|constrain|>z",
        [("text", "xyz")],
        {"stray_token": 4},
    ),
    (
        "<|channel|>final<|message|>x<|return|>more",
        [("text", "xmore")],
        {"missing_start": 1, "after_turn": 1},
    ),
    ("<|channel|>final<|message|>x<|endoftext|>", [("text", "x")], {"end_of_text": 1}),
    ("<|return|>", [], {"empty_message": 1}),
    ("<|channel|>analysis<|message|>t<|end|>to<|return|>", [ANALYSIS, ("text", "to")], {"missing_start": 1}),
    (
        "<|channel|>analysis<|message|>t<|end|><|channel|>final x<|return|>",
        [ANALYSIS, ("text", "x")],
        {"missing_start": 1, "missing_message": 1},
    ),
    (
        "<|channel|>analysis<|message|>t<|end|><|message|>x<|return|>",
        [ANALYSIS, ("text", "x")],
        {"missing_start": 1, "missing_channel": 1},
    ),
    # Cut off by the length limit: nothing of a header is shown, and nothing is wrong with the
    # format.
    ("", [], {}),
    (" to=func", [], {}),
    ("fin", [], {}),
    ("<|channel|>", [], {}),
    ("<|channel|>commentary to=functions.f", [], {}),
    ("<|channel|>commentary to=functions.f <|constrain|>js", [], {}),
    ("<|channel|>analysis<|message|>t<|end|><|start|>assist", [ANALYSIS], {}),
    ('<|channel|>commentary to=functions.f<|message|>{"a', [("call", "f", '{"a')], {}),
]


@pytest.mark.parametrize(("text", "items", "repairs"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_shapes(
    small: HarmonyEncoding,
    gpt_oss: HarmonyEncoding,
    text: str,
    items: list[tuple[str, ...]],
    repairs: dict[str, int],
) -> None:
    for encoding in (small, gpt_oss):
        ids = encoding.encode_with_special(text.replace("3900", "200013" if encoding is gpt_oss else "3900"))
        for tokens in (ids, spelled(encoding, ids, random.Random(3))):
            parser, got = parse(encoding, tokens, ["f", "g"])
            assert (got, dict(parser.repairs)) == (items, repairs)


def test_control_tokens_spelled_as_text_do_not_reach_a_name(small: HarmonyEncoding) -> None:
    ids = small.encode_with_special("<|channel|>commentary to=functions.f")
    ids += small.encode("<|channel|>commentary") + small.encode_with_special("<|message|>{}<|call|>")
    parser, items = parse(small, ids, ["f"])
    assert items == [("call", "f", "{}")]
    assert parser.repairs == {"recipient_cut": 1}


def test_turn_over(small: HarmonyEncoding) -> None:
    for end, over in (
        ("<|return|>", True),
        ("<|call|>", True),
        ("<|endoftext|>", True),
        ("<|end|>", False),
        ("<|start|>user<|message|>", True),
    ):
        parser, _ = parse(small, small.encode_with_special(f"<|channel|>final<|message|>x{end}"))
        assert parser.turn_over is over


CALL_F = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"


@pytest.mark.parametrize(
    ("rest", "over", "repairs"),
    [
        ("", False, {}),
        ("<|return|>", True, {}),
        ("<|start|>functions<|return|>", True, {}),
        (f"<|start|>assistant{CALL_F}", False, {}),
        (f"<|start|>assistant{CALL_F}<|return|>", True, {}),
        ("<|start|>functions", False, {}),
        ("<|start|>functions.f to=assistant<|channel|>", True, {"foreign_role": 1}),
        ("<|start|>assistant<|return|>", True, {"empty_message": 1}),
        ("<|end|>", False, {"stray_token": 1}),
        ("<|end|><|return|>", True, {"stray_token": 2}),
        ("<|call|>", True, {"stray_token": 1}),
        ("<|return|><|return|>", True, {"stray_token": 1}),
    ],
)
def test_several_calls(small: HarmonyEncoding, rest: str, over: bool, repairs: dict[str, int]) -> None:
    parser = HarmonyParser(small, ["f"], several_calls=True)
    for token_id in small.encode_with_special(CALL_F + rest):
        parser.push(token_id)
    parser.finish()
    assert (parser.turn_over, dict(parser.repairs)) == (over, repairs)
    assert parser.num_messages == 1 + rest.count(CALL_F)


def test_a_character_cut_off_is_replaced_once(gpt_oss: HarmonyEncoding) -> None:
    byte_ids = {gpt_oss.token_bytes(token_id): token_id for token_id in range(256)}
    begin = gpt_oss.encode_with_special("<|channel|>final<|message|>a")
    half = [byte_ids[bytes([byte])] for byte in "😀".encode()[:2]]
    assert parse(gpt_oss, begin + half)[1] == [("text", "a\ufffd")]
    assert parse(gpt_oss, [*begin, *half, gpt_oss.end])[1] == [("text", "a\ufffd")]


def test_a_header_without_end_becomes_text(small: HarmonyEncoding) -> None:
    ids = small.encode_with_special("<|channel|>final " + "word " * 300)
    parser, items = parse(small, ids)
    assert items == [("text", "word " * 300)]
    assert parser.repairs["missing_message"] == 1
    first_text = next(index for index in range(len(ids)) if parse(small, ids[: index + 1])[1])
    assert first_text <= MAX_HEADER_TOKENS + 1


def test_the_longest_names_fit_a_header(gpt_oss: HarmonyEncoding) -> None:
    name = "q_" * 32
    ids = gpt_oss.encode_with_special(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{{}}<|call|>"
    )
    byte_ids = {gpt_oss.token_bytes(token_id): token_id for token_id in range(256)}
    ids = [b for i in ids for b in ([byte_ids[bytes([x])] for x in gpt_oss.token_bytes(i)] or [i])]
    assert parse(gpt_oss, ids, [name])[1] == [("call", name, "{}")]


def test_names_have_a_bound(small: HarmonyEncoding) -> None:
    parser, items = parse(
        small,
        small.encode_with_special(
            f"<|channel|>commentary to=functions.{'assistant' * 40}<|message|>{{}}<|call|>"
        ),
    )
    assert items == [("call", ("assistant" * 40)[:128], "{}")]
    assert parser.repairs == {"recipient_cut": 1}


# Anything at all.

CONTROL = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|startoftext|>",
)
WORDS = (
    "assistant",
    "analysis",
    "commentary",
    "final",
    "user",
    " to=functions.f",
    " to=",
    "json",
    " code",
    "{",
    '"a"',
    " ",
    "\n",
    "text",
    "é",
    "中",
)
PIECES = st.lists(st.sampled_from(CONTROL) | st.sampled_from(WORDS), max_size=30).map("".join)
RELAXED = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def plain_ids(small: HarmonyEncoding) -> list[int]:
    """Return tokens that cannot spell a control token."""
    return [
        i
        for i in range(small.vocab_size)
        if i in small.special_ids or not set(small.token_bytes(i)) & set(b"<|>")
    ]


@RELAXED
@given(data=st.data())
def test_any_ids_give_a_turn(small: HarmonyEncoding, plain_ids: list[int], data: st.DataObject) -> None:
    harmony = [
        small.start,
        small.end,
        small.message,
        small.channel,
        small.constrain,
        small.return_,
        small.call,
        small.endoftext,
    ]
    token = st.sampled_from(plain_ids) | st.sampled_from(harmony) | st.sampled_from([-1, 4096, 10**9])
    ids = data.draw(st.lists(token, max_size=60))
    _, items = parse(small, ids, data.draw(st.sampled_from([None, ["f"]])))
    assert not any(mark in text for item in items for text in item for mark in ("<|", "|>"))
    for item in items:
        if item[0] == "call":
            assert 1 <= len(item[1]) <= 128
            assert not any(character.isspace() or character in "<>|" for character in item[1])


@RELAXED
@given(text=PIECES)
@example(text="<|channel|>final<|end|>x<|start|>")
def test_a_longer_turn_begins_as_the_shorter_one(small: HarmonyEncoding, text: str) -> None:
    ids = small.encode_with_special(text)
    parser = HarmonyParser(small)
    shown: list[MessageEvent] = []
    for index, token_id in enumerate(ids):
        shown += parser.push(token_id)
        again = HarmonyParser(small)
        assert [event for i in ids[: index + 1] for event in again.push(i)] == shown
        assert (again.part, again.repairs, again.num_messages, again.turn_over) == (
            parser.part,
            parser.repairs,
            parser.num_messages,
            parser.turn_over,
        )


@RELAXED
@given(
    header=st.lists(
        st.sampled_from(["zqx", " zqx", " to=functions.zqx", "<|constrain|>zqx", " json", "<|channel|>zqx"]),
        max_size=6,
    ).map("".join)
)
def test_header_text_is_never_content(small: HarmonyEncoding, header: str) -> None:
    _, items = parse(small, small.encode_with_special(f"<|channel|>analysis {header}<|message|>body<|end|>"))
    assert not any("zqx" in text for item in items if item[0] != "call" for text in item)
    assert "body" in [item[-1] for item in items]
    cut_off = small.encode_with_special(f"<|channel|>analysis {header}")
    assert parse(small, cut_off)[1] == []


@RELAXED
@given(text=PIECES)
def test_body_text_is_never_lost(small: HarmonyEncoding, text: str) -> None:
    """Every text token that the parser calls content arrives, and only those do."""
    parser = HarmonyParser(small)
    shown = b""
    told = ""
    for token_id in small.encode_with_special(text):
        was_body = parser.message is not None
        events = parser.push(token_id)
        if was_body and parser.part != "markup":
            shown += small.token_bytes(token_id)
            told += text_of(events)
    assert told == shown.decode()


def test_after_finish_nothing_happens(small: HarmonyEncoding) -> None:
    parser = HarmonyParser(small)
    parser.finish()
    assert [
        parser.push(token_id) for token_id in small.encode_with_special("<|channel|>final<|message|>x")
    ] == [[], [], [], []]


@pytest.mark.parametrize(
    ("written", "declared", "recipient", "repairs"),
    [
        ("functions.f", ["f"], "functions.f", []),
        ("a.b-c", ["a.b-c"], "functions.a.b-c", ["recipient_without_namespace"]),
        ("python", ["python"], "functions.python", ["recipient_without_namespace"]),
        ("browser.search", ["f"], "browser.search", ["recipient_without_namespace", "unknown_tool"]),
        ("functions.f", ["functions.f"], "functions.functions.f", ["recipient_without_namespace"]),
        ("functions.f", ["f", "functions.f"], "functions.f", []),
        ("functions.functions.f", ["functions.f"], "functions.functions.f", []),
        ("functions.g", ["functions.f"], "functions.g", ["unknown_tool"]),
        ("a.bcommentary", ["a.b"], "functions.a.b", ["recipient_cut", "recipient_without_namespace"]),
    ],
)
def test_the_recipient_is_the_declared_tool_or_stays_as_written(
    small: HarmonyEncoding, written: str, declared: list[str], recipient: str, repairs: list[str]
) -> None:
    parser = HarmonyParser(small, declared)
    ids = small.encode_with_special(f"<|channel|>commentary to={written} <|constrain|>json<|message|>")
    (start,) = [event for token_id in ids for event in parser.push(token_id)]
    assert isinstance(start, MessageStart)
    assert start.message.recipient == recipient
    assert sorted(parser.repairs) == repairs
