"""What a step costs rank 0 apart from the model and the sampling of its logits: the plan off the
wire, slots and inputs, what sampling needs to know, the result on the wire.

    python3 -m benchmarks.rank_step [--num-seqs 64 256] [--steps 200]

Sequences decode as in benchmarks/scheduler.py; the model and the sampler of the real runner are
replaced by ones that return at once. Times are of the rank's thread on the processor, so that other
programs on the machine count little.
"""

import argparse
import statistics
import time
from typing import cast

import torch
from torch import Tensor

from benchmarks.scheduler import MAX_MODEL_LEN, build
from kernels.implementation import Implementation
from kernels.sampling import SampleOutput, SamplingOperations, reference
from workers.model.gpt_oss import GptOss
from workers.parallel.collectives import Alone
from workers.rank.runner import Runner
from workers.request import SamplingParams
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import decode_plan, encode_plan, encode_result

SAMPLING = {
    "greedy": SamplingParams(temperature=0),
    "temperature and top-p": SamplingParams(temperature=0.8, top_p=0.9),
}
HIDDEN_SIZE = 64
VOCAB_SIZE = 1024


class NoModel:
    """A model that answers at once, with tensors of the right shapes. The seconds that this and the
    sampler take are not the runner's."""

    device = torch.device("cpu")
    collectives = Alone()

    def __init__(self) -> None:
        self.spent_s = 0.0
        operations = SamplingOperations(self.sample, reference.logprobs)
        self.sampling = Implementation(operations, "none", "returns at once")

    def forward(self, batch: object, kv_caches: object) -> Tensor:
        begin = time.thread_time()
        hidden = torch.zeros(len(batch.token_ids), HIDDEN_SIZE)  # type: ignore[attr-defined]
        self.spent_s += time.thread_time() - begin
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        begin = time.thread_time()
        logits = torch.zeros(len(hidden), VOCAB_SIZE)
        self.spent_s += time.thread_time() - begin
        return logits

    def sample(self, logits: Tensor, batch: object) -> SampleOutput:
        begin = time.thread_time()
        output = SampleOutput(torch.full((len(logits),), 7))
        self.spent_s += time.thread_time() - begin
        return output


def measure(num_seqs: int, num_steps: int, sampling: SamplingParams) -> list[float]:
    """Return the milliseconds of each step of num_seqs decoding sequences."""
    model = NoModel()
    runner = Runner(cast(GptOss, model), [], max_num_seqs=num_seqs, max_model_len=MAX_MODEL_LEN)
    costs: list[float] = []

    def execute(plan: StepPlan) -> StepResult:
        data, model.spent_s = encode_plan(plan), 0.0
        begin = time.thread_time()
        result = runner.step(decode_plan(data))
        encode_result(result)
        costs.append(1e3 * (time.thread_time() - begin - model.spent_s))
        return result

    scheduler = build(num_seqs, sampling=sampling, execute=execute)
    costs.clear()
    for _ in range(num_steps):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(execute(plan))
    return costs


def main() -> None:
    """Parse the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| decoding | sampling | median ms | p90 ms |\n| ---: | --- | ---: | ---: |")
    for num_seqs in options.num_seqs:
        for name, sampling in SAMPLING.items():
            costs = sorted(measure(num_seqs, options.steps, sampling))
            print(
                f"| {num_seqs} | {name} | {statistics.median(costs):.2f} | "
                f"{costs[int(0.9 * (len(costs) - 1))]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
