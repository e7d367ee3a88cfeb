"""The gate's linear layer, for gpt-oss-120b."""

from benchmarks.kernel_specs.spec import KernelSpec, Limits, Pass
from kernels.linear.narrow import BLOCK_N, narrow_linear_kernel, tile_for


def _narrow(num_tokens: int) -> KernelSpec:
    tile = tile_for(num_tokens)
    block_m, block_k = tile["BLOCK_M"], tile["BLOCK_K"]
    return KernelSpec(
        name=f"linear/narrow {num_tokens} tokens",
        kernel=narrow_linear_kernel,
        signature={
            "x_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "out_ptr": "*fp32",
            "x_stride": "i32",
        }
        | {"num_tokens": "i32", "num_outputs": "i32", "width": "i32"},
        constexprs={"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k},
        options={"num_warps": tile["num_warps"]},
        unaligned=("num_tokens",),
        work=Pass(bytes=2 * block_m * block_k + 4 * BLOCK_N * block_k, weights=BLOCK_N * block_k),
        limits={"sm_90": Limits(load_bits=128), "sm_100": Limits(load_bits=128)},
    )


SPECS = (_narrow(1), _narrow(64))
