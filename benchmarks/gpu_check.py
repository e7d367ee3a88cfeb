"""Check a GPU machine and time what runs on it: the tests of tests/gpu, and every kernel, decode step and prefill against the hardware.

    make gpu-check                                      # or GPU_CHECK_FLAGS="--preset 20b --only step,kernels"
    python3 -m benchmarks.gpu_check [--model FOLDER | --preset 120b] [--only tests,step] [--time-limit 570] [--out FOLDER]

Needs torch, Triton, numpy and pytest, no checkpoint and no network: weights are random, of the largest of 120b, 20b and small that fits.
Parts run one after the other in processes of their own, so that one which fails or takes too long leaves the others their figures; what is
found is written to OUT/gpu_check.json and, as tables, to OUT/gpu_check.md after each part, and printed; OUT/tests.txt has what pytest said.

This was written on machines without a GPU. It has run with `--device cpu`, which proves the script but says nothing of a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_attempts import Attempts
from benchmarks.gpu_parts import PARTS, Options
from benchmarks.gpu_report import report
from benchmarks.gpu_tests import run_tests
from workers.executor.rank import usable_device

TESTS = "tests"
ORDER = ("device", TESTS, "step", "kernels", "prefill", "sampling")
TESTS_SHARE = 0.5
"""Of the time that is left, at most."""
LEAST_S = 20.0
"""Under which no part is begun."""
ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here, so nothing was checked", file=sys.stderr)
        return 2
    if args.part:
        return _run_part(args)
    return _run_all(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights of --preset")
    parser.add_argument("--preset", help="as of `cantata make-checkpoint`; default: the largest of 120b, 20b and small that fits")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=_parts, default=ORDER, help=f"of {','.join(ORDER)}")
    parser.add_argument("--batch-sizes", type=_numbers, default=(1, 8, 64, 256), help="those without room are left out")
    parser.add_argument("--contexts", type=_numbers, default=(1024, 8192), help="tokens of each sequence before decoding")
    parser.add_argument("--prompts", type=_numbers, default=(2048, 8192), help="tokens of each prefill")
    parser.add_argument("--steps", type=int, default=50, help="of decode that are timed")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds for all parts")
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="for the tests")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"numbers above 0, got {text}")
    return numbers


def _parts(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := set(names) - set(ORDER):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} not among {', '.join(ORDER)}")
    return tuple(name for name in ORDER if name in names)


def _run_part(args: argparse.Namespace) -> int:
    """In the part's own process."""
    options = Options(usable_device(args.device), args.model, args.preset, args.batch_sizes, args.contexts, args.steps, args.prompts)
    attempts = Attempts(options.device, args.result)
    PARTS[args.part](options, attempts)
    attempts.keep()
    return 0


def _run_all(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.time_limit
    found: dict[str, dict[str, Any]] = {}
    for name in args.only:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            found[name] = {"failed": f"not begun, no time was left of {args.time_limit:.0f} s"}
        elif name == TESTS:
            found[name] = run_tests(ROOT, args.processes, left * (TESTS_SHARE if len(args.only) > 1 else 1), args.out / "tests.txt")
        else:
            found[name] = _child(name, args, left)
        (args.out / "gpu_check.json").write_text(json.dumps(found, indent=1))
        (args.out / "gpu_check.md").write_text(report(found))
        print(report({name: found[name]}), flush=True)
    return int(any("failed" in result for result in found.values()))


def _child(name: str, args: argparse.Namespace, timeout_s: float) -> dict[str, Any]:
    """What the part has found, also where it failed."""
    numbers: dict[str, Callable[[], str]] = {
        "--batch-sizes": lambda: ",".join(map(str, args.batch_sizes)),
        "--contexts": lambda: ",".join(map(str, args.contexts)),
        "--prompts": lambda: ",".join(map(str, args.prompts)),
        "--steps": lambda: str(args.steps),
        "--device": lambda: args.device,
    }
    flags = [word for flag, value in numbers.items() for word in (flag, value())]
    flags += [word for flag, value in (("--model", args.model), ("--preset", args.preset)) if value for word in (flag, str(value))]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, "--result", str(result), *flags]
        failed = None
        try:
            ran = subprocess.run(command, timeout=timeout_s, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
            if ran.returncode:
                failed = f"ended with {ran.returncode}: {_last_lines(ran.stderr)}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {timeout_s:.0f} s"
        found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        return found if failed is None else found | {"failed": failed}


def _last_lines(text: str) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-4:])


if __name__ == "__main__":
    sys.exit(main())
