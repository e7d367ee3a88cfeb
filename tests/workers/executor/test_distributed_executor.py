"""Several ranks as real processes: the same answers as one; whatever happens to a rank, all
requests end once and nothing stays."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from kernels.cpu import native
from tests.support.processes import marked, new_mark, none_left
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from tests.support.waiting import until
from workers.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from workers.config_json import engine_config_from_json, engine_config_to_json
from workers.engine.engine import Engine
from workers.engine.llm import LLM
from workers.engine.stream import OutputStream, ThreadReader
from workers.errors import CheckpointError, ConfigError, EngineDead, RankCrashed
from workers.executor import channel as wire
from workers.executor.channel import EngineChannel, RankChannel
from workers.executor.distributed import DistributedExecutor
from workers.executor.launch_processes import ProcessRanks
from workers.executor.launcher import OnExit, Placement
from workers.model.make_checkpoint import write_checkpoint
from workers.model_config import load_model_config
from workers.private_folder import PrivateFolder
from workers.rank.process import RankSpec, identity, serve_rank
from workers.request import EngineOutput, EngineRequest, SamplingParams

WAIT_S = 60.0
PROMPTS = [[1, 2, 3, 4] * 10, [5, 6], [7] * 33]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("distributed"))


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return a variable that marks all processes started from here on."""
    mark = new_mark()
    for name, value in mark.items():
        monkeypatch.setenv(name, value)
    return mark


