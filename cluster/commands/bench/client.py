"""One streaming request against an OpenAI-compatible server, with the time of each chunk.

Times follow vLLM's `bench serve` (vllm/benchmarks/lib/endpoint_request_func.py): the clock starts
before the request is sent, and a chunk's time is when it was read. One departure: a chunk counts as
output only if it carries some (text, reasoning or a piece of a tool call), so that a server cannot
shorten its time to first token with an empty chunk that names the role.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType

import httpx
import orjson

from cluster.commands.bench.workload import Endpoint, Messages, Prompt
from workers.errors import ConfigError

_OUTPUT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls", "text")
_MAX_DETAIL = 200


@dataclass(slots=True)
class RequestRecord:
    """The record of one request. Times are `time.perf_counter` seconds.

    Attributes:
        started: when the request was sent.
        chunk_times: when each chunk with output was read.
        ended: when the last chunk with a choice was read, or the request failed.
        prompt_tokens, cached_tokens, output_tokens: from the stream's usage; None if the server
        reported none.
        error: kind of failure; None if the whole answer arrived.
        detail: the failure in one sentence, shortened.
    """

    started: float
    chunk_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: str) -> None:
        self.error = kind
        self.detail = " ".join(detail.split())[:_MAX_DETAIL]
        self.ended = time.perf_counter()


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Options that all requests of a run share.

    Attributes:
        timeout_s: seconds for one request, from sending to its last chunk.
        temperature: sampling temperature; None for the server's default.
    """

    endpoint: Endpoint
    model: str
    timeout_s: float
    ignore_eos: bool = False
    temperature: float | None = None


class BenchClient:
    """The client of one server. It follows no redirects and uses no proxy from the environment.

    Args:
        base_url: without a trailing /v1.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        headers = {"accept-encoding": "identity"} | (
            {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        )
        self._base_url = base_url
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            timeout=httpx.Timeout(None, connect=30.0),
            trust_env=False,
        )

    async def __aenter__(self) -> "BenchClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """Return the name of the first model that the server lists.

        Raises:
            ConfigError: the server does not answer, or not with a list of models.
        """
        try:
            async with asyncio.timeout(30):
                response = await self._http.get("/v1/models")
            if response.status_code != 200:
                raise ConfigError(
                    f"{self._base_url}/v1/models returned status {response.status_code}: "
                    f"{_server_message(response.content)}"
                )
            name = orjson.loads(response.content)["data"][0]["id"]
        except (httpx.HTTPError, TimeoutError) as error:
            raise ConfigError(
                f"no server answers at {self._base_url} ({_reason(error)}); start one, or give --base-url"
            ) from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(
                f"{self._base_url}/v1/models does not list models; is this an OpenAI-compatible server?"
            ) from None
        return str(name)

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """Return the token ids of `text` from the server's /tokenize; None if it has no such
        endpoint."""
        try:
            async with asyncio.timeout(30):
                response = await self._http.post("/tokenize", json={"model": model, "prompt": text})
            tokens = orjson.loads(response.content)["tokens"] if response.status_code == 200 else None
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError):
            return None
        return (
            tokens
            if isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens)
            else None
        )

    async def send(self, prompt: Prompt, options: RequestOptions, record: RequestRecord) -> None:
        """Send one request and read its stream to the end. Failures are recorded; only cancellation
        raises."""
        path = "/v1/chat/completions" if options.endpoint == "chat" else "/v1/completions"
        body = _request_body(prompt, options)
        try:
            async with asyncio.timeout(options.timeout_s):
                async with self._http.stream(
                    "POST", path, content=body, headers={"content-type": "application/json"}
                ) as response:
                    if response.status_code == 200:
                        await _read_stream(response, record)
                    else:
                        record.fail(f"http_{response.status_code}", _server_message(await response.aread()))
        except TimeoutError:
            record.fail("timeout", f"the answer did not end within {options.timeout_s:g} s")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            record.fail("connect", _reason(error))
        except httpx.HTTPError as error:
            record.fail("disconnected", _reason(error))


async def _read_stream(response: httpx.Response, record: RequestRecord) -> None:
    async for data in _events(response.aiter_raw()):
        now = time.perf_counter()
        if data == b"[DONE]":
            if not record.ended:
                record.fail("empty", "the stream ended without an answer")
            return
        try:
            chunk = orjson.loads(data)
            choices, usage, error = chunk.get("choices"), chunk.get("usage"), chunk.get("error")
            if error:
                record.fail(
                    "stream_error", str(error.get("message", "")) if isinstance(error, dict) else str(error)
                )
                return
            if choices:
                record.ended = now
                if _has_output(choices[0]):
                    record.chunk_times.append(now)
            if usage:
                _read_usage(usage, record)
        except (ValueError, AttributeError, TypeError, KeyError):
            record.fail("bad_response", "an event of the stream is not a completion chunk")
            return
    record.fail("disconnected", "the stream ended without [DONE]")


async def _events(raw: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events, one line each as OpenAI's servers send them. Splits on
    bytes, since text may contain Unicode line breaks."""
    rest = b""
    async for piece in raw:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _has_output(choice: dict[str, object]) -> bool:
    delta = choice.get("delta")
    fields = delta if isinstance(delta, dict) else choice
    return any(fields.get(name) for name in _OUTPUT_FIELDS)


def _read_usage(usage: dict[str, object], record: RequestRecord) -> None:
    record.prompt_tokens = _count(usage.get("prompt_tokens"))
    record.output_tokens = _count(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    record.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _request_body(prompt: Prompt, options: RequestOptions) -> bytes:
    body: dict[str, object] = {
        "model": options.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.endpoint == "completions":
        return orjson.dumps(body | {"prompt": prompt.content, "max_tokens": prompt.max_tokens})
    content = prompt.content
    messages = (
        orjson.Fragment(content.as_json)
        if isinstance(content, Messages)
        else [{"role": "user", "content": content}]
    )
    return orjson.dumps(body | {"messages": messages, "max_completion_tokens": prompt.max_tokens})


def _server_message(content: bytes) -> str:
    try:
        return str(orjson.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:_MAX_DETAIL].decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
