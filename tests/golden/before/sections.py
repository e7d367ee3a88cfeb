"""What is recorded, in sections: each function returns names and values that a run without changes
gives again."""

import asyncio
import base64
import contextlib
import importlib.metadata
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import httpx
import msgpack
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from tests.golden.before import disturbed
from tests.golden.before.calls import CHAT, COMPLETIONS, Grpc, grpc_request, stream, whole
from tests.golden.before.compare import Json, masked
from tests.golden.before.conversations import TOOLS, USER, conversations, result
from tests.golden.before.edges import ROUTES, TOKENS, edges
from tests.golden.before.internals import (
    FakeEngine,
    Gateway,
    Script,
    asked,
    built_plan,
    built_result,
    cantata_main,
    engine_main,
    fake_gateway,
    scheduled_plans,
)
from tests.golden.before.offline import offline
from tests.golden.before.scripts import WELL_FORMED, Scripted, all_scripts
from tests.golden.before.served_cases import served as served_cases

_SPECIAL_NAMES = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "cantata": ("--help",),
    "serve": ("serve", "--help"),
    "inspect": ("inspect", "--help"),
    "make-checkpoint": ("make-checkpoint", "--help"),
    "bench": ("bench", "--help"),
    "bench serve": ("bench", "serve", "--help"),
    "bench engine": ("bench", "engine", "--help"),
    "version": ("version",),
    "no command": (),
    "unknown command": ("nonsense",),
    "no model": ("serve", "--standalone"),
    "no such folder": ("serve", "--standalone", "--model", "/nowhere"),
    "wrong dtype": ("serve", "--model", "x", "--dtype", "int8"),
    "wrong isa": ("serve", "--model", "x", "--cpu-isa", "sse9"),
    "wrong flag": ("serve", "--modle", "x"),
    "no preset": ("make-checkpoint", "OUT"),
    "inspect CHECKPOINT": ("inspect", "CHECKPOINT"),
    "inspect CHECKPOINT, json": ("inspect", "CHECKPOINT", "--json", "--tp", "2", "--gpu", "h100"),
    "inspect nothing": ("inspect", "/nowhere"),
    "dry run": ("make-checkpoint", "--preset", "20b", "--dry-run", "OUT"),
}


def make_checkpoint(folder: Path) -> Path:
    """Write the tiny random checkpoint, as a user would, and return its path."""
    path = folder / "tiny"
    if not path.exists():
        made = _called(cantata_main, "make-checkpoint", "--preset", "tiny", "--seed", "5", str(path))
        assert made["exit code"] == 0, made
    return path


def scripted(folder: Path) -> Json:
    """Scripted turns through the real gateway: HTTP whole, events and gRPC, and their answers as
    history."""
    return asyncio.run(_scripted(folder))


async def _scripted(folder: Path) -> Json:
    async with fake_gateway(folder) as (gateway, [engine]):
        encode = _encoder(folder)
        grpc = Grpc(gateway.grpc_address)
        found: dict[str, Json] = {}
        for number, script in enumerate(all_scripts(encode)):
            engine.answer = lambda request, script=script: Script(  # type: ignore[misc]
                script.token_ids, script.finish, script.per_message, num_cached_tokens=16
            )
            found[script.name] = await _one(gateway, grpc, script, number)
        engine.answer = lambda request: Script(encode(WELL_FORMED["analysis, preamble, call"]), per_message=2)
        found["repairs counted"] = _samples(
            (await gateway.http.get("/metrics")).text, "cantata_harmony_repairs_total"
        )
        await grpc.close()
    return found


async def _one(gateway: Gateway, grpc: Grpc, script: Scripted, number: int) -> Json:
    body: dict[str, Json] = {"messages": [USER], "seed": 1, "max_tokens": 400, **script.fields}
    if script.tools:
        body["tools"] = TOOLS
    answer = await whole(gateway.http, CHAT, body)
    found = {"whole": answer, "stream": await stream(gateway.http, CHAT, body)}
    request = grpc_request(body)
    if request is not None:
        found["grpc"] = await grpc.whole(request)
        found["grpc stream"] = await grpc.stream(request)
    if script.history and answer["status"] == 200:
        found["as history"] = await _as_history(gateway.http, answer)
    if number % 9 == 0:
        raw = {
            "prompt": "Once",
            "max_tokens": 400,
            "logprobs": 1,
            "skip_special_tokens": number % 2 == 0,
            "echo": False,
        }
        found["completion"] = await whole(gateway.http, COMPLETIONS, raw)
        found["completion stream"] = await stream(gateway.http, COMPLETIONS, raw)
    return found


async def _as_history(http: httpx.AsyncClient, answer: Json) -> Json:
    """The prompt of the next turn, which has this answer in it."""
    message = json.loads(answer["body"])["choices"][0]["message"]
    results = [result(call["id"], "42") for call in message.get("tool_calls", ())]
    following = results or [{"role": "user", "content": "Go on."}]
    return await _prompt(http, {"messages": [USER, message, *following], "tools": TOOLS})


