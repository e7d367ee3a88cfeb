"""The compilation of a Triton kernel for the report and the gate, and the limits for the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""Targets of the report: A100, L40S, H100 and H200, B200, RTX PRO 6000, MI300X, MI355X."""

GATED_TARGETS = ("sm_90", "sm_100", "gfx950")
"""Targets that the test compiles."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the machine code of one kernel for one target; None: no limit.

    Attributes:
        matrix: start of the matrix instruction that the main loop must hold: HGMMA, UTCHMMA,
            v_mfma.
        anywhere: starts of matrix instructions that the kernel must hold somewhere, where it has
            several loops that matter.
        nowhere: regular expressions of instructions that the kernel must not hold, in whatever
            loop.
        load_bits: minimum width of the loads that bring most of what the main loop reads: all but
            `narrow_share` of its bytes.
        narrow_share: see `load_bits`.
        instructions: thread-instructions of the main loop for 8 weights.
        registers: number per thread.
        spilled_bytes: bytes of stack to which registers were spilled; 0 unless a kernel is known to
            be best with some.
        shared_stores: instructions of the main loop that store to shared memory.
        traffic: bytes that loads of the main loop fetch, as a multiple of what `Pass` says.
    """

    matrix: str | None = None
    anywhere: tuple[str, ...] = ()
    nowhere: tuple[str, ...] = ()
    load_bits: int | None = None
    narrow_share: float = 0.1
    instructions: float | None = None
    registers: int | None = None
    spilled_bytes: int = 0
    shared_stores: int | None = None
    traffic: float | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """The data that one program must read in one pass of its main loop, or altogether where the
    kernel has no loop.

    Attributes:
        bytes: number of bytes from memory, each counted once.
        weights: number of weights among these; 0 where it reads none.
        cached_bytes: bytes read besides that other programs read too, so that most of them come
            from a cache.
    """

    bytes: int
    weights: int = 0
    cached_bytes: int = 0


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel with one choice of tile constants.

    Attributes:
        name: unique; `operation/kernel tile`.
        kernel: decorated with `triton.jit`.
        signature: argument → Triton's type name (`*bf16`, `i32`, `tensordesc<u8[8,1024]>`), all
            that are not in `constexprs`.
        constexprs: argument → value.
        options: num_warps, num_stages, maxnreg and other options of the launch.
        targets: the targets for which it is meant.
        unaligned: pointers and integers that are not multiples of 16.
        large: pointers to tensors of 2 GiB or more.
        work: the minimum that one pass reads; None leaves the columns for it empty.
        limits: target → limits; the gate checks all specs on the GATED_TARGETS among their targets,
            with `Limits()` where none are given.
    """

    name: str
    kernel: "JITFunction[object]"
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    options: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS
    unaligned: tuple[str, ...] = ()
    large: tuple[str, ...] = ()
    work: Pass | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)
