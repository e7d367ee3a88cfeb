"""`cantata bench serve`: load an OpenAI-compatible server over HTTP streaming, and measure it.

Either a fixed number of requests in flight (`--concurrency`) or requests sent at random times
regardless of those running (`--request-rate`, Poisson). It sends only to `--base-url`, at most
`--num-prompts` requests in at most `--max-time` seconds.
"""

import argparse
import asyncio
import datetime
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from cluster.commands.bench.arguments import at_least, positive_float, positive_int, temperature
from cluster.commands.bench.client import BenchClient, RequestOptions, RequestRecord
from cluster.commands.bench.report import Report, Settings, summarise, table
from cluster.commands.bench.workload import (
    SAMPLE_TEXT,
    WORDS,
    Prompt,
    arrival_times,
    random_ids,
    random_text,
    read_dataset,
)
from workers.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cantata bench serve`."""
    add = parser.add_argument
    add(
        "--base-url",
        default=DEFAULT_URL,
        metavar="URL",
        help=f"the server, without /v1 (default: {DEFAULT_URL})",
    )
    add("--model", metavar="NAME", help="model to request (default: the first that the server lists)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file that contains the API key (default: no key)",
    )
    add("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    add(
        "--num-prompts", type=positive_int, default=100, metavar="N", help="number of requests (default: 100)"
    )
    _add_load(parser)
    _add_prompts(parser)
    add(
        "--warmup",
        type=at_least(0),
        default=1,
        metavar="N",
        help="warm-up requests, sent one by one and not measured (default: 1)",
    )
    add(
        "--timeout",
        type=positive_float,
        default=300.0,
        metavar="SECONDS",
        help="time limit of one request (default: 300)",
    )
    add(
        "--max-time",
        type=positive_float,
        default=1800.0,
        metavar="SECONDS",
        help="time limit of the whole run, which is then cut off (default: 1800)",
    )
    add("--json", type=Path, metavar="FILE", help="write the report to this file as JSON")


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=positive_int,
        metavar="N",
        help=f"requests in flight (default: {DEFAULT_CONCURRENCY})",
    )
    load.add_argument(
        "--request-rate",
        type=positive_float,
        metavar="R",
        help="average requests per second, sent at random times",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dataset",
        default="random",
        metavar="random|FILE",
        help="random prompts, or JSONL: see docs/performance.md (default: random)",
    )
    add(
        "--input-len",
        type=positive_int,
        default=128,
        metavar="TOKENS",
        help="tokens of a random prompt (default: 128; approximate for chat)",
    )
    add(
        "--output-len",
        type=positive_int,
        default=64,
        metavar="TOKENS",
        help="maximum output tokens of a request (default: 64)",
    )
    add(
        "--ignore-eos",
        action="store_true",
        help="answers do not end before --output-len (an extension of vLLM and Cantata)",
    )
    add("--temperature", type=temperature, metavar="T", help="default: the server's")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of random prompts and arrival times (default: 0)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its table. Return 1 if no request got an answer.

    Raises:
        ConfigError: the flags, the dataset or the server cannot be used.
    """
    base_url = _base_url(options.base_url)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: its folder does not exist")
    report = asyncio.run(measure(options, base_url))
    print(table(report))
    if options.json is not None:
        try:
            options.json.write_bytes(report.to_json())
        except OSError as error:
            raise ConfigError(f"--json {options.json} cannot be written: {error.strerror}") from None
    return 0 if report.num_completed else 1


async def measure(options: argparse.Namespace, base_url: str) -> Report:
    """Prepare the prompts, warm up, send all requests and compute the report."""
    async with BenchClient(base_url, _read_key(options.api_key_file)) as client:
        model = options.model or await client.first_model()
        request = RequestOptions(
            options.endpoint, model, options.timeout, options.ignore_eos, options.temperature
        )
        prompts = await _prompts(client, options, model)
        for prompt in prompts[: options.warmup]:
            record = RequestRecord(time.perf_counter())
            await client.send(prompt, request, record)
            if record.error is not None:
                raise ConfigError(f"a warm-up request failed ({record.error}): {record.detail}")
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        records = await _send_all(client, prompts[options.warmup :], options, request)
    return summarise(records, _settings(options, base_url, model), started_at)


async def _prompts(client: BenchClient, options: argparse.Namespace, model: str) -> list[Prompt]:
    """Return the prompts for warm-up and run, drawn together so that the warm-up puts none of the
    run's prefixes into the server's cache."""
    count = options.warmup + options.num_prompts
    if options.dataset != "random":
        return read_dataset(Path(options.dataset), options.endpoint, count, options.output_len)
    ids = await client.tokenize(model, SAMPLE_TEXT)
    if ids is None:
        print(
            "the server has no /tokenize: random prompts are words, each counted as one token",
            file=sys.stderr,
        )
    elif options.endpoint == "completions":
        return random_ids(count, options.input_len, options.output_len, sorted(set(ids)), options.seed)
    return random_text(
        count, options.input_len, options.output_len, len(ids or WORDS) / len(WORDS), options.seed
    )


async def _send_all(
    client: BenchClient, prompts: list[Prompt], options: argparse.Namespace, request: RequestOptions
) -> list[RequestRecord]:
    """Return the records of the requests sent, in the order of sending."""
    records: list[RequestRecord] = []
    with tqdm(total=len(prompts), unit="req", disable=None, file=sys.stderr) as progress:

        async def send(prompt: Prompt) -> None:
            record = RequestRecord(time.perf_counter())
            records.append(record)
            try:
                await client.send(prompt, request, record)
            except asyncio.CancelledError:
                record.fail("cut_off", f"still running after --max-time {options.max_time:g} s")
                raise
            progress.update()

        try:
            async with asyncio.timeout(options.max_time):
                if options.request_rate is None:
                    await _closed_loop(prompts, options.concurrency or DEFAULT_CONCURRENCY, send)
                else:
                    await _open_loop(
                        prompts, arrival_times(len(prompts), options.request_rate, options.seed), send
                    )
        except TimeoutError:
            print(f"cut off after --max-time {options.max_time:g} s", file=sys.stderr)
    return records


async def _closed_loop(
    prompts: Sequence[Prompt], concurrency: int, send: Callable[[Prompt], Awaitable[None]]
) -> None:
    """Keep `concurrency` requests in flight."""
    waiting = iter(prompts)

    async def send_one_after_another() -> None:
        for prompt in waiting:
            await send(prompt)

    async with asyncio.TaskGroup() as senders:
        for _ in range(min(concurrency, len(prompts))):
            senders.create_task(send_one_after_another())


async def _open_loop(
    prompts: Sequence[Prompt], times: Sequence[float], send: Callable[[Prompt], Coroutine[None, None, None]]
) -> None:
    """Send each prompt at its time, regardless of those still running."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as senders:
        for prompt, leaves_at in zip(prompts, times, strict=True):
            await asyncio.sleep(max(0.0, start + leaves_at - time.perf_counter()))
            senders.create_task(send(prompt))


def _settings(options: argparse.Namespace, base_url: str, model: str) -> Settings:
    is_random = options.dataset == "random"
    return Settings(
        base_url=base_url,
        endpoint=options.endpoint,
        model=model,
        num_prompts=options.num_prompts,
        concurrency=None if options.request_rate is not None else options.concurrency or DEFAULT_CONCURRENCY,
        request_rate=options.request_rate,
        dataset=options.dataset,
        input_len=options.input_len if is_random else None,
        output_len=options.output_len,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        seed=options.seed,
        warmup=options.warmup,
        timeout_s=options.timeout,
        max_time_s=options.max_time,
    )


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or parts.username
        or parts.password
    ):
        raise ConfigError(f"--base-url {text!r} is not the URL of a server; write for instance {DEFAULT_URL}")
    return text.rstrip("/").removesuffix("/v1")


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"--api-key-file {file} must hold one key of printable ASCII characters")
    return key
