"""Compiler of Triton kernels for absent GPUs, with counts of the instructions in the machine code.

Triton's wheel has all that this takes: ptxas, nvdisasm and cuobjdump for NVIDIA, LLVM for AMD. No
GPU, driver or toolkit.

The main loop is the innermost loop with most matrix instructions; in a kernel without these, the
longest innermost loop; in a kernel without loops, everything. A loop is what lies on some path from
its head back to it, wherever the compiler put that.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.kernel_specs.spec import KernelSpec, Limits

_SHORTEST_LOOP = 8
"""Minimum length of a main loop in instructions; shorter loops only wait."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of the GPU that stands for a target.

    Attributes:
        processors: SMs or compute units.
        clock_ghz: under load.
        bandwidth_tbs: memory bandwidth in 10^12 bytes a second.
        issue: thread-instructions that a processor issues in a cycle.
    """

    name: str
    processors: int
    clock_ghz: float
    bandwidth_tbs: float
    issue: int

    @property
    def bytes_per_cycle(self) -> float:
        """Memory bandwidth as seen by one processor."""
        return self.bandwidth_tbs * 1e3 / (self.processors * self.clock_ghz)


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41, 2.04, 128),
    "sm_89": Gpu("L40S", 142, 2.52, 0.864, 128),
    "sm_90": Gpu("H100 SXM", 132, 1.755, 3.35, 128),
    "sm_100": Gpu("B200", 148, 1.85, 8.0, 128),
    "sm_120": Gpu("RTX PRO 6000", 188, 2.6, 1.79, 128),
    # Four SIMD units of 16 lanes. Scalar instructions have a unit of their own and are not counted.
    "gfx942": Gpu("MI300X", 304, 2.1, 5.3, 64),
    "gfx950": Gpu("MI355X", 256, 2.4, 8.0, 64),
}


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Properties of a compiled kernel.

    Attributes:
        registers: number per thread.
        spilled_bytes: bytes of stack to which a thread spills registers.
        spills: instructions that do so, in the whole kernel.
        stack_bytes: bytes per thread, spills among them.
        shared_bytes: bytes per program.
        threads: number per program.
        matrix: matrix instructions in the main loop, by mnemonic.
        loads: loads from memory in the main loop, by bits a thread.
        stores_to_shared: number of instructions in the main loop.
        instructions: number in the main loop; on AMD without scalar ones, which have a unit of
            their own.
        size: number of instructions of the kernel, counted alike.
        grouped_assembly: inline assembly that gets several elements at once. Triton leaves open
            which, and they are no neighbours in some register layouts.
        layout_changes: conversions between register layouts that Triton's GPU dialect has; some
            cost nothing.
        listing: the assembly.
    """

    registers: int
    spilled_bytes: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    matrix: dict[str, int]
    loads: dict[int, int]
    stores_to_shared: int
    instructions: int
    size: int
    grouped_assembly: int
    layout_changes: int
    listing: str

    @property
    def loaded_bytes(self) -> int:
        """Bytes that the loads of one pass of the main loop fetch for a program, without loads by
        TMA."""
        return sum(bits // 8 * count for bits, count in self.loads.items()) * self.threads

    def narrow_share(self, bits: int) -> float:
        """Return the share of these bytes that come by loads of fewer bits."""
        narrow = sum(width // 8 * count for width, count in self.loads.items() if width < bits) * self.threads
        return narrow / self.loaded_bytes if self.loaded_bytes else 0.0

    def instructions_per_8_weights(self, spec: KernelSpec) -> float | None:
        """Return thread-instructions of the main loop; None where the kernel reads no weights."""
        return (
            self.instructions * self.threads * 8 / spec.work.weights
            if spec.work and spec.work.weights
            else None
        )

    def traffic(self, spec: KernelSpec) -> float | None:
        """Return the bytes loaded in a pass over the least that it must read; None where that was
        not given or comes by TMA."""
        return (
            self.loaded_bytes / (spec.work.bytes + spec.work.cached_bytes)
            if spec.work and self.loads
            else None
        )

    def issue_share(self, spec: KernelSpec, target: str) -> float | None:
        """Return the share of all issue slots that a pass takes while memory delivers its bytes at
        full bandwidth; above 1 that is impossible."""
        if not spec.work:
            return None
        gpu = GPUS[target]
        return (self.instructions * self.threads / gpu.issue) / (spec.work.bytes / gpu.bytes_per_cycle)


def violations(code: MachineCode, spec: KernelSpec, target: str) -> list[str]:
    """Return the violations of the spec's limits for the target, one sentence each."""
    limits = spec.limits.get(target, Limits())
    found = []
    if code.spilled_bytes > limits.spilled_bytes or (code.spills and not limits.spilled_bytes):
        found.append(
            f"{code.spills} spilling instructions, {code.spilled_bytes} bytes of registers on the stack"
        )
    if code.grouped_assembly:
        found.append(
            f"{code.grouped_assembly} pieces of inline assembly get several elements at once (pack), and "
            f"which is not defined"
        )
    if limits.matrix and not any(name.startswith(limits.matrix) for name in code.matrix):
        found.append(
            f"no {limits.matrix} in the main loop, which has "
            f"{sorted(code.matrix) or 'no matrix instructions'}"
        )
    found += [
        f"no {start} in the kernel" for start in limits.anywhere if not re.search(rf"\b{start}", code.listing)
    ]
    found += [
        f"{pattern} in the kernel"
        for pattern in limits.nowhere
        if re.search(rf"\b(?:{pattern})", code.listing)
    ]
    if limits.load_bits is not None:
        narrow = code.narrow_share(limits.load_bits)
        if not code.loads or narrow > limits.narrow_share:
            found.append(
                f"{narrow:.0%} of the loaded bytes come by loads under {limits.load_bits} bits: {code.loads}"
            )
    per_weights = code.instructions_per_8_weights(spec)
    if limits.instructions is not None and (per_weights is None or per_weights > limits.instructions):
        found.append(f"{per_weights} thread-instructions for 8 weights, {limits.instructions} are allowed")
    if limits.registers is not None and code.registers > limits.registers:
        found.append(f"{code.registers} registers, {limits.registers} are allowed")
    if limits.shared_stores is not None and code.stores_to_shared > limits.shared_stores:
        found.append(
            f"{code.stores_to_shared} stores to shared memory in the main loop, {limits.shared_stores} are "
            f"allowed"
        )
    traffic = code.traffic(spec)
    if limits.traffic is not None and (traffic is None or traffic > limits.traffic):
        found.append(f"{traffic} times the least bytes are loaded, {limits.traffic} are allowed")
    return found


def compile_kernel(spec: KernelSpec, target: str) -> MachineCode:
    """Compile the kernel and read its machine code. Raises as `compile_anew`."""
    kernel = compile_anew(spec, target)
    return _nvidia(kernel) if target.startswith("sm_") else _amd(kernel)


def compile_anew(spec: KernelSpec, target: str) -> CompiledKernel:
    """Compile the kernel, never from a cache.

    Raises:
        ValueError: an argument of the kernel has no type and no value, or one is unknown.
        Exception: any error of the compiler.
    """
    arguments = spec.kernel.arg_names
    wrong = set(arguments) ^ (set(spec.signature) | set(spec.constexprs))
    if wrong:
        raise ValueError(
            f"{spec.name}: signature and constexprs do not match the kernel's arguments at {sorted(wrong)}"
        )
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in arguments}
    nvidia = target.startswith("sm_")
    # The attributes that the launcher would derive from the arguments; on AMD also that tensors are
    # under 2 GiB.
    known: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(arguments):
        pointer = signature[name].startswith("*")
        if name not in spec.unaligned and (pointer or signature[name] in ("i32", "i64")):
            known[place,] = [["tt.divisibility", 16]]
        if pointer and not nvidia and name not in spec.large:
            known.setdefault((place,), []).append(["tt.pointer_range", 32])
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=known)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    with _no_cache(), _quiet():
        return triton.compile(source, target=gpu, options={"enable_fp_fusion": True, **spec.options})


