"""The load of a benchmark: prompts, random or from a file, and arrival times. The same seed gives
the same load."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from workers.errors import ConfigError

Endpoint = Literal["chat", "completions"]

SAMPLE_TEXT = (
    "amber anchor apple autumn basket beacon berry birch blanket bottle branch bridge bronze cabin candle "
    "canyon carpet castle cedar "
    "cherry circle clover cobalt copper coral cotton crystal daisy desert dragon eagle ember engine falcon "
    "feather fiddle forest "
    "fossil garden ginger glacier granite harbor hazel helmet hollow indigo island ivory jacket jasmine "
    "jungle kernel kettle ladder "
    "lagoon lantern lemon lilac linen magnet maple marble meadow mirror mosaic needle nickel olive orbit "
    "orchid paper pebble pepper "
    "pillow planet pocket prairie pumpkin quartz rabbit raven ribbon river saddle salmon shadow silver "
    "socket spiral spring summit "
    "temple thunder timber tulip tunnel valley velvet violet walnut willow window winter yellow zephyr"
)
"""Text whose words, or tokens, random prompts are made of."""

WORDS = tuple(SAMPLE_TEXT.split())


@dataclass(frozen=True, slots=True)
class Messages:
    """Chat messages of a dataset, kept as their original JSON."""

    as_json: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to send.

    Attributes:
        content: text (a user message for chat), token ids (completions), or chat messages as JSON
            text.
        max_tokens: output tokens to request.
    """

    content: str | tuple[int, ...] | Messages
    max_tokens: int


def random_ids(count: int, length: int, max_tokens: int, pool: Sequence[int], seed: int) -> list[Prompt]:
    """Return prompts of exactly `length` token ids drawn from `pool`; shared prefixes are
    accidental."""
    draw = random.Random(f"{seed}/prompts")
    return [Prompt(tuple(draw.choices(pool, k=length)), max_tokens) for _ in range(count)]


def random_text(count: int, length: int, max_tokens: int, tokens_per_word: float, seed: int) -> list[Prompt]:
    """Return prompts of random words, about `length` tokens each (at least one word)."""
    draw = random.Random(f"{seed}/prompts")
    num_words = max(1, round(length / tokens_per_word))
    return [Prompt(" ".join(draw.choices(WORDS, k=num_words)), max_tokens) for _ in range(count)]


def read_dataset(file: Path, endpoint: Endpoint, count: int, max_tokens: int) -> list[Prompt]:
    """Read the first `count` prompts of a JSONL file, repeating it if it has fewer.

    Each line is an object with `prompt` (text, or token ids for completions) or `messages` (chat
    only), and optionally `max_tokens`.

    Raises:
        ConfigError: the file cannot be read, has no lines, or contains an invalid line, which is
            named.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            prompts = list(_read_lines(lines, str(file), endpoint, count, max_tokens))
    except OSError as error:
        raise ConfigError(f"dataset {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"dataset {file} is not UTF-8 text") from None
    if not prompts:
        raise ConfigError(f"dataset {file} has no prompts")
    return [prompts[index % len(prompts)] for index in range(count)]


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Return the seconds after the start at which each request is sent: a Poisson process of `rate`
    per second, scaled so that the last one is sent at count / rate and all seeds offer the same
    load (as in vLLM's `bench serve`)."""
    draw = random.Random(f"{seed}/arrivals")
    times = list(accumulate(draw.expovariate(rate) for _ in range(count)))
    scale = count / rate / times[-1]
    return [time * scale for time in times]


def _read_lines(
    lines: Iterator[str], source: str, endpoint: Endpoint, count: int, max_tokens: int
) -> Iterator[Prompt]:
    found = 0
    for number, line in enumerate(lines, start=1):
        if found == count:
            return
        if line.strip():
            found += 1
            yield _read_prompt(line, f"dataset {source}, line {number}", endpoint, max_tokens)


def _read_prompt(line: str, where: str, endpoint: Endpoint, default_max_tokens: int) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where} is not JSON") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object with prompt or messages")
    if unknown := set(value) - {"prompt", "messages", "max_tokens"}:
        raise ConfigError(
            f"{where} has the unknown field {min(unknown)}; known are prompt, messages and max_tokens"
        )
    if ("prompt" in value) == ("messages" in value):
        raise ConfigError(f"{where} must have either prompt or messages")
    max_tokens = value.get("max_tokens", default_max_tokens)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ConfigError(f"{where}: max_tokens must be a positive integer")
    if "messages" in value:
        if endpoint != "chat":
            raise ConfigError(f"{where} has messages, which only --endpoint chat can send")
        if not isinstance(value["messages"], list):
            raise ConfigError(f"{where}: messages must be a list")
        return Prompt(Messages(json.dumps(value["messages"])), max_tokens)
    prompt = value["prompt"]
    if isinstance(prompt, str):
        return Prompt(prompt, max_tokens)
    if endpoint == "completions" and isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return Prompt(tuple(prompt), max_tokens)
    raise ConfigError(
        f"{where}: prompt must be text{' or a list of token ids' if endpoint == 'completions' else ''}"
    )
