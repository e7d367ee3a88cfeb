"""Every CPU kernel on small shapes with the results of the torch references.

`python -m tests.support.isa_cases` writes them to tests/golden/isa_cases.json.gz. Inputs are the
same on every machine. Nothing here uses the library: weights are packed by the layouts'
definitions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.attention import reference as attention_reference
from kernels.automaton import layout
from kernels.automaton import reference as automaton_reference
from kernels.cpu import native, sampling
from kernels.embedding import reference as embedding_reference
from kernels.moe import ExpertWeights
from kernels.moe import reference as moe_reference
from kernels.mxfp4 import from_natural
from kernels.pointwise import reference as pointwise_reference
from kernels.sampling import SamplingBatch
from kernels.sampling import reference as sampling_reference
from tests.support.stored_calls import GOLDEN, Case, Inputs, Output, Scratch, packed_dense, rows16, save

TYPES = native.DATA_TYPES
ROPE = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
# Sums of up to a thousand products in another order; a result that is rounded to bf16 here and
# there; bf16 inside as well.
FP32 = {"atol": 1e-4, "rtol": 1e-5}
BF16 = {"atol": 1e-4, "rtol": 2**-7}
BF16_INSIDE = {"atol": 2e-2, "rtol": 2e-2}


def linears() -> Iterator[Case]:
    for dtype in TYPES:
        for rows, width, outputs, quick in ((1, 67, 33, True), (7, 96, 20, True), (33, 131, 20, False)):
            inputs = Inputs(f"linear {dtype} {rows}")
            x, weight, bias = (
                inputs.floats(rows, width),
                inputs.floats(outputs, width, dtype=dtype),
                inputs.floats(outputs, dtype=dtype),
            )
            expected = (x.double() @ weight.double().T + bias.double()).float()
            yield Case(f"linear, {rows} rows, weights of {dtype}", quick).call(
                "linear",
                x=x,
                weight=weight,
                bias=bias,
                out=Output(expected, FP32),
                num_rows=rows,
                width=width,
                num_outputs=outputs,
                weight_type=TYPES[dtype],
            )


def dense_layers() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.int8):
        for rows, width, outputs, quick in ((1, 64, 33, True), (9, 96, 20, True), (20, 288, 33, False)):
            inputs = Inputs(f"dense {dtype} {rows}")
            x, bias = (
                inputs.floats(rows, width, dtype=torch.bfloat16),
                inputs.floats(outputs, dtype=torch.bfloat16),
            )
            values, scales, exact = packed_dense(inputs.floats(outputs, width, dtype=torch.bfloat16), dtype)
            expected = (x.double() @ exact.double().T + bias.double()).bfloat16()
            yield Case(f"dense, {rows} rows, weights of {dtype}", quick).call(
                "dense",
                x=x,
                weight=values,
                scales=scales,
                bias=bias,
                out=Output(expected, BF16),
                num_rows=rows,
                width=width,
                num_outputs=outputs,
            )


def packing() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.int8):
        weight = Inputs(f"pack_dense {dtype}").floats(37, 75, dtype=torch.bfloat16)
        values, scales, _ = packed_dense(weight, dtype)
        yield Case(f"pack_dense to {dtype}").call(
            "pack_dense",
            weight=weight,
            packed=Output(values, before=torch.zeros_like(values)),
            scales=None if scales is None else Output(scales, {"rtol": 1e-6}),
            first_row=0,
            num_rows=37,
            width=75,
            packed_width=96,
        )
    for rows, groups in ((32, 3), (16, 17)):
        inputs = Inputs(f"pack_rows16 {rows}")
        blocks, scales = inputs.bytes(1, rows, groups, 16), inputs.bytes(1, rows, groups).clamp(max=254)
        outputs = [Output(part) for part in rows16(blocks, scales)]
        case = Case(f"pack_rows16, {rows} rows of {groups} groups")
        yield _pack(case, 0, blocks, scales, *outputs)
        damaged = scales.clone()
        damaged[0, rows - 1, groups - 1] = 255
        outputs = [Output(part) for part in rows16(blocks, damaged)]
        yield _pack(
            Case(f"pack_rows16, {rows} rows of {groups} groups, a scale is NaN"), 1, blocks, damaged, *outputs
        )


def _pack(
    case: Case, returns: int, blocks: Tensor, scales: Tensor, packed_blocks: Output, packed_scales: Output
) -> Case:
    _, rows, groups = scales.shape
    return case.call(
        "pack_rows16",
        returns,
        blocks=blocks,
        scales=scales,
        packed_blocks=packed_blocks,
        packed_scales=packed_scales,
        num_rows=rows,
        num_groups=groups,
        blocks_stride=16 * groups,
        scales_stride=groups,
        packed_groups=groups,
    )


def experts() -> Iterator[Case]:
    for dtype in TYPES:
        for tokens, hidden, intermediate, quick in (
            (1, 64, 32, True),
            (6, 64, 32, True),
            (24, 96, 32, False),
        ):
            inputs = Inputs(f"experts {dtype} {tokens}")
            held, of, first, top_k = 3, 5, 1, 2
            natural = [
                (inputs.bytes(held, rows, width // 32, 16), inputs.bytes(held, rows, width // 32) % 4 + 123)
                for rows, width in ((2 * intermediate, hidden), (hidden, intermediate))
            ]
            (gate_up_blocks, gate_up_scales), (down_blocks, down_scales) = (
                rows16(*weights) for weights in natural
            )
            x = inputs.floats(tokens, hidden, dtype=dtype)
            gate_up_bias, down_bias = (
                inputs.floats(held, 2 * intermediate, dtype=dtype),
                inputs.floats(held, hidden, dtype=dtype),
            )
            ids = torch.tensor([inputs.permutation(of)[:top_k] for _ in range(tokens)], dtype=torch.int32)
            weights = inputs.bytes(tokens, top_k).float() / 256
            gate_up, down = (from_natural(*weights) for weights in natural)
            experts = ExpertWeights(
                *(gate_up, gate_up_bias, down, down_bias),
                swiglu_limit=7.0,
                swiglu_alpha=1.702,
                num_experts=of,
                first_expert=first,
            )
            expected = moe_reference.fused_experts(x.float(), ids, weights, experts)
            # Values of order 1000; with bf16, rounded to 8 bits between the projections and at the
            # end, and here.
            tolerance = {"atol": 2e-3, "rtol": 1e-5} if dtype == torch.float32 else {"norm": 5e-3}
            yield Case(f"experts, {tokens} tokens of {dtype}", quick).call(
                "experts",
                x=x,
                topk_ids=ids,
                topk_weights=weights,
                gate_up_blocks=gate_up_blocks,
                gate_up_scales=gate_up_scales,
                down_blocks=down_blocks,
                down_scales=down_scales,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                out=Output(expected.to(dtype), tolerance),
                num_tokens=tokens,
                top_k=top_k,
                hidden=hidden,
                intermediate=intermediate,
                first_expert=first,
                num_experts=held,
                limit=7.0,
                alpha=1.702,
                type=TYPES[dtype],
                bias_type=TYPES[dtype],
            )


def attentions() -> Iterator[Case]:
    for dtype in TYPES:
        # Decodes and a chunk in the middle of a prompt, within and beyond the window.
        for lengths, head_dim, window, quick in (
            (((1, 1), (37, 1), (20, 5)), 32, None, True),
            (((50, 3), (4, 4)), 32, 16, True),
            (((70, 1), (20, 9), (5, 5)), 64, None, False),
            (((50, 1), (40, 9), (5, 5)), 40, 32, False),
        ):
            inputs = Inputs(f"attention {dtype} {lengths} {window}")
            num_tokens, block_size, (heads, kv_heads) = sum(queries for _, queries in lengths), 16, (4, 2)
            blocks = [-(-length // block_size) for length, _ in lengths]
            ids = iter(inputs.permutation(sum(blocks)))
            table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
            for row, count in enumerate(blocks):
                table[row, :count] = torch.tensor([next(ids) for _ in range(count)])
            q = inputs.floats(num_tokens, heads, head_dim, dtype=dtype)
            cache = inputs.floats(2, sum(blocks), block_size, kv_heads, head_dim, dtype=dtype, bits=3)
            context = torch.tensor([length for length, _ in lengths], dtype=torch.int32)
            queries = torch.tensor([0, *(count for _, count in lengths)], dtype=torch.int32).cumsum(
                0, dtype=torch.int32
            )
            sinks = inputs.floats(heads)
            expected = attention_reference.paged_attention(
                q.float(), cache.float(), table, context, queries, sinks, scale=0.125, window=window
            ).to(dtype)
            name = f"attention, {len(lengths)} sequences, window {window}, heads of {head_dim} {dtype}"
            tolerance = FP32 if dtype == torch.float32 else BF16_INSIDE
            yield _attention(
                Case(name, quick),
                0,
                q,
                cache,
                table,
                context,
                queries,
                sinks,
                Output(expected, tolerance),
                window or 0,
            )
            if quick and window is None:
                bad = table.clone()
                bad[1, 0] = sum(blocks)
                refused = Case(f"{name}, a block outside the cache")
                yield _attention(refused, 2, q, cache, bad, context, queries, sinks, torch.zeros_like(q), 0)


def _attention(
    case: Case,
    returns: int,
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    context: Tensor,
    queries: Tensor,
    sinks: Tensor,
    out: Output | Tensor,
    window: int,
) -> Case:
    num_tokens, heads, head_dim = q.shape
    return case.call(
        "attention",
        returns,
        q=q,
        keys=cache[0],
        values=cache[1],
        block_table=table,
        context_lens=context,
        cu_seqlens_q=queries,
        sinks=sinks,
        out=out,
        num_tokens=num_tokens,
        q_stride=heads * head_dim,
        num_seqs=len(context),
        max_blocks=table.shape[1],
        num_blocks=cache.shape[1],
        block_size=cache.shape[2],
        num_heads=heads,
        num_kv_heads=cache.shape[3],
        head_dim=head_dim,
        window=window,
        scale=0.125,
        type=TYPES[q.dtype],
    )


def norms() -> Iterator[Case]:
    for dtype in TYPES:
        for rows, width, added, quick in ((3, 67, True, True), (2, 64, False, True), (5, 331, True, False)):
            inputs = Inputs(f"norm {dtype} {rows}")
            x, delta, weight = (
                inputs.floats(rows, width, dtype=dtype),
                inputs.floats(rows, width, dtype=dtype),
                inputs.floats(width, dtype=dtype),
            )
            if added:
                total, normed = pointwise_reference.add_rms_norm(x.clone(), delta, weight, 1e-5)
            else:
                total, normed = x, pointwise_reference.rms_norm(x, weight, 1e-5)
            yield Case(f"norm, {rows} rows of {width} {dtype}{', added' if added else ''}", quick).call(
                "norm",
                x=Output(total, before=x),
                delta=delta if added else None,
                weight=weight,
                out=Output(normed, FP32 if dtype == torch.float32 else BF16),
                num_rows=rows,
                width=width,
                eps=1e-5,
                type=TYPES[dtype],
                weight_type=TYPES[dtype],
            )


def ropes() -> Iterator[Case]:
    for dtype in TYPES:
        inputs = Inputs(f"rope {dtype}")
        tokens, heads, kv_heads, head_dim, slots = 5, 4, 2, 36, 32
        qkv = inputs.floats(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        cos, sin = inputs.floats(tokens, head_dim // 2) / 4, inputs.floats(tokens, head_dim // 2) / 4
        cache = inputs.floats(2, slots // 16, 16, kv_heads, head_dim, dtype=dtype)
        slot_mapping = torch.tensor(inputs.permutation(slots)[:tokens])
        rotated, filled = qkv.clone(), cache.clone()
        rotated[:, :heads] = attention_reference.rope_and_store_kv(
            qkv.clone(), heads, cos, sin, filled, slot_mapping
        )
        # The kernel rotates the queries where they are, and leaves the keys there as they were.
        tolerance = FP32 if dtype == torch.float32 else BF16
        sizes = {
            "num_tokens": tokens,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "num_slots": slots,
        }
        yield Case(f"rope_and_store, {dtype}").call(
            "rope_and_store",
            0,
            qkv=Output(rotated, tolerance, before=qkv),
            cos=cos,
            sin=sin,
            keys=Output(filled[0], tolerance, before=cache[0]),
            values=Output(filled[1], before=cache[1]),
            slot_mapping=slot_mapping,
            type=TYPES[dtype],
            **sizes,
        )
        bad = slot_mapping.clone()
        bad[-1] = slots
        yield Case(f"rope_and_store, {dtype}, a slot outside the cache").call(
            "rope_and_store",
            2,
            qkv=qkv,
            cos=cos,
            sin=sin,
            keys=cache[0],
            values=cache[1],
            slot_mapping=bad,
            type=TYPES[dtype],
            **sizes,
        )


def gates() -> Iterator[Case]:
    for tokens, num_experts, k in ((3, 32, 4), (2, 7, 7)):
        logits = Inputs(f"gate {num_experts}").floats(tokens, num_experts)
        ids, weights = moe_reference.gate_topk(logits, k)
        yield Case(f"gate_topk, {k} of {num_experts}").call(
            "gate_topk",
            logits=logits,
            topk_ids=Output(ids),
            topk_weights=Output(weights, FP32),
            num_tokens=tokens,
            num_experts=num_experts,
            k=k,
        )


def samples() -> Iterator[Case]:
    for rows, vocab, greedy, quick in ((3, 700, True, True), (6, 700, False, True), (6, 1500, False, False)):
        logits = Inputs(f"sample {vocab} {greedy}").floats(rows, vocab, bits=8)
        batch = SamplingBatch()
        if not greedy:
            batch = SamplingBatch(
                temperature=torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 2.0]),
                seeds=torch.arange(rows) * 10**15 - 7,
                output_positions=torch.arange(rows) * 3,
                top_k=torch.tensor([0, 0, 50, 0, 300, 1]),
                top_p=torch.tensor([1.0, 1.0, 1.0, 0.5, 0.875, 1.0]),
                min_p=torch.tensor([0.0, 0.125, 0.0, 0.0, 0.0, 0.0]),
            )
        blocks = -(-vocab // sampling.TOKEN_BLOCK)
        vectors = ("temperature", "seeds", "output_positions", "top_k", "top_p", "min_p")
        yield Case(f"sample, {vocab} tokens{', greedy' if greedy else ''}", quick).call(
            "sample",
            logits=logits,
            **{name: getattr(batch, name) for name in vectors},
            token_ids=Output(sampling_reference.sample(logits, batch).token_ids),
            block_maxima=Scratch(4 * rows * blocks),
            block_sums=Scratch(8 * rows * blocks),
            num_rows=rows,
            vocab=vocab,
            row_stride=vocab,
        )
    logits, rows, chosen = (
        Inputs("logprobs").floats(4, 700, bits=8),
        torch.tensor([3, 0]),
        torch.tensor([5, 0, 0, 699]),
    )
    found = sampling_reference.logprobs(logits, chosen, rows, 5)
    yield Case("logprobs").call(
        "logprobs",
        logits=logits,
        rows=rows,
        token_ids=chosen,
        logprobs=Output(found.logprobs, FP32),
        top_ids=Output(found.top_ids),
        top_logprobs=Output(found.top_logprobs, FP32),
        block_maxima=Scratch(4 * 2 * 2),
        block_sums=Scratch(8 * 2 * 2),
        num_rows=2,
        vocab=700,
        row_stride=700,
        num_top=5,
    )


def automata() -> Iterator[Case]:
    """The mask of four sequences' rows, and their places after the tokens that were sampled."""
    vocab, (thinks, answers, cut), none = 150, range(3), layout.NO_STATE
    first = layout.pack(
        layout.StateLists(
            forbids=[True, False, False],
            tokens=[[3, 40, 149], [8, 9, 70, 131], [20]],
            next_tokens=[[12, 9], [8, 9], [20]],
            next_states=[[cut, answers], [thinks, answers], [answers]],
            counted=[True, False, False],
            overflow=[cut, none, none],
        )
    )
    second = layout.pack(
        layout.StateLists([False, True], [[149], []], [[149], []], [[1], []], [False, False], [none, none])
    )
    far, limit, device = len(first), layout.UNLIMITED, layout.ON_DEVICE
    rows = torch.tensor(
        [  # As `layout.Row`. Row 3 of the logits follows no automaton.
            (0, 2, 0, thinks, 1, 4, limit, limit, 0, 9),
            (1, 2, 0, thinks, 1, 5, limit, limit, 1, 8),
            (2, 2, 0, thinks, 1, 6, limit, limit, 2, -1),
            (4, 0, 0, device, 0, 0, 6, limit, 0, -1),
            (5, 1, far, device, 0, 2, limit, limit, 0, 149),
            (6, 1, far, device, 0, 3, limit, limit, 1, -1),
            (7, 3, 0, thinks, 0, 3, limit, 4, 0, -1),
        ],
        dtype=torch.int32,
    ).T.contiguous()
    places = torch.tensor([(thinks, 5), (0, 0), (cut, 9), (cut, 9)], dtype=torch.int32)
    words = torch.cat((torch.from_numpy(first), torch.from_numpy(second)))
    automaton = layout.AutomatonRows(words, places, rows)
    logits = Inputs("automaton").floats(8, vocab)
    masked = logits.clone()
    automaton_reference.mask(masked, automaton)
    followed = {"words": words, "rows": rows, "num_rows": rows.shape[1]}
    yield Case("automaton_mask").call(
        "automaton_mask",
        **followed,
        logits=Output(masked, before=logits),
        places=places,
        token_ids=None,
        vocab=vocab,
        row_stride=vocab,
    )
    for kind, draft in (("all drafts are right", 8), ("a draft is wrong", 70)):
        token_ids = torch.tensor([9, draft, 5, 0, 50, 149, 7, 1])
        moved = layout.AutomatonRows(words, places.clone(), rows)
        automaton_reference.advance(moved, token_ids)
        yield Case(f"automaton_advance, {kind}").call(
            "automaton_advance",
            **followed,
            logits=None,
            places=Output(moved.places, before=places),
            token_ids=token_ids,
            vocab=0,
            row_stride=0,
        )


