"""The runner: what a rank does with a StepPlan. Every executor runs this one."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.sampling import SampleOutput, sample
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch
from workers.rank.recorded.cpu_program import DecodePrograms
from workers.rank.recorded.cuda_graph import DecodeGraphs, GraphReport
from workers.rank.sampling_state import SamplingState, TokenListener
from workers.rank.slots import DeviceSlots, SequenceSlots, StepRows
from workers.rank.step_arrays import EdgeArrays, upload_step
from workers.rank.step_inputs import InputBuffers
from workers.request import TokenLogprobs
from workers.scheduler.plan import StepPlan, StepResult


class PendingStep:
    """A step that was launched. On a CPU it is done; on a GPU its kernels and the copy of its
    tokens to the host are queued.

    Args:
        device: where it runs.
        output: what was sampled, on the device; None: the step yields no token.
        num_logprobs: alternatives that each sequence wants, by seq_id, in the order of
            `output.logprobs`.
        listeners: (index into seq_ids, what is told that token).
    """

    def __init__(
        self,
        step: int,
        started: float,
        device: torch.device,
        seq_ids: tuple[int, ...] = (),
        output: SampleOutput | None = None,
        num_logprobs: Sequence[tuple[int, int]] = (),
        listeners: Sequence[tuple[int, TokenListener]] = (),
    ) -> None:
        self._step = step
        self._started = started
        self._seq_ids = seq_ids
        self._num_logprobs = num_logprobs
        self._listeners = listeners
        self._result: StepResult | None = None
        self._lock = threading.Lock()
        self._copied: torch.cuda.Event | None = None
        self._output = output
        if device.type != "cpu":
            if output is not None:
                parts = (output.logprobs, output.top_ids, output.top_logprobs)
                self._output = SampleOutput(
                    _to_pinned(output.token_ids),
                    *(None if part is None else _to_pinned(part) for part in parts),
                )
            # Also of a step that yields no token: it is not done before, and only so many may be in
            # flight.
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the step's tokens; the same result each time.

        Raises:
            RuntimeError: a kernel of this or an earlier step failed on the GPU.
        """
        # The next launch may need the tokens while another thread waits for them: listeners hear
        # each token once.
        with self._lock:
            if self._result is None:
                self._result = self._take()
            return self._result

    def _take(self) -> StepResult:
        if self._copied is not None:
            self._copied.synchronize()
        token_ids = [] if self._output is None else self._output.token_ids.tolist()
        for index, listener in self._listeners:
            listener.push(token_ids[index])
        return StepResult(
            step=self._step,
            seq_ids=self._seq_ids,
            token_ids=tuple(token_ids),
            logprobs=self._logprobs(),
            elapsed_s=time.perf_counter() - self._started,
        )

    def _logprobs(self) -> dict[int, TokenLogprobs]:
        output = self._output
        if output is None or output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
            return {}
        chosen, ids, values = output.logprobs.tolist(), output.top_ids.tolist(), output.top_logprobs.tolist()
        return {
            seq_id: TokenLogprobs(chosen[row], tuple(zip(ids[row][:count], values[row][:count], strict=True)))
            for row, (seq_id, count) in enumerate(self._num_logprobs)
        }


class Runner:
    """A model, its KV caches and the state of the sequences that live on this rank.

    Args:
        kv_caches: a layer's each, as `GptOss.forward` takes them.
        max_num_seqs: sequences known at once.
        max_model_len: tokens of a sequence at most.
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
        self._sampling = SamplingState(max_num_seqs) if model.collectives.rank == 0 else None
        self._graphs: DecodeGraphs | DecodePrograms | None = None
        self._next_step = 0
        # Steps whose tokens some sequence's next token depends on, and which may not have come yet.
        self._unheard: deque[PendingStep] = deque()

    def capture_graphs(self, progress: Callable[[str, int, int], None]) -> GraphReport:
        """Record the model's decode step for all padded batch sizes (CUDA only). All ranks do this
        at the same time, before any step.

        Args:
            progress: called with ("capture graphs", done, total).
        """
        graphs = DecodeGraphs(self._slots, self._device_slots, self._forward_alone())
        self._graphs = graphs
        return graphs.capture(progress)

    def record_programs(self) -> None:
        """Run decode steps as programs of C++ operations (CPU only, one rank)."""
        self._graphs = DecodePrograms(self._slots, self._device_slots, self._forward_alone())

    def step(self, plan: StepPlan) -> StepResult:
        """`launch` and wait for the result."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Apply the plan, run the model, sample. The next plan may be launched before this one's
        result was taken.

        Raises:
            ValueError: a step is missing between the last plan and this one; the rank's state would
                be wrong from here on.
        """
        started = time.perf_counter()
        self._check_order(plan.step)
        self._apply_changes(plan)
        rows = self._slots.build(plan)
        hidden, edges = self._forward(rows)
        if len(rows.sampled) == 0:
            return PendingStep(plan.step, started, self._model.device)
        output = self._sample(rows, self._model.compute_logits(hidden))
        self._device_slots.newest.index_copy_(0, edges.sampled_slots, output.token_ids)
        return self._pending(plan, started, rows, output)

    def _apply_changes(self, plan: StepPlan) -> None:
        """Forget and take in sequences, and on rank 0 how they are sampled."""
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
        """The model over these caches, without this object: graphs are to end with it, at once,
        since NCCL waits for those that hold its calls before it lets a group be left."""
        model, kv_caches = self._model, self._kv_caches
        return lambda batch: model.forward(batch, kv_caches)

    def _forward(self, rows: StepRows) -> tuple[Tensor, EdgeArrays[Tensor]]:
        """([num_samples, hidden] of the rows to sample, what surrounds the model)."""
        if self._graphs is not None and (size := self._graphs.size_for(rows)) is not None:
            hidden, edges = self._graphs.replay(rows, size, self._inputs)
        else:
            arrays, edges = upload_step(self._inputs, rows.model, rows.edges)
            self._device_slots.set_blocks(edges)
            batch = self._device_slots.batch(
                arrays, edges.sample_indices, rows.num_blocks, rows.max_query_len
            )
            hidden = self._model.forward(batch, self._kv_caches)
        if rows.samples_all:
            return hidden[: len(rows.sampled)], edges
        return hidden.index_select(0, edges.sample_indices), edges

    def _sample(self, rows: StepRows, logits: Tensor | None) -> SampleOutput:
        """Rank 0 samples; all ranks need the ids, which are the next step's inputs.

        Args:
            logits: None on the other ranks.
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
        output = sample(logits, sampling.build(slots, rows.output_positions, self._inputs))
        collectives.broadcast(output.token_ids)
        return output

    def _pending(self, plan: StepPlan, started: float, rows: StepRows, output: SampleOutput) -> PendingStep:
        slots = rows.sampled_slots
        seq_ids = tuple(plan.seq_ids[index] for index in rows.sampled.tolist())
        sampling = self._sampling
        listeners = [] if sampling is None else sampling.listeners(slots)
        num_logprobs = [] if sampling is None else sampling.num_logprobs(seq_ids, slots)
        pending = PendingStep(
            plan.step, started, self._model.device, seq_ids, output, num_logprobs, listeners
        )
        if self._model.device.type == "cpu":
            pending.result()
        elif listeners:
            self._unheard.append(pending)
        return pending

    def _check_order(self, step: int) -> None:
        if step != self._next_step:
            raise ValueError(f"step {step} came, but step {self._next_step} is due")
        self._next_step = step + 1


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy on the host, queued behind what computes it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
