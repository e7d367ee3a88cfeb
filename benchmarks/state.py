"""What the state costs a gateway, in processor time: continuing a long chain of stored
responses, and writing the tokens of many background responses.

    python -m benchmarks.state [--turns 1000] [--tokens 100000] [--streams 1000]

The database is an SQLite file in a temporary folder.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.frontend.responses.items import Seals, input_messages
from cluster.frontend.responses.schema_items import Item
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.harmony.render import Conversation, render
from cluster.sealing import Sealer
from cluster.state.background import Background
from cluster.state.responses import ResponseRecord
from cluster.state.rows import StoredItem
from cluster.state.settings import StateConfig, location
from cluster.state.state import State, open_state
from workers.request import EngineOutput

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_REPEATS = 7
_TOKENS_A_SECOND = 30


def words(encoding: HarmonyEncoding, num_tokens: int) -> str:
    """Return a text of about so many tokens."""
    sample = "the gateway continues what another copy began and the engine finds its prefix "
    per_sample = len(encoding.encode(sample))
    return sample * max(1, num_tokens // per_sample)


async def chain(state: State, encoding: HarmonyEncoding, turns: int, tokens: int) -> str:
    """Store a chain of turns, a question and an answer each; return the last id."""
    text, previous = words(encoding, tokens // turns // 2), None
    for index in range(turns):
        id = f"resp_{index}"
        question = StoredItem(
            {
                "id": f"msg_{index}",
                "type": "message",
                "role": "user",
                "status": "completed",
                "content": [{"type": "input_text", "text": text}],
            }
        )
        answer = StoredItem(
            {
                "id": f"out_{index}",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "phase": "final_answer",
                "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
            }
        )
        record = ResponseRecord(id, "", int(time.time()), {}, (question,), previous_response_id=previous)
        await state.responses.put(record, "completed", {"id": id}, [answer])
        previous = id
    assert previous is not None
    return previous


async def timed(name: str, work: Callable[[], Awaitable[Any]]) -> Any:
    """Print the median processor time of `work`, all threads together; return its last result."""
    times, result = [], None
    for _ in range(_REPEATS):
        begin = time.process_time()
        result = await work()
        times.append(time.process_time() - begin)
    print(f"{name:<44} {statistics.median(times) * 1000:8.1f} ms  (first {times[0] * 1000:.1f})")
    return result


async def measure_chain(state: State, encoding: HarmonyEncoding, turns: int, tokens: int) -> None:
    """Measure what continuing a chain costs, step by step."""
    last = await chain(state, encoding, turns, tokens)
    seals = Seals(Sealer(b"benchmark" * 4), "")
    history = await timed(f"read {turns} turns", lambda: state.responses.history(last, ""))

    async def items() -> list[Item]:
        return _ITEMS.validate_python([item.body for item in history.items])

    found = await timed("check the items", items)

    async def messages() -> Any:
        return input_messages(found, None, seals, len(found))

    made = await timed("as harmony's messages", messages)

    async def prompt() -> list[int]:
        return render(Conversation(made), encoding)

    ids = await timed("as token ids", prompt)
    print(f"{len(ids)} tokens")


async def measure_streams(state: State, streams: int) -> None:
    """Measure a second of many background responses, in one transaction and in ten."""
    background: Background = state.background
    for index in range(streams):
        await background.begin(ResponseRecord(f"bg_{index}", "", int(time.time()), {}, ()))
    start = 0
    for writes in (1, 10):
        count = max(1, _TOKENS_A_SECOND // writes)
        times = []
        for _ in range(_REPEATS):
            begin = time.process_time()
            for _ in range(writes):
                outputs = [EngineOutput((200_000,)) for _ in range(count)]
                await background.add({f"bg_{index}": (start, outputs) for index in range(streams)})
                start += count
            times.append(time.process_time() - begin)
        print(
            f"{streams} streams, {writes} transactions of {count} tokens each: "
            f"{statistics.median(times) * 1000:.0f} ms of processor time a second"
        )


async def main(turns: int, tokens: int, streams: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bpe_tokenizer(folder, 2048)
        encoding = HarmonyEncoding.load(folder, 2048)
        settings = StateConfig(url=f"sqlite:///{folder / 'state.sqlite3'}")
        state = await open_state(location(settings, several_hosts=False), settings)
        assert state is not None
        try:
            await measure_chain(state, encoding, turns, tokens)
            await measure_streams(state, streams)
        finally:
            await state.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=1000)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.turns, arguments.tokens, arguments.streams))