@contextmanager
def _no_cache() -> Iterator[None]:
    with triton.knobs.compilation.scope(), triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as empty:
        triton.knobs.compilation.always_compile = True
        triton.knobs.cache.dir = empty
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Triton's backends, which write all of a program that they could not assemble to the
    file descriptors."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (nowhere, *kept):
            os.close(descriptor)


def _grouped_assembly(kernel: CompiledKernel) -> int:
    return sum(
        int(pack) > 1
        for pack in re.findall(r"elementwise_inline_asm .*packed_element = (\d+)", kernel.asm["ttgir"])
    )


# NVIDIA: SASS as nvdisasm prints it.

_SASS_LINE = re.compile(
    r"^(?P<label>\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<name>[A-Z][\w.]*)(?P<operands>.*?);",
    re.MULTILINE,
)
_SASS_MATRIX = re.compile(r"(H|Q|I|O|D)G?MMA|UTC\w*MMA|BMMA")
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _nvidia(kernel: CompiledKernel) -> MachineCode:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        listing = _run(tools / "nvdisasm", "-c", file.name)
    program = parse_sass(listing)
    instructions, main = program.names, program.main_loop(_SASS_MATRIX)
    return MachineCode(
        registers=_number(r"\bREG:(\d+)", usage),
        spilled_bytes=_spill_bytes(instructions),
        spills=sum(name.split(".")[0] in ("LDL", "STL") for name in instructions),
        stack_bytes=_number(r"\bSTACK:(\d+)", usage),
        shared_bytes=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        matrix=dict(Counter(name for name in main if _SASS_MATRIX.match(name))),
        loads=dict(Counter(_sass_bits(name) for name in main if name.split(".")[0] in ("LDG", "LDGSTS"))),
        stores_to_shared=sum(name.split(".")[0] in ("STS", "STSM") for name in main),
        instructions=len(main),
        size=len(instructions),
        grouped_assembly=_grouped_assembly(kernel),
        layout_changes=kernel.asm["ttgir"].count("ttg.convert_layout"),
        listing=listing,
    )


