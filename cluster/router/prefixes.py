"""What replicas probably have in their prefix caches, guessed from what was sent to them: an engine does not tell, and need not."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MAX_BLOCKS_PER_REPLICA = 65_536
"""A million tokens, 9 MB for each replica. A replica of several GPUs may hold more; what is forgotten here costs a hit there, no more."""


class PrefixIndex:
    """Block hashes (`workers.kv_cache.prefix_cache.block_hashes`) by replica, the least recently sent forgotten first.

    Args:
        max_blocks: of each replica.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS_PER_REPLICA) -> None:
        self._max_blocks = max_blocks
        self._sent: dict[str, OrderedDict[bytes, None]] = {}

    def match(self, replica_id: str, hashes: Sequence[bytes]) -> int:
        """Blocks at the beginning that were sent there."""
        sent = self._sent.get(replica_id)
        if not sent:
            return 0
        for count, block in enumerate(hashes):
            if block not in sent:
                return count
        return len(hashes)

    def add(self, replica_id: str, hashes: Sequence[bytes]) -> None:
        """A prompt went there."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        # From the end: a prefix must outlive what follows it, or it would be found no more.
        for block in reversed(hashes):
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._max_blocks:
            sent.popitem(last=False)

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """How many blocks are remembered, by replica."""
        return {replica_id: len(sent) for replica_id, sent in self._sent.items()}

    def forget(self, replica_id: str) -> None:
        """The replica died, or is gone: its cache with it."""
        self._sent.pop(replica_id, None)
