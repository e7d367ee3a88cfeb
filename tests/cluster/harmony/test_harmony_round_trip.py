"""Messages that were parsed, rendered and parsed again are the same; well-formed ones, token for
token."""

import random
from collections.abc import Sequence
from dataclasses import replace

import openai_harmony as oh
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Channel, End, Message, MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.render import Conversation, history, render
from tests.cluster.harmony.harmony_conversations import TEXTS
from tests.cluster.harmony.test_harmony_parse import CONTROL, RELAXED, WORDS, spelled, well_formed_turn

MORE_WORDS = (
    *WORDS,
    " to=f",
    " to=functions.",
    " to=functions.fcommentary",
    " to=user",
    " to=browser.search",
    " to=functions.unknown",
    "functions.f",
    "<|constrain|>zq.x",
    "<|start|>assistant",
    "<|start|>assistant<|channel|>analysis<|message|>",
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    "<|start|>assistant<|channel|>final<|message|>",
    " to=functions.f<|channel|>commentary json<|message|>",
)
NEARLY_WELL_FORMED = st.lists(st.sampled_from(CONTROL) | st.sampled_from(MORE_WORDS), max_size=25).map(
    "".join
)
TOOLS = st.sampled_from([None, ["f"], []])


def parsed(encoding: HarmonyEncoding, ids: Sequence[int], tools: list[str] | None = None) -> list[Message]:
    parser = HarmonyParser(encoding, tools)
    events = [event for token_id in ids for event in parser.push(token_id)] + parser.finish()
    return [event.message for event in events if isinstance(event, MessageEnd)]


def without_ids(messages: Sequence[Message]) -> list[Message]:
    return [replace(message, token_ids=None) for message in messages]


def render_turn(messages: Sequence[Message], encoding: HarmonyEncoding) -> list[int]:
    """Return the token ids of a turn after the prompt's `<|start|>assistant`: each message as
    `render` writes it into a history, but with the end that it had."""
    ends = {"end": [encoding.end], "call": [encoding.call], "return": [encoding.return_], None: []}
    assistant = len([encoding.start, *encoding.encode("assistant")])
    question = Message("user", "x")
    before = len(render(Conversation((question,)), encoding)) - assistant
    ids: list[int] = []
    for message in messages:
        prompt = render(Conversation((question, message)), encoding)
        ids += prompt[before : -assistant - 1] + ends[message.end]
    return ids[assistant:]


def check_round_trip(encoding: HarmonyEncoding, ids: Sequence[int], tools: list[str] | None) -> None:
    messages = parsed(encoding, ids, tools)
    assert parsed(encoding, render_turn(messages, encoding), tools) == messages
    assert parsed(encoding, render_turn(without_ids(messages), encoding), tools) == messages


@RELAXED
@given(text=NEARLY_WELL_FORMED, tools=TOOLS)
@example(text="<|channel|>analysis<|message|>t<|channel|>final<|message|>x<|start|>", tools=None)
@example(text=" to=f<|message|>x<|end|>y<|return|>z", tools=["f"])
def test_any_turn_of_words_and_control_tokens(
    small: HarmonyEncoding, text: str, tools: list[str] | None
) -> None:
    check_round_trip(small, small.encode_with_special(text), tools)


@RELAXED
@given(data=st.data(), tools=TOOLS)
def test_any_ids(small: HarmonyEncoding, data: st.DataObject, tools: list[str] | None) -> None:
    token = (
        st.integers(0, small.vocab_size - 1)
        | st.sampled_from(sorted(small.control_tokens))
        | st.sampled_from([-1, 4096, 10**9])
    )
    check_round_trip(small, data.draw(st.lists(token, max_size=60)), tools)


@RELAXED
@given(
    before=st.sampled_from(["<|channel|>commentary to=functions.", "<|channel|>final <|constrain|>", " to="]),
    header=st.lists(st.integers(0, 255), max_size=230),
    after=st.sampled_from(["<|message|>body<|call|>", "<|channel|>final<|message|>", "<|return|>", ""]),
    tools=TOOLS,
)
def test_any_header_however_long(
    small: HarmonyEncoding, before: str, header: list[int], after: str, tools: list[str] | None
) -> None:
    """Ids up to 255 are single bytes, the longest way to spell a text."""
    ids = [*small.encode_with_special(before), *header, *small.encode_with_special(after)]
    check_round_trip(small, ids, tools)


def test_the_longest_header_that_is_kept_is_read_again(small: HarmonyEncoding) -> None:
    name, content_type = "\x01" * 400, "_" * 400
    text = (
        f"<|channel|>commentary to={name}<|message|>x<|end|><|channel|>commentary <|constrain|>{content_type}"
    )
    ids = small.encode_with_special(text + "<|message|>x<|end|>")
    check_round_trip(small, ids, ["f"])


