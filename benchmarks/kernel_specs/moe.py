"""Mixture of experts, with every tile that the launchers select."""

from collections.abc import Iterator, Mapping

from benchmarks.kernel_specs.spec import TARGETS, KernelSpec, Limits, Pass
from kernels.moe.combine import add_slots, add_slots_rms_norm
from kernels.moe.matmul_mxfp8 import expert_matmul_mxfp8, quantize_rows
from kernels.moe.matmul_natural import expert_matmul_natural
from kernels.moe.matmul_wgmma import expert_matmul_wgmma
from kernels.moe.routing import choose_experts, place_tokens
from kernels.moe.tile_choice import DENSE, MXFP4, MXFP4_MXFP8, MXFP4_WGMMA, Tile, choose_tile, tiles
from kernels.pointwise.norm import tile as row_tile

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
_MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx950": "v_mfma"}


def _matmuls(weights: str, target: str) -> Iterator[KernelSpec]:
    for tile in tiles(weights, target):
        for product in ("gate_up", "down"):
            num_weights = tile.block_n * tile.block_k
            read = 2 * num_weights if weights == DENSE else num_weights * 17 // 32
            constexprs = {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GATE_UP": product == "gate_up",
                "NUM_STAGES": tile.num_stages,
            }
            yield KernelSpec(
                name=f"moe/{weights} {product} {tile.block_m}x{tile.block_n}x{tile.block_k} "
                f"w{tile.num_warps} ({target})",
                kernel=expert_matmul_wgmma if weights == MXFP4_WGMMA else expert_matmul_natural,
                signature={**_MATMUL, "blocks_ptr": "*bf16"} if weights == DENSE else _MATMUL,
                constexprs=constexprs
                if weights == MXFP4_WGMMA
                else {**constexprs, "PACKED": weights == MXFP4, "EVEN_K": weights == DENSE},
                options={"num_warps": tile.num_warps},
                targets=(target,),
                unaligned=("top_k",),
                # All experts of gpt-oss-120b in bf16 are 4 GB a layer.
                large=("blocks_ptr",) if weights == DENSE else (),
                work=Pass(read, num_weights, 2 * tile.block_m * tile.block_k),
                limits={target: _limits(weights, target, tile)},
            )


def _fp32() -> Iterator[KernelSpec]:
    """Yield specs for comparisons, so without limits except on spills."""
    tile = choose_tile(MXFP4, "cpu", 1, 1, fp32=True)
    signature = {name: "*fp32" if kind == "*bf16" else kind for name, kind in _MATMUL.items()}
    constexprs = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GATE_UP": True,
        "NUM_STAGES": tile.num_stages,
    }
    for weights, targets in ((MXFP4_WGMMA, ("sm_90",)), (MXFP4, TARGETS), (DENSE, TARGETS)):
        yield KernelSpec(
            name=f"moe/fp32 {weights} gate_up {tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps}",
            kernel=expert_matmul_wgmma if weights == MXFP4_WGMMA else expert_matmul_natural,
            signature={**signature, "blocks_ptr": "*fp32"} if weights == DENSE else signature,
            constexprs=constexprs
            if weights == MXFP4_WGMMA
            else {**constexprs, "PACKED": weights == MXFP4, "EVEN_K": False},
            options={"num_warps": tile.num_warps},
            targets=targets,
            unaligned=("top_k",),
        )


def _mxfp8(target: str) -> Iterator[KernelSpec]:
    for tile in tiles(MXFP4_MXFP8, target):
        for product in ("gate_up", "down"):
            num_weights = tile.block_n * tile.block_k
            signature = {**_MATMUL, "x_ptr": "*fp8e4nv", "x_scales_ptr": "*u8", "out_scales_ptr": "*u8"}
            if product == "gate_up":
                signature["out_ptr"] = "*fp8e4nv"
            yield KernelSpec(
                name=f"moe/{MXFP4_MXFP8} {product} {tile.block_m}x{tile.block_n}x{tile.block_k} "
                f"w{tile.num_warps} ({target})",
                kernel=expert_matmul_mxfp8,
                signature={
                    name: kind for name, kind in signature.items() if name in expert_matmul_mxfp8.arg_names
                },
                constexprs={
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "GATE_UP": product == "gate_up",
                    "NUM_STAGES": tile.num_stages,
                },
                options={"num_warps": tile.num_warps},
                targets=(target,),
                unaligned=("top_k",),
                work=Pass(num_weights * 17 // 32, num_weights, tile.block_m * tile.block_k * 33 // 32),
                limits={
                    target: Limits(
                        matrix={"sm_100": "UTCQMMA", "gfx950": "v_mfma_scale"}[target],
                        load_bits={"sm_100": 64}.get(target),
                        instructions=14 if tile.block_m <= 64 else 30,
                        traffic=1.06,
                    )
                },
            )


def _limits(weights: str, target: str, tile: Tile) -> Limits:
    if weights == MXFP4_WGMMA:
        # One store is for scales whose share of a thread is too narrow for an asynchronous copy;
        # decoded weights would take 16 and more.
        instructions = 28 if tile.block_m <= 32 else 38
        return Limits(matrix="HGMMA", load_bits=128, instructions=instructions, shared_stores=1, traffic=1.02)
    if weights == DENSE:
        # Under 64 rows wgmma and tcgen05 have nothing to put on their 64 or 128 rows.
        matrix = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target) if tile.block_m >= 64 else None
        # On AMD a tile of 16 tokens by 64 columns is less than 128 bits a thread.
        return Limits(matrix=matrix, load_bits=128, narrow_share=0.25, instructions=36, traffic=1.02)
    # From Triton 3.8 on AMD's loads go straight into LDS, 32 bits of a packed row at a time.
    bits = {"sm_100": 64}.get(target)
    # Where up to 64 rows share a weight, decoding must not be slower than need be; with more the
    # matrix product has its share too.
    instructions = {"sm_100": 44 if tile.block_m <= 64 else 68, "gfx950": 34}.get(target)
    return Limits(matrix=_MATRIX.get(target), load_bits=bits, instructions=instructions, traffic=1.06)