@pytest.fixture(autouse=True)
def _no_socket_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # short: Unix sockets have names of 107 bytes at most
    folder = Path(tempfile.mkdtemp(prefix="sockets-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield
    (root,) = folder.iterdir() if any(folder.iterdir()) else [folder / "none"]
    assert not root.exists() or list(root.iterdir()) == []
    shutil.rmtree(folder)


def config_of(
    path: Path,
    *,
    tensor: int = 3,
    expert: int | None = None,
    step_timeout_s: float = 30.0,
    start_timeout_s: float = 180.0,
) -> EngineConfig:
    return EngineConfig(
        path,
        dtype="float32",
        max_model_len=256,
        cache=CacheConfig(4 << 20),
        parallel=ParallelConfig(tensor, None, step_timeout_s, start_timeout_s),
    )


class Serving:
    """An engine over real ranks."""

    def __init__(self, config: EngineConfig) -> None:
        self.ranks = ProcessRanks()
        model = load_model_config(config.model_path)
        self.engine = Engine(
            config, model, DistributedExecutor(config, model, self.ranks), check_integrity=True
        )
        self.info = self.engine.start()
        self.reader = ThreadReader()

    def submit(self, num_tokens: int) -> OutputStream:
        return self.engine.submit(
            EngineRequest("r", (1, 2, 3), SamplingParams(temperature=0, seed=0, max_tokens=num_tokens)),
            self.reader,
        )


@contextmanager
def serving(config: EngineConfig) -> Iterator[Serving]:
    serving = Serving(config)
    try:
        yield serving
    finally:
        serving.engine.shutdown()


def test_ranks_run_on_the_instruction_set_that_was_chosen(
    checkpoint: Path, mark: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANTATA_CPU_ISA", "portable")
    with serving(config_of(checkpoint)) as replica:
        assert replica.info.kernels["attention"] == "C++ portable (as CANTATA_CPU_ISA says)"
        assert ", portable, " in replica.info.device
    monkeypatch.delenv("CANTATA_CPU_ISA")
    with serving(replace(config_of(checkpoint), cpu_isa="reference")) as replica:
        assert replica.info.kernels["attention"] == "torch reference (cpu_isa is reference)"
    monkeypatch.setenv("CANTATA_CPU_ISA", "avx3")
    with pytest.raises(
        ConfigError, match=r"^CANTATA_CPU_ISA is avx3, which this processor or this build does not have: "
    ):
        Serving(config_of(checkpoint))
    assert none_left(mark, 5) == []


def last_outputs(serving: Serving, streams: Sequence[OutputStream]) -> list[EngineOutput]:
    """Return the end of each stream; a stream that has two ends fails."""
    ends: dict[int, EngineOutput] = {}
    for stream, output in serving.reader.read(streams):
        if output.finish_reason is not None:
            assert stream.seq_id not in ends
            ends[stream.seq_id] = output
    return [ends[stream.seq_id] for stream in streams]


def test_three_ranks_answer_as_one(checkpoint: Path, mark: dict[str, str]) -> None:
    sampling = [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(seed=7, max_tokens=20, logprobs=2),
        SamplingParams(seed=3, max_tokens=9),
    ]

    def answers(tensor: int) -> tuple[list[tuple[int, ...]], torch.Tensor, list[float]]:
        with LLM(
            checkpoint,
            dtype="float32",
            max_model_len=256,
            kv_cache_bytes=4 << 20,
            tensor_parallel_size=tensor,
            max_num_batched_tokens=32,
        ) as llm:
            assert llm.info.num_ranks == tensor
            outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
            logprobs = [entry.logprob for entry in outputs[1].outputs[0].logprobs or ()]
            return [output.outputs[0].token_ids for output in outputs], llm.logits(PROMPTS[0]), logprobs

    alone, together = answers(1), answers(3)
    assert together[0] == alone[0]
    # fp32 sums in another order.
    torch.testing.assert_close(together[1], alone[1], atol=1e-4, rtol=0)
    assert together[2] == pytest.approx(alone[2], abs=1e-4)
    assert none_left(mark, 10) == [f for f in marked(mark) if f.startswith(f"{os.getpid()} ")]


def ended_by(serving: Serving, harm: Callable[[int], None]) -> tuple[str, float]:
    """Harm rank 1 in the middle of three streams; return the one sentence that ends them all, and
    the time until then."""
    streams = [serving.submit(200) for _ in range(3)]
    for num_seen, _ in enumerate(serving.reader.read(streams), start=1):
        if num_seen == 6:
            break
    begin = time.monotonic()
    harm(serving.ranks.pids[1])
    ends = last_outputs(serving, streams)
    took = time.monotonic() - begin
    assert {end.finish_reason for end in ends} == {"error"}
    (sentence,) = {end.error for end in ends}
    assert sentence is not None
    assert serving.engine.wait_stopped(10)
    with pytest.raises(EngineDead):
        serving.submit(1)
    for pid in serving.ranks.pids:
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10)  # type: ignore[misc]
    return sentence, took


def test_a_killed_rank_ends_every_request_at_once(checkpoint: Path) -> None:
    with serving(config_of(checkpoint)) as replica:
        sentence, took = ended_by(replica, lambda pid: os.kill(pid, signal.SIGKILL))
    # On a busy machine another rank may be first, which only knows that its step failed.
    assert sentence == "rank 1 ended with signal SIGKILL" or re.fullmatch(
        r"step \d+ failed on rank [02]; its log has the details", sentence
    )
    assert took < 20  # 0.02 s on a quiet machine; the step timeout is 30 s
    assert replica.engine.crash is None, "it was not its own fault"


def test_a_stopped_rank_ends_every_request_at_the_step_timeout(checkpoint: Path) -> None:
    with serving(config_of(checkpoint, step_timeout_s=1.5)) as replica:
        sentence, took = ended_by(replica, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert "has no result after 1.5 s (engine.parallel.step_timeout_s): a rank hangs" in sentence
    assert took > 1.4


def test_a_rank_that_crashes_while_nothing_runs_is_noticed(checkpoint: Path) -> None:
    with serving(config_of(checkpoint)) as replica:
        assert last_outputs(replica, [replica.submit(3)])[0].finish_reason == "length"
        os.kill(replica.ranks.pids[2], signal.SIGABRT)
        assert replica.engine.wait_stopped(10)
        assert replica.engine.error == "rank 2 ended with signal SIGABRT"
    assert replica.engine.crash is not None
    assert replica.engine.crash.signal == signal.SIGABRT


def test_ranks_end_with_their_engine(checkpoint: Path, mark: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.engine", "--config", engine_config_to_json(config_of(checkpoint))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert '"ready"' in process.stdout.readline()
    ranks = [int(entry.split()[0]) for entry in marked(mark) if "workers.rank.process" in entry]
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGSTOP)  # it cannot see by itself that its engine is gone
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not [entry for entry in marked(mark) if "workers.rank.process" in entry], 10)
    # A killed process cannot remove its folders; the next one does.
    own = PrivateFolder()
    assert list(own.path.parent.iterdir()) == [own.path]
    own.close()


def test_ranks_outlive_the_thread_that_starts_them(checkpoint: Path) -> None:
    """The kernel ends a rank with the thread that started it, and an LLM may be made in a thread
    that ends."""
    channel, launcher, ended = EngineChannel(1), ProcessRanks(), threading.Event()
    spec = RankSpec(
        engine_config_to_json(config_of(checkpoint)), 0, channel.endpoints(0), "127.0.0.1", 0, 3, 1
    )
    starting = threading.Thread(target=launcher.launch, args=(spec, lambda how, crash: ended.set()))
    starting.start()
    starting.join()
    try:
        deadline = time.monotonic() + 60
        while (message := channel.receive(1)) is None or message[0] != wire.HELLO:
            assert time.monotonic() < deadline
            assert not ended.is_set()
        channel.send(0, wire.STOP, b"", connect_s=20)
        launcher.end(20)
        assert launcher._processes[0].returncode == 0, "it ended because it was told to"
    finally:
        launcher.end(0)
        channel.close()


def held(pid: int) -> set[str]:
    """Return the sockets that a process has open, and the files that it has mapped to be written by
    all."""
    sockets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.exists()}
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {name for name in sockets if name.startswith("socket:")} | {
        " ".join(entry[3:]) for entry in maps if entry[1] in ("rw-s", "-w-s")
    }


def test_two_engines_on_one_checkpoint_share_nothing_that_one_could_break(checkpoint: Path) -> None:
    config = config_of(checkpoint, tensor=1)
    with serving(config) as first, serving(config) as second:
        answers = [last_outputs(replica, [replica.submit(5)]) for replica in (first, second)]
        assert [[end.finish_reason for end in ends] for ends in answers] == [["length"]] * 2
        assert answers[0] == answers[1]
        assert held(first.ranks.pids[0])
        assert not held(first.ranks.pids[0]) & held(second.ranks.pids[0])
        running = second.submit(200)
        os.kill(first.ranks.pids[0], signal.SIGKILL)
        assert first.engine.wait_stopped(10)
        assert last_outputs(second, [running])[0].finish_reason in ("length", "stop")
        assert second.engine.error is None


class ChangedSpecs(ProcessRanks):
    """Rank 1 is told something else."""

    def __init__(self, change: Callable[[RankSpec], RankSpec]) -> None:
        super().__init__()
        self._change = change

    def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
        super().launch(self._change(spec) if spec.rank == 1 else spec, on_exit)


def refusal(config: EngineConfig, launcher: ProcessRanks) -> Exception:
    executor = DistributedExecutor(config, load_model_config(config.model_path), launcher)
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        executor.start()
    assert all(not Path(f"/proc/{pid}").exists() for pid in launcher.pids)
    return raised.value


def with_model(spec: RankSpec, path: Path) -> RankSpec:
    return replace(
        spec, config=engine_config_to_json(replace(engine_config_from_json(spec.config), model_path=path))
    )


def test_ranks_with_different_checkpoints_do_not_start(checkpoint: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path, seed=1)
    said = str(refusal(config_of(checkpoint), ChangedSpecs(lambda spec: with_model(spec, other))))
    assert "rank 1 on 127.0.0.1 has another checkpoint" in said


class Greeters(ProcessRanks):
    """Ranks that greet and do no more, without processes; rank 1 sends something else, or
    nothing."""

    def __init__(self, **says: object) -> None:
        super().__init__()
        self._says = says
        self._channels: list[RankChannel] = []

    def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
        channel = RankChannel(spec.endpoints)
        self._channels.append(channel)
        if spec.rank != 1 or self._says:
            own = identity(engine_config_from_json(spec.config))
            said = own | (self._says if spec.rank == 1 else {})
            channel.send(wire.HELLO, wire.pack(rank=spec.rank, host="10.0.0.7", identity=said, store_port=1))

    def end(self, grace_s: float) -> None:
        for channel in self._channels:
            channel.close(0)
        self._channels.clear()


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("Cantata", "0.0.9"),
        ("torch", "2.0.0"),
        ("version of step messages", 0),
        ("checkpoint", "0" * 64),
        ("configuration", "0" * 64),
    ],
)
def test_ranks_that_are_not_alike_do_not_start(checkpoint: Path, what: str, value: object) -> None:
    said = str(refusal(config_of(checkpoint), Greeters(**{what: value})))
    assert said.startswith(
        f"rank 1 on 10.0.0.7 has another {what} ({str(value)[:12]}) than its engine on 127.0.0.1 ("
    )


