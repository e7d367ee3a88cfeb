"""Processor time of the gateway per token of a stream: chat against the Responses API, in
pairs that take turns.

The app is called without sockets, over an engine that has its tokens ready: what is measured is
reading tokens, folding, and writing events. Run from the repository root: `python3 -m
benchmarks.stream_cost [--tokens 2000] [--pairs 15] [--per-message 1]`.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI

from cluster.assembly import connect
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.frontend.app import build_app
from cluster.generation import ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from workers.request import EngineOutput, EngineRequest

VOCAB_SIZE = 2048
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "stream": True},
    "/v1/responses": {"input": "Hello", "stream": True},
}


class ReadyEngine:
    """An engine client whose tokens are ready."""

    def __init__(self, token_ids: list[int], per_message: int) -> None:
        self._token_ids = token_ids
        self._per_message = per_message

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        ids, step = self._token_ids, self._per_message
        for start in range(0, len(ids), step):
            is_last = start + step >= len(ids)
            yield EngineOutput(tuple(ids[start : start + step]), finish_reason="length" if is_last else None)

    async def close(self) -> None:
        """See EngineClient."""


async def stream(app: FastAPI, path: str) -> tuple[float, int]:
    """Return the processor seconds of one stream, and its size in bytes."""
    data = json.dumps(BODIES[path]).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    parts = [{"type": "http.request", "body": data, "more_body": False}]
    num_bytes = 0

    async def receive() -> MutableMapping[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal num_bytes
        num_bytes += len(message.get("body", b""))

    begin = time.process_time()
    await app(scope, receive, send)
    return time.process_time() - begin, num_bytes


async def measure(num_tokens: int, num_pairs: int, per_message: int) -> None:
    """Print the cost of each API and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        write_bpe_tokenizer(Path(folder), VOCAB_SIZE)
        encoding = HarmonyEncoding.load(Path(folder), VOCAB_SIZE)
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    words = encoding.encode_with_special("The quick brown fox jumps over the lazy dog. ")
    ids = encoding.encode_with_special(text)
    ids += (words * (num_tokens // len(words) + 1))[: num_tokens - len(ids)]
    replicas = ReplicaSet()
    replicas.replace([Replica("a", "host:1")])
    model = ModelInfo("m", 2 * num_tokens + 1000, VOCAB_SIZE)
    engine = cast(EngineClient, ReadyEngine(ids, per_message))
    gateway = connect(model, encoding, replicas, engine)
    app = build_app(gateway.service, gateway.status)
    times: dict[str, list[float]] = {path: [] for path in BODIES}
    sizes: dict[str, int] = {}
    for _ in range(num_pairs + 1):
        for path in BODIES:
            seconds, sizes[path] = await stream(app, path)
            times[path].append(seconds)
    await gateway.service.close()
    chat, responses = (times[path][1:] for path in BODIES)  # the first pair warms up
    for path in BODIES:
        microseconds = statistics.median(times[path][1:]) / num_tokens * 1e6
        print(f"{path:24} {microseconds:7.1f} us a token, {sizes[path] / num_tokens:6.0f} bytes a token")
    ratio = statistics.median(b / a for a, b in zip(chat, responses, strict=True))
    print(f"responses / chat: {ratio:.2f} (median of {num_pairs} pairs)")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--per-message", type=int, default=1)
    asked = parser.parse_args()
    asyncio.run(measure(asked.tokens, asked.pairs, asked.per_message))


if __name__ == "__main__":
    main()
