"""Sets of CUDA graphs: how they are captured, on which streams, what they take, what may not happen
meanwhile."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.fake_cuda import FakeCuda, Taken
from workers.model.step_batch import StepBatch
from workers.rank.recorded import cuda_graph
from workers.rank.recorded.cuda_graph import DecodeGraphs, no_kernel_loads
from workers.rank.slots import DeviceSlots, SequenceSlots

CPU = torch.device("cpu")


def new_graphs(forward: Callable[[StepBatch], Tensor] = lambda batch: batch.positions) -> DecodeGraphs:
    slots = SequenceSlots(9, 40)
    return DecodeGraphs(slots, DeviceSlots(slots, CPU), forward)


def no_progress(phase: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("limit", [None, 2])
def test_graphs_are_captured_from_the_largest_on_one_stream_and_their_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """A stream for each graph would leave a cuBLAS workspace for each. What another process takes
    shows as the driver's."""
    taken = [Taken(70, 4), Taken(5, 3, elsewhere=1000), Taken(3, 2, elsewhere=-400), Taken(2, 1), Taken(1)][
        : limit or 5
    ]
    cuda = FakeCuda(taken)
    cuda.install(monkeypatch)
    batches = []
    graphs = new_graphs(lambda batch: batches.append(batch) or batch.positions)
    assert graphs.sizes == (1, 2, 4, 8, 9)
    seen = []
    report = graphs.capture(lambda *progress: seen.append(progress), limit=limit)
    assert report.pool_bytes == tuple(each.pool for each in taken)
    assert report.driver_bytes == tuple(each.driver + each.elsewhere for each in taken)
    assert (report.num_graphs, report.memory_bytes) == (
        len(taken),
        sum(each.pool + each.driver + each.elsewhere for each in taken),
    )
    assert [len(batch.token_ids) for batch in batches[::2]] == [9, 8, 4, 2, 1][: limit or 5], (
        "each once to warm up and once captured"
    )
    assert len(batches) == 2 * len(taken)
    assert cuda.captured_on == cuda.captured_on[:1] * len(taken)
    assert seen == [("capture graphs", done, len(taken)) for done in range(len(taken) + 1)]


def test_each_living_set_of_graphs_has_a_stream_and_a_later_one_takes_over_that_of_a_set_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda([Taken(1)] * 100, num_streams=3)
    cuda.install(monkeypatch)

    def captured() -> DecodeGraphs:
        graphs = new_graphs()
        graphs.capture(no_progress, limit=1)
        return graphs

    def stream() -> int:
        return cuda.captured_on[-1].cuda_stream  # type: ignore[attr-defined, no-any-return]

    living, streams = [], []
    for _ in range(3):
        living.append(captured())
        streams.append(stream())
    assert len(set(streams)) == 3
    with pytest.raises(RuntimeError, match="no stream is left"):
        captured()
    del living[1]
    assert len(cuda.living) == 2
    for _ in range(5):
        graphs = captured()
        assert stream() == streams[1]
        del graphs
    assert len(cuda.living) == 2


def test_a_stream_is_free_only_once_its_graphs_are_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda([Taken(1)] * 5)
    cuda.install(monkeypatch)
    graphs = new_graphs()
    graphs.capture(no_progress)
    left: list[int] = []
    give_back = cuda_graph._streams.give_back
    monkeypatch.setattr(
        cuda_graph._streams, "give_back", lambda *args: (left.append(len(cuda.living)), give_back(*args))
    )
    assert len(cuda.living) == 5
    del graphs
    assert left == [0]


class TestKernelLoads:
    """Loads of kernels, reported through Triton's hook as Triton calls it; that Triton calls it is
    not tested here."""

    def load(self, name: str) -> None:
        knobs = pytest.importorskip("triton.knobs")
        knobs.runtime.kernel_load_start_hook(None, None, name, {}, "key")

    def test_a_kernel_that_is_loaded_while_a_graph_is_captured_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        FakeCuda([Taken(1)] * 5).install(monkeypatch)
        calls: list[StepBatch] = []

        def forward(batch: StepBatch) -> Tensor:
            calls.append(batch)
            if len(calls) in (1, 4):  # warming up the first graph, capturing the second
                self.load(f"kernel_{len(calls)}")
            return batch.positions

        with pytest.raises(
            RuntimeError, match="kernel kernel_4 while a CUDA graph of 8 sequences is captured"
        ):
            new_graphs(forward).capture(no_progress)
        self.load("afterwards")

    def test_another_thread_may_load(self) -> None:
        failed: list[BaseException] = []

        def load() -> None:
            try:
                self.load("other")
            except RuntimeError as error:
                failed.append(error)

        with no_kernel_loads("a graph"):
            thread = threading.Thread(target=load)
            thread.start()
            thread.join()
            with pytest.raises(RuntimeError, match="mine"):
                self.load("mine")
        assert not failed

    def test_nothing_is_watched_where_there_is_no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_graph, "has_triton", lambda: False)
        with no_kernel_loads("a graph"):
            self.load("some")
