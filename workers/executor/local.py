"""The executor of an engine on this host alone: one rank runs in the engine's process, several
ranks run in their own."""

from workers.config import EngineConfig, ModelConfig
from workers.executor.base import Executor
from workers.executor.inline import InlineExecutor
from workers.rank.rank import Progress


def local_executor(config: EngineConfig, model: ModelConfig, *, progress: Progress | None = None) -> Executor:
    """Return an executor that has not been started."""
    if config.parallel.tensor == 1:
        return InlineExecutor(config, model, progress=progress)
    # Imported here, since one rank needs neither ZMQ nor msgpack.
    from workers.executor.distributed import DistributedExecutor
    from workers.executor.launch_processes import ProcessRanks

    return DistributedExecutor(config, model, ProcessRanks(), progress=progress)
