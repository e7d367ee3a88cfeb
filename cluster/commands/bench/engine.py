"""`cantata bench engine`: throughput and latency of an engine in this process, without a server,
and a profile of its steps."""

import argparse
from pathlib import Path
from typing import get_args

from cluster.commands.bench.arguments import at_least, positive_int, temperature
from cluster.numbers_as_text import parse_size
from workers.config import CpuIsa
from workers.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cantata bench engine`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="folder of a gpt-oss checkpoint")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    add("--device", default="cpu", metavar="DEVICE", help="torch device (default: cpu)")
    add("--tensor-parallel-size", "-tp", type=positive_int, default=1, metavar="N", help="ranks (default: 1)")
    add("--quantize", choices=("mxfp4",), help="pack the experts of a bf16 checkpoint while loading")
    add(
        "--cpu-dense-dtype",
        choices=("bf16", "int8"),
        default="bf16",
        help="as for `cantata serve` (default: bf16)",
    )
    add("--cpu-isa", choices=get_args(CpuIsa), default="auto", help="as for `cantata serve` (default: auto)")
    _add_run(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input-len",
        type=positive_int,
        default=32,
        metavar="TOKENS",
        help="tokens of each prompt (default: 32)",
    )
    add(
        "--output-len",
        type=positive_int,
        default=128,
        metavar="TOKENS",
        help="output tokens of each prompt (default: 128)",
    )
    add(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="prompts submitted at once (default: 8)",
    )
    add("--num-iters", type=positive_int, default=10, metavar="N", help="measured iterations (default: 10)")
    add(
        "--num-iters-warmup",
        type=at_least(0),
        default=1,
        metavar="N",
        help="warm-up iterations (default: 1)",
    )
    add(
        "--max-num-seqs",
        type=positive_int,
        default=256,
        metavar="N",
        help="maximum running sequences (default: 256)",
    )
    add(
        "--max-num-batched-tokens",
        type=positive_int,
        default=2048,
        metavar="TOKENS",
        help="maximum tokens per step (default: 2048)",
    )
    add(
        "--kv-cache-memory",
        type=_size,
        metavar="SIZE",
        help="KV cache size, such as 2GiB (default: chosen from free memory)",
    )
    add("--temperature", type=temperature, default=1.0, metavar="T", help="default: 1")
    add("--seed", type=int, default=0, metavar="N", help="seed of prompts and sampling (default: 0)")
    add(
        "--profile",
        action="store_true",
        help="add an iteration that measures time and bytes of each operation (CPU)",
    )
    add("--json", type=Path, metavar="FILE", help="write the report to this file as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its tables.

    Raises:
        CheckpointError, ConfigError: the checkpoint or the flags cannot be used.
    """
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: its folder does not exist")
    if options.profile and (options.device != "cpu" or options.tensor_parallel_size > 1):
        raise ConfigError(
            "--profile times the C++ kernels of this process: it needs --device cpu and one rank"
        )
    # Imports torch, which --help and `bench serve` need not wait for.
    from cluster.commands.bench.offline import measure, table

    report = measure(options)
    print(table(report))
    if options.json is not None:
        try:
            options.json.write_bytes(report.to_json())
        except OSError as error:
            raise ConfigError(f"--json {options.json} cannot be written: {error.strerror}") from None
    return 0


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
