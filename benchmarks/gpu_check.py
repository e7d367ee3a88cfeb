"""Check a GPU machine and time what runs on it: decode steps, every kernel and prompts against the
hardware, and the tests of tests/gpu.

    # or GPU_CHECK_FLAGS="--preset 20b --only step,kernels"
    make gpu-check
    python3 -m benchmarks.gpu_check [--model FOLDER | --preset 120b] [--only tests,step]
        [--time-limit 570] [--out FOLDER] [--cache FILE]
    # beforehand, on a machine without a GPU (`benchmarks/kernel_cache.py`)
    python3 -m benchmarks.gpu_check --pack-cache FILE

Needs torch, Triton, numpy and pytest, no checkpoint and no network: weights are random, of the
largest of 120b, 20b and small that fits. First comes a probe of a minute, then figures, then tests,
each in processes of its own, so that one which fails, hangs or dies leaves the others their
figures. All that is written is under OUT: gpu_check.json and, as tables, gpu_check.md after each
part; PART.json, which grows while the part runs; PART.txt, all that its processes print, tracebacks
among it; tests.jsonl, a line for each test as it ends; cache/.

This was written on machines without a GPU. It has run with `--device cpu`, which proves the script
but says nothing of a GPU.
"""

import argparse
import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import moe_stages
from benchmarks.gpu_attempts import CONTEXT_LOST, DOING, Attempts, add_failure, read_result, write_result
from benchmarks.gpu_children import (
    end_children,
    end_with_parent,
    how_it_ended,
    last_lines,
    run_child,
    where_it_was,
)
from benchmarks.gpu_llm import measure_llm
from benchmarks.gpu_machine import describe, sentence, triton_target
from benchmarks.gpu_parts import PARTS, Options
from benchmarks.gpu_probe import probe
from benchmarks.gpu_report import report
from benchmarks.gpu_tests import run_tests, so_far
from workers.cores import usable_cores
from workers.rank.device import usable_device

