"""The machine code of every Triton kernel, compiled for the gated targets: no spills, and each
spec's own limits. And the gate itself.

GPUs run the Triton that torch brings, so everything is compiled with that one. The one that is
installed for the interpreter's tests is newer, as a later torch may bring it: with it the kernels
that have limits of their own are compiled too, for one target, and for the others in slow tests.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.kernel_code import (  # noqa: E402
    MachineCode,
    compile_anew,
    compile_kernel,
    parse_gcn,
    parse_sass,
    violations,
)
from benchmarks.kernel_report import COLUMNS, compile_all, markdown, row  # noqa: E402
from benchmarks.kernel_specs import all_specs  # noqa: E402
from benchmarks.kernel_specs.spec import GATED_TARGETS, KernelSpec, Limits, Pass  # noqa: E402

ROOT = Path(__file__).parents[2]
TORCHS_TRITON = Path(sys.prefix) / "torchs-triton"
NUM_PROCESSES = 2
TARGET_OF_NEWER_TRITON = "sm_90"
LIMITED = [
    (name, target) for name, spec in all_specs().items() for target in GATED_TARGETS if target in spec.limits
]


def torchs_triton() -> str:
    """Return the version of torch's Triton."""
    versions = [
        found.version for found in metadata.distributions(path=[str(TORCHS_TRITON)]) if found.name == "triton"
    ]
    assert len(versions) == 1, (
        f"the Triton of torch's build for CUDA is not in {TORCHS_TRITON}: run scripts/install.sh dev"
    )
    return versions[0]


def test_the_triton_of_torch_is_the_one_that_torch_asks_for() -> None:
    asked = [
        requirement for requirement in metadata.requires("torch") or () if requirement.startswith("triton")
    ]
    if not asked:
        pytest.skip("only torch's build for CUDA asks for a Triton")
    assert [re.match(r"triton *==([\w.]+)", requirement)[1] for requirement in asked] == [torchs_triton()]


@pytest.mark.timeout(1800)
def test_machine_code_keeps_to_its_limits_with_the_triton_of_torch() -> None:
    version = torchs_triton()
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernel_report",
        "--targets",
        ",".join(GATED_TARGETS),
        "--jobs",
        str(NUM_PROCESSES),
    ]
    path = os.pathsep.join(map(str, (TORCHS_TRITON, ROOT)))
    report = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert report.returncode == 0, report.stderr
    lines = report.stdout.splitlines()
    assert lines[0] == f"Triton {version}"
    compiled = sum(target in GATED_TARGETS for spec in all_specs().values() for target in spec.targets)
    assert len(lines) == 3 + compiled


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], "Future[MachineCode]"]:
    """Return the compilations for the selected tests, by (spec, target): one pool for the
    module."""
    items = [
        item
        for item in request.session.items
        if item.path == request.path and "compiled" in item.fixturenames
    ]
    wanted = {(item.callspec.params["name"], item.callspec.params["target"]) for item in items}
    return {
        (name, target): future
        for name, target, future in compile_all([job for job in LIMITED if job in wanted], NUM_PROCESSES)
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(*job, marks=[] if job[1] == TARGET_OF_NEWER_TRITON else pytest.mark.slow)
        for job in LIMITED
    ],
)
def test_machine_code_keeps_to_its_limits(
    compiled: dict[tuple[str, str], "Future[MachineCode]"], name: str, target: str
) -> None:
    code = compiled[name, target].result()
    assert not violations(code, all_specs()[name], target)


@triton.jit
def matmul(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Multiply [M, K] bf16 by [N, K] bf16 → [M, N] bf16, M and N multiples of the blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + m[:, None] * K + (start + k)[None, :])
        total = tl.dot(left, tl.load(b + n[None, :] * K + (start + k)[:, None]), total)
    tl.store(c + m[:, None] * (tl.num_programs(1) * BLOCK_N) + n[None, :], total.to(tl.bfloat16))