_ROUTING = {
    "logits_ptr": "*fp32",
    "ids_ptr": "*i32",
    "weights_ptr": "*fp32",
    "counts_ptr": "*i32",
    "tiles_ptr": "*i32",
    "pairs_ptr": "*i32",
    "num_tokens": "i32",
    "num_experts": "i32",
    "first_expert": "i32",
    "num_local": "i32",
    "max_tiles": "i32",
}


def _routing() -> Iterator[KernelSpec]:
    def spec(name: str, num_tokens: int, num_warps: int, **constexprs: object) -> KernelSpec:
        common = {
            "TOP_K": 4,
            "SLOTS": 4,
            "LOCAL": 128,
            "BLOCK_T": num_tokens,
            "BLOCK_M": 16,
            "BLOCK_TILES": 16,
        }
        kernel = choose_experts if constexprs else place_tokens
        signature: Mapping[str, str] = {
            name: kind for name, kind in _ROUTING.items() if name in kernel.arg_names
        }
        return KernelSpec(
            name=f"moe/{name}",
            kernel=kernel,
            signature=signature,
            constexprs={**common, **constexprs},
            options={"num_warps": num_warps},
            unaligned=("num_tokens", "first_expert", "max_tiles"),
        )

    everything = {"EXPERTS": 128, "FROM_LOGITS": True, "ROUTES": "all"}
    yield spec("choose and route 1 token", 2, 4, **everything)
    yield spec("choose and route 64 tokens", 64, 8, **everything)
    yield spec("choose and count 32 of many tokens", 32, 8, **{**everything, "ROUTES": "counts"})
    yield spec("place 32 of many tokens", 32, 8)


def _rows() -> Iterator[KernelSpec]:
    yield KernelSpec(
        name="moe/round to mxfp8",
        kernel=quantize_rows,
        signature={
            "x_ptr": "*bf16",
            "values_ptr": "*fp8e4nv",
            "scales_ptr": "*u8",
            "width": "i32",
            "x_stride": "i32",
        },
        constexprs={"BLOCK": 1024},
        options={"num_warps": 4},
        targets=("sm_100", "gfx950"),
        work=Pass(2 * 1024),
    )
    yield KernelSpec(
        name="moe/combine",
        kernel=add_slots,
        signature={
            "results_ptr": "*bf16",
            "ids_ptr": "*i32",
            "out_ptr": "*bf16",
            "hidden_size": "i32",
            "first_expert": "i32",
            "num_local": "i32",
        },
        constexprs={"TOP_K": 4, "BLOCK_H": 1024},
        options={"num_warps": 4},
        unaligned=("first_expert",),
        work=Pass(4 * 1024 * 2),
        # Expert ids are read one by one, and AMD has twice the threads for as many columns.
        limits={target: Limits(load_bits=64, narrow_share=0.25) for target in TARGETS},
    )
    row = row_tile(2880)
    yield KernelSpec(
        name="moe/combine, add, norm",
        kernel=add_slots_rms_norm,
        signature={
            "residual_ptr": "*bf16",
            "results_ptr": "*bf16",
            "ids_ptr": "*i32",
            "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
            "residual_stride": "i32",
            "hidden_size": "i32",
            "first_expert": "i32",
            "num_local": "i32",
            "eps": "fp32",
        },
        constexprs={"TOP_K": 4, "BLOCK": row["BLOCK"]},
        options={"num_warps": row["num_warps"]},
        unaligned=("first_expert",),
        work=Pass(6 * row["BLOCK"] * 2),
        limits={target: Limits(load_bits=128, narrow_share=0.25) for target in TARGETS},
    )


SPECS = (
    *_matmuls(MXFP4_WGMMA, "sm_90"),
    *(spec for target in TARGETS for spec in _matmuls(MXFP4, target)),
    *(spec for target in TARGETS for spec in _matmuls(DENSE, target)),
    *(spec for target in ("sm_100", "gfx950") for spec in _mxfp8(target)),
    *_fp32(),
    *_routing(),
    *_rows(),
)
