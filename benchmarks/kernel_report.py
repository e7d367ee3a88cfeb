"""What compilers make of the Triton kernels, for GPUs that are not here: a row for each kernel and
target.

    python3 -m benchmarks.kernel_report [--targets sm_90,gfx950] [--kernels REGEX]
        [--markdown] [--csv FILE] [--dump FOLDER] [--jobs 2]

Nothing is run, so nothing here is a time. `instr/8w` are thread-instructions of the main loop for 8
weights; `loads` are those of the main loop, bits a thread; `read` is what these fetch as a multiple
of what must be read; `issue` is the share of all issue slots that the loop takes while memory
delivers at its full bandwidth, and `bound` the share of that bandwidth which this leaves possible:
an estimate from above, from published figures of the GPU named in `benchmarks/kernel_code.py`. The
command fails if a kernel does not compile or does not keep to its limits
(`benchmarks/kernel_specs`).
"""

import argparse
import csv
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import triton

from benchmarks.kernel_code import MachineCode, compile_kernel, violations
from benchmarks.kernel_specs import all_specs
from benchmarks.kernel_specs.spec import TARGETS, KernelSpec

_TEXT = ("kernel", "target")
_NUMBERS = ("regs", "spills", "stack", "smem", "threads", "loop", "sts", "instr/8w", "read", "issue", "bound")
COLUMNS = (*_TEXT, "matrix", "loads", *_NUMBERS)


def compile_all(
    jobs: Iterable[tuple[str, str]], num_processes: int
) -> Iterator[tuple[str, str, "Future[MachineCode]"]]:
    """Return all specs by name.

    Raises:
        ValueError: two have the same name.
    """
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(name, target, pool.submit(_compile, name, target)) for name, target in jobs]
        for name, target, future in futures:
            future.exception()
            yield name, target, future


def _compile(name: str, target: str) -> MachineCode:
    try:
        return compile_kernel(all_specs()[name], target)
    except Exception as error:  # Triton's do not travel between processes
        raise RuntimeError(f"{type(error).__name__}: {_essence(str(error))}") from None


def _essence(message: str) -> str:
    """Return the assembler's errors without the program that it could not assemble."""
    errors = re.findall(r"error *: .*", message)
    return "; ".join(errors[:3]) if errors else message[-500:]


def row(spec: KernelSpec, target: str, code: MachineCode) -> dict[str, str]:
    """Return the cells of a table's row, by column."""
    instructions, traffic, issue = (
        code.instructions_per_8_weights(spec),
        code.traffic(spec),
        code.issue_share(spec, target),
    )
    return {
        "kernel": spec.name,
        "target": target,
        "matrix": " ".join(f"{count} {name}" for name, count in sorted(_families(code.matrix).items())),
        "loads": " ".join(f"{count}x{bits}" for bits, count in sorted(code.loads.items(), reverse=True)),
        "regs": str(code.registers),
        "spills": str(code.spills),
        "stack": str(code.stack_bytes),
        "smem": f"{code.shared_bytes / 1024:.1f}k",
        "threads": str(code.threads),
        "loop": str(code.instructions),
        "sts": str(code.stores_to_shared),
        "instr/8w": "" if instructions is None else f"{instructions:.1f}",
        "read": "" if traffic is None else f"{traffic:.2f}",
        "issue": "" if issue is None else f"{issue:.0%}",
        "bound": "" if issue is None else f"{min(1.0, 1 / issue):.0%}",
    }


def _families(matrix: dict[str, int]) -> dict[str, int]:
    """Count HGMMA.64x16x16.F32.BF16 and its like as one."""
    counts: dict[str, int] = {}
    for name, count in matrix.items():
        family = name.split(".")[0]
        counts[family] = counts.get(family, 0) + count
    return counts


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return a table for the documents."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 4 + " ---: |" * len(_NUMBERS)]
    return "\n".join(
        lines + ["| " + " | ".join(cells[column] for column in COLUMNS) + " |" for cells in rows]
    )


def plain(rows: Sequence[dict[str, str]]) -> str:
    """Return a table for a terminal."""
    table = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    widths = {column: max(len(cells[column]) for cells in table) for column in COLUMNS}
    return "\n".join(
        "  ".join(cells[column].ljust(widths[column]) for column in COLUMNS).rstrip() for cells in table
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--kernels", default="", help="regular expression that names match somewhere")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--dump", type=Path, help="folder for the assembly of each kernel and target")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets: {', '.join(sorted(unknown))} not among {', '.join(TARGETS)}")
    specs = all_specs()
    jobs = [
        (name, target)
        for name, spec in specs.items()
        if re.search(args.kernels, name)
        for target in targets
        if target in spec.targets
    ]
    rows, complaints = [], []
    for name, target, future in compile_all(jobs, args.jobs):
        if error := future.exception():
            complaints.append(f"{name} {target}: {error}")
            continue
        code = future.result()
        rows.append(row(specs[name], target, code))
        complaints += [f"{name} {target}: {violation}" for violation in violations(code, specs[name], target)]
        if args.dump:
            args.dump.mkdir(parents=True, exist_ok=True)
            (args.dump / f"{name.replace('/', '.').replace(' ', '-')}.{target}.s").write_text(code.listing)
    print(f"Triton {triton.__version__}\n")
    print(markdown(rows) if args.markdown else plain(rows))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
