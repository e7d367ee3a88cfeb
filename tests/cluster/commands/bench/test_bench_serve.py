"""The load generator against a small server whose behaviour each test chooses; what it counts, and
what it calls an error."""

import argparse
import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import pytest
import uvicorn

from cluster.commands.bench import cli, report, serve
from cluster.commands.bench.workload import arrival_times
from workers.errors import ConfigError

Event = dict[str, object] | str


@dataclass
class Script:
    """The behaviour of the server; `answer` maps a request's body to a status and either its events
    or its error body."""

    answer: Callable[[dict[str, object]], tuple[int, Sequence[Event]]]
    tokenize: Callable[[str], list[int]] | None = None
    hold: int = 0
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    peak: int = 0


class Server:
    """An ASGI application of the three routes that the load generator uses."""

    def __init__(self) -> None:
        self.script = Script(lambda body: (200, []))
        self.full = asyncio.Event()
        self.url = ""

    async def __call__(
        self, scope: dict[str, object], receive: Callable[[], object], send: Callable[[object], object]
    ) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.script.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/v1/models":
            await self._json(send, 200, {"data": [{"id": "first"}, {"id": "second"}]})
        elif scope["path"] == "/tokenize":
            tokenize = self.script.tokenize
            await self._json(
                send,
                404 if tokenize is None else 200,
                {"tokens": tokenize(json.loads(body)["prompt"]) if tokenize else None},
            )
        else:
            await self._complete(scope["path"], json.loads(body), send)

    async def _complete(self, path: str, body: dict[str, object], send: Callable[[object], object]) -> None:
        script = self.script
        script.bodies.append(body | {"path": path})
        script.running += 1
        script.peak = max(script.peak, script.running)
        if script.running >= script.hold:
            self.full.set()
        await self.full.wait()
        status, events = script.answer(body)
        try:
            if status != 200:
                await self._json(send, status, {"error": {"message": events[0]}})
                return
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-type", b"text/event-stream")],
                }
            )
            for event in events:
                if event == "forever":
                    await asyncio.Event().wait()
                data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                await send(
                    {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
                )
            await send({"type": "http.response.body", "body": b""})
        finally:
            script.running -= 1

    async def _json(self, send: Callable[[object], object], status: int, body: object) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    server = Server()
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(
            server, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
    )
    started = threading.Event()
    startup = uvicorn_server.startup

    async def announce(sockets: object = None) -> None:
        await startup()
        started.set()

    uvicorn_server.startup = announce
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    assert started.wait(30)
    server.url = f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    yield server
    uvicorn_server.should_exit = True
    thread.join(30)


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.full = asyncio.Event()
    return running_server


def chat(**delta: object) -> Event:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def usage(prompt: int, completion: int, cached: int = 0) -> Event:
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"choices": [], "usage": counts}