def test_each_setting_counts_as_configuration(checkpoint: Path) -> None:
    config = config_of(checkpoint)
    changed = replace(config, scheduler=SchedulerConfig(max_num_seqs=7))
    same, other, longer = identity(config), identity(changed), identity(replace(config, max_model_len=257))
    assert [name for name in same if same[name] != other[name]] == ["configuration"]
    assert [name for name in same if same[name] != longer[name]] == ["configuration"]


def test_a_rank_that_does_not_come_is_named(checkpoint: Path) -> None:
    said = str(refusal(config_of(checkpoint, start_timeout_s=2), Greeters()))
    assert said == "after 2 s these ranks have not started: 1"


def test_what_is_wrong_with_a_checkpoint_is_said_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "broken", TINY, seed=0)
    file = tmp_path / "broken/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = str(refusal(config_of(tmp_path / "broken"), ProcessRanks()))
    assert said.startswith(f"{file} is truncated: tensor lm_head.weight")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGILL])
def test_a_rank_that_dies_while_starting_is_told(checkpoint: Path, number: signal.Signals) -> None:
    class Dying(ProcessRanks):
        def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
            super().launch(spec, on_exit)
            if spec.rank == 1:
                os.kill(self.pids[1], number)

    said = refusal(config_of(checkpoint), Dying())
    if number == signal.SIGKILL:
        assert type(said) is ConfigError
        assert (
            str(said) == "before all ranks were ready, rank 1 ended with signal SIGKILL; see its output above"
        )
    else:
        assert isinstance(said, RankCrashed)
        assert said.signal == number
        assert "--cpu-isa" in str(said)


