"""Sampling, at gpt-oss's vocabulary."""

import triton

from benchmarks.kernel_specs.spec import KernelSpec, Limits, Pass
from kernels.automaton import device as automaton
from kernels.sampling import choose, logprobs, modify

_VOCAB_SIZE = 201088
_BLOCK_CHUNKS = triton.next_power_of_2(triton.cdiv(_VOCAB_SIZE, choose.CHUNK))
_LOGPROB_CHUNKS = triton.cdiv(_VOCAB_SIZE, logprobs.CHUNK)
_MAX_TOP_LOGPROBS = 20
_WIDE = {target: Limits(load_bits=128) for target in ("sm_90", "sm_100", "gfx950")}
_LOGITS = {"logits_ptr": "*fp32"}
_BATCH = {"temperature_ptr": "*fp32", "min_p_ptr": "*fp32", "has_min_p": "i32"}
_TOP_K, _TOP_P = {"top_k_ptr": "*i64"}, {"top_p_ptr": "*fp32"}
_SIZES = {"stride": "i32", "vocab_size": "i32", "num_chunks": "i32"}
_END = {"end_ptr": "*i64", "end_ties_ptr": "*i64"}
_ENTRIES = {"rows_ptr": "*i64", "token_ids_ptr": "*i64"}
_COUNTS = {"num_entries": "i32", "num_rows": "i32", "vocab_size": "i32"}
_AUTOMATON = {"words_ptr": "*i32", "places_ptr": "*i32", "rows_ptr": "*i32"}
_UNALIGNED = ("num_chunks",)


def _search(*, mass: bool) -> KernelSpec:
    floors = {"floor_ptr": "*i64", "excess_ptr": "*fp64"}
    old = {"old_bins_ptr": "*fp64", "old_prefix_ptr": "*i64", "old_amounts_ptr": "*fp64"}
    return KernelSpec(
        name=f"sampling/search {'top_p' if mass else 'top_k'}",
        kernel=choose.search_kernel,
        signature=_LOGITS
        | {"best_ptr": "*i64"}
        | _BATCH
        | (_TOP_P | floors if mass else _TOP_K)
        | old
        | {"bins_ptr": "*fp64", "prefix_ptr": "*i64", "amounts_ptr": "*fp64"}
        | _SIZES
        | {"level": "i32"},
        constexprs={
            "MASS": mass,
            "BITS": choose.BITS,
            "CHUNK": choose.CHUNK,
            "SKIP": choose.SKIP,
            "TILE": choose.TILE,
        }
        | {"BLOCK_CHUNKS": _BLOCK_CHUNKS}
        | dict.fromkeys(_TOP_K if mass else _TOP_P | floors),
        options={"num_warps": 8},
        unaligned=(*_UNALIGNED, "has_min_p", "level"),
    )


