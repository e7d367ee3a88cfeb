"""The step loop over a fake executor: every request ends exactly once, whatever happens to it or to
the engine."""

import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.fake_executor import MODEL, VOCAB, FakeExecutor
from tests.support.waiting import until
from workers.config import CacheConfig, EngineConfig, SchedulerConfig
from workers.engine import requests as requests_module
from workers.engine import step_loop
from workers.engine.engine import Engine
from workers.engine.stream import OutputStream, ThreadReader
from workers.errors import (
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    Overloaded,
)
from workers.request import EngineOutput, EngineRequest, SamplingParams
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

WAIT_S = 60.0


@contextmanager
def running(
    executor: FakeExecutor, *, max_model_len: int | None = None, prefix_caching: bool = True, **limits: int
) -> Iterator[Engine]:
    config = EngineConfig(
        Path("nowhere"),
        max_model_len=max_model_len,
        cache=CacheConfig(prefix_caching=prefix_caching),
        scheduler=SchedulerConfig(**limits),
    )
    executor.max_model_len = max_model_len or MODEL.max_context_len
    engine = Engine(config, MODEL, executor, check_integrity=True)
    engine.start()
    try:
        yield engine
    finally:
        executor.gate.set()
        engine.shutdown()


def request(
    *prompt: int, deadline_s: float | None = None, output: tuple[int, ...] = (), **sampling: object
) -> EngineRequest:
    return EngineRequest("r", prompt or (1,), SamplingParams(seed=0, **sampling), output, deadline_s)


def read_all(reader: ThreadReader, *streams: OutputStream) -> list[EngineOutput]:
    """Return each stream's outputs joined, in order of `streams`."""
    outputs: dict[int, list[EngineOutput]] = {stream.seq_id: [] for stream in streams}
    for stream, output in reader.read(streams):
        outputs[stream.seq_id].append(output)
    joined = []
    for stream in streams:
        parts = outputs[stream.seq_id]
        assert [part.finish_reason is not None for part in parts] == [False] * (len(parts) - 1) + [True]
        assert stream.take() is None
        last = parts[-1]
        tokens = tuple(token for part in parts for token in part.token_ids)
        logprobs = tuple(entry for part in parts for entry in part.logprobs)
        joined.append(
            EngineOutput(
                tokens, logprobs, last.finish_reason, last.stop_token_id, last.num_cached_tokens, last.error
            )
        )
    return joined


def test_a_request_gets_its_tokens_and_one_end() -> None:
    reader = ThreadReader()
    with running(FakeExecutor()) as engine:
        [output] = read_all(reader, engine.submit(request(5, 6, 7, max_tokens=4), reader))
    assert output == EngineOutput((8, 9, 10, 11), finish_reason="length")


def test_stop_tokens_end_and_are_reported() -> None:
    reader = ThreadReader()
    with running(FakeExecutor()) as engine:
        own = engine.submit(request(5, max_tokens=9, stop_token_ids=(7,)), reader)
        models = engine.submit(request(997, max_tokens=9), reader)
        ignored = engine.submit(request(997, max_tokens=4, ignore_eos=True), reader)
        outputs = read_all(reader, own, models, ignored)
    assert outputs[0] == EngineOutput((6, 7), finish_reason="stop", stop_token_id=7)
    assert outputs[1] == EngineOutput((998, 999), finish_reason="stop", stop_token_id=999)
    assert outputs[2] == EngineOutput((998, 999, 0, 1), finish_reason="length")


def test_logprobs_come_one_for_each_token() -> None:
    reader = ThreadReader()
    with running(FakeExecutor()) as engine:
        [output] = read_all(reader, engine.submit(request(5, max_tokens=3, logprobs=0), reader))
    assert [entry.logprob for entry in output.logprobs] == [-6.0, -7.0, -8.0]


@pytest.mark.parametrize(
    ("resumed", "expected"),
    [
        (request(5, output=(6, 7), max_tokens=4), EngineOutput((8, 9), finish_reason="length")),
        (request(5, output=(6, 7), max_tokens=2), EngineOutput((), finish_reason="length")),
        (
            request(5, output=(6, 999), max_tokens=9),
            EngineOutput((), finish_reason="stop", stop_token_id=999),
        ),
        (
            request(5, output=(6, 999), max_tokens=4, min_tokens=2),
            EngineOutput((0, 1), finish_reason="length"),
        ),
    ],
    ids=["goes on", "at max_tokens", "behind a stop token", "stop token before min_tokens"],
)
def test_resumption(resumed: EngineRequest, expected: EngineOutput) -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    with running(executor) as engine:
        assert read_all(reader, engine.submit(resumed, reader)) == [expected]
    assert bool(executor.plans) == bool(expected.token_ids), "a request that was complete already took a step"