def parse_sass(listing: str) -> "Program":
    """Parse a disassembly."""
    program = Program()
    for line in _SASS_LINE.finditer(listing):
        if line["label"]:
            program.label(line["label"])
            continue
        name, operands = line["name"], line["operands"]
        target = re.search(r"\.L_\w+", operands) if name.startswith("BRA") else None
        ends = (
            not line["guard"]
            and "P" not in operands.split("`")[0]
            and name.split(".")[0] in ("BRA", "EXIT", "RET")
        )
        program.add(name, target[0] if target else None, ends)
    return program


def _sass_bits(name: str) -> int:
    return next((bits for part in name.split(".") if (bits := _SASS_WIDTHS.get(part))), 32)


def _spill_bytes(instructions: Sequence[str]) -> int:
    """Return an upper bound: each store to the stack has a place of its own."""
    return sum(_sass_bits(name) // 8 for name in instructions if name.startswith("STL"))


# AMD: the assembly that LLVM prints.

_GCN_LINE = re.compile(
    r"^(?P<label>\.L\w+):|^\t(?P<name>(?:[vs]_|ds_|buffer_|global_|scratch_|flat_)\w+)(?P<operands>.*)",
    re.MULTILINE,
)
_GCN_MATRIX = re.compile(r"v_mfma|v_smfmac|v_wmma")
_GCN_WIDTHS = {"x4": 128, "x3": 96, "x2": 64, "short": 16, "d16": 16, "byte": 8}


def _amd(kernel: CompiledKernel) -> MachineCode:
    listing = kernel.asm["amdgcn"]
    program = parse_gcn(listing)
    instructions = [name for name in program.names if not name.startswith("s_")]
    main = [name for name in program.main_loop(_GCN_MATRIX) if not name.startswith("s_")]
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", listing)
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s+(\d+)", listing),
        spilled_bytes=4 * spilled,
        spills=sum(name.startswith("scratch_") for name in instructions),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", listing),
        shared_bytes=kernel.metadata.shared,
        threads=64 * kernel.metadata.num_warps,
        matrix=dict(Counter(name for name in main if _GCN_MATRIX.match(name))),
        loads=dict(Counter(_gcn_bits(name) for name in main if re.match(r"(global|buffer|flat)_load", name))),
        stores_to_shared=sum(name.startswith("ds_write") for name in main),
        instructions=len(main),
        size=len(instructions),
        grouped_assembly=_grouped_assembly(kernel),
        layout_changes=kernel.asm["ttgir"].count("ttg.convert_layout"),
        listing=listing,
    )


