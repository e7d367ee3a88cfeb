"""Compiles Triton kernels for GPUs that are not here, and counts what is in the machine code.

Triton's wheel has all that this takes: ptxas, nvdisasm and cuobjdump for NVIDIA, LLVM for AMD. No GPU, driver or toolkit.

The main loop is the innermost loop with most matrix instructions; in a kernel without these, the longest innermost loop; in a kernel
without loops, everything.
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
"""Instructions; shorter ones wait for something."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of the GPU that stands for a target.

    Attributes:
        processors: SMs or compute units.
        clock_ghz: under load.
        bandwidth_tbs: of memory, 10^12 bytes a second.
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
    # Four SIMD units of 16 lanes, and scalar instructions beside them, which count as if they took lanes.
    "gfx942": Gpu("MI300X", 304, 2.1, 5.3, 64),
    "gfx950": Gpu("MI355X", 256, 2.4, 8.0, 64),
}


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What a compiled kernel is made of.

    Attributes:
        registers: of a thread.
        spilled_bytes: of stack that a thread spills registers to.
        spills: instructions that do so, in the whole kernel.
        stack_bytes: of a thread, spills among it.
        shared_bytes: of a program.
        threads: of a program.
        matrix: matrix instructions in the main loop, by mnemonic.
        loads: loads from memory in the main loop, by bits a thread.
        stores_to_shared: instructions of the main loop.
        instructions: of the main loop.
        size: instructions of the kernel.
        layout_changes: conversions between register layouts that Triton's GPU dialect has; some cost nothing.
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
    layout_changes: int
    listing: str

    @property
    def loaded_bytes(self) -> int:
        """What the loads of one pass of the main loop fetch for a program; not counting loads by TMA."""
        return sum(bits // 8 * count for bits, count in self.loads.items()) * self.threads

    def narrow_share(self, bits: int) -> float:
        """Of these bytes, the share that comes by loads of fewer bits."""
        narrow = sum(width // 8 * count for width, count in self.loads.items() if width < bits) * self.threads
        return narrow / self.loaded_bytes if self.loaded_bytes else 0.0

    def instructions_per_8_weights(self, spec: KernelSpec) -> float | None:
        """Thread-instructions of the main loop; None where the kernel reads no weights."""
        return self.instructions * self.threads * 8 / spec.work.weights if spec.work and spec.work.weights else None

    def traffic(self, spec: KernelSpec) -> float | None:
        """Bytes loaded in a pass over the least that it must read; None where that was not given or comes by TMA."""
        return self.loaded_bytes / spec.work.bytes if spec.work and self.loads else None

    def issue_share(self, spec: KernelSpec, target: str) -> float | None:
        """Share of all issue slots that a pass takes while memory delivers its bytes at full bandwidth; above 1 it cannot."""
        if not spec.work:
            return None
        gpu = GPUS[target]
        return (self.instructions * self.threads / gpu.issue) / (spec.work.bytes / gpu.bytes_per_cycle)


def violations(code: MachineCode, spec: KernelSpec, target: str) -> list[str]:
    """What the code does not keep to of the spec's limits for the target, a sentence each."""
    limits = spec.limits.get(target, Limits())
    found = []
    if code.spilled_bytes > limits.spilled_bytes or (code.spills and not limits.spilled_bytes):
        found.append(f"{code.spills} spilling instructions, {code.spilled_bytes} bytes of registers on the stack")
    if limits.matrix and not any(name.startswith(limits.matrix) for name in code.matrix):
        found.append(f"no {limits.matrix} in the main loop, which has {sorted(code.matrix) or 'no matrix instructions'}")
    if limits.load_bits is not None:
        narrow = code.narrow_share(limits.load_bits)
        if not code.loads or narrow > limits.narrow_share:
            found.append(f"{narrow:.0%} of the loaded bytes come by loads under {limits.load_bits} bits: {code.loads}")
    per_weights = code.instructions_per_8_weights(spec)
    if limits.instructions is not None and (per_weights is None or per_weights > limits.instructions):
        found.append(f"{per_weights} thread-instructions for 8 weights, {limits.instructions} are allowed")
    if limits.registers is not None and code.registers > limits.registers:
        found.append(f"{code.registers} registers, {limits.registers} are allowed")
    traffic = code.traffic(spec)
    if limits.traffic is not None and (traffic is None or traffic > limits.traffic):
        found.append(f"{traffic} times the least bytes are loaded, {limits.traffic} are allowed")
    return found


def compile_kernel(spec: KernelSpec, target: str) -> MachineCode:
    """Compile anew, never from a cache.

    Raises:
        ValueError: an argument of the kernel has no type and no value, or one is unknown.
        Exception: whatever the compiler raised.
    """
    arguments = spec.kernel.arg_names
    wrong = set(arguments) ^ (set(spec.signature) | set(spec.constexprs))
    if wrong:
        raise ValueError(f"{spec.name}: signature and constexprs do not match the kernel's arguments at {sorted(wrong)}")
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in arguments}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(arguments)
        if name not in spec.unaligned and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=aligned)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    with _no_cache(), _quiet():
        kernel = triton.compile(source, target=gpu, options={"enable_fp_fusion": True, **spec.options})
    return _nvidia(kernel) if nvidia else _amd(kernel)