def pointwise_cases() -> Iterator[Case]:
    for dtype in TYPES:
        weight, ids = (
            Inputs(f"embed {dtype}").floats(9, 33, dtype=dtype),
            torch.tensor([4, 12, 3, 13, 8, 2**40, 4]),
        )
        yield Case(f"embed, {dtype}").call(
            "embed",
            token_ids=ids,
            weight=weight,
            out=Output(embedding_reference.embed(ids, weight, 4)),
            num_tokens=7,
            num_rows=9,
            width=33,
            first_id=4,
            type=TYPES[dtype],
        )
        numbers = Inputs("convert").floats(1000)
        # A third is no number of few bits: with fp32 to round.
        x = (numbers / 3).to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
        yield Case(f"convert to {dtype}").call(
            "convert", **{"from": x}, to=Output(x.to(dtype)), count=1000, to_type=TYPES[dtype]
        )
    positions = torch.tensor([0, 1, 63, 4095, 4096, 131071])
    cos, sin = pointwise_reference.yarn_cos_sin(positions, 64, **ROPE)
    # The angles are the same; a sine of another library differs in the last bit.
    yield Case("yarn").call(
        "yarn",
        positions=positions,
        frequencies=pointwise_reference.yarn_frequencies(64, *ROPE.values()),
        cos=Output(cos, {"atol": 1e-6}),
        sin=Output(sin, {"atol": 1e-6}),
        num_tokens=6,
        half=32,
        concentration=pointwise_reference.yarn_concentration(ROPE["factor"]),
    )
    memory = Inputs("read_through").bytes(1000).repeat(70)
    combined = 0
    for word in memory[: 70_000 // 256 * 256].view(torch.int32).tolist():
        combined ^= word & 0xFFFFFFFF
    yield Case("read_through").call("read_through", combined, memory=memory, num_bytes=70_000)


def programs() -> Iterator[Case]:
    inputs = Inputs("program")
    ids, table, scale, weight = (
        torch.tensor([3, 0, 8]),
        inputs.floats(9, 40),
        inputs.floats(40),
        inputs.floats(12, 40),
    )
    x = embedding_reference.embed(ids, table)
    normed = pointwise_reference.rms_norm(x, scale, 1e-5)
    logits = normed @ weight.T
    top_ids, top_weights = moe_reference.gate_topk(logits, 3)
    parts = (
        Output(x),
        Output(normed, FP32),
        Output(logits, FP32),
        Output(top_ids),
        Output(top_weights, FP32),
    )
    case = Case("run_program, each operation reads what the last one wrote", program=4)
    yield _program(case, ids, table, scale, weight, parts)
    # The second call refuses; the third must not run.
    qkv, angles, cache = inputs.floats(1, 3, 8), inputs.floats(1, 4), inputs.floats(2, 16, 8)
    yield (
        Case("run_program, a slot outside the cache ends it", program=1)
        .call(
            "convert", **{"from": scale}, to=Output(scale.bfloat16()), count=40, to_type=TYPES[torch.bfloat16]
        )
        .call(
            "rope_and_store",
            qkv=qkv,
            cos=angles,
            sin=angles,
            keys=cache[0],
            values=cache[1],
            slot_mapping=torch.tensor([16]),
            num_tokens=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            num_slots=16,
            type=TYPES[torch.float32],
        )
        .call(
            "convert",
            **{"from": weight[0]},
            to=torch.zeros(40, dtype=torch.bfloat16),
            count=40,
            to_type=TYPES[torch.bfloat16],
        )
    )


def _program(
    case: Case, ids: Tensor, table: Tensor, scale: Tensor, weight: Tensor, parts: tuple[Output, ...]
) -> Case:
    x, normed, logits, top_ids, top_weights = parts
    fp32 = TYPES[torch.float32]
    return (
        case.call(
            "embed",
            token_ids=ids,
            weight=table,
            out=x,
            num_tokens=3,
            num_rows=9,
            width=40,
            first_id=0,
            type=fp32,
        )
        .call(
            "norm",
            x=x,
            delta=None,
            weight=scale,
            out=normed,
            num_rows=3,
            width=40,
            eps=1e-5,
            type=fp32,
            weight_type=fp32,
        )
        .call(
            "linear",
            x=normed,
            weight=weight,
            bias=None,
            out=logits,
            num_rows=3,
            width=40,
            num_outputs=12,
            weight_type=fp32,
        )
        .call(
            "gate_topk",
            logits=logits,
            topk_ids=top_ids,
            topk_weights=top_weights,
            num_tokens=3,
            num_experts=12,
            k=3,
        )
    )


def cases() -> list[dict[str, Any]]:
    """Return all cases, in a few hundred milliseconds."""
    kinds = (
        linears,
        dense_layers,
        packing,
        experts,
        attentions,
        norms,
        ropes,
        gates,
        samples,
        automata,
        pointwise_cases,
        programs,
    )
    return [case.stored() for kind in kinds for case in kind()]


if __name__ == "__main__":
    save(cases(), GOLDEN)
