"""One request's output, from the engine's thread to its reader."""

import pytest

from workers.engine.stream import MAX_PROMPT_LOGPROBS, OutputStream, ThreadReader
from workers.errors import EngineDead
from workers.request import EngineOutput, TokenLogprobs


@pytest.fixture
def stream() -> OutputStream:
    return OutputStream("r", 3, ThreadReader())


def test_the_first_end_counts(stream: OutputStream) -> None:
    stream.push((5, 6), (), 2)
    assert not stream.ended
    assert stream.end("stop", stop_token_id=6)
    assert stream.ended
    assert not stream.end("error", error="the engine is dead", failure=EngineDead("the engine is dead"))
    stream.push((7,), (TokenLogprobs(-1.0),), 9)
    stream.push_prompt((TokenLogprobs(-2.0),))
    assert stream.failure is None
    assert stream.take() == EngineOutput((5, 6), (), "stop", 6, 2)
    assert stream.take() is None
    assert not stream.end("abort")
    assert stream.take() is None


def test_output_is_taken_once_and_the_end_comes_alone_if_it_must(stream: OutputStream) -> None:
    assert stream.take() is None
    entries = tuple(TokenLogprobs(-float(token)) for token in (5, 6, 7))
    stream.push((5,), entries[:1], 1)
    stream.push((6, 7), entries[1:], 1)
    assert stream.take() == EngineOutput((5, 6, 7), entries, num_cached_tokens=1)
    assert stream.take() is None
    failure = EngineDead("gone")
    assert stream.end("error", error="gone", failure=failure)
    assert stream.failure is failure
    assert stream.take() == EngineOutput((), (), "error", None, 1, "gone")


def test_log_probabilities_of_a_long_prompt_come_in_parts_before_the_tokens(stream: OutputStream) -> None:
    entries = tuple(TokenLogprobs(-float(position)) for position in range(2 * MAX_PROMPT_LOGPROBS + 1))
    stream.push_prompt(entries)
    stream.push((5,), (), 0)
    stream.end("length")
    parts = [stream.take(), stream.take(), stream.take()]
    assert [part and len(part.prompt_logprobs) for part in parts] == [
        MAX_PROMPT_LOGPROBS,
        MAX_PROMPT_LOGPROBS,
        1,
    ]
    assert sum((part.prompt_logprobs for part in parts if part), ()) == entries
    assert [part and (part.token_ids, part.finish_reason) for part in parts] == [
        ((), None),
        ((), None),
        ((5,), "length"),
    ]
    assert stream.take() is None
