"""Mixture of experts."""

from collections.abc import Iterator

from benchmarks.kernel_specs.spec import KernelSpec, Limits, Pass
from kernels.moe.matmul_wgmma import expert_matmul_wgmma

_MATMUL = {
    "x_ptr": "*bf16",
    "blocks_ptr": "*u8",
    "scales_ptr": "*u8",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "tiles_ptr": "*i32",
    "pairs_ptr": "*i32",
    "row_weights_ptr": "*fp32",
    "N": "i32",
    "K": "i32",
    "x_stride": "i32",
    "out_stride": "i32",
    "top_k": "i32",
    "alpha": "fp32",
    "limit": "fp32",
}


def _wgmma() -> Iterator[KernelSpec]:
    for block_m, block_n, block_k, warps, stages in [
        (8, 64, 128, 4, 4),
        (8, 64, 256, 4, 4),
        (8, 128, 128, 4, 4),
        (16, 64, 256, 4, 4),
        (16, 128, 128, 4, 4),
        (32, 128, 128, 4, 4),
        (64, 128, 128, 4, 3),
        (64, 256, 128, 8, 3),
        (128, 128, 128, 8, 3),
    ]:
        for gate_up in (True, False):
            yield KernelSpec(
                name=f"moe/wgmma {'gate_up' if gate_up else 'down'} {block_m}x{block_n}x{block_k}",
                kernel=expert_matmul_wgmma,
                signature=_MATMUL,
                constexprs={
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                    "BLOCK_K": block_k,
                    "GATE_UP": gate_up,
                    "NUM_STAGES": stages,
                },
                options={"num_warps": warps},
                targets=("sm_90",),
                unaligned=("top_k",),
                work=Pass(block_n * block_k * 17 // 32 + 2 * block_m * block_k, block_n * block_k),
                limits={"sm_90": Limits(matrix="HGMMA", load_bits=128, instructions=28 if block_m <= 32 else 38, traffic=1.02)},
            )


SPECS: tuple[KernelSpec, ...] = (*_wgmma(),)