async def _prompt(http: httpx.AsyncClient, body: dict[str, Json]) -> Json:
    response = await http.post("/tokenize", json=body)
    if response.status_code != 200:
        return {"status": response.status_code, "body": masked(response.text)}
    ids = response.json()["tokens"]
    return {"text": (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"], "ids": ids}


def rendered(folder: Path) -> Json:
    """Conversations as prompts: by /tokenize, and as they reach an engine over HTTP and gRPC."""
    return asyncio.run(_rendered(folder))


async def _rendered(folder: Path) -> Json:
    async with fake_gateway(folder) as (gateway, [engine]):
        encode = _encoder(folder)
        grpc = Grpc(gateway.grpc_address)
        engine.answer = lambda request: Script(encode(WELL_FORMED["final"]), per_message=1000)
        found: dict[str, Json] = {}
        for name, body in conversations():
            prompt = await _prompt(gateway.http, body)
            request = grpc_request(body)
            found[name] = {
                "prompt": prompt,
                "chat": await _reached(engine, prompt, whole(gateway.http, CHAT, body)),
                "grpc": None if request is None else await _reached(engine, prompt, grpc.whole(request)),
            }
        await grpc.close()
    return found


async def _reached(engine: FakeEngine, prompt: Json, answering: "asyncio.Future[Json] | Json") -> Json:
    """Whether the engine got the prompt that /tokenize says; else the prompt that it got, or the
    refusal."""
    before = len(engine.requests)
    answer = await answering
    if len(engine.requests) == before:
        return answer
    ids = list(engine.requests[-1].prompt_token_ids)
    return "the same" if ids == prompt.get("ids") else ids


def at_the_edge(folder: Path) -> Json:
    """Every field with values of every kind, malformed bodies, routes: the refusal, or what the
    engine was asked."""
    return asyncio.run(_at_the_edge(folder))


async def _at_the_edge(folder: Path) -> Json:
    async with fake_gateway(folder) as (gateway, [engine]):
        encode = _encoder(folder)
        engine.answer = lambda request: Script(encode(WELL_FORMED["final"]), per_message=1000)
        grpc = Grpc(gateway.grpc_address)
        found: dict[str, Json] = {}
        for name, path, body in edges():
            assert name not in found, f"two cases have the name {name}"
            before = len(engine.requests)
            request = grpc_request(body) if path == CHAT and "stop" not in name else None
            found[name] = {"http": _refusal(await whole(gateway.http, path, body), engine, before)}
            before = len(engine.requests)
            if request is not None:
                found[name]["grpc"] = _refusal(await grpc.whole(request), engine, before)
        for number, (path, body) in enumerate(TOKENS):
            found[f"{path} {number}"] = await whole(gateway.http, path, body)
        for method, route in ROUTES:
            response = await gateway.http.request(method, route)
            kept = {
                name: response.headers[name] for name in ("allow", "content-type") if name in response.headers
            }
            found[f"{method} {route}"] = {
                "status": response.status_code,
                "body": masked(response.text),
            } | kept
        response = await gateway.http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
        found["text/plain"] = {"status": response.status_code, "body": response.text}
        found["models over gRPC"] = await _models(grpc)
        await grpc.close()
    return found


async def _models(grpc: Grpc) -> Json:
    from google.protobuf.json_format import MessageToDict

    from tests.golden.before.internals import inference_pb2

    return MessageToDict(
        await grpc.stub.ListModels(inference_pb2.ListModelsRequest()), preserving_proto_field_name=True
    )


def _refusal(answer: Json, engine: FakeEngine, before: int) -> Json:
    """What the engine was asked, where the request got that far."""
    if len(engine.requests) == before:
        return answer
    found = [
        asked(request) for request in sorted(engine.requests[before:], key=lambda request: request.request_id)
    ]
    for one in found:
        if one["sampling"].get("seed", 0) and "seed" not in answer:
            one["sampling"].pop("seed")
        one["prompt"] = len(one["prompt"])
    return [found[0], {"and": len(found) - 1}]


def wire(folder: Path) -> Json:
    """The bytes of step plans and results: drawn ones with anything in them, and those of a
    scheduler."""
    draw = random.Random(50)
    found: dict[str, Json] = {}
    for step in range(25):
        found[f"plan {step}"] = _packed(built_plan(draw, step))
        found[f"result {step}"] = _packed(built_result(draw, step))
    for seed in (0, 1):
        for step, plan in enumerate(scheduled_plans(seed)):
            found[f"schedule {seed}, step {step}"] = _packed(plan)
    return found


def _packed(data: bytes) -> Json:
    content = msgpack.unpackb(data, strict_map_key=False)
    return {"content": content, "bytes": base64.b85encode(data).decode()}


def surfaces(folder: Path) -> Json:
    """Help, output and errors of every command."""
    checkpoint = make_checkpoint(folder)
    found: dict[str, Json] = {}
    for name, words in _COMMANDS.items():
        ran = _called(cantata_main, *(str(checkpoint) if word == "CHECKPOINT" else word for word in words))
        found[name] = {
            key: str(value).replace(str(checkpoint), "CHECKPOINT").splitlines() for key, value in ran.items()
        }
    found["workers.engine"] = _called(engine_main, "--help")
    return found


def served(folder: Path) -> Json:
    """A real model by `cantata serve --standalone`: its answers, its start-up, OpenAPI document and
    metrics."""
    checkpoint = make_checkpoint(folder)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    token_ids = {name: tokenizer.token_to_id(name) for name in _SPECIAL_NAMES}
    with disturbed.server(folder, checkpoint, "served") as server:
        found = asyncio.run(_served(server.url, server.grpc, token_ids))
        found["disconnect"] = disturbed.a_client_that_leaves(server)
        code = server.stop()
        log = server.log.read_text(errors="replace")
    found["end"] = {"exit code": code}
    found["log"] = _masked_log(log, checkpoint)
    return found


async def _served(url: str, grpc_address: str, token_ids: dict[str, int]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    grpc = Grpc(grpc_address)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        for name, path, body in served_cases(token_ids):
            one = {
                "whole": await whole(http, path, body, exact=False),
                "stream": await stream(http, path, body, exact=False),
            }
            request = grpc_request(body) if path == CHAT else None
            if request is not None:
                one["grpc stream"] = await grpc.stream(request, exact=False)
            if body.get("n", 1) > 1 or isinstance(body.get("prompt"), list):
                _mask_cached(one)
            found[name] = one
        found["openapi"] = (await http.get("/openapi.json")).json()
        found["metrics"] = _families((await http.get("/metrics")).text)
    await grpc.close()
    return found


def _mask_cached(value: Json) -> None:
    """Which of several choices finds blocks of the others depends on their order."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key == "cached_tokens":
                value[key] = "masked"
            _mask_cached(entry)
    elif isinstance(value, list):
        for entry in value:
            _mask_cached(entry)


def _families(text: str) -> Json:
    """Type, help and series of each metric, without values."""
    return {
        family.name: {
            "type": family.type,
            "help": family.documentation,
            "series": sorted(
                {f"{sample.name} {dict(sorted(sample.labels.items()))}" for sample in family.samples}
            ),
        }
        for family in text_string_to_metric_families(text)
    }


def _samples(text: str, name: str) -> Json:
    return {
        str(sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


_LOG_MASKS = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+", "TIME"),
    (r"unix:\S+", "unix:SOCKET"),
    (r"(INFO|WARNING|ERROR) (cluster|workers)\.[\w.]+:", r"\1 \2:"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
    (r"cpu \((\w+), (\w+), (\d+) threads?\)", r"cpu (MACHINE, \2, \3 threads)"),
    (r"\d+\.\d\d s", "N s"),
    (r"process \[\d+\]", "process [PID]"),
    (r"load weights: .*", "load weights: PROGRESS"),
)


def _masked_log(log: str, checkpoint: Path) -> list[str]:
    log = log.replace(str(checkpoint), "CHECKPOINT").replace("\r", "\n")
    for pattern, replacement in _LOG_MASKS:
        log = re.sub(pattern, replacement, log)
    lines = [line for line in log.splitlines() if line.strip()]
    return [line for index, line in enumerate(lines) if index == 0 or line != lines[index - 1]]


def _encoder(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(make_checkpoint(folder) / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _called(main: Callable[[], int], *words: str) -> dict[str, Json]:
    """Run a command in this process, as wide as a terminal of 110 columns."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["cantata", *words]),
        mock.patch.dict(os.environ, {"COLUMNS": "110", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main()
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
    return {"exit code": code, "stdout": out.getvalue(), "stderr": errors.getvalue()}


def versions() -> dict[str, str]:
    """Return what else the recording depends on: argparse words help, pydantic errors, FastAPI the
    OpenAPI document."""
    names = (
        "fastapi",
        "pydantic",
        "orjson",
        "grpcio",
        "protobuf",
        "msgpack",
        "tokenizers",
        "torch",
        "prometheus-client",
    )
    return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"} | {
        name: importlib.metadata.version(name) for name in names
    }


SECTIONS: dict[str, Callable[[Path], Json]] = {
    "scripted": scripted,
    "rendered": rendered,
    "at_the_edge": at_the_edge,
    "wire": wire,
    "surfaces": surfaces,
    "served": served,
    "offline": offline,
    "disturbed": disturbed.disturbed,
}
