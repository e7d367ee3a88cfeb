"""Times on a device, with a device and a clock that are this test's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_timing
from benchmarks.decode_batches import Batch, Decoder, StepTime
from benchmarks.gpu_parts import stays_in_cache
from benchmarks.gpu_timing import GRAPH_LAUNCHES, WARM_UP_S, Timing, timed, warm_up
from tests.support.tiny_model import TINY

CPU = torch.device("cpu")


class Device:
    """A GPU on which each launch takes the time that it names, three times as long until the clocks
    are up."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clocks_up_s: float = 0.0) -> None:
        self.now = 0.0
        self.graphs: list[list[float]] = []
        self.eager = 0
        self._clocks_up_s = clocks_up_s
        self._capturing = False
        monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self._new_graph)
        monkeypatch.setattr(torch.cuda, "graph", contextmanager(self._graph))

    def work(self, seconds: float) -> Callable[[], None]:
        def launch() -> None:
            if self._capturing:
                self.graphs[-1].append(seconds)
            else:
                self.eager += 1
                self.run(seconds)

        return launch

    def run(self, seconds: float) -> None:
        self.now += seconds * (1 if self.now >= self._clocks_up_s else 3)

    def _new_graph(self) -> SimpleNamespace:
        launches: list[float] = []
        self.graphs.append(launches)
        return SimpleNamespace(replay=lambda: [self.run(seconds) for seconds in launches])

    def _graph(self, graph: object) -> Iterator[None]:
        self._capturing = True
        yield
        self._capturing = False


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self.at = self._device.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


@pytest.mark.parametrize(("num_works", "expected"), [(1, GRAPH_LAUNCHES), (3, 21), (18, 36), (30, 30)])
def test_a_launch_is_timed_in_a_graph_of_many(
    monkeypatch: pytest.MonkeyPatch, num_works: int, expected: int
) -> None:
    device = Device(monkeypatch)
    took = timed([device.work(1e-6 * (1 + index)) for index in range(num_works)], device)  # type: ignore[arg-type]
    (graph,) = device.graphs
    assert len(graph) == expected
    assert graph[:num_works] == [1e-6 * (1 + index) for index in range(num_works)], "in turn"
    assert took.best_s == pytest.approx(1e-6 * (1 + num_works) / 2)
    assert took.median_s == pytest.approx(took.best_s)


def test_work_that_no_graph_holds_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert timed([device.work(0.001)], device, graph=False).best_s == pytest.approx(0.001)  # type: ignore[arg-type]
    assert not device.graphs


def test_rounds_before_the_clocks_are_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, clocks_up_s=0.015)
    took = timed([device.work(1e-5)], device)  # type: ignore[arg-type]
    assert took.median_s == pytest.approx(1e-5)


def test_work_that_takes_long_is_run_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timed([device.work(2.0)], device, graph=False)  # type: ignore[arg-type]
    assert device.eager == 1 + 3


def test_the_best_and_the_median_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([9.0, 5.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(gpu_timing, "_round", lambda run, device, calls: next(rounds) * calls)
    monkeypatch.setattr(gpu_timing, "_ROUNDS", 4)
    ticks = iter(range(100))
    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-3))
    assert timed([lambda: None], CPU) == Timing(2.0, 3.5)


def test_warming_up_takes_as_long_as_clocks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    product = device.work(1e-3)
    monkeypatch.setattr(
        torch,
        "ones",
        lambda *shape, **options: type("Matrix", (), {"__matmul__": lambda self, other: product()})(),
    )
    warm_up(device)  # type: ignore[arg-type]
    assert WARM_UP_S <= device.now < WARM_UP_S + 0.01
    warm_up(CPU)


def test_what_twice_the_cache_holds_may_be_found_there() -> None:
    assert stays_in_cache(99e6, 50_000_000)
    assert not stays_in_cache(101e6, 50_000_000)
    assert not stays_in_cache(0, 0), "a CPU, whose caches are not looked at"


def test_decode_steps_are_timed_in_runs_after_the_clocks_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 steps make runs of 2, 2, 3, 3, 3; the steps go on from context to context."""
    device, contexts, order = Device(monkeypatch), [], []
    monkeypatch.setattr("benchmarks.decode_batches.time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr("benchmarks.decode_batches.warm_up", lambda device: order.append("warm up"))
    monkeypatch.setattr(Decoder, "_start", lambda self, batch: order.append("start"))
    speeds = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def decode(decoder: Decoder, context: int, num_steps: int) -> float:
        contexts.append((context, num_steps))
        order.append("decode")
        speed = next(speeds)
        device.now += num_steps * speed
        return num_steps * speed / 10

    monkeypatch.setattr(Decoder, "_decode", decode)
    decoder = Decoder(None, TINY, 13, CPU)  # type: ignore[arg-type]
    assert decoder.time(Batch(2, 100)) == StepTime(seconds=1.0, launch_s=0.1, median_s=3.0)
    assert order[:3] == ["start", "warm up", "decode"]
    assert contexts == [(100, 5), (105, 2), (107, 2), (109, 3), (112, 3), (115, 3)]