SPECS = (
    KernelSpec(
        name="sampling/chunk_best",
        kernel=choose.chunk_best_kernel,
        signature=_LOGITS | {"best_ptr": "*i64", "stride": "i32", "vocab_size": "i32"},
        constexprs={"CHUNK": choose.CHUNK},
        options={"num_warps": 8},
        work=Pass(bytes=4 * choose.CHUNK),
        limits=_WIDE,
    ),
    KernelSpec(
        name="sampling/greedy",
        kernel=choose.greedy_kernel,
        signature={"best_ptr": "*i64", "token_ids_ptr": "*i64", "num_chunks": "i32"},
        constexprs={"BLOCK_CHUNKS": _BLOCK_CHUNKS},
        options={"num_warps": 1},
        unaligned=_UNALIGNED,
    ),
    _search(mass=False),
    _search(mass=True),
    KernelSpec(
        name="sampling/finish_search",
        kernel=choose.finish_search_kernel,
        signature={"best_ptr": "*i64"}
        | _BATCH
        | _TOP_P
        | {
            "floor_ptr": "*i64",
            "excess_ptr": "*fp64",
            "bins_ptr": "*fp64",
            "prefix_ptr": "*i64",
            "amounts_ptr": "*fp64",
        }
        | {"floor_ties_ptr": "*i64"}
        | _END
        | {"vocab_size": "i32", "num_chunks": "i32"},
        constexprs={
            "NUM_LEVELS": choose.NUM_LEVELS,
            "MASS": True,
            "NUM_BINS": choose.NUM_BINS,
            "BLOCK_CHUNKS": _BLOCK_CHUNKS,
        }
        | {"end_excess_ptr": None, "top_k_ptr": None},
        options={"num_warps": 1},
        unaligned=_UNALIGNED,
    ),
    KernelSpec(
        name="sampling/chunk_sum",
        kernel=choose.chunk_sum_kernel,
        signature=_LOGITS
        | {"best_ptr": "*i64"}
        | _BATCH
        | {"end_ptr": "*i64", "sums_ptr": "*fp64", "ties_ptr": "*i32", "stride": "i32", "vocab_size": "i32"},
        constexprs={"CHUNK": choose.CHUNK, "BLOCK_CHUNKS": _BLOCK_CHUNKS},
        options={"num_warps": 8},
    ),
    KernelSpec(
        name="sampling/pick",
        kernel=choose.pick_kernel,
        signature=_LOGITS
        | {"best_ptr": "*i64"}
        | _BATCH
        | {"seeds_ptr": "*i64", "positions_ptr": "*i64"}
        | _END
        | {"sums_ptr": "*fp64", "ties_ptr": "*i32", "token_ids_ptr": "*i64"}
        | _SIZES,
        constexprs={"CHUNK": choose.CHUNK, "BLOCK_CHUNKS": _BLOCK_CHUNKS},
        options={"num_warps": 8},
        unaligned=_UNALIGNED,
    ),
    KernelSpec(
        name="sampling/bias",
        kernel=modify.bias_kernel,
        signature=_LOGITS | _ENTRIES | {"values_ptr": "*fp32"} | _COUNTS,
        constexprs={"ENTRIES": modify.ENTRIES},
        unaligned=("num_entries", "num_rows"),
    ),
    KernelSpec(
        name="sampling/penalties",
        kernel=modify.penalties_kernel,
        signature=_LOGITS
        | _ENTRIES
        | {"counts_ptr": "*i32", "presence_ptr": "*fp32", "frequency_ptr": "*fp32", "repetition_ptr": "*fp32"}
        | _COUNTS
        | {"limit": "fp32"},
        constexprs={"ENTRIES": modify.ENTRIES},
        unaligned=("num_entries", "num_rows"),
    ),
    KernelSpec(
        name="sampling/mark",
        kernel=modify.mark_kernel,
        signature={"bits_ptr": "*i32"} | _ENTRIES | _COUNTS | {"num_words": "i32"},
        constexprs={"ENTRIES": modify.ENTRIES},
        unaligned=("bits_ptr", "num_entries", "num_rows", "num_words"),
    ),
    *(
        KernelSpec(
            name=f"sampling/{name}",
            kernel=kernel,
            signature=_LOGITS
            | {
                "allowed_ptr": "*i32",
                "forbidden_ptr": "*i32",
                "left_ptr": "*i32",
                "vocab_size": "i32",
                "num_words": "i32",
            },
            constexprs={"CHUNK": modify.CHUNK},
            options={"num_warps": modify.NUM_WARPS},
            unaligned=("num_words",),
        )
        for name, kernel in (("look", modify.look_kernel), ("restrict", modify.restrict_kernel))
    ),
    KernelSpec(
        name="sampling/allow_bits",
        kernel=modify.allow_bits_kernel,
        signature=_LOGITS
        | {"rows_ptr": "*i64", "bits_ptr": "*u8", "num_rows": "i32", "vocab_size": "i32"}
        | {"num_bytes": "i32", "bits_stride": "i32"},
        constexprs={"CHUNK": modify.CHUNK},
        unaligned=("num_rows", "num_bytes", "bits_stride"),
    ),
    KernelSpec(
        name="sampling/automaton mask",
        kernel=automaton.mask_kernel,
        signature=_LOGITS | _AUTOMATON | {"num_rows": "i32", "num_logits_rows": "i32", "vocab_size": "i32"},
        constexprs={"CHUNK": automaton.CHUNK},
        options={"num_warps": automaton.NUM_WARPS},
        unaligned=("num_rows", "num_logits_rows"),
    ),
    KernelSpec(
        name="sampling/automaton advance",
        kernel=automaton.advance_kernel,
        signature=_AUTOMATON | {"token_ids_ptr": "*i64", "num_rows": "i32"},
        constexprs={},
        options={"num_warps": 1},
        unaligned=("num_rows",),
    ),
    KernelSpec(
        name="sampling/chunk_logprobs",
        kernel=logprobs.chunk_logprobs_kernel,
        signature=_LOGITS
        | {
            "rows_ptr": "*i64",
            "maxima_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "best_ptr": "*i64",
            "stride": "i32",
            "num_rows": "i32",
        }
        | {"vocab_size": "i32", "num_top": "i32"},
        constexprs={"CHUNK": logprobs.CHUNK},
        unaligned=("num_rows", "num_top"),
    ),
    KernelSpec(
        name="sampling/logprobs",
        kernel=logprobs.logprobs_kernel,
        signature=_LOGITS
        | _ENTRIES
        | {
            "maxima_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "best_ptr": "*i64",
            "logprobs_ptr": "*fp32",
            "top_ids_ptr": "*i64",
        }
        | {
            "top_logprobs_ptr": "*fp32",
            "stride": "i32",
            "num_rows": "i32",
            "num_chunks": "i32",
            "num_top": "i32",
        },
        constexprs={"BLOCK_CHUNKS": triton.next_power_of_2(_LOGPROB_CHUNKS)}
        | {"BLOCK_BEST": triton.next_power_of_2(_LOGPROB_CHUNKS * _MAX_TOP_LOGPROBS)},
        unaligned=("num_rows", "num_chunks", "num_top"),
    ),
)