@contextmanager
def _no_cache() -> Iterator[None]:
    with triton.knobs.compilation.scope(), triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as empty:
        triton.knobs.compilation.always_compile = True
        triton.knobs.cache.dir = empty
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Triton's backends write all of a program that they could not assemble to the file descriptors."""
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


# NVIDIA: SASS as nvdisasm prints it.

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
_SASS_LINE = re.compile(rf"(?P<label>^\.L_\w+):|{_SASS.pattern}", re.MULTILINE)
_SASS_MATRIX = re.compile(r"(H|Q|I|O|D)G?MMA|UTC\w*MMA|BMMA")
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _nvidia(kernel: CompiledKernel) -> MachineCode:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        listing = _run(tools / "nvdisasm", "-c", file.name)
    instructions, loops = parse_sass(listing)
    main = _main_loop(instructions, loops, _SASS_MATRIX)
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
        layout_changes=kernel.asm["ttgir"].count("ttg.convert_layout"),
        listing=listing,
    )


def parse_sass(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(mnemonics with modifiers, loops as (first, last) index) of a disassembly."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in _SASS_LINE.finditer(listing):
        if line["label"]:
            labels[line["label"]] = len(instructions)
            continue
        name, operands = line[2], line[3]
        target = re.search(r"\.L_\w+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], len(instructions)) < len(instructions):
            loops.append((labels[target[0]], len(instructions)))
        instructions.append(name)
    return instructions, loops


def _sass_bits(name: str) -> int:
    return next((bits for part in name.split(".") if (bits := _SASS_WIDTHS.get(part))), 32)


def _spill_bytes(instructions: Sequence[str]) -> int:
    """An upper bound: each store to the stack has a place of its own."""
    return sum(_sass_bits(name) // 8 for name in instructions if name.startswith("STL"))


# AMD: the assembly that LLVM prints.

_GCN_LINE = re.compile(r"^(?P<label>\.L\w+):|^\t(?P<name>(?:[vs]_|ds_|buffer_|global_|scratch_|flat_)\w+)(?P<operands>.*)", re.MULTILINE)
_GCN_MATRIX = re.compile(r"v_mfma|v_smfmac|v_wmma")
_GCN_WIDTHS = {"x4": 128, "x3": 96, "x2": 64, "short": 16, "d16": 16, "byte": 8}


def _amd(kernel: CompiledKernel) -> MachineCode:
    listing = kernel.asm["amdgcn"]
    instructions, loops = parse_gcn(listing)
    main = _main_loop(instructions, loops, _GCN_MATRIX)
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
        layout_changes=kernel.asm["ttgir"].count("ttg.convert_layout"),
        listing=listing,
    )


def parse_gcn(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(mnemonics, loops as (first, last) index) of an assembly."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in _GCN_LINE.finditer(listing):
        if line["label"]:
            labels[line["label"]] = len(instructions)
            continue
        if line["name"].startswith(("s_cbranch", "s_branch")):
            target = line["operands"].split()[0]
            if labels.get(target, len(instructions)) < len(instructions):
                loops.append((labels[target], len(instructions)))
        instructions.append(line["name"])
    return instructions, loops


def _gcn_bits(name: str) -> int:
    return next((bits for part, bits in _GCN_WIDTHS.items() if part in name), 32)


def _main_loop(instructions: Sequence[str], loops: Sequence[tuple[int, int]], matrix: re.Pattern[str]) -> Sequence[str]:
    def num_matrix(loop: tuple[int, int]) -> int:
        return sum(bool(matrix.match(name)) for name in instructions[loop[0] : loop[1] + 1])

    with_matrix = [loop for loop in loops if num_matrix(loop)]
    candidates = with_matrix or [loop for loop in loops if loop[1] - loop[0] >= _SHORTEST_LOOP]
    inner = [loop for loop in candidates if not any(loop != other and loop[0] <= other[0] and other[1] <= loop[1] for other in candidates)]
    if not inner:
        return instructions
    first, last = max(inner, key=lambda loop: (num_matrix(loop), loop[1] - loop[0]))
    return instructions[first : last + 1]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(match[1])
