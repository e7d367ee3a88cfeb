"""The runner, which executes a StepPlan on a rank. Every executor uses it."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import AllowedBits, SampleOutput
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch
from workers.rank.drafts import newest_slots
from workers.rank.pending import PendingStep, PromptScores, Sampled, UnsampledStep
from workers.rank.recorded.cpu_program import DecodePrograms
from workers.rank.recorded.cuda_graph import DecodeGraphs, GraphReport
from workers.rank.sampling_state import SamplingState
from workers.rank.slots import DeviceSlots, SequenceSlots, StepRows
from workers.rank.step_arrays import EdgeArrays, upload_step
from workers.rank.step_inputs import InputBuffers
from workers.scheduler.plan import StepMasks, StepPlan, StepResult


class Runner:
    """A model, its KV caches and the state of the sequences that live on this rank.

    Args:
        kv_caches: one for each layer, as `GptOss.forward` takes them.
        max_num_seqs: maximum number of live sequences.
        max_model_len: maximum tokens of a sequence.
    """

    def __init__(
        self, model: GptOss, kv_caches: Sequence[Tensor], *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._slots = SequenceSlots(max_num_seqs, max_model_len)
        self._device_slots = DeviceSlots(self._slots, model.device)
        self._inputs = InputBuffers(model.device)
        # Only rank 0 samples.
        self._sampling = SamplingState(max_num_seqs, model.device) if model.collectives.rank == 0 else None
        self._graphs: DecodeGraphs | DecodePrograms | None = None
        self._max_logits = max_num_seqs
        self._next_step = 0
        # Steps whose sampled tokens decide the next token of some sequence, and whose tokens may
        # not have arrived yet.
        self._unheard: deque[PendingStep] = deque()

    def capture_graphs(self, progress: Callable[[str, int, int], None]) -> GraphReport:
        """Record the model's decode step for all padded batch sizes (CUDA only). All ranks call
        this at the same time, before any step.

        Args:
            progress: called with ("capture graphs", done, total).
        """
        graphs = DecodeGraphs(self._slots, self._device_slots, self._forward_alone())
        self._graphs = graphs
        return graphs.capture(progress)

    def record_programs(self) -> None:
        """Run decode steps as programs of C++ operations from now on (CPU only, one rank)."""
        self._graphs = DecodePrograms(self._slots, self._device_slots, self._forward_alone())

    def step(self, plan: StepPlan) -> StepResult:
        """Launch a plan that awaits no masks, wait, and return its result."""
        launched = self.launch(plan)
        assert isinstance(launched, PendingStep), "the plan awaits masks"
        return launched.result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep | UnsampledStep:
        """Apply the plan, run the model, and sample, or, if the plan awaits masks and this rank
        samples, return what is left to do. The next plan may be launched before this one's result
        was taken, but not before it was sampled.

        Raises:
            ValueError: a step is missing between the previous plan and this one, so the rank's
                state would be wrong from here on.
        """
        started = time.perf_counter()
        self._check_order(plan.step)
        self._apply_changes(plan)
        rows = self._slots.build(plan)
        hidden, edges = self._forward(rows)
        scores = self._score_prompts(plan, rows, hidden) if plan.prompt_logprobs else None
        if len(rows.sampled) == 0:
            return PendingStep(plan.step, started, self._model.device, scores=scores)
        wanted = (
            hidden[: len(rows.sampled)] if rows.samples_all else hidden.index_select(0, edges.sample_indices)
        )
        logits = self._model.compute_logits(wanted)
        if plan.awaits_masks and self._sampling is not None:
            return UnsampledStep(partial(self._finish, plan, started, rows, edges, logits, scores))
        return self._finish(plan, started, rows, edges, logits, scores)

    @torch.inference_mode()
    def _finish(
        self,
        plan: StepPlan,
        started: float,
        rows: StepRows,
        edges: EdgeArrays[Tensor],
        logits: Tensor | None,
        scores: PromptScores | None,
        masks: StepMasks | None = None,
    ) -> PendingStep:
        """Sample a step whose forward pass was launched, in whichever thread has its masks."""
        if masks is not None and self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        output = self._sample(rows, logits, masks)
        self._note_newest(rows, edges, output.token_ids)
        return self._pending(plan, started, rows, output, scores)

    def _apply_changes(self, plan: StepPlan) -> None:
        """Drop and add sequences, and on rank 0 their sampling state."""
        sampling = self._sampling
        for seq_id in plan.drops:
            slot = self._slots.drop(seq_id)
            if sampling is not None:
                sampling.drop(slot)
        if sampling is not None:
            sampling.update_automata(plan.automata, plan.dropped_automata)
        for start in plan.starts:
            slot = self._slots.start(start)
            if sampling is not None:
                sampling.start(slot, start)

    def _forward_alone(self) -> Callable[[StepBatch], Tensor]:
        """Return the model over these caches as a function without a reference to this object.
        Graphs must be destroyed at once when this object is: NCCL does not leave a group while
        graphs hold calls to it."""
        model, kv_caches = self._model, self._kv_caches
        return lambda batch: model.forward(batch, kv_caches)

    def _forward(self, rows: StepRows) -> tuple[Tensor, EdgeArrays[Tensor]]:
        """Return ([T or more, hidden], valid until the next step; the arrays around the model)."""
        if self._graphs is not None and (size := self._graphs.size_for(rows)) is not None:
            hidden, edges = self._graphs.replay(rows, size, self._inputs)
        else:
            arrays, edges = upload_step(self._inputs, rows.model, rows.edges)
            self._device_slots.set_blocks(edges)
            batch = self._device_slots.batch(
                arrays, edges.sample_indices, rows.num_blocks, rows.max_query_len
            )
            hidden = self._model.forward(batch, self._kv_caches)
        return hidden, edges

    def _note_newest(self, rows: StepRows, edges: EdgeArrays[Tensor], token_ids: Tensor) -> None:
        """Store each sequence's newest token on the device, for the next step."""
        slots = edges.sampled_slots
        if rows.drafts is not None:
            expected, firsts = self._inputs.upload([rows.drafts.expected, rows.drafts.firsts])
            slots = newest_slots(token_ids, expected, firsts, slots, self._device_slots.padding_slot)
        self._device_slots.newest.index_copy_(0, slots, token_ids)

    def _score_prompts(self, plan: StepPlan, rows: StepRows, hidden: Tensor) -> PromptScores:
        """Return log-probabilities of prompt tokens, computed in pieces whose logits fit into the
        memory that the rank reserved. All ranks take part."""
        model = self._model
        at, tokens, wanted = [], [], []
        for index, first, count, num_top in plan.prompt_logprobs:
            row = int(np.searchsorted(rows.entries, index))
            # The token at a position is predicted by the logits of the position before it.
            offset = int(rows.model.cu_seqlens_q[row]) + first - 1 - plan.num_computed_tokens[index]
            at.append(np.arange(offset, offset + count))
            tokens.append(self._slots.prompt_tokens(plan.seq_ids[index], first, first + count))
            wanted.append((plan.seq_ids[index], count, num_top))
        num_top = max(num_top for _, _, num_top in wanted)
        indices, targets = self._inputs.upload([np.concatenate(at), np.concatenate(tokens)])
        parts = []
        for start in range(0, len(indices), self._max_logits):
            piece = slice(start, start + self._max_logits)
            logits = model.compute_logits(hidden.index_select(0, indices[piece]))
            if self._sampling is not None and logits is not None:
                parts.append(model.sampling.run.score(logits, targets[piece], num_top))
        return PromptScores(tuple(wanted), parts)

    def _sample(self, rows: StepRows, logits: Tensor | None, masks: StepMasks | None) -> SampleOutput:
        """Sample on rank 0 and send the ids to all ranks, whose next step needs them as inputs.

        Args:
            logits: None on ranks other than 0.
            masks: of the rows in a grammar; None if there are none.
        """
        collectives = self._model.collectives
        sampling = self._sampling
        if sampling is None or logits is None:
            return SampleOutput(
                collectives.broadcast(
                    torch.empty(len(rows.sampled), dtype=torch.int64, device=self._model.device)
                )
            )
        slots = rows.sampled_slots
        if sampling.listeners(slots):
            while self._unheard:
                self._unheard.popleft().result()
        batch = sampling.build(slots, rows.output_positions, self._inputs, rows.drafts)
        if masks is not None and len(masks.rows):
            batch = replace(batch, allowed_bits=AllowedBits(*self._inputs.upload([masks.rows, masks.bits])))
        output = self._model.sampling.run.sample(logits, batch)
        collectives.broadcast(output.token_ids)
        return output

    def _pending(
        self,
        plan: StepPlan,
        started: float,
        rows: StepRows,
        output: SampleOutput,
        scores: PromptScores | None,
    ) -> PendingStep:
        slots, sampling = rows.sampled_slots, self._sampling
        listeners = [] if sampling is None else sampling.listeners(slots)
        sampled = Sampled(
            seq_ids=tuple(plan.seq_ids[index] for index in rows.entries[rows.sampled].tolist()),
            output=output,
            drafts=rows.drafts,
            logprob_rows=[] if sampling is None else sampling.logprob_rows(slots),
            listeners=listeners,
        )
        pending = PendingStep(plan.step, started, self._model.device, sampled, scores)
        if self._model.device.type == "cpu":
            pending.result()
        elif listeners:
            self._unheard.append(pending)
        return pending

    def _check_order(self, step: int) -> None:
        if step != self._next_step:
            raise ValueError(f"step {step} came, but step {self._next_step} is due")
        self._next_step = step + 1