def test_well_formed_turns_keep_their_ids(gpt_oss: HarmonyEncoding) -> None:
    """This holds also where they are spelled in other tokens than the renderer would write."""
    rng = random.Random(7)
    for _ in range(150):
        text = well_formed_turn(rng)
        last = text.removesuffix("<|end|>") + "<|return|>" if text.endswith("<|end|>") else text
        for ids in (gpt_oss.encode_with_special(text), gpt_oss.encode_with_special(last)):
            generated = spelled(gpt_oss, ids, rng)
            messages = parsed(gpt_oss, generated)
            assert render_turn(messages, gpt_oss) == generated
            assert parsed(gpt_oss, render_turn(without_ids(messages), gpt_oss)) == messages


def test_a_message_that_was_repaired_is_written_as_it_was_read(small: HarmonyEncoding) -> None:
    ids = small.encode_with_special(
        "<|channel|>analysis<|message|>t<|end|><|end|>It is 4."
        "<|start|>assistant<|channel|>final<|message|>5<|return|>"
    )
    first, second, third = parsed(small, ids)
    assert first.token_ids is not None
    assert second.token_ids is None
    assert third.token_ids is not None
    assert small.decode(render_turn([first, second, third], small), skip_special_tokens=False) == (
        "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>5<|return|>"
    )


CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(
        st.builds(
            lambda channel, recipient, content_type, content: Message(
                "assistant",
                content,
                channel=channel,
                recipient=recipient,
                content_type=content_type,
                end="end" if recipient is None else "call",
            ),
            st.sampled_from(CHANNELS),
            st.sampled_from([None, "functions.f", "functions.a-b_2", "browser.search", "python"]),
            st.sampled_from([None, "json"]),
            st.sampled_from(TEXTS) | st.text(max_size=20),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_canonical_turns_are_those_of_oss_harmony(
    gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding, messages: list[Message]
) -> None:
    theirs: list[int] = []
    for message in messages:
        made = oh.Message.from_role_and_content(oh.Role.ASSISTANT, message.content)
        assert message.channel is not None
        made = made.with_channel(message.channel)
        if message.recipient is not None:
            made = made.with_recipient(message.recipient)
        if message.content_type is not None:
            made = made.with_content_type(f"<|constrain|>{message.content_type}")
        theirs += oracle.render(made)
    turn = theirs[len([gpt_oss.start, *gpt_oss.encode("assistant")]) :]
    assert render_turn(messages, gpt_oss) == turn
    again = parsed(gpt_oss, turn)
    assert again == messages
    assert render_turn(without_ids(again), gpt_oss) == turn


def test_a_tool_loop_finds_its_whole_prefix_again(gpt_oss: HarmonyEncoding) -> None:
    """The next prompt begins with the last one and with what was generated, whatever its tokens."""
    rng = random.Random(5)
    question = Message("user", "What is the weather in Paris?")
    prompt = render(Conversation((question,)), gpt_oss)
    generated = spelled(
        gpt_oss,
        gpt_oss.encode_with_special(
            "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant to=functions.f<|channel|>"
            'commentary json<|message|>{"city": "Paris"}<|call|>'
        ),
        rng,
    )
    turn = parsed(gpt_oss, generated)
    result = Message("tool", "sunny", name="functions.f", recipient="assistant", channel="commentary")
    following = render(Conversation((question, *turn, result)), gpt_oss)
    assert following[: len(prompt) + len(generated)] == prompt + generated
    assert gpt_oss.decode(following[len(prompt) + len(generated) :], skip_special_tokens=False) == (
        "<|start|>functions.f<|channel|>commentary to=assistant<|message|>sunny<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("keeps_ids", [True, False])
@pytest.mark.parametrize("end", ["<|return|>", "<|end|>", ""])
def test_history_ends_every_message(small: HarmonyEncoding, end: str, keeps_ids: bool) -> None:
    messages = parsed(small, small.encode_with_special(f"<|channel|>final<|message|>Four.{end}"))
    given_end: dict[str, End | None] = {"<|return|>": "return", "<|end|>": "end", "": None}
    assert messages == [Message("assistant", "Four.", channel="final", end=given_end[end])]
    chat = Conversation((*(messages if keeps_ids else without_ids(messages)), Message("user", "And 5?")))
    text = small.decode(render(chat, small), skip_special_tokens=False)
    assert (
        "<|start|>assistant<|channel|>final<|message|>Four.<|end|><|start|>user<|message|>And 5?<|end|>"
        in text
    )


def test_history_leaves_out_analysis_before_the_last_final() -> None:
    def said(channel: Channel, recipient: str | None = None) -> Message:
        return Message("assistant", channel, channel=channel, recipient=recipient)

    user = Message("user", "x")
    called = said("analysis", "python")
    turn = (said("analysis"), called, said("commentary"), said("final"))
    assert list(history((user, *turn, user, *turn[:3]))) == [user, called, *turn[2:], user, *turn[:3]]