def test_a_trial_of_the_kernels_that_dies_is_a_crash(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    class Threads(ProcessRanks):
        def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
            threads.append(threading.Thread(target=serve_rank, args=(spec,), daemon=True))
            threads[-1].start()

    monkeypatch.setattr(native, "runs", lambda: False)
    said = refusal(config_of(checkpoint), Threads())
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert isinstance(said, RankCrashed)
    assert said.signal == signal.SIGILL
    assert str(said).startswith("this processor cannot run the C++ kernels")


def test_a_plan_that_cannot_work_is_refused_before_anything_starts(checkpoint: Path) -> None:
    launcher = ProcessRanks()
    said = str(refusal(config_of(checkpoint, tensor=4), launcher))
    assert (
        "6 query heads cannot be split evenly over 4 ranks; the nearest that can: tensor=3, expert=3" in said
    )
    assert launcher.pids == []


def test_more_gpus_than_there_are_are_refused(checkpoint: Path) -> None:
    config = replace(config_of(checkpoint), device="cuda")
    if torch.cuda.device_count() >= 3:
        pytest.skip("this host has three GPUs")
    assert f"engine.parallel.tensor needs 3 GPUs, but this host has {torch.cuda.device_count()}" in str(
        refusal(config, ProcessRanks())
    )


def decided(monitor: "zmq.Socket[bytes]") -> zmq.Event:
    """Wait until the peer of the monitored socket has let it in or has refused it."""
    assert monitor.poll(int(WAIT_S * 1000)), "the handshake is not decided"
    return zmq.Event(recv_monitor_message(monitor)["event"])


def test_strangers_can_neither_send_nor_take_messages() -> None:
    channel = EngineChannel(1, host="127.0.0.1")
    endpoints = channel.endpoints(0)
    assert endpoints.server_key is not None
    context, rank = zmq.Context(), RankChannel(endpoints)
    strangers: list[zmq.Socket[bytes]] = []
    monitors: list[zmq.Socket[bytes]] = []
    refused = (
        zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
        | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        | zmq.Event.HANDSHAKE_FAILED_AUTH
    )
    # One without keys, and one that knows the engine's public key only.
    for keys in (None, zmq.curve_keypair()):
        for kind, address in ((zmq.PUSH, endpoints.results), (zmq.PULL, endpoints.plans)):
            socket = context.socket(kind)
            strangers.append(socket)
            monitors.append(socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | refused))
            if keys is not None:
                socket.curve_serverkey = endpoints.server_key.encode()
                socket.curve_publickey, socket.curve_secretkey = keys
            socket.connect(address)
            if kind == zmq.PUSH:
                socket.send_multipart([wire.RESULT, b"forged"])
    try:
        for monitor in monitors:
            assert decided(monitor) in refused
        rank.send(wire.HELLO, b"from the rank")
        assert channel.receive(20) == (wire.HELLO, b"from the rank")
        sent = [str(number).encode() for number in range(20)]
        for body in sent:
            channel.send(0, wire.PLAN, body, connect_s=20)
        assert [rank.receive(20) for _ in sent] == [(wire.PLAN, body) for body in sent], (
            "a share of them goes to each who is let in"
        )
        assert channel.receive(0) is None
        assert not any(socket.poll(0) for socket in strangers if socket.type == zmq.PULL)
    finally:
        context.destroy(linger=0)
        rank.close(0)
        channel.close()