def parse_gcn(listing: str) -> "Program":
    """Parse an assembly."""
    program = Program()
    for line in _GCN_LINE.finditer(listing):
        if line["label"]:
            program.label(line["label"])
            continue
        name = line["name"]
        target = line["operands"].split()[0] if name.startswith(("s_cbranch", "s_branch")) else None
        program.add(name, target, name in ("s_branch", "s_endpgm", "s_setpc_b64"))
    return program


def _gcn_bits(name: str) -> int:
    return next((bits for part, bits in _GCN_WIDTHS.items() if part in name), 32)


class Program:
    """Instructions in the order of their addresses, with the possible jumps from each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._labels: dict[str, int] = {}
        self._targets: dict[int, str] = {}
        self._ends: set[int] = set()

    def label(self, name: str) -> None:
        """Give the next instruction this label."""
        self._labels[name] = len(self.names)

    def add(self, name: str, target: str | None, ends: bool) -> None:
        """Append an instruction.

        Args:
            target: label that it may jump to.
            ends: whether control never goes on to the next instruction.
        """
        if target is not None:
            self._targets[len(self.names)] = target
        if ends:
            self._ends.add(len(self.names))
        self.names.append(name)

    def loops(self) -> list[frozenset[int]]:
        """Return the instructions of each loop. Loops with one head are one."""
        before: list[list[int]] = [[] for _ in self.names]
        backward: dict[int, list[int]] = {}
        for at in range(len(self.names)):
            if at + 1 < len(self.names) and at not in self._ends:
                before[at + 1].append(at)
            target = self._labels.get(self._targets.get(at, ""))
            if target is not None and target < len(self.names):
                before[target].append(at)
                if target <= at:
                    backward.setdefault(target, []).append(at)
        return [body for head, tails in backward.items() if (body := self._between(head, tails, before))]

    def _between(self, head: int, tails: list[int], before: list[list[int]]) -> frozenset[int] | None:
        """Return the instructions that lead to the tails without passing the head; None if the
        program's beginning does: this is a jump back out of line."""
        body, open_ends = {head}, list(tails)
        while open_ends:
            at = open_ends.pop()
            if at not in body:
                body.add(at)
                open_ends += before[at]
        return None if 0 in body and head != 0 else frozenset(body)

    def main_loop(self, matrix: re.Pattern[str]) -> list[str]:
        """Return the mnemonics of the main loop; all, if there is no loop."""

        def num_matrix(loop: frozenset[int]) -> int:
            return sum(bool(matrix.match(self.names[at])) for at in loop)

        loops = self.loops()
        candidates = [loop for loop in loops if num_matrix(loop)] or [
            loop for loop in loops if len(loop) >= _SHORTEST_LOOP
        ]
        inner = [loop for loop in candidates if not any(other < loop for other in candidates)]
        if not inner:
            return self.names
        return [self.names[at] for at in sorted(max(inner, key=lambda loop: (num_matrix(loop), len(loop))))]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(match[1])