TESTS, PROBE = "tests", "probe"
RUNS = {PROBE: probe, **PARTS, "llm": measure_llm}
ORDER = (*RUNS, TESTS)
PACKED_PRESETS = ("20b", "120b")
"""Presets whose kernels --pack-cache compiles by default: the probe's, and the one for which an
H100 has room."""
PROBE_S = 60.0
"""Maximum seconds of the probe."""
PART_SHARE = 0.6
"""Share of the time left that a part gets when others follow it."""
LEAST_S = 20.0
"""Minimum seconds left for starting a process."""
SHOWN_LINES = 40
"""Number of lines shown of what a failed part printed."""
ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    machine = describe()
    print(f"gpu-check: {sentence(machine)}", flush=True)
    if args.pack_cache:
        return _pack_cache(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here, so nothing was checked", file=sys.stderr)
        return 2
    # A part that is stopped or dies leaves no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if args.part:
        return _run_part(args)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _Check(args, machine).run()
    except KeyboardInterrupt:
        end_children()
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights of --preset")
    parser.add_argument(
        "--preset",
        help="as of `cantata make-checkpoint`; default: the largest of 120b, 20b and small that fits",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=_parts, default=ORDER, help=f"of {','.join(ORDER)}")
    parser.add_argument(
        "--batch-sizes", type=_numbers, default=(1, 8, 64, 256), help="those without room are left out"
    )
    parser.add_argument(
        "--contexts", type=_numbers, default=(1024, 8192), help="tokens of each sequence before decoding"
    )
    parser.add_argument("--prompts", type=_numbers, default=(2048, 8192), help="tokens of each prefill")
    parser.add_argument("--steps", type=int, default=50, help="of decode that are timed")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds for all parts")
    parser.add_argument(
        "--processes", type=int, default=max(1, min(8, usable_cores() // 2)), help="for the tests"
    )
    parser.add_argument(
        "--tests",
        default="",
        metavar="EXPRESSION",
        help="which of the tests, as pytest's -k has it; default: all",
    )
    parser.add_argument(
        "--moe-num-stages",
        type=int,
        help="pipeline stages of the experts' products; 1: none, which leaves no race",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for all that is written")
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="compiled kernels that --pack-cache has written"
    )
    parser.add_argument(
        "--pack-cache",
        type=Path,
        metavar="FILE",
        help="compile what the parts launch for --target into FILE, without a GPU",
    )
    parser.add_argument(
        "--target", default="sm_90", help="of --pack-cache, as Triton names it; default: an H100's or H200's"
    )
    parser.add_argument("--part", choices=tuple(RUNS), help=argparse.SUPPRESS)
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


def _options(args: argparse.Namespace, device: torch.device, preset: str | None) -> Options:
    return Options(device, args.model, preset, args.batch_sizes, args.contexts, args.steps, args.prompts)


def _run_part(args: argparse.Namespace) -> int:
    """Run a part, in its own process."""
    end_with_parent()
    moe_stages.apply_from_environment()
    options = _options(args, usable_device(args.device), args.preset)
    attempts = Attempts(options.device, args.result)
    if options.device.type != "cuda":
        RUNS[args.part](options, attempts)
    else:
        from benchmarks.kernel_cache import CompileCounter

        counter = CompileCounter()
        RUNS[args.part](options, attempts)
        attempts.begin({"triton_cache": counter.sentence()})
    attempts.keep()
    return 0


def _pack_cache(args: argparse.Namespace) -> int:
    from benchmarks.absent_gpu import META
    from benchmarks.absent_parts import launch_parts
    from benchmarks.absent_tests import launch_tests
    from benchmarks.kernel_cache import pack

    failures: list[str] = []

    def work(cache: Path) -> None:
        presets = () if args.only == (TESTS,) else (args.preset,) if args.preset else PACKED_PRESETS
        for preset in presets:
            print(f"gpu-check: compiling what the parts launch of {preset}", flush=True)
            failures.extend(launch_parts(args.target, _options(args, META, preset)))

        if TESTS in args.only:
            print("gpu-check: compiling what the tests launch", flush=True)
            print(f"gpu-check: {launch_tests(args.target, usable_cores(), cache)}")

    print(f"gpu-check: {pack(args.pack_cache, args.target, work)}")
    for failure in failures:
        print(f"gpu-check: not packed: {failure}", file=sys.stderr)
    return int(bool(failures))


class _Check:
    """One run of the parts that were asked for."""

    def __init__(self, args: argparse.Namespace, machine: dict[str, str]) -> None:
        self._args = args
        self._out: Path = args.out.absolute()
        self._deadline = time.monotonic() + args.time_limit
        self._found: dict[str, dict[str, Any]] = {"machine": {"machine": machine}}
        self._env = child_environment(self._out, args.moe_num_stages)

    def run(self) -> int:
        self._out.mkdir(parents=True, exist_ok=True)
        if self._args.cache:
            self._unpack(self._args.cache)
        self._keep()
        for index, name in enumerate(self._args.only):
            followed = index + 1 < len(self._args.only)
            try:
                self._found[name] = self._run(name, followed)
            except Exception as error:
                traceback.print_exc()
                self._found[name] = {"failed": f"{type(error).__name__}: {error}"}
            except KeyboardInterrupt:
                self._found[name] = self._so_far(name) | {"failed": "gpu-check itself was stopped"}
                raise
            finally:
                self._keep()
            self._show(name)
        return int(any("failed" in result or "failures" in result for result in self._found.values()))

    def _unpack(self, file: Path) -> None:
        from benchmarks.kernel_cache import unpack

        try:
            said = unpack(file, Path(self._env["TRITON_CACHE_DIR"]), triton_target())
        except (OSError, ValueError) as error:
            said = f"{error}; kernels are compiled"
        print(f"gpu-check: {said}", flush=True)
        self._found["machine"]["cache"] = said

    def _run(self, name: str, followed: bool) -> dict[str, Any]:
        left = self._deadline - time.monotonic()
        if left < LEAST_S:
            return {"failed": f"not begun, no time was left of {self._args.time_limit:.0f} s"}
        limit = left * (PART_SHARE if followed else 1)
        if name == TESTS:
            return run_tests(
                ROOT, self._out, self._args.processes, limit, self._env, selected=self._args.tests
            )
        if name == PROBE:
            limit = min(limit, PROBE_S)
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, *_flags(self._args)]
        return run_part(name, command, self._out, limit, self._env)

    def _so_far(self, name: str) -> dict[str, Any]:
        return so_far(self._out) if name == TESTS else read_result(self._out / f"{name}.json")

    def _keep(self) -> None:
        write_result(self._out / "gpu_check.json", self._found)
        (self._out / "gpu_check.md").write_text(report(self._found))

    def _show(self, name: str) -> None:
        result = self._found[name]
        print(report({name: result}), flush=True)
        if "failed" in result or "failures" in result:
            log = self._out / f"{name}.txt"
            print("\n".join([f"The end of {log}:", *last_lines(log, SHOWN_LINES), ""]), flush=True)


def _flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that a part reads."""
    numbers = {"--batch-sizes": args.batch_sizes, "--contexts": args.contexts, "--prompts": args.prompts}
    values = {flag: ",".join(map(str, value)) for flag, value in numbers.items()} | {
        "--steps": args.steps,
        "--device": args.device,
    }
    values |= {"--model": args.model and args.model.absolute(), "--preset": args.preset}
    return [word for flag, value in values.items() if value is not None for word in (flag, str(value))]


def child_environment(out: Path, moe_num_stages: int | None) -> dict[str, str]:
    """Return this process's environment, with all caches under `out`; a TRITON_CACHE_DIR that is
    set stays."""
    cache = out / "cache"
    env = {"TRITON_CACHE_DIR": str(cache / "triton")} | dict(os.environ)
    env |= {"CUDA_CACHE_PATH": str(cache / "cuda"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    # Only the binaries are read again; all stages of a compilation are ten times as much.
    env |= {"TRITON_STORE_BINARY_ONLY": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if moe_num_stages is not None:
        env[moe_stages.ENVIRONMENT] = str(moe_num_stages)
    return env


def run_part(
    name: str, command: Sequence[str], out: Path, timeout_s: float, env: dict[str, str]
) -> dict[str, Any]:
    """Run a part and return its result, also after a failure: `failed` gives the reason if the
    whole part ended early, `failures` those of single pieces.

    Args:
        command: writes its result, piece by piece, to the file that `--result` names
            (`gpu_attempts`); begun again, with what is there, after a death in the middle of a
            piece.
    """
    path, log = out / f"{name}.json", out / f"{name}.txt"
    for stale in (path, log):
        stale.unlink(missing_ok=True)
    deadline = time.monotonic() + timeout_s
    while True:
        code = run_child(
            [*command, "--result", str(path)], log, deadline - time.monotonic(), cwd=ROOT, env=env
        )
        found = read_result(path)
        doing = found.pop(DOING, None)
        if code == 0:
            return found
        if code is None:
            where = where_it_was(log, ROOT)
            at = "".join([f" at {doing}" if doing else "", f" in {where}" if where else ""])
            return found | {
                "failed": f"stopped after {timeout_s:.0f} s{at}; {log.name} has where each thread was"
            }
        if code != CONTEXT_LOST:
            ended = f"{how_it_ended(code)}: {' | '.join(line.strip() for line in last_lines(log, 4))}"
            if doing is None:
                return found | {"failed": ended}
            add_failure(found, doing, f"the process {ended}")
        write_result(path, found)
        if deadline - time.monotonic() < LEAST_S:
            return found | {"failed": "no time was left to go on in a new process after the last failure"}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
