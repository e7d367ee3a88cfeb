"""Token sequences that a fake engine generates: turns as gpt-oss writes them, malformed ones, cut
ones and random ones."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.golden.before.compare import Json

Encode = Callable[[str], list[int]]
Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Scripted:
    """A sequence and how it is asked for.

    Attributes:
        token_ids: what follows `<|start|>assistant`.
        per_message: tokens in each message of the engine.
        fields: of the body, beside its messages and tools.
        history: whether the answer goes back as a message of the conversation and is rendered
            again.
    """

    name: str
    token_ids: tuple[int, ...]
    per_message: int = 1
    finish: Finish = "stop"
    fields: dict[str, Json] = field(default_factory=dict)
    tools: bool = True
    history: bool = False


A, C, F = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "ü🎉"}<|call|>'
WEATHER = (
    '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
AGAIN = "<|start|>assistant"

WELL_FORMED = {
    "final": f"{F}Hi 🎉 you, in naïve café style.<|return|>",
    "analysis, final": f"{A}The user greets. Be kind.{NEXT}{F}Hello there!<|return|>",
    "empty final": f"{F}<|return|>",
    "empty analysis, final": f"{A}{NEXT}{F}Hello.<|return|>",
    "two analysis, final": f"{A}First thought.{NEXT}{A}Second thought.{NEXT}{F}Done.<|return|>",
    "two finals": f"{F}One.{NEXT}{F}Two.<|return|>",
    "analysis, two finals": f"{A}Think.{NEXT}{F}There are one.{NEXT}{F}There are two.<|return|>",
    "preamble, final": f"{C}I will look it up.{NEXT}{F}There are two.<|return|>",
    "two preambles, final": f"{C}One moment.{NEXT}{C}Still looking.{NEXT}{F}Found.<|return|>",
    "analysis between finals": f"{F}One.{NEXT}{A}Hm.{NEXT}{F}Two.<|return|>",
    "analysis after preamble": f"{A}First.{NEXT}{C}Preamble.{NEXT}{A}Second.{NEXT}{F}Final.<|return|>",
    "analysis ends the turn": f"{A}Only thoughts.<|return|>",
    "preamble ends the turn": f"{C}Only a preamble.<|return|>",
    "final ended by end": f"{F}Text.<|end|>",
    "call": CALL,
    "analysis, call": f"{A}I need the tool.{NEXT}{CALL}",
    "analysis, preamble, call": f"{A}I need the tool.{NEXT}{C}One moment.{NEXT}{WEATHER}",
    "two analysis, two preambles, call": f"{A}x{NEXT}{A}y{NEXT}{C}p{NEXT}{C}q{NEXT}{WEATHER}",
    "call on analysis": f"{A}Hm.{NEXT}<|channel|>analysis to=functions.f "
    f"<|constrain|>json<|message|>{{}}<|call|>",
    "call on analysis without constrain": '<|channel|>analysis to=functions.f code<|message|>{"a": '
    "1}<|call|>",
    "call on final": '<|channel|>final to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
    "recipient before channel": ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": '
    "1}<|call|>",
    "recipient before analysis channel": " to=functions.f<|channel|>analysis "
    '<|constrain|>json<|message|>{"a": 1}<|call|>',
    "call without constrain": '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>',
    "call with json as a word": '<|channel|>commentary to=functions.f json<|message|>{"a": 1}<|call|>',
    "call with no arguments": "<|channel|>commentary to=functions.f <|constrain|>json<|message|><|call|>",
    "call of python": "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
    "call of browser.search": '<|channel|>analysis to=browser.search code<|message|>{"query": "x"}<|call|>',
    "call of an unknown function": "<|channel|>commentary to=functions.nothing "
    '<|constrain|>json<|message|>{"a": 1}<|call|>',
    "two calls": f"{CALL}{AGAIN}{WEATHER}",
    "two calls of one function": f"{CALL}{AGAIN}{CALL}",
    "call, analysis, call": f"{CALL}{AGAIN}{A}Another one.{NEXT}{WEATHER}",
    "call, final": f"{CALL}{AGAIN}{F}And that was it.<|return|>",
    "call ended by end, call": f'<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"a": '
    f"1}}{NEXT}{WEATHER}",
    "final with constrain": '<|channel|>final <|constrain|>json<|message|>{"answer": 4}<|return|>',
    "markup written as text": f"{F}Type <|fim|> or < | start | >.<|return|>",
}
MALFORMED = {
    "no markup": "Hello without any markup.",
    "no markup, ended": "Hello without any markup.<|return|>",
    "nothing": "<|return|>",
    "end of text": f"{F}Hello<|endoftext|>",
    "end of text only": "<|endoftext|>",
    "no start between": f"{A}Think.<|end|>{F}Answer.<|return|>",
    "no start, role": f"{A}Think.<|end|>assistant{F}Answer.<|return|>",
    "no role": f"{A}Think.<|end|><|start|>{F}Answer.<|return|>",
    "role twice": f"{A}Think.{NEXT}assistant{F}Answer.<|return|>",
    "role in front": f"assistant{F}Answer.<|return|>",
    "start in front": f"<|start|>assistant{F}Answer.<|return|>",
    "no channel": "<|message|>Answer.<|return|>",
    "no channel later": f"{A}Think.{NEXT}<|message|>Answer.<|return|>",
    "no message": "<|channel|>final<|end|>",
    "header into body": "<|channel|>final Hello there, this is the body.<|return|>",
    "header without message, start": f"<|channel|>analysis{AGAIN}{F}Answer.<|return|>",
    "header without message, call": "<|channel|>commentary to=functions.f <|constrain|>json<|call|>",
    "no end before start": f"{A}Think.{AGAIN}{F}Answer.<|return|>",
    "no end before channel": f"{A}Think.{F}Answer.<|return|>",
    "message in body": f"{F}One<|message|>two.<|return|>",
    "constrain in body": f"{F}One<|constrain|>two.<|return|>",
    "another role": f"{A}Think.<|end|><|start|>user<|message|>I am the user.<|end|>",
    "a tool's role": f"{CALL}<|start|>functions.f to=assistant<|channel|>commentary<|message|>result<|end|>",
    "after the turn": f"{F}Answer.<|return|>{AGAIN}{F}More.<|return|>",
    "ends twice": f"{F}Answer.<|end|><|end|><|return|>",
    "header words": "<|channel|>final with some words<|message|>Answer.<|return|>",
    "channel analysis2": f"<|channel|>analysis2<|message|>Think.{NEXT}{F}Answer.<|return|>",
    "channel Final": "<|channel|>Final<|message|>Answer.<|return|>",
    "channel justify": "<|channel|>justify<|message|>Answer.<|return|>",
    "channel without token": "final<|message|>Answer.<|return|>",
    "channel without token, call": 'commentary to=functions.f<|message|>{"a": 1}<|call|>',
    "channel twice": "<|channel|>analysis<|channel|>final<|message|>Answer.<|return|>",
    "recipient twice": ' to=functions.f<|channel|>commentary to=functions.get_weather<|message|>{"a": '
    "1}<|call|>",
    "recipient without to": '<|channel|>commentary functions.f<|message|>{"a": 1}<|call|>',
    "recipient without namespace": '<|channel|>commentary to=f<|message|>{"a": 1}<|call|>',
    "recipient user": "<|channel|>commentary to=user<|message|>Hello.<|end|>",
    "recipient assistant": "<|channel|>commentary to=assistant<|message|>Hello.<|call|>",
    "recipient empty": "<|channel|>commentary to=<|message|>Hello.<|call|>",
    "recipient functions only": "<|channel|>commentary to=functions.<|message|>Hello.<|call|>",
    "recipient glued": '<|channel|>commentary to=functions.fcommentary<|message|>{"a": 1}<|call|>',
    "recipient too long": f"<|channel|>commentary to=functions.{'x' * 300}<|message|>{{}}<|call|>",
    "constrain without recipient": f"<|channel|>commentary "
    f"<|constrain|>json<|message|>Hello.{NEXT}{F}x<|return|>",
    "call without recipient": "<|channel|>commentary<|message|>Hello.<|call|>",
    "final ended by call": f"{F}Hello.<|call|>",
    "call ended by return": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": '
    "1}<|return|>",
    "long header": f"<|channel|>final {'blah ' * 150}<|message|>Answer.<|return|>",
    "role cut": f"{A}Think.<|end|><|start|>assis",
    "reserved token": f"{F}One<|startoftext|>two<|return|>",
    "blank around": " assistant <|channel|> final <|message|> Answer. <|return|>",
}
VARIANTS: dict[str, dict[str, Json]] = {
    "logprobs": {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "no reasoning, token ids": {"include_reasoning": False, "return_token_ids": True},
    "one call": {"parallel_tool_calls": False},
    "stop": {"stop": ["there", " o"]},
    "stop, logprobs": {"stop": "e", "logprobs": True, "return_token_ids": True},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60},
    "max_tokens": {"max_tokens": 9},
    "two choices": {"n": 2, "seed": 4, "logprobs": True, "top_logprobs": 1},
}
_WORDS = (
    "assistant",
    "analysis",
    "final",
    "commentary",
    " to=functions.f",
    " to=python",
    " json",
    "user",
    "🎉",
    "The ",
    " x",
    "é",
)
_SPECIALS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
)


def all_scripts(encode: Encode) -> Iterator[Scripted]:
    """Yield every script, several hundred of them.

    Args:
        encode: text with special tokens in it to ids.
    """
    for number, (name, text) in enumerate(WELL_FORMED.items()):
        yield Scripted(name, tuple(encode(text)), per_message=(1, 2, 3, 1000)[number % 4], history=True)
    for number, (name, text) in enumerate(MALFORMED.items()):
        yield Scripted(
            f"malformed: {name}",
            tuple(encode(text)),
            per_message=(1, 3, 2)[number % 3],
            history=number % 2 == 0,
        )
    for variant, fields in VARIANTS.items():
        for name in ("analysis, final", "two finals", "analysis, preamble, call", "two calls", "call, final"):
            yield Scripted(
                f"{variant}: {name}", tuple(encode(WELL_FORMED[name])), per_message=2, fields=fields
            )
    for name in ("call", "analysis, preamble, call", "recipient before channel", "call of python"):
        yield Scripted(f"no tools: {name}", tuple(encode(WELL_FORMED[name])), tools=False)
    for name in ("analysis, final", "analysis, preamble, call", "recipient before channel"):
        ids = encode(WELL_FORMED[name])
        for cut in range(1, len(ids), 4):
            yield Scripted(f"cut after {cut}: {name}", tuple(ids[:cut]), finish="length", per_message=2)
    for finish in ("abort", "error"):
        for cut in (2, 7):
            yield Scripted(
                f"{finish} after {cut}", tuple(encode(WELL_FORMED["analysis, final"])[:cut]), finish=finish
            )
    yield from _random_scripts(encode)


def _random_scripts(encode: Encode) -> Iterator[Scripted]:
    draw = random.Random(20)
    specials = [encode(name)[0] for name in _SPECIALS]
    words = [encode(word) for word in _WORDS]
    for number in range(40):
        ids: list[int] = []
        for _ in range(draw.randrange(4, 40)):
            kind = draw.random()
            if kind < 0.4:
                ids.append(draw.choice(specials[:5] if kind < 0.33 else specials))
            elif kind < 0.75:
                ids += draw.choice(words)
            else:
                ids.append(draw.randrange(2048))
        fields = (
            VARIANTS["logprobs"] if number % 5 == 0 else VARIANTS["ignore_eos"] if number % 5 == 1 else {}
        )
        yield Scripted(
            f"random {number}",
            tuple(ids),
            draw.choice((1, 1, 2, 5)),
            draw.choice(("stop", "length")),
            dict(fields),
        )
    turns = [encode(text) for text in WELL_FORMED.values()]
    for number in range(40):
        ids = _mutated(draw, draw.choice(turns), specials)
        yield Scripted(
            f"mutated {number}", tuple(ids), draw.choice((1, 1, 2, 5)), draw.choice(("stop", "length"))
        )


def _mutated(draw: random.Random, turn: Sequence[int], specials: Sequence[int]) -> list[int]:
    ids = list(turn)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(ids))
        match draw.randrange(4):
            case 0 if len(ids) > 1:
                del ids[place]
            case 1:
                ids.insert(place, draw.choice(specials))
            case 2:
                ids[place] = draw.choice(specials)
            case _:
                ids[place:place] = ids[place : place + draw.randrange(1, 6)]
    return ids
