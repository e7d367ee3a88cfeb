"""Attention over the paged KV cache, for gpt-oss's heads on one GPU, and its preparation."""

from dataclasses import replace

import torch

from benchmarks.kernel_specs.spec import TARGETS, KernelSpec, Limits, Pass
from kernels.attention import paged, rope_store
from kernels.formats import fp8_refusal

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128

_PREFILL_MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
"""Matrix instructions of prefill tiles with 64 or 128 rows; those of decodes, with 16 rows, are
HMMA on both."""

_SIGNATURE = {
    "q_ptr": "*bf16",
    "kv_ptr": "*bf16",
    "table_ptr": "*i32",
    "context_lens_ptr": "*i32",
    "cu_seqlens_ptr": "*i32",
    "sinks_ptr": "*fp32",
    "out_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "scale": "fp32",
    "q_stride": "i32",
    "v_offset": "i64",
    "num_tiles": "i32",
    "num_programs": "i32",
    "num_seqs": "i32",
    "max_blocks": "i32",
    "max_splits": "i32",
}
_UNALIGNED = (
    "table_ptr",
    "context_lens_ptr",
    "cu_seqlens_ptr",
    "sinks_ptr",
    "num_tiles",
    "num_programs",
    "num_seqs",
    "max_blocks",
    "max_splits",
)


def _attend_specs(window: int | None, fp8: bool) -> list[KernelSpec]:
    """Return one spec for each choice of tiles, for the targets that have it."""
    targets: dict[paged.Tiles, list[str]] = {}
    for target in TARGETS:
        if not fp8 or fp8_refusal(target) is None:
            targets.setdefault(paged.choose_tiles(target, torch.bfloat16, HEAD_DIM, window), []).append(
                target
            )
    return [_attend_spec(window, fp8, tiles, tuple(names)) for tiles, names in targets.items()]


def _attend_spec(window: int | None, fp8: bool, tiles: paged.Tiles, targets: tuple[str, ...]) -> KernelSpec:
    name = f"attention/attend {'fp8' if fp8 else 'bf16'} {'full' if window is None else f'window {window}'}"
    # The main loop is the one with most matrix instructions: of these it is that of decodes, a tile
    # of keys and values in each pass.
    is_decode = window is None and tiles.num_warps == 8
    # Keys and values come 128 bits a thread, and nothing else but block ids: 4 bytes a thread, on
    # AMD up to four times.
    limits = {
        target: Limits(load_bits=128, narrow_share=0.15 if target.startswith("sm_") else 0.25)
        for target in targets
    }
    # Asynchronous copies are of keys, values and block ids, in the loops of both kinds of program.
    limits |= {
        target: replace(
            limits[target],
            anywhere=(matrix, "HMMA"),
            nowhere=(r"LDGSTS\S*\.64",),
            traffic=1.1 if is_decode else None,
            registers=128,
        )
        for target, matrix in _PREFILL_MATRIX.items()
        if target in targets
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.max_registers is not None:
        options["maxnreg"] = tiles.max_registers
    return KernelSpec(
        name=f"{name} m{tiles.block_m}n{tiles.block_n}d{tiles.decode_n}w{tiles.num_warps}",
        kernel=paged._attend,
        signature=_SIGNATURE | ({"kv_ptr": "*fp8e4nv", "scales_ptr": "*fp32"} if fp8 else {}),
        constexprs={
            "KV": KV_HEADS,
            "GROUP": HEADS // KV_HEADS,
            "HEAD_DIM": HEAD_DIM,
            "BLOCK_D": HEAD_DIM,
            "PAGE": 16,
            "WINDOW": window or 0,
            "BLOCK_M": tiles.block_m,
            "BLOCK_G": 16,
            "BLOCK_N": tiles.block_n,
            "DECODE_N": tiles.decode_n,
            "MIN_SPLIT": paged.MIN_SPLIT,
            "MAX_SPLITS": 32,
        }
        | ({} if fp8 else {"scales_ptr": None}),
        options=options,
        targets=targets,
        unaligned=_UNALIGNED,
        work=Pass(bytes=2 * tiles.decode_n * HEAD_DIM * (1 if fp8 else 2)) if is_decode else None,
        limits=limits,
    )


_MERGE = KernelSpec(
    name="attention/merge splits",
    kernel=paged._merge_splits,
    signature={
        "partial_ptr": "*fp32",
        "stats_ptr": "*fp32",
        "context_lens_ptr": "*i32",
        "cu_seqlens_ptr": "*i32",
        "sinks_ptr": "*fp32",
        "out_ptr": "*bf16",
        "num_seqs": "i32",
        "max_splits": "i32",
    },
    constexprs={
        "HEADS": HEADS,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_D": HEAD_DIM,
        "DECODE_N": 128,
        "WINDOW": 0,
        "MIN_SPLIT": paged.MIN_SPLIT,
        "MAX_SPLITS": 32,
    },
    options={"num_warps": 1},
    unaligned=("context_lens_ptr", "cu_seqlens_ptr", "sinks_ptr", "num_seqs", "max_splits"),
)


def _rope_spec(fp8: bool) -> KernelSpec:
    return KernelSpec(
        name=f"attention/rope and store {'fp8' if fp8 else 'bf16'}",
        kernel=rope_store._rope_and_store,
        signature={
            "qkv_ptr": "*bf16",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "slots_ptr": "*i64",
            "q_ptr": "*bf16",
            "kv_ptr": "*fp8e4nv" if fp8 else "*bf16",
            "qkv_stride": "i32",
            "v_offset": "i64",
        }
        | ({"scales_ptr": "*fp32"} if fp8 else {}),
        constexprs={
            "HEADS": HEADS,
            "KV": KV_HEADS,
            "HALF": HEAD_DIM // 2,
            "BLOCK_HALF": HEAD_DIM // 2,
            "BLOCK_H": rope_store.BLOCK_H,
            "IS_FP8": fp8,
        }
        | ({} if fp8 else {"scales_ptr": None}),
        options={"num_warps": 2},
        targets=tuple(target for target in TARGETS if not fp8 or fp8_refusal(target) is None),
        unaligned=("slots_ptr", "scales_ptr") if fp8 else ("slots_ptr",),
    )


SPECS: tuple[KernelSpec, ...] = (
    *(spec for fp8 in (False, True) for window in (None, WINDOW) for spec in _attend_specs(window, fp8)),
    _MERGE,
    _rope_spec(False),
    _rope_spec(True),
)
