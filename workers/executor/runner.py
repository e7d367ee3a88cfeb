"""The runner: what a rank does with a StepPlan. Every executor runs this one."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.sampling import SampleOutput, SamplingBatch, sample
from workers.executor.sampling_state import SamplingState
from workers.executor.slots import Ints, SequenceSlots
from workers.model.gpt_oss import GptOss
from workers.request import TokenLogprobs
from workers.scheduler.plan import StepPlan, StepResult


class Runner:
    """A model, its KV caches and the state of the sequences that live on this rank.

    Args:
        kv_caches: a layer's each, as `GptOss.forward` takes them.
        max_num_seqs: sequences known at once.
        max_model_len: tokens of a sequence at most.
    """

    def __init__(self, model: GptOss, kv_caches: Sequence[Tensor], *, max_num_seqs: int, max_model_len: int) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._slots = SequenceSlots(max_num_seqs, max_model_len)
        self._sampling = SamplingState(max_num_seqs)
        self._next_step = 0

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Apply the plan, run the model, sample.

        Raises:
            ValueError: a step is missing between the last plan and this one; the rank's state would be wrong from here on.
        """
        started = time.perf_counter()
        self._check_order(plan.step)
        self._apply(plan)
        rows = self._slots.build(plan, self._model.device)
        hidden = self._model.forward(rows.batch, self._kv_caches)
        if len(rows.sampled) == 0:
            return StepResult(plan.step, elapsed_s=time.perf_counter() - started)
        logits = self._model.compute_logits(hidden[rows.batch.sample_indices])
        slots = rows.slots[rows.sampled]
        output = None if logits is None else sample(logits, self._sampling_batch(plan, slots))
        # Rank 0 samples, all ranks need the ids: they are the next step's inputs.
        chosen = torch.empty(len(slots), dtype=torch.int64, device=self._model.device) if output is None else output.token_ids
        token_ids = self._model.collectives.broadcast(chosen).cpu().numpy()
        self._slots.append_tokens(slots, token_ids)
        self._sampling.push(slots, token_ids)
        seq_ids = tuple(plan.seq_ids[index] for index in rows.sampled.tolist())
        return StepResult(
            step=plan.step,
            seq_ids=seq_ids,
            token_ids=tuple(token_ids.tolist()),
            logprobs={} if output is None else self._logprobs(seq_ids, slots, output),
            elapsed_s=time.perf_counter() - started,
        )

    def _sampling_batch(self, plan: StepPlan, slots: Ints) -> SamplingBatch:
        positions = self._slots.num_tokens[slots] - self._slots.num_prompt_tokens[slots]
        masks = {self._slots.slot(seq_id): mask for seq_id, mask in plan.masks}
        return self._sampling.build(slots, positions, masks, self._model.device)

    def _check_order(self, step: int) -> None:
        if step != self._next_step:
            raise ValueError(f"step {step} came, but step {self._next_step} is due")
        self._next_step = step + 1

    def _apply(self, plan: StepPlan) -> None:
        for seq_id in plan.drops:
            self._sampling.drop(self._slots.drop(seq_id))
        for start in plan.starts:
            self._sampling.start(self._slots.start(start), start)

    def _logprobs(self, seq_ids: Sequence[int], slots: Ints, output: SampleOutput) -> dict[int, TokenLogprobs]:
        if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
            return {}
        chosen, ids, values = output.logprobs.tolist(), output.top_ids.tolist(), output.top_logprobs.tolist()
        counts = [(seq_id, self._sampling.num_logprobs(slot)) for seq_id, slot in zip(seq_ids, slots.tolist(), strict=True)]
        wanted = [(seq_id, count) for seq_id, count in counts if count is not None]
        return {
            seq_id: TokenLogprobs(chosen[row], tuple(zip(ids[row][:count], values[row][:count], strict=True)))
            for row, (seq_id, count) in enumerate(wanted)
        }
