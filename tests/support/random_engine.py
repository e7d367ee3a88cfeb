"""An engine with a real model of random weights, in the test's own process: what it writes is noise
within the constraint of the request."""

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.support.gateway import VOCAB_SIZE
from tests.support.tiny_model import TINY
from workers.config import CacheConfig, EngineConfig, SchedulerConfig
from workers.engine.server import EngineServer
from workers.model.make_checkpoint import write_checkpoint
from workers.private_folder import PrivateFolder
from workers.rpc.convert import EngineInfo


def write_random_checkpoint(folder: Path, encoding: HarmonyEncoding) -> Path:
    """Write the model, with the tokenizer of `tests.support.gateway`."""
    config = replace(
        TINY, vocab_size=VOCAB_SIZE, max_context_len=4096, stop_token_ids=encoding.stop_token_ids
    )
    write_checkpoint(folder, config, seed=3)
    write_bpe_tokenizer(folder, VOCAB_SIZE)
    return folder


@dataclass
class RandomEngine:
    """The engine, for `tests.support.gateway.serving`.

    Args:
        checkpoint: from `write_random_checkpoint`.
    """

    checkpoint: Path
    address: str = ""

    async def start(self) -> "RandomEngine":
        self._server = EngineServer()
        config = EngineConfig(
            self.checkpoint,
            dtype="float32",
            cache=CacheConfig(memory_bytes=1 << 24),
            scheduler=SchedulerConfig(max_num_seqs=16),
        )
        self._folder = PrivateFolder()
        self.address = await self._server.start(config, f"unix:{self._folder.path}/e")
        return self

    async def stop(self) -> None:
        await self._server.stop()
        self._folder.close()

    def info(self) -> EngineInfo:
        return self._server.start_up.info