def spec_of(block_m: int, block_n: int, block_k: int, **changes: object) -> KernelSpec:
    spec = KernelSpec(
        name="test/matmul",
        kernel=matmul,
        signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"},
        constexprs={"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
        options={"num_warps": 4, "num_stages": 3},
        work=Pass(bytes=2 * (block_m + block_n) * block_k, weights=block_n * block_k),
    )
    return replace(spec, **changes)


@pytest.mark.parametrize(
    ("target", "matrix"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx950", "v_mfma")]
)
def test_what_the_figures_are_of_a_matrix_product(target: str, matrix: str) -> None:
    spec = spec_of(64, 64, 64)
    code = compile_kernel(spec, target)
    assert any(name.startswith(matrix) for name in code.matrix)
    assert code.threads == (256 if target == "gfx950" else 128)
    assert code.loaded_bytes == 2 * (64 + 64) * 64, "each byte of a pass is loaded once"
    assert code.loads.keys() == {128}
    assert code.traffic(spec) == 1.0
    assert code.spills == code.spilled_bytes == 0
    assert code.shared_bytes >= 2 * (64 + 64) * 64, "two operands and a stage at the least"
    assert 0 < code.instructions < code.size
    per_weights = code.instructions_per_8_weights(spec)
    assert per_weights == code.instructions * code.threads / 512
    limits = Limits(
        matrix=matrix, load_bits=128, instructions=per_weights, registers=code.registers, traffic=1.0
    )
    assert not violations(code, replace(spec, limits={target: limits}), target)
    cells = row(spec, target, code)
    assert tuple(cells) == COLUMNS
    assert len({line.count("|") for line in markdown([cells]).splitlines()}) == 1


def test_the_gate_names_each_fault() -> None:
    strict = Limits(
        matrix="HGMMA",
        anywhere=("HMMA", "UTCHMMA"),
        nowhere=(r"LDGSTS\S*\.128", "BMMA"),
        load_bits=128,
        instructions=1,
        registers=8,
        shared_stores=0,
        traffic=0.5,
    )
    spec = spec_of(16, 64, 64, unaligned=("b",), limits={"sm_90": strict})
    found = violations(compile_kernel(spec, "sm_90"), spec, "sm_90")
    assert not {"no HMMA in the kernel", "BMMA in the kernel"} & set(found)
    for word in (
        "no HGMMA in the main loop",
        "no UTCHMMA in the kernel",
        r"LDGSTS\S*\.128 in the kernel",
        "loads under 128 bits",
        "thread-instructions",
        "registers, 8",
        "stores to shared memory",
        "least bytes",
    ):
        assert any(word in sentence for sentence in found), (word, found)


def test_spills_are_found_without_any_limits() -> None:
    for target, spec in {"sm_80": spec_of(256, 256, 32), "gfx950": spec_of(256, 512, 32)}.items():
        code = compile_kernel(spec, target)
        assert code.spills > 0
        assert code.spilled_bytes > 0
        assert any("spilling" in sentence for sentence in violations(code, spec, target)), target


def test_a_compiled_kernel_never_comes_from_the_cache() -> None:
    """The same kernel with another matrix of the compiler's options; a stale entry would have the
    first one's registers."""
    wide, narrow = (
        compile_kernel(spec_of(64, 64, 64, options={"num_warps": 4, "maxnreg": registers}), "sm_80")
        for registers in (128, 64)
    )
    assert narrow.registers <= 64 < wide.registers


def test_a_signature_that_does_not_match_is_named() -> None:
    with pytest.raises(ValueError, match="BLOCK_K"):
        compile_kernel(spec_of(16, 16, 16, constexprs={"BLOCK_M": 16, "BLOCK_N": 16}), "sm_80")


def test_of_equal_gate_logits_the_lower_expert_is_chosen() -> None:
    """The interpreter takes the first of equals whatever the kernel says, so the compiled code is
    read: a maximum and its place are combined by the comparison of both."""
    kernel = compile_anew(all_specs()["moe/choose and route 1 token"], "sm_80")
    pattern = r'"tt.reduce"\(%\w+, %\w+\)[^\n]*\n(.*?)tt.reduce.return'
    combined = re.findall(pattern, kernel.asm["ttir"], re.DOTALL)
    assert len(combined) == 4, "one for each of the experts chosen"
    for body in combined:
        operations = re.findall(r"arith\.(\w+(?: \w+,)?)", body)
        assert operations[:5] == ["cmpi eq,", "cmpi slt,", "andi", "cmpi sgt,", "ori"], operations


@triton.jit
def double(x, PACK: tl.constexpr):
    at = x + tl.arange(0, 128)
    value = tl.load(at)
    tl.store(
        at,
        tl.inline_asm_elementwise(
            "add.u32 $0, $1, $1;", "=r,r", [value], dtype=value.dtype, is_pure=True, pack=PACK
        ),
    )


@pytest.mark.parametrize(("kind", "pack"), [("*u32", 1), ("*u8", 4)])
def test_inline_assembly_of_several_elements_is_refused(kind: str, pack: int) -> None:
    spec = KernelSpec("test/double", double, {"x": kind}, {"PACK": pack}, {"num_warps": 1})
    found = violations(compile_kernel(spec, "sm_80"), spec, "sm_80")
    assert ["inline assembly" in sentence for sentence in found] == [True] * (pack > 1)


def test_loops_of_nvidia_assembly() -> None:
    lines = [
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA `(.L_x_2)",
        None,
        "LDG.E.128 R4, desc[UR6][R2.64]",
        "@!P1 BRA `(.L_x_1)",
        "EXIT",
    ]
    listing, address = "", 0
    for line in lines:
        listing += (
            ".L_x_1:\n"
            if line is None
            else f"        /*{(address := address + 16):04x}*/                   {line} ;\n"
        )
    program = parse_sass(listing + ".L_x_2:\n")
    assert program.names == ["MOV", "BRA", "LDG.E.128", "BRA", "EXIT"]
    assert program.loops() == [{2, 3}]


def test_loops_of_amd_assembly() -> None:
    lines = [
        "s_mov_b32 s0, 0",
        None,
        "global_load_dwordx4 v[0:3], v4, s[2:3]",
        "s_cbranch_scc1 .LBB0_1",
        "s_cbranch_scc0 .LBB0_2",
    ]
    listing = "".join(".LBB0_1:\n" if line is None else f"\t{line}\n" for line in lines)
    program = parse_gcn(listing + ".LBB0_2:\n")
    assert program.names == ["s_mov_b32", "global_load_dwordx4", "s_cbranch_scc1", "s_cbranch_scc0"]
    assert program.loops() == [{1, 2}]


def test_a_part_of_a_loop_that_lies_elsewhere_belongs_to_it() -> None:
    """LLVM places the code that a mask skips after the loop, with a jump back into it; it is not a
    loop of its own."""
    lines = [
        "s_mov_b32",
        "head:",
        "v_mfma_f32",
        "s_cbranch_execnz aside",
        "back:",
        "s_cbranch_scc1 head",
        "s_endpgm",
    ]
    lines += ["aside:", "global_load_dwordx4 v[0:3]", "s_branch back"]
    listing = "".join(
        f".L{line}\n" if line.endswith(":") else f"\t{line.replace(' ', ' .L')}\n" for line in lines
    )
    program = parse_gcn(listing)
    assert program.loops() == [{1, 2, 3, 5, 6}]
    assert program.main_loop(re.compile("v_mfma")) == [
        "v_mfma_f32",
        "s_cbranch_execnz",
        "s_cbranch_scc1",
        "global_load_dwordx4",
        "s_branch",
    ]
