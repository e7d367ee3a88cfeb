"""One chat, from its HTTP request to the sampled tokens and back: the files that it passes."""

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import httpx
import pytest

from cluster.assembly import build_gateway
from cluster.config import load_config
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.frontend.app import build_app
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.test_imports import LAYERS, ROOT
from workers.engine.server import EngineServer
from workers.model.make_checkpoint import preset_config, write_checkpoint

BODY = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3, "stream": True}
DESIGN = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- files of one chat -->", "<!-- end of the files of one chat -->"


class Trace:
    """Product files in the order in which a function of theirs is first entered, on any thread."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.on = False
        self._root = f"{ROOT}/"

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.on and event == "call":
            path = frame.f_code.co_filename.removeprefix(self._root)
            if path.split("/")[0] in LAYERS and path not in self.files:
                self.files.append(path)


@pytest.fixture
def trace() -> Iterator[Trace]:
    found = Trace()
    threading.setprofile(found)
    sys.setprofile(found)
    yield found
    sys.setprofile(None)
    threading.setprofile(None)


async def files_of_one_chat(trace: Trace, folder: Path) -> list[str]:
    """Serve a tiny model in this process, one rank in the engine, and send it one chat."""
    model = folder / "model"
    write_checkpoint(model, preset_config("tiny"), seed=0)
    write_bpe_tokenizer(model, 2048)
    config = load_config(None, {}, {"engine.model_path": model, "engine.cache.memory_bytes": 64 << 20})
    server = EngineServer()
    address = await server.start(config.engine, f"unix:{folder}/engine")
    replicas = ReplicaSet()
    replicas.replace([Replica("engine-0", address)])
    gateway, infos = build_gateway(config, HarmonyEncoding.load(model), replicas)
    app = build_app(gateway.service, gateway.status, config.gateway)
    try:
        await infos.first()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            trace.on = True
            answer = await client.post("/v1/chat/completions", json=BODY)
            trace.on = False
    finally:
        await gateway.service.close()
        await server.stop()
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    return trace.files


async def test_the_files_that_one_chat_passes(trace: Trace, tmp_path: Path) -> None:
    files = await files_of_one_chat(trace, tmp_path)
    # Which of the CPU's or torch's kernels run is the processor's matter.
    read = [path for path in files if not path.startswith("kernels/")]
    page = DESIGN.read_text().split(BEGIN)[1].split(END)[0]
    listed = re.findall(r"(?:cluster|workers)(?:/[a-z0-9_]+)+\.py", page)
    assert sorted(listed) == sorted(read), f"in order of appearance: {' · '.join(read)}"
