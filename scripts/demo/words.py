"""The words of which names and values are made. They are spelled letter by letter, so that a name
the model never saw is read like one it knows."""

import random
from collections.abc import Callable
from functools import partial

from scripts.demo.split import Split, pick
from scripts.demo.word_lists import CHOICES, CITIES, FIRST_NAMES, NOUNS, TWO_WORDS, VERBS

_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "kr",
    "pl",
    "pr",
    "sh",
    "sk",
    "sl",
    "sp",
    "st",
    "th",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "x", "nd", "rk"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up(rng: random.Random) -> str:
    """Return a word that does not exist, in lower case."""
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choices((2, 3), (3, 1))[0])
    ]
    return "".join(syllables)


def tool_name(rng: random.Random, split: Split) -> str:
    """Return the name of a function: two words, rarely one."""

    def make() -> str:
        noun = made_up(rng) if rng.random() < 0.4 else rng.choice(NOUNS)
        verb = made_up(rng) if rng.random() < 0.15 else rng.choice(VERBS)
        kind = rng.random()
        if kind < 0.75:
            return f"{verb}_{noun}"
        if kind < 0.9:
            return f"{verb}{noun.capitalize()}"
        return f"{verb}_{noun}_{rng.choice(NOUNS)}"

    return pick(make, split)


def parameter_name(rng: random.Random, known: tuple[str, ...], split: Split) -> str:
    """Return the name of a parameter: one of those known, a word or two."""

    def make() -> str:
        kind = rng.random()
        if kind < 0.55:
            return rng.choice(known)
        if kind < 0.75:
            return f"{rng.choice(NOUNS)}_{pick(lambda: rng.choice(known), 'train')}"
        return made_up(rng)

    return pick(make, split)


def person(rng: random.Random, split: Split) -> str:
    return pick(partial(_name, rng, FIRST_NAMES), split)


def city(rng: random.Random, split: Split) -> str:
    return pick(partial(_name, rng, CITIES), split)


def _name(rng: random.Random, known: tuple[str, ...]) -> str:
    return rng.choice(known) if rng.random() < 0.5 else made_up(rng).capitalize()


def text_value(rng: random.Random, split: Split) -> str:
    """Return a string that a user may give: a name, a word, two words, an id, a file. Of two words
    and of a file the made-up part belongs to the part."""
    return rng.choices(_MAKERS, _WEIGHTS)[0](rng, split)


def choices(rng: random.Random, split: Split) -> list[str]:
    """Return the values of an enumeration, two or three, all different."""
    found: list[str] = []
    while len(found) < 2 or (len(found) < 3 and rng.random() < 0.5):
        word = pick(lambda: rng.choice(CHOICES) if rng.random() < 0.6 else made_up(rng), split)
        found += [word] if word not in found else []
    return found


def word(rng: random.Random, split: Split) -> str:
    """Return a made-up word."""
    return pick(lambda: made_up(rng), split)


def _two_words(rng: random.Random, split: Split) -> str:
    return f"{rng.choice(TWO_WORDS)} {word(rng, split).capitalize()}"


def _id(rng: random.Random, split: Split) -> str:
    def make() -> str:
        letters = "".join(rng.choices(_LETTERS, k=rng.randint(1, 2))).upper()
        return f"{letters}{rng.choice(('-', ''))}{rng.randint(10, 9999)}"

    return pick(make, split)


def _file(rng: random.Random, split: Split) -> str:
    return f"{word(rng, split)}.{rng.choice(('txt', 'csv', 'pdf', 'png'))}"


def _letters(rng: random.Random, split: Split) -> str:
    return pick(lambda: "".join(rng.choices(_LETTERS, k=rng.randint(4, 8))), split)


_MAKERS: tuple[Callable[[random.Random, Split], str], ...] = (
    person,
    city,
    word,
    lambda rng, split: word(rng, split).capitalize(),
    _two_words,
    _id,
    _file,
    _letters,
)
_WEIGHTS = (3, 3, 4, 2, 2, 2, 1, 3)
