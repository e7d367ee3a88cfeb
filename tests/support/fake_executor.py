"""An executor without a model: each sequence's next token is its last one plus one. It makes the
checks that a rank would make."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from workers.config import ModelConfig
from workers.errors import RankCrashed
from workers.executor.base import ExecutorInfo
from workers.request import TokenLogprobs
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

VOCAB = 1000

MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_token=2,
    layer_windows=(32, None),
    max_context_len=512,
    stop_token_ids=(999,),
)


class FakeExecutor:
    """A fake executor, which runs in the engine's thread.

    Attributes:
        gate: while it is not set, a step hangs (at most 30 s).
        entered: set when a step has begun.
        fail_at_step: this step's result is an error.
        before_step: called with each plan.
        fail: tells the engine that the ranks are gone.
    """

    def __init__(
        self,
        num_full_blocks: int = 200,
        num_sliding_blocks: int = 200,
        max_model_len: int = MODEL.max_context_len,
    ) -> None:
        self.num_blocks = (num_full_blocks, num_sliding_blocks)
        self.max_model_len = max_model_len
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fail_at_step: int | None = None
        self.before_step: Callable[[StepPlan], None] = lambda plan: None
        self.plans: list[StepPlan] = []
        self.stopped = False
        self.crash: RankCrashed | None = None
        self.fail: Callable[[str], None] = lambda sentence: None
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, int] = {}

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(
            device="none",
            dtype="float32",
            num_ranks=1,
            max_model_len=self.max_model_len,
            num_full_blocks=self.num_blocks[0],
            num_sliding_blocks=self.num_blocks[1],
            kv_cache_bytes=0,
            weight_bytes=0,
            kernels={},
            phases_s={},
        )

    def on_failure(self, callback: Callable[[str], None]) -> None:
        self.fail = callback

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        raise NotImplementedError("there is no model")

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        assert plan.awaits_masks == (masks is not None)
        self.plans.append(plan)
        self.before_step(plan)
        self.entered.set()
        assert self.gate.wait(30)
        future: Future[StepResult] = Future()
        future.set_result(self._run(plan))
        return future

    def shutdown(self) -> None:
        self.stopped = True

    def _run(self, plan: StepPlan) -> StepResult:
        if plan.step == self.fail_at_step:
            return StepResult(plan.step, error="a rank is on fire")
        for seq_id in plan.drops:
            del self._tokens[seq_id]
        for start in plan.starts:
            assert start.seq_id not in self._tokens
            self._tokens[start.seq_id] = list(start.token_ids)
            if start.sampling.logprobs is not None:
                self._logprobs[start.seq_id] = start.sampling.logprobs
        sampled: dict[int, int] = {}
        for seq_id, computed, scheduled, samples in zip(
            plan.seq_ids, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True
        ):
            tokens = self._tokens[seq_id]
            assert samples == (computed + scheduled == len(tokens))
            if samples:
                sampled[seq_id] = (tokens[-1] + 1) % VOCAB
                tokens.append(sampled[seq_id])
        logprobs = {
            seq_id: (
                TokenLogprobs(
                    -float(token), tuple((rank, -float(rank)) for rank in range(self._logprobs[seq_id]))
                ),
            )
            for seq_id, token in sampled.items()
            if seq_id in self._logprobs
        }
        return StepResult(plan.step, tuple(sampled), tuple(sampled.values()), logprobs)
