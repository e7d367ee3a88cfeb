"""Many streamed completions at once against a server whose engines may be killed meanwhile."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable

import httpx

from tests.support.served import MODEL_NAME, Served

FIRST_CHUNKS = 3
NUM_TOKENS = 400
"""Number of tokens of each stream: an engine is to be far from done with the running streams when
the reader gets their first tokens."""


def read_many(
    served: Served, num_streams: int, num_running: int, then: Callable[[], None] = lambda: None
) -> list[str]:
    """Return the texts of greedy completions of different prompts, all requested at once.

    Args:
        num_running: number of streams that run at a time; the others wait in their engines.
        then: called when this many have sent FIRST_CHUNKS chunks.
    Raises:
        AssertionError: a stream was refused, broke off or sent an error.
    """
    return asyncio.run(_read_many(served, num_streams, num_running, then))


async def _read_many(
    served: Served, num_streams: int, num_running: int, then: Callable[[], None]
) -> list[str]:
    began: Counter[int] = Counter()
    came = asyncio.Event()
    async with httpx.AsyncClient(
        base_url=served.url, timeout=120, trust_env=False, limits=httpx.Limits()
    ) as client:
        streams = [asyncio.create_task(_read(client, index, began, came)) for index in range(num_streams)]
        async with asyncio.timeout(60):
            while sum(count >= FIRST_CHUNKS for count in began.values()) < num_running:
                came.clear()
                await came.wait()
        then()
        return await asyncio.gather(*streams)


async def _read(client: httpx.AsyncClient, index: int, began: Counter[int], came: asyncio.Event) -> str:
    body = {
        "model": MODEL_NAME,
        "prompt": f"{index} is a number",
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    text, last = "", ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                began[index] += 1
                came.set()
            last = line or last
    assert last == "data: [DONE]"
    return text


def counted(served: Served, name: str) -> float:
    """Return the sum of the samples on the metrics page whose line starts with `name`."""
    page = httpx.get(f"{served.url}/metrics", timeout=30, trust_env=False).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))
