"""How far the logits of each CPU path are from fp32: `python3 -m benchmarks.logits_error --model
checkpoints/small`.

One prompt of random tokens goes through the model in float32 (the reference numerics), then in
bfloat16 with dense weights in bf16 and in int8, on each of this processor's instruction sets.
Relative error is the norm of the difference over the norm of the fp32 logits; agreement is the
share of positions with the same most likely token.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu import native
from workers.config import CpuIsa, DenseDtype, Dtype
from workers.engine.llm import LLM


def main() -> None:
    """Parse the flags, run the model and print the table."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.logits_error", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompt; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    exact = logits(arguments.model, arguments.tokens, arguments.seed, "float32", "bf16")
    print(f"{arguments.tokens} tokens, standard deviation of the fp32 logits {exact.std():.3f}\n")
    print("| instruction set | dense weights | relative error | largest error | same most likely token |")
    print("| --- | --- | ---: | ---: | ---: |")
    paths: tuple[DenseDtype, ...] = ("bf16", "int8")
    for isa in native.available():
        for dense in paths:
            found = logits(arguments.model, arguments.tokens, arguments.seed, "bfloat16", dense, isa)
            error = (found - exact).norm() / exact.norm()
            same = (found.argmax(dim=1) == exact.argmax(dim=1)).float().mean()
            print(f"| {isa} | {dense} | {error:.2%} | {(found - exact).abs().max():.3f} | {same:.0%} |")


def logits(
    model: Path,
    num_tokens: int,
    seed: int,
    dtype: Dtype,
    cpu_dense_dtype: DenseDtype,
    cpu_isa: CpuIsa = "auto",
) -> Tensor:
    """Return [num_tokens, vocab] fp32 logits of a random prompt."""
    with LLM(
        model,
        dtype=dtype,
        cpu_dense_dtype=cpu_dense_dtype,
        cpu_isa=cpu_isa,
        max_num_seqs=1,
        max_model_len=1024,
        kv_cache_bytes=64 << 20,
    ) as llm:
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(0, llm.engine.vocab_size, (num_tokens,), generator=generator)
        return llm.logits(token_ids.tolist())


if __name__ == "__main__":
    main()
