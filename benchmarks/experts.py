"""The experts of one layer against the time to read their weights once.

    python3 -m benchmarks.experts [--experts 128] [--hidden 2880] [--intermediate 2880]
        [--tokens 1 8 64] [--device cuda] [--mxfp8] [--dense]

Random weights in the layout of the device's kernels, random choices; each batch size has tokens
that choose anew in every run, and there are enough layers that weights do not stay in a cache.
Printed are the median time of gate choice and experts together, the bytes of the experts that were
hit, and these over the time as a share of what a large copy reaches. On a GPU the calls are
replayed from a CUDA graph, as decode steps are. Has run on CPUs only."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_timing import copy_bandwidth, replayed, wait
from kernels.formats import MX_BLOCK
from kernels.moe import ExpertWeights, gate_topk, select
from kernels.mxfp4 import PackedMXFP4, choose_layout, from_natural

TOP_K = 4
CACHE_BYTES = 512 << 20
"""Bytes to read before a layer is used again, more than any device caches."""


def layer(args: argparse.Namespace, device: torch.device, seed: int) -> ExpertWeights:
    """Return a layer of random weights."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16

    def weights(num_rows: int, width: int) -> PackedMXFP4 | Tensor:
        if args.dense:
            return (
                torch.randn(args.experts, num_rows, width, generator=generator, device=device, dtype=dtype)
                / width**0.5
            )
        shape = (args.experts, num_rows, width // MX_BLOCK)
        blocks = torch.randint(
            0, 256, (*shape, MX_BLOCK // 2), generator=generator, device=device, dtype=torch.uint8
        )
        scales = torch.randint(116, 122, shape, generator=generator, device=device, dtype=torch.uint8)
        return from_natural(blocks, scales, "natural" if args.mxfp8 else choose_layout(device))

    biases = (
        torch.randn(args.experts, size, generator=generator, device=device).to(dtype)
        for size in (2 * args.intermediate, args.hidden)
    )
    gate_up_bias, down_bias = biases
    return ExpertWeights(
        weights(2 * args.intermediate, args.hidden),
        gate_up_bias,
        weights(args.hidden, args.intermediate),
        down_bias,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        num_experts=args.experts,
        moe_activation_dtype="mxfp8" if args.mxfp8 else "auto",
    )


def bytes_of(weights: PackedMXFP4 | Tensor) -> int:
    return weights.num_bytes if isinstance(weights, PackedMXFP4) else weights.nbytes


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--intermediate", type=int, default=2880)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024, 8192])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mxfp8", action="store_true", help="round activations to MXFP8")
    parser.add_argument("--dense", action="store_true", help="bf16 weights")
    args = parser.parse_args()
    device = torch.device(args.device)
    first = layer(args, device, seed=0)
    layer_bytes = bytes_of(first.gate_up) + bytes_of(first.down)
    layers = [
        first,
        *(layer(args, device, seed) for seed in range(1, max(2, -(-CACHE_BYTES // layer_bytes)))),
    ]
    kernels = [select(weights, torch.bfloat16, device) for weights in layers]
    bandwidth = copy_bandwidth(device, 256 << 20)
    print(
        f"{args.experts} experts, {layer_bytes / 1e6:.0f} MB a layer, {len(layers)} layers, copy "
        f"{bandwidth / 1e9:.0f} GB/s"
    )
    print(
        "| tokens | experts hit | time a layer, us | GB/s | of the copy |\n"
        "| ---: | ---: | ---: | ---: | ---: |"
    )
    for num_tokens in args.tokens:
        x = torch.randn(num_tokens, args.hidden, device=device).to(torch.bfloat16)
        logits = torch.randn(num_tokens, args.experts, device=device)

        def step(x: Tensor = x, logits: Tensor = logits) -> Tensor:
            for chosen in kernels:
                out = chosen.run.gated_experts(x, logits, TOP_K)
            return out

        run = replayed(step, device)
        times, hits = [], []
        for _ in range(args.runs):
            logits.copy_(torch.randn_like(logits))
            hits.append(gate_topk(logits, TOP_K)[0].unique().numel())
            times.append(seconds(run, device) / len(layers))
        time_s, hit = statistics.median(times), statistics.mean(hits)
        rate = hit / args.experts * layer_bytes / time_s
        print(
            f"| {num_tokens} | {hit:.1f} | {time_s * 1e6:.0f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} |"
        )


if __name__ == "__main__":
    main()
