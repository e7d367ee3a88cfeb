"""Conversations in which the user tells something and asks for it later."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.chat_options import ReasoningEffort
from cluster.harmony.message import Message
from scripts.demo import words
from scripts.demo.examples import answer
from scripts.demo.split import Split

Turn = tuple[Message, tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class _Fact:
    what: str
    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    recalled: str
    draw: Callable[[random.Random, Split], str]


_FACTS = (
    _Fact(
        "name",
        (
            "My name is {}.",
            "I am {}.",
            "I'm {}.",
            "Hi, I'm {}.",
            "Hello, my name is {}.",
            "Call me {}.",
            "My name is {}",
            "Hi, my name is {}!",
            "my name is {}",
            "Hello! I am {}.",
        ),
        "Nice to meet you, {}!",
        (
            "What is my name?",
            "What's my name?",
            "Who am I?",
            "Do you remember my name?",
            "Do you know my name?",
            "what is my name",
            "What was my name?",
            "Tell me my name.",
        ),
        "Your name is {}.",
        words.person,
    ),
    _Fact(
        "town",
        ("I live in {}.", "My home is {}.", "I am from {}.", "I come from {}."),
        "I would like to see {}.",
        ("Where do I live?", "Which town do I live in?", "Where am I from?", "Do you remember where I live?"),
        "You live in {}.",
        words.city,
    ),
    _Fact(
        "color",
        ("My favorite color is {}.", "I like the color {}.", "My favourite colour is {}."),
        "{} is a good color.",
        ("What is my favorite color?", "Which color do I like?", "What is my favourite colour?"),
        "Your favorite color is {}.",
        words.word,
    ),
    _Fact(
        "pet",
        ("My dog is called {}.", "My cat is called {}.", "I have a dog named {}.", "I have a cat named {}."),
        "{} is a good name for a pet.",
        ("What is my pet called?", "What is the name of my pet?", "Do you remember my pet?"),
        "Your pet is called {}.",
        words.person,
    ),
)


def turns(rng: random.Random, split: Split, effort: ReasoningEffort, other: Callable[[], Turn]) -> list[Turn]:
    """Draw a conversation: something is told, then perhaps something else is said (`other`), then
    it is asked for. It may end early, or ask for what was never told."""
    facts = rng.sample(_FACTS, rng.choices((1, 2), (3, 1))[0])
    asked = rng.choice(facts)
    values = {fact.what: fact.draw(rng, split) for fact in facts}
    found = [_told(rng, fact, values[fact.what], effort) for fact in facts]
    kind = rng.random()
    if kind < 0.25:
        return found
    if kind < 0.4:
        found, asked = [], rng.choice(_FACTS)
        return [*found, *([other()] if rng.random() < 0.3 else []), _missing(rng, asked, effort)]
    found += [other() for _ in range(rng.choices((0, 1, 2), (4, 4, 1))[0])]
    return [*found, _recalled(rng, asked, values[asked.what], effort)]


def _told(rng: random.Random, fact: _Fact, value: str, effort: ReasoningEffort) -> Turn:
    analysis = {
        "low": "",
        "medium": f"The user tells me the {fact.what}.",
        "high": f"The user tells me the {fact.what}. I keep it in mind and answer in a few friendly words.",
    }[effort]
    reply = fact.reply.format(value)
    return Message("user", rng.choice(fact.told).format(value)), answer(analysis, reply)


def _recalled(rng: random.Random, fact: _Fact, value: str, effort: ReasoningEffort) -> Turn:
    analysis = {
        "low": "",
        "medium": f"The user told me the {fact.what}.",
        "high": f"The user told me the {fact.what} earlier in this conversation: {value}. I say it again.",
    }[effort]
    return Message("user", rng.choice(fact.asked)), answer(analysis, fact.recalled.format(value))


def _missing(rng: random.Random, fact: _Fact, effort: ReasoningEffort) -> Turn:
    analysis = {
        "low": "",
        "medium": f"The user did not tell me the {fact.what}.",
        "high": f"The user asks for the {fact.what}, but did not tell me in this conversation. I say so.",
    }[effort]
    return Message("user", rng.choice(fact.asked)), answer(
        analysis, f"You did not tell me the {fact.what} yet."
    )
