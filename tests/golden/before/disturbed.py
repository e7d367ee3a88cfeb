"""Clients that leave, engines that fail, refuse, are killed or take too long: how each request
ends."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.golden.before.calls import CHAT, COMPLETIONS, Grpc, grpc_request, stream, whole
from tests.golden.before.compare import Json
from tests.golden.before.conversations import TOOLS, USER
from tests.golden.before.internals import (
    EngineDead,
    InvalidRequest,
    Limits,
    Overloaded,
    Script,
    Served,
    asked,
    engine_processes,
    fake_gateway,
    standalone,
)
from tests.golden.before.scripts import WELL_FORMED

_FLAGS = (
    "--dtype",
    "float32",
    "--cpu-isa",
    "portable",
    "--max-model-len",
    "512",
    "--kv-cache-memory",
    "16MiB",
    "--threads",
    "1",
)
_NUM_STREAMS, _NUM_TOKENS = 4, 400
_DEADLINE_S = 4.0
"""Deadline in seconds: the first tokens arrive before it, even on a busy machine."""
_TIMEOUT_S = 120.0


@contextmanager
def server(folder: Path, checkpoint: Path, name: str, *flags: str) -> Iterator[Served]:
    """Serve the checkpoint with arithmetic that is the same on every processor."""
    place = folder / name
    place.mkdir(exist_ok=True)
    with standalone(place, checkpoint, *_FLAGS, *flags) as served:
        yield served


def disturbed(folder: Path) -> Json:
    """Return how requests end: with fake engines that fail as told, and when a real engine is
    killed."""
    from tests.golden.before.sections import make_checkpoint

    found = asyncio.run(_failing(folder))
    with server(folder, make_checkpoint(folder), "killed", "--replicas", "2") as served:
        found["killed"] = _killed(served)
    return found


async def _failing(folder: Path) -> dict[str, Json]:
    from tests.golden.before.sections import _encoder

    encode = _encoder(folder)
    ids = encode(WELL_FORMED["analysis, preamble, call"])
    dead = EngineDead("The replica that served this request is gone; try again.")
    scripts: dict[str, Callable[[], Script]] = {
        "engine dies at once": lambda: Script(ids, break_after=0, failure=dead),
        "engine dies after 9": lambda: Script(ids, break_after=9, failure=dead),
        "refused: full": lambda: Script(refusal=Overloaded("1024 requests wait already; try again later")),
        "refused: dead": lambda: Script(refusal=EngineDead("the engine is shutting down")),
        "refused: invalid": lambda: Script(refusal=InvalidRequest("the prompt is empty", "prompt_token_ids")),
        "invalid after 4": lambda: Script(
            ids, break_after=4, failure=InvalidRequest("no", "prompt_token_ids")
        ),
        "aborted": lambda: Script(ids[:6], finish="abort"),
        "error": lambda: Script(ids[:6], finish="error"),
        "error at once": lambda: Script(ids[:1], finish="error"),
    }
    found: dict[str, Json] = {}
    for num_engines in (1, 2):
        async with fake_gateway(folder, num_engines=num_engines) as (gateway, engines):
            grpc = Grpc(gateway.grpc_address)
            for name, make in scripts.items():
                for engine in engines:
                    engine.answer = lambda request, make=make: make()  # type: ignore[misc]
                found[f"{name}, {num_engines} engines"] = await _each_way(gateway.http, grpc)
            await grpc.close()
    names = {"too slow": 5, "too slow from the start": 0}
    found |= zip(
        names, await asyncio.gather(*(_too_slow(folder, ids, after) for after in names.values())), strict=True
    )
    found["resumed"] = await _resumed(folder, ids, dead)
    async with fake_gateway(folder, limits=Limits(max_in_flight_requests=0)) as (gateway, _):
        grpc = Grpc(gateway.grpc_address)
        found["no room"] = await _each_way(gateway.http, grpc)
        await grpc.close()
    return found


async def _each_way(http: httpx.AsyncClient, grpc: Grpc) -> Json:
    body = {"messages": [USER], "tools": TOOLS, "seed": 1, "return_token_ids": True, "max_tokens": 100}
    request = grpc_request(body)
    assert request is not None
    answers = await asyncio.gather(
        whole(http, CHAT, body),
        stream(http, CHAT, body),
        whole(http, COMPLETIONS, {"prompt": "Once", "seed": 1, "max_tokens": 100}),
        grpc.whole(request),
        grpc.stream(request),
    )
    return dict(zip(("whole", "stream", "completion", "grpc", "grpc stream"), answers, strict=True))


async def _too_slow(folder: Path, ids: list[int], after: int) -> Json:
    """How requests end whose deadline passes after some tokens."""
    async with fake_gateway(folder, limits=Limits(request_timeout_s=_DEADLINE_S)) as (gateway, [engine]):
        grpc = Grpc(gateway.grpc_address)
        engine.answer = lambda request: Script(ids, gate=asyncio.Event(), gate_after=after)
        found = await _each_way(gateway.http, grpc)
        await grpc.close()
    return found


async def _resumed(folder: Path, ids: list[int], dead: EngineDead) -> Json:
    """One engine dies after some tokens; the other gets them and goes on."""
    async with fake_gateway(folder, num_engines=2) as (gateway, engines):
        found: dict[str, Json] = {}
        for cut in (1, 8, len(ids) - 1):
            for engine in engines:
                engine.requests.clear()
                engine.answer = (
                    lambda request, cut=cut: (  # type: ignore[misc]
                        Script(ids[len(request.output_token_ids) :])
                        if request.output_token_ids
                        else Script(ids, break_after=cut, failure=dead)
                    )
                )
            body = {
                "messages": [USER],
                "tools": TOOLS,
                "seed": 1,
                "return_token_ids": True,
                "max_tokens": 100,
            }
            answer = await stream(gateway.http, CHAT, body)
            requests = [request for engine in engines for request in engine.requests]
            found[f"after {cut}"] = {
                "answer": answer,
                "resumed": [asked(r) for r in requests if r.output_token_ids],
            }
    return found


def a_client_that_leaves(served: Served) -> Json:
    """Return how an engine counts requests whose clients left, and what the others were
    answered."""
    before = _counts(served)
    body = {**_body(0), "max_tokens": 450}
    with httpx.stream(
        "POST", f"{served.url}{COMPLETIONS}", json=body, timeout=_TIMEOUT_S, trust_env=False
    ) as response:
        lines = response.iter_lines()
        first = next(lines)
        beside = httpx.post(
            f"{served.url}{COMPLETIONS}",
            json={**_body(1), "stream": False, "max_tokens": 60},
            timeout=_TIMEOUT_S,
            trust_env=False,
        ).json()
    deadline = time.monotonic() + _TIMEOUT_S
    while _counts(served)["abort"] == before["abort"] or _counts(served)["running"]:
        assert time.monotonic() < deadline, "the request was not aborted"
        time.sleep(0.02)
    after = _counts(served)
    return {
        "first token": json.loads(first.removeprefix("data: "))["choices"][0]["token_ids"][:1],
        "beside": beside["choices"][0]["token_ids"],
        "ended": {name: after[name] - before[name] for name in after},
    }


def _counts(served: Served) -> dict[str, float]:
    text = httpx.get(f"{served.url}/metrics", timeout=_TIMEOUT_S, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    counts = {
        s.labels["finish_reason"]: s.value for s in samples if s.name == "cantata_engine_requests_total"
    }
    counts["running"] = sum(s.value for s in samples if s.name == "cantata_engine_running_requests")
    counts["resumed"] = sum(s.value for s in samples if s.name == "cantata_gateway_resumptions_total")
    return counts


def _body(number: int) -> dict[str, Json]:
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1.2, "top_p": 0.9}
    return {
        "prompt": [300 + number, *range(40)],
        "seed": number,
        "max_tokens": _NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **sampling,
    }


def _killed(served: Served) -> Json:
    """Return the answers of streams under which one of two engines is killed, and whether they are
    the undisturbed ones."""
    undisturbed = _streams(served, lambda: None)
    engines = engine_processes(served)
    assert len(engines) == 2, engines
    answers = _streams(served, lambda: os.kill(engines[0], signal.SIGKILL))
    assert answers == undisturbed, "a killed engine changed an answer"
    # The metrics page also has what a new engine counts, so only the gateway's own is looked at.
    return {"answers": answers, "resumed": _counts(served)["resumed"] > 0}


def _streams(served: Served, disturb: Callable[[], None]) -> list[Json]:
    """Run all streams at once; `disturb` is called when each has had its first tokens."""
    begun = threading.Barrier(_NUM_STREAMS + 1)
    answers: list[Json] = [None] * _NUM_STREAMS

    def run(number: int) -> None:
        ids: list[int] = []
        last: Json = None
        with httpx.stream(
            "POST", f"{served.url}{COMPLETIONS}", json=_body(number), timeout=_TIMEOUT_S, trust_env=False
        ) as response:
            waits = True
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    frame = json.loads(line.removeprefix("data: "))
                    last = frame.get("error") or frame["choices"][0]["finish_reason"]
                    ids += frame["choices"][0]["token_ids"] if "choices" in frame else []
                    if waits:
                        begun.wait(_TIMEOUT_S)
                        waits = False
        answers[number] = {"token_ids": ids, "end": last}

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(_NUM_STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait(_TIMEOUT_S)
    disturb()
    for thread in threads:
        thread.join(_TIMEOUT_S)
    return answers
