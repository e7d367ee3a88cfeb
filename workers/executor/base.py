"""The Executor protocol: runs StepPlans on the ranks. One implementation runs in the engine's
process, one drives other processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from workers.errors import RankCrashed
from workers.scheduler.plan import StepMasks, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """The selections made at start-up; printed in the start-up summary.

    Attributes:
        max_model_len: maximum tokens of a sequence: EngineConfig's value, or as many as the model
            and the KV cache allow.
        num_full_blocks, num_sliding_blocks: blocks of each KV group, including NULL_BLOCK.
        kv_cache_bytes, weight_bytes: over all ranks.
        phases_s: seconds by start-up phase, in order.
        kernels: operation → implementation, layout and why (`workers.rank.kernel_table`).
    """

    device: str
    dtype: str
    num_ranks: int
    max_model_len: int
    num_full_blocks: int
    num_sliding_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    kernels: dict[str, str]
    phases_s: dict[str, float]


MAX_IN_FLIGHT = 2
"""Maximum number of plans sent and not answered: while the ranks compute one, the next one already
waits."""


class Executor(Protocol):
    """Runs plans in order. A failed step is a StepResult with `error`, never an exception of the
    future.

    Attributes:
        crash: the crash of the rank that ended first; None if it did not crash, or if that is not
            known. Final after `shutdown`.
    """

    crash: RankCrashed | None

    def start(self) -> ExecutorInfo:
        """Load the model and size the KV cache; block until ready.

        Raises:
            CheckpointError, ConfigError (including RankCrashed): with one sentence for the user.
        """

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        """Queue a plan; plans run in the order given. At most MAX_IN_FLIGHT may be in flight.

        Args:
            masks: of a plan that awaits masks; done at some time after the result of the plan
                before, without this call's thread unless no plan is in flight. If they fail or take
                longer than parallel.step_timeout_s, so does the step.
        """

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the logits after each token of one sequence, independently of the steps:
        [len(token_ids), vocab_size] fp32."""

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Register a callback for a failure of the ranks, also while no plan is in flight. It is
        called once, from any thread, with a sentence."""

    def shutdown(self) -> None:
        """Release everything; idempotent. Open futures get an error result."""