FINISH: Event = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
WHOLE: Sequence[Event] = (
    chat(role="assistant", content=""),
    chat(reasoning="Hm\u2028m", reasoning_content="Hm\u2028m"),
    chat(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
    chat(content="three"),
    FINISH,
    usage(10, 7, cached=4),
    "[DONE]",
)


def options(server: Server, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--base-url", server.url, *flags])


def measure(server: Server, *flags: str) -> report.Report:
    return asyncio.run(serve.measure(options(server, *flags), server.url))


def test_counts_tokens_by_usage_and_chunks_by_what_they_carry(server: Server) -> None:
    server.script = Script(lambda body: (200, WHOLE), hold=1)
    result = measure(server, "--num-prompts", "5", "--warmup", "2", "--concurrency", "2")
    assert len(server.script.bodies) == 7
    assert (result.num_completed, result.num_failed, result.num_not_sent, result.errors) == (5, 0, 0, {})
    assert (result.prompt_tokens, result.cached_tokens, result.output_tokens) == (50, 20, 35)
    assert result.num_chunks == 15
    assert result.num_without_usage == 0
    assert result.settings.model == "first"


def test_without_usage_chunks_are_counted(server: Server) -> None:
    server.script = Script(lambda body: (200, [event for event in WHOLE if "usage" not in event]), hold=1)
    result = measure(server, "--num-prompts", "3")
    assert (result.output_tokens, result.num_chunks, result.num_without_usage) == (9, 9, 3)


@pytest.mark.parametrize(
    ("status", "events", "kind", "detail"),
    [
        (429, ["the queue is full"], "http_429", "the queue is full"),
        (
            200,
            [chat(content="a"), {"error": {"message": "the engine died"}}, "[DONE]"],
            "stream_error",
            "the engine died",
        ),
        (200, [chat(content="a"), FINISH], "disconnected", "the stream ended without [DONE]"),
        (200, ["{no json"], "bad_response", "an event of the stream is not a completion chunk"),
        (200, ['["list"]'], "bad_response", "an event of the stream is not a completion chunk"),
        (200, [usage(3, 0), "[DONE]"], "empty", "the stream ended without an answer"),
        (200, [chat(content="a"), "forever"], "timeout", "the answer did not end within 0.3 s"),
    ],
)
def test_failures_are_counted_by_kind_and_do_not_enter_the_figures(
    server: Server, status: int, events: Sequence[Event], kind: str, detail: str
) -> None:
    answers = iter([(status, events), (200, WHOLE), (status, events)])
    server.script = Script(lambda body: next(answers), hold=1)
    result = measure(server, "--num-prompts", "3", "--warmup", "0", "--concurrency", "1", "--timeout", "0.3")
    assert (result.num_completed, result.num_failed, result.errors) == (1, 2, {kind: 2})
    assert result.error_examples == {kind: detail}
    assert (result.output_tokens, result.num_chunks) == (7, 3)


def test_concurrency_is_kept_and_not_exceeded(server: Server) -> None:
    # Nothing is answered before four requests are in flight at once.
    server.script = Script(lambda body: (200, WHOLE), hold=4)
    result = measure(server, "--num-prompts", "20", "--warmup", "0", "--concurrency", "4")
    assert result.num_completed == 20
    assert server.script.peak == 4
    assert result.peak_concurrency == 4


def test_request_rate_does_not_wait_for_answers(server: Server) -> None:
    # Only an open loop gets all twenty requests to a server that answers none before the last is
    # there.
    server.script = Script(lambda body: (200, WHOLE), hold=20)
    result = measure(server, "--num-prompts", "20", "--warmup", "0", "--request-rate", "200")
    assert result.num_completed == 20
    assert result.settings.concurrency is None
    times = arrival_times(20, 200.0, seed=0)
    assert result.duration_s >= times[-1] - times[0] - 1e-3


def test_max_time_cuts_off_what_runs_and_what_waits(server: Server) -> None:
    server.script = Script(lambda body: (200, [chat(content="a"), "forever"]), hold=1)
    result = measure(server, "--num-prompts", "9", "--warmup", "0", "--concurrency", "3", "--max-time", "0.4")
    assert (result.num_completed, result.errors, result.num_not_sent) == (0, {"cut_off": 3}, 6)


def test_random_prompts_for_completions_are_token_ids_of_the_server(server: Server) -> None:
    server.script = Script(
        lambda body: (200, [{"choices": [{"index": 0, "text": "x"}]}, "[DONE]"]),
        tokenize=lambda text: [5, 7, 11],
        hold=1,
    )
    flags = (
        "--endpoint",
        "completions",
        "--num-prompts",
        "4",
        "--warmup",
        "0",
        "--input-len",
        "33",
        "--output-len",
        "9",
        "--ignore-eos",
    )
    measure(server, *flags, "--model", "second", "--temperature", "0", "--concurrency", "1")
    bodies = server.script.bodies
    assert {body["path"] for body in bodies} == {"/v1/completions"}
    assert all(len(body["prompt"]) == 33 and set(body["prompt"]) == {5, 7, 11} for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 4
    rest = {name: value for name, value in bodies[0].items() if name not in ("prompt", "path")}
    assert rest == {
        "model": "second",
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "max_tokens": 9,
    }
    again = [body["prompt"] for body in bodies]
    bodies.clear()
    measure(server, *flags, "--concurrency", "1")
    assert [body["prompt"] for body in bodies] == again


def test_random_chat_prompts_have_about_the_tokens_asked_for(server: Server) -> None:
    # A tokenizer of two tokens a word.
    server.script = Script(
        lambda body: (200, WHOLE), tokenize=lambda text: [1] * (2 * len(text.split())), hold=1
    )
    measure(server, "--num-prompts", "3", "--warmup", "0", "--input-len", "40", "--output-len", "5")
    for body in server.script.bodies:
        assert (body["path"], body["max_completion_tokens"]) == ("/v1/chat/completions", 5)
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert len(body["messages"][0]["content"].split()) == 20


def test_dataset_lines_are_sent_as_they_are_and_repeated(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?"}]
    file.write_text(
        json.dumps({"prompt": "one", "max_tokens": 3}) + "\n\n" + json.dumps({"messages": messages}) + "\n"
    )
    server.script = Script(lambda body: (200, WHOLE), hold=1)
    result = measure(
        server,
        "--dataset",
        str(file),
        "--num-prompts",
        "3",
        "--warmup",
        "0",
        "--concurrency",
        "1",
        "--output-len",
        "8",
    )
    one = [{"role": "user", "content": "one"}]
    sent = [(body["messages"], body["max_completion_tokens"]) for body in server.script.bodies]
    assert sent == [(one, 3), (messages, 8), (one, 3)]
    assert result.settings.input_len is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ("{}", "line 2 must have either prompt or messages"),
        ('{"prompt": 5}', "line 2: prompt must be text"),
        ('{"prompt": [1, 2]}', "line 2: prompt must be text"),
        ('{"prompt": "a", "max_tokens": 0}', "line 2: max_tokens must be a positive integer"),
        ('{"prompt": "a", "top_p": 1}', "line 2 has the unknown field top_p"),
        ('{"messages": "a"}', "line 2: messages must be a list"),
    ],
)
def test_a_wrong_dataset_line_is_named(server: Server, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError) as error:
        measure(server, "--dataset", str(file))
    assert reason in str(error.value)


def test_the_key_is_sent_and_not_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame-5\n")
    server.script = Script(lambda body: (200, WHOLE), hold=1)
    result = measure(server, "--num-prompts", "1", "--api-key-file", str(tmp_path / "key"))
    assert {headers.get("authorization") for headers in server.script.headers} == {"Bearer sesame-5"}
    assert b"sesame" not in result.to_json()


def test_the_command_prints_a_table_and_writes_the_documented_json(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([(200, WHOLE), (200, WHOLE), (503, ["no replica is ready"]), (200, WHOLE)])
    server.script = Script(lambda body: next(answers), hold=1)
    file = tmp_path / "report.json"
    flags = [
        "serve",
        "--base-url",
        server.url + "/v1/",
        "--num-prompts",
        "3",
        "--concurrency",
        "1",
        "--json",
        str(file),
    ]
    assert cli.main(flags) == 0
    shown = capsys.readouterr().out
    assert "completed                   2 of 3" in shown
    assert "failed: http_503            1   no replica is ready" in shown
    assert "output tokens               14 in 6 chunks" in shown
    written = json.loads(file.read_text())
    jsonschema.validate(written, json.loads((Path(__file__).parent / "report.schema.json").read_text()))
    assert written["settings"]["base_url"] == server.url
    assert written["errors"] == {"http_503": 1}


def test_exit_code_and_null_figures_when_nothing_was_answered(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = Script(lambda body: (500, ["broken"]), hold=1)
    file = tmp_path / "report.json"
    assert (
        cli.main(
            ["serve", "--base-url", server.url, "--num-prompts", "2", "--warmup", "0", "--json", str(file)]
        )
        == 1
    )
    assert "time to first token                  -" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["ttft_s"] is written["itl_s"] is written["tpot_s"] is written["latency_s"] is None
    assert written["output_tokens_per_s"] == 0


def test_a_failing_warm_up_ends_the_run(server: Server) -> None:
    server.script = Script(lambda body: (400, ["messages is missing"]), hold=1)
    with pytest.raises(ConfigError, match=r"a warm-up request failed \(http_400\): messages is missing"):
        measure(server, "--num-prompts", "50")
    assert len(server.script.bodies) == 1


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"no server answers at http://127.0.0.1:9 \(.*\); start one, or give --base-url"
    ):
        cli.main(["serve", "--base-url", "http://127.0.0.1:9"])


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_base_url_may_be_that_of_the_api(path: str) -> None:
    assert serve._base_url(f"http://127.0.0.1:8000/cantata{path}") == "http://127.0.0.1:8000/cantata"


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://user:pass@a", "http://a?x=1"]
)
def test_a_wrong_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        cli.main(["serve", "--base-url", url])


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-prompts", "0"],
        ["--concurrency", "-1"],
        ["--request-rate", "nan"],
        ["--timeout", "inf"],
        ["--temperature", "-1"],
        ["--warmup", "-1"],
        ["--concurrency", "1", "--request-rate", "1"],
        ["--endpoint", "responses"],
    ],
)
def test_wrong_flags_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *flags])
    assert exit_.value.code == 2
    assert flags[0] in capsys.readouterr().err
