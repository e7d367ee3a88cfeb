"""The Executor protocol: who runs a StepPlan on the ranks. One implementation runs in the engine's
process, one drives other processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from workers.errors import RankCrashed
from workers.scheduler.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What was chosen while starting; printed in the start-up summary.

    Attributes:
        max_model_len: tokens of a sequence at most: what EngineConfig says, or as many as the model
            and the KV cache allow.
        num_full_blocks, num_sliding_blocks: blocks of each KV group, NULL_BLOCK included.
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
"""Plans sent and not answered: while the ranks compute one, the next already waits for them."""


class Executor(Protocol):
    """Runs plans in order. Failure of a step is a StepResult with `error`, never an exception of
    the future.

    Attributes:
        crash: the crash of the rank that ended first; None: it was no crash, or that is not known.
            Final after `shutdown`.
    """

    crash: RankCrashed | None

    def start(self) -> ExecutorInfo:
        """Load the model and size the KV cache; blocks until ready.

        Raises:
            CheckpointError, ConfigError, RankCrashed among them: with one sentence for the user.
        """

    def execute(self, plan: StepPlan) -> "Future[StepResult]":
        """Queue a plan; plans run in the order given. At most MAX_IN_FLIGHT may be in flight."""

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each token of one sequence, apart from the steps: [len(token_ids),
        vocab_size] fp32."""

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call this, once and from any thread, with a sentence if the ranks fail, also while no
        plan is in flight."""

    def shutdown(self) -> None:
        """Release everything; idempotent. Futures still open get an error result."""
