"""Where an engine on Ray and its ranks note that they crash, and that they do not load where that
has happened too often. What the notes are is tested in tests/workers/test_crash_notes.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serve import replica
from cluster.serve.replica import EngineReplica
from workers import crash_notes
from workers.config import EngineConfig
from workers.config_json import engine_config_to_json
from workers.errors import RankCrashed
from workers.executor import channel, launch_ray
from workers.rank import process
from workers.rank.process import RankSpec

CONFIG = EngineConfig(Path("nowhere"), cpu_isa="avx2")
LOCAL_RANK = 1
NOTE = b"Fatal Python error: Illegal instruction\n\nStack\n"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a Ray session, and processes whose crashes are not noted."""
    context = SimpleNamespace(get_temp_dir=lambda: str(tmp_path), get_session_name=lambda: "session")
    monkeypatch.setattr(launch_ray.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(crash_notes.faulthandler, "enable", lambda *_, **__: None)
    monkeypatch.setattr(crash_notes, "STABLE_AFTER_S", 1e6)
    monkeypatch.setattr(replica, "_CRASHED_PAUSE_S", 0.0)
    return tmp_path / "session"


def notes_of(config: EngineConfig, place: str) -> Path:
    return launch_ray.crash_notes(engine_config_to_json(config), place)._file


async def start_engine() -> None:
    engine: Any = SimpleNamespace()
    await EngineReplica.__init__(engine, CONFIG, "127.0.0.1", 1.0)


def start_rank() -> None:
    endpoints = channel.Endpoints(
        **dict.fromkeys(channel.Endpoints.__dataclass_fields__, "")  # type: ignore[arg-type]
    )
    spec = RankSpec(engine_config_to_json(CONFIG), 9, endpoints, "127.0.0.1", LOCAL_RANK, 8, 1)
    launch_ray._RankActor().run(spec.to_json())


class Channel:
    """A rank's channel that keeps what is sent."""

    def __init__(self, sent: list[bytes]) -> None:
        self._sent = sent

    def send(self, kind: bytes, body: bytes) -> None:
        self._sent.append(kind + body)

    def close(self) -> None: ...


@pytest.mark.parametrize("num_crashes", [4, 5])
async def test_neither_engine_nor_rank_loads_after_five_crashes(
    session: Path, num_crashes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading: list[str] = []

    async def start(*_: object, **__: object) -> str:
        loading.append("engine")
        raise ValueError("loads")

    sent: list[bytes] = []
    monkeypatch.setattr("workers.engine.server.EngineServer.start", start)
    monkeypatch.setattr(process, "_serve", lambda *_: loading.append("rank"))
    monkeypatch.setattr(process, "RankChannel", lambda _: Channel(sent))
    for place in ("engine", f"rank-{LOCAL_RANK}"):
        notes = notes_of(CONFIG, place)
        assert notes.is_relative_to(session)
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_bytes(NOTE * num_crashes)
    with pytest.raises(ValueError if num_crashes == 4 else RankCrashed, match=r"loads|SIGILL.*--cpu-isa"):
        await start_engine()
    start_rank()
    assert loading == (["engine", "rank"] if num_crashes == 4 else [])
    assert [b"RankCrashed" in message for message in sent] == ([] if num_crashes == 4 else [True])
    assert notes_of(EngineConfig(Path("nowhere")), f"rank-{LOCAL_RANK}") != notes


def test_a_crash_of_all_ranks_of_a_node_counts_once(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading: list[str] = []
    monkeypatch.setattr(process, "_serve", lambda *_: loading.append("rank"))
    monkeypatch.setattr(process, "RankChannel", lambda _: Channel([]))
    for local_rank in range(8):
        notes = notes_of(CONFIG, f"rank-{local_rank}")
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_bytes(NOTE)
    start_rank()
    assert loading == ["rank"]
    assert len(list(notes.parent.iterdir())) == 8  # it read one of these