def test_within_a_host_the_channel_is_in_a_private_folder() -> None:
    channel = EngineChannel(1)
    path = Path(channel.endpoints(0).plans.removeprefix("ipc://"))
    assert path.is_socket()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    channel.close()
    assert not path.parent.exists()


def test_a_message_to_a_rank_that_ends_meanwhile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = EngineChannel(1)
    try:
        # what a rank leaves that ends between the question and the message
        monkeypatch.setattr(zmq.Socket, "poll", lambda *_: zmq.POLLOUT)
        channel.send(0, wire.STOP, b"")
    finally:
        channel.close()


def test_placements_say_who_shares_a_host() -> None:
    assert ProcessRanks().place(3, "cpu", 7, 1) == [Placement("127.0.0.1", rank, 3, 2) for rank in range(3)]


def test_a_spec_survives_its_journey(checkpoint: Path) -> None:
    spec = RankSpec(
        engine_config_to_json(config_of(checkpoint)),
        1,
        wire.Endpoints("a", "b", "c", "d"),
        "127.0.0.1",
        1,
        2,
        3,
    )
    assert RankSpec.from_json(spec.to_json()) == spec
    assert msgpack.unpackb(wire.pack(rank=1)) == {"rank": 1}
    assert isinstance(load_model_config(checkpoint), ModelConfig)