def test_abort_ends_with_the_tokens_so_far() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    with running(executor) as engine:
        stream = engine.submit(request(1, max_tokens=400), reader)
        seen = 0
        for _, output in reader.read([stream]):
            seen += len(output.token_ids)
            if seen >= 3:
                engine.abort(stream, "enough")
            if output.finish_reason is not None:
                assert (output.finish_reason, output.error) == ("abort", "enough")
        assert 3 <= seen < 400
        engine.abort(stream)  # of an ended request: nothing happens
        other = engine.submit(request(1, max_tokens=2), reader)
        assert read_all(reader, other)[0].finish_reason == "length"
        assert executor.plans[-2].drops, "the ranks were not told"


def test_a_waiting_request_can_be_aborted() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    executor.gate.clear()
    with running(executor, max_num_seqs=1) as engine:
        first = engine.submit(request(1, max_tokens=2), reader)
        assert executor.entered.wait(WAIT_S)
        second = engine.submit(request(2, max_tokens=2), reader)
        engine.abort(second)
        executor.gate.set()
        outputs = read_all(reader, first, second)
    assert outputs[0].finish_reason == "length"
    assert (outputs[1].token_ids, outputs[1].finish_reason) == ((), "abort")


def test_a_deadline_ends_running_and_waiting_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes in the fourth step only."""
    reader = ThreadReader()
    executor = FakeExecutor()
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(step_loop, "time", clock)
    monkeypatch.setattr(requests_module, "time", clock)

    def pass_time(plan: StepPlan) -> None:
        now[0] += 0.2 if plan.step == 3 else 0.0

    executor.before_step = pass_time
    executor.gate.clear()
    with running(executor, max_num_seqs=1) as engine:
        first = engine.submit(request(1, max_tokens=400, deadline_s=0.2), reader)
        second = engine.submit(request(1, max_tokens=400, deadline_s=0.2), reader)
        third = engine.submit(request(1, max_tokens=3, deadline_s=0.3), reader)
        executor.gate.set()
        outputs = read_all(reader, first, second, third)
    assert [output.finish_reason for output in outputs] == ["abort", "abort", "length"]
    assert [output.token_ids for output in outputs] == [(2, 3, 4, 5), (), (2, 3, 4)]
    assert isinstance(first.failure, DeadlineExceeded)
    assert isinstance(second.failure, DeadlineExceeded)
    assert third.failure is None


def test_a_full_inbox_refuses_and_recovers() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    executor.gate.clear()
    with running(executor, max_num_seqs=1, max_waiting_requests=2) as engine:
        streams = [engine.submit(request(1, max_tokens=1), reader)]
        assert executor.entered.wait(WAIT_S)
        streams += [engine.submit(request(1, max_tokens=1), reader) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 requests are waiting") as caught:
            engine.submit(request(1, max_tokens=1), reader)
        assert caught.value.retry_after_s > 0
        assert (engine.load().num_running, engine.load().num_waiting) == (1, 2)
        executor.gate.set()
        assert [output.finish_reason for output in read_all(reader, *streams)] == ["length"] * 3
        assert read_all(reader, engine.submit(request(1, max_tokens=1), reader))[0].finish_reason == "length"
        assert "cantata_engine_refused_requests_total 1.0" in engine.metrics.render()


def test_requests_that_cannot_run_are_refused_at_once() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    with running(executor, max_model_len=100) as engine:
        with pytest.raises(ContextLengthExceeded):
            engine.submit(request(*range(100)), reader)
        with pytest.raises(ContextLengthExceeded):
            engine.submit(request(1, max_tokens=100), reader)
        with pytest.raises(InvalidRequest):
            engine.submit(request(1, output=(2, 3, 4), max_tokens=2), reader)
        assert engine.load().num_waiting == 0
        [output] = read_all(reader, engine.submit(request(1, max_tokens=None), reader))
    assert len(output.token_ids) == 99


def test_a_context_beyond_the_models_is_a_config_error() -> None:
    with (
        pytest.raises(ConfigError, match="max_model_len must be 2 to 512"),
        running(FakeExecutor(), max_model_len=513),
    ):
        pass


def test_an_executor_failure_ends_everything_and_the_engine() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    executor.fail_at_step = 4
    died = threading.Event()
    engine = Engine(
        EngineConfig(Path("nowhere"), scheduler=SchedulerConfig(max_num_seqs=2)),
        MODEL,
        executor,
        on_death=died.set,
    )
    engine.start()
    executor.gate.clear()
    streams = [engine.submit(request(1, max_tokens=100), reader) for _ in range(4)]
    executor.gate.set()
    outputs = read_all(reader, *streams)
    assert [output.finish_reason for output in outputs] == ["error"] * 4
    assert all(output.error == "a rank is on fire" for output in outputs)
    assert all(isinstance(stream.failure, EngineDead) for stream in streams)
    assert outputs[0].token_ids, "tokens sampled before the failure are delivered"
    assert died.wait(WAIT_S)
    assert engine.error == "a rank is on fire"
    load = engine.load()
    assert (load.accepting, load.num_running, load.num_waiting, load.kv_usage) == (False, 0, 0, 0.0)
    metrics = engine.metrics.render()
    for gauge in ("running_requests", "waiting_requests", 'kv_usage_ratio{group="full"}'):
        assert f"cantata_engine_{gauge} 0.0" in metrics
    with pytest.raises(EngineDead, match="on fire"):
        engine.submit(request(1), reader)
    engine.shutdown()
    assert executor.stopped


def test_ranks_that_fail_while_nothing_runs_end_the_engine_too() -> None:
    executor = FakeExecutor()
    with running(executor) as engine:
        executor.fail("rank 1 ended with signal SIGKILL")
        assert engine.wait_stopped(10)
        assert engine.error == "rank 1 ended with signal SIGKILL"
        with pytest.raises(EngineDead, match="rank 1 ended"):
            engine.submit(request(1), ThreadReader())


def test_a_bug_in_a_step_ends_everything_too() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()

    def explode(plan: object) -> None:
        raise ZeroDivisionError("secret prompt")

    executor.before_step = explode
    with running(executor) as engine:
        stream = engine.submit(request(1), reader)
        [output] = read_all(reader, stream)
        assert output.finish_reason == "error"
        assert "ZeroDivisionError" in (output.error or "")
        assert "secret" not in (output.error or "")


def test_no_memory_for_a_step_is_said_with_what_helps() -> None:
    executor = FakeExecutor()
    executor.before_step = lambda plan: bytearray(sys.maxsize)
    with running(executor) as engine:
        reader = ThreadReader()
        [output] = read_all(reader, engine.submit(request(1), reader))
        assert output.finish_reason == "error"
        assert "ran out of memory" in (output.error or "")
        assert "--kv-cache-memory" in (output.error or "")


def test_shutdown_ends_running_and_waiting_requests() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    executor.gate.clear()
    with running(executor, max_num_seqs=1) as engine:
        streams = [engine.submit(request(1, max_tokens=400), reader) for _ in range(3)]
        assert executor.entered.wait(WAIT_S)
        stopping = threading.Thread(target=engine.shutdown)
        stopping.start()
        executor.gate.set()
        outputs = read_all(reader, *streams)
        stopping.join(WAIT_S)
        assert not stopping.is_alive()
        assert [output.finish_reason for output in outputs] == ["abort"] * 3
        assert all(isinstance(stream.failure, EngineDead) for stream in streams)
        with pytest.raises(EngineDead, match="shutting down"):
            engine.submit(request(1), reader)
        engine.shutdown()  # idempotent


def test_drain_lets_requests_end() -> None:
    reader = ThreadReader()
    with running(FakeExecutor()) as engine:
        streams = [engine.submit(request(1, max_tokens=300), reader) for _ in range(3)]
        assert engine.drain(WAIT_S) == 0
        assert [output.finish_reason for output in read_all(reader, *streams)] == ["length"] * 3
        with pytest.raises(EngineDead):
            engine.submit(request(1), reader)


def test_drain_aborts_what_outlasts_the_grace_period() -> None:
    reader = ThreadReader()
    executor = FakeExecutor()
    executor.before_step = lambda plan: time.sleep(0.01)
    with running(executor, max_num_seqs=1) as engine:
        streams = [engine.submit(request(1, max_tokens=500), reader) for _ in range(2)]
        assert executor.entered.wait(WAIT_S)
        assert engine.drain(0.05) == 2
        outputs = read_all(reader, *streams)
    assert [output.finish_reason for output in outputs] == ["abort"] * 2
    assert all("grace period" in (output.error or "") for output in outputs)
    assert all(stream.failure is None for stream in streams)


def test_a_slow_reader_gets_all_tokens_at_once_and_readers_are_woken_once_a_step() -> None:
    executor = FakeExecutor()
    notified: list[int] = []
    done = threading.Event()

    class CountingReader(ThreadReader):
        def notify(self, streams: object) -> None:
            notified.append(len(streams))
            super().notify(streams)
            if all(stream.ended for stream in all_streams):
                done.set()

    reader = CountingReader()
    all_streams: list[OutputStream] = []
    executor.gate.clear()
    with running(executor) as engine:
        all_streams += [engine.submit(request(1, max_tokens=50), reader)]
        assert executor.entered.wait(WAIT_S)
        all_streams += [engine.submit(request(2, max_tokens=49), reader) for _ in range(7)]
        executor.gate.set()
        assert done.wait(WAIT_S)
        first = all_streams[0].take()
    assert first is not None
    assert first.token_ids == tuple(range(2, 52))
    assert first.finish_reason == "length"
    assert notified == [1] + [8] * 49, "one wake for each step, with all its streams"


def test_an_idle_engine_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waits until it is woken, however long that takes."""
    waits: list[tuple[threading.Condition, float | None]] = []
    wait = threading.Condition.wait

    def note(condition: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "cantata-engine":
            waits.append((condition, timeout))
        return wait(condition, timeout)

    monkeypatch.setattr(threading.Condition, "wait", note)
    reader = ThreadReader()
    with running(FakeExecutor()) as engine:
        for _ in range(2):
            read_all(reader, engine.submit(request(1, max_tokens=2), reader))
            engine.drain(WAIT_S)
            engine._requests.open()
        of_requests = engine._requests._changed
        until(lambda: engine.watch._stalls_at_s is None, WAIT_S)
    timeouts = [timeout for condition, timeout in waits if condition is of_requests]
    assert timeouts
    assert set(timeouts) == {None}


def test_metrics_count_what_happened() -> None:
    reader = ThreadReader()
    with running(FakeExecutor(), max_num_seqs=2) as engine:
        prompt = tuple(range(100, 140))
        read_all(reader, *[engine.submit(request(*prompt, max_tokens=5), reader) for _ in range(2)])
        [again] = read_all(reader, engine.submit(request(*prompt, max_tokens=5), reader))
        engine.drain(WAIT_S)
        text = engine.metrics.render()
    assert again.num_cached_tokens == 32, "two full blocks of the prompt"
    for line in (
        'cantata_engine_requests_total{finish_reason="length"} 3.0',
        "cantata_engine_prompt_tokens_total 120.0",
        "cantata_engine_output_tokens_total 15.0",
        "cantata_engine_queue_duration_seconds_count 3.0",
        "cantata_engine_running_requests 0.0",
        "cantata_engine_waiting_requests 0.0",
        'cantata_engine_kv_usage_ratio{group="full"} 0.0',
    ):
        assert line in text, line
    cached = next(
        line for line in text.splitlines() if line.startswith("cantata_engine_cached_tokens_total ")
    )
    assert float(cached.split()[1]) >= 32


@pytest.mark.parametrize(("prefix_caching", "num_cached"), [(True, 32), (False, 0)])
def test_prefixes_are_found_if_that_is_set(prefix_caching: bool, num_cached: int) -> None:
    reader = ThreadReader()
    with running(FakeExecutor(), prefix_caching=prefix_caching) as engine:
        for wanted in (0, num_cached):
            [output] = read_all(reader, engine.submit(request(*range(100, 140), max_tokens=2), reader))
            assert output.num_cached_tokens == wanted


def test_a_preempted_request_is_counted_once() -> None:
    """Two sequences of 100 tokens over 8 blocks of 16: the second loses its blocks and starts
    again."""
    reader = ThreadReader()
    executor = FakeExecutor(num_full_blocks=9)
    executor.gate.clear()
    with running(executor, max_model_len=100) as engine:
        prompts = [range(100, 120), range(200, 220)]
        streams = [engine.submit(request(*prompt, max_tokens=80), reader) for prompt in prompts]
        executor.gate.set()
        outputs = read_all(reader, *streams)
        engine.drain(WAIT_S)
        text = engine.metrics.render()
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert sum(len(plan.starts) for plan in executor.plans) == 3
    for line in (
        "cantata_engine_preemptions_total 1.0",
        "cantata_engine_prompt_tokens_total 40.0",
        "cantata_engine_cached_tokens_total 0.0",
        "cantata_engine_output_tokens_total 160.0",
        "cantata_engine_queue_duration_seconds_count 2.0",
        'cantata_engine_requests_total{finish_reason="length"} 2.0',
    ):
        assert f"{line}\n" in text, line


@pytest.mark.parametrize(("num_full", "num_sliding"), [(20, 200), (200, 20), (0, 20)])
def test_the_load_is_that_of_the_full_layers_if_there_are_any(num_full: int, num_sliding: int) -> None:
    reader = ThreadReader()
    executor = FakeExecutor(num_full, num_sliding)
    executor.gate.clear()
    with running(executor, max_model_len=200) as engine:
        stream = engine.submit(request(*range(40), max_tokens=1), reader)
        assert executor.entered.wait(WAIT_S)
        assert engine.load().kv_usage == pytest.approx(3 / ((num_full or num_sliding) - 1))
        executor.gate.set()
        read_all(reader, stream)


class QueuedExecutor(FakeExecutor):
    """Plans wait until the test lets the oldest one run.

    Attributes:
        num_ahead: for each plan, the number of plans without a result when it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_ahead: list[int] = []
        self._queue: deque[tuple[StepPlan, Future[StepResult]]] = deque()

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        future: Future[StepResult] = Future()
        self.num_ahead.append(len(self._queue))
        self._queue.append((plan, future))
        self.plans.append(plan)
        return future

    def run_oldest(self) -> None:
        plan, future = self._queue.popleft()
        future.set_result(self._run(plan))


def test_the_next_plan_comes_before_the_result() -> None:
    """The ranks never wait for the engine: while they compute a step, the next plan is there, and
    no more than that one."""
    reader = ThreadReader()
    executor = QueuedExecutor()
    with running(executor) as engine:
        streams = [engine.submit(request(1, max_tokens=6), reader)]
        for step in range(6):
            until(lambda step=step: len(executor.plans) >= min(step + 2, 6), WAIT_S)
            executor.run_oldest()
        [output] = read_all(reader, *streams)
    assert output == EngineOutput((2, 3, 4, 5, 6, 7), finish_reason="length")
    assert executor.num_ahead == [0] + [1] * 5


def test_a_crowd_that_comes_leaves_and_is_preempted_ends_once_each() -> None:
    """Few KV blocks, several submitting threads, aborts and deadlines at random: each stream ends,
    and with the right tokens."""
    executor = FakeExecutor(num_full_blocks=16, num_sliding_blocks=16)
    failures: list[str] = []
    with running(executor, max_model_len=200, max_num_seqs=6, max_num_batched_tokens=64) as engine:

        def client(number: int) -> None:
            draw = random.Random(number)
            reader = ThreadReader()
            for _ in range(12):
                prompt = tuple(draw.randrange(900) for _ in range(draw.randrange(1, 60)))
                max_tokens = draw.randrange(1, 100)
                deadline_s = draw.choice([None, None, 0.02])
                stream = engine.submit(
                    request(*prompt, max_tokens=max_tokens, ignore_eos=True, deadline_s=deadline_s), reader
                )
                if draw.random() < 0.2:
                    engine.abort(stream)
                [output] = read_all(reader, stream)
                expected = tuple((prompt[-1] + 1 + i) % VOCAB for i in range(max_tokens))
                if output.finish_reason == "length" and output.token_ids != expected:
                    failures.append(f"{number}: wrong tokens")
                if output.token_ids != expected[: len(output.token_ids)]:
                    failures.append(f"{number}: not a prefix")
                if output.finish_reason not in ("length", "abort"):
                    failures.append(f"{number}: {output}")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert engine.drain(WAIT_S) == 0
        assert engine.error is None
        assert "cantata_engine_preemptions_total 0.0" not in engine.metrics.render(), (
            "the pool was meant to be too small"
        )
    assert failures == []
