"""What replicas probably have in their prefix caches, guessed from what was sent to them: an engine
does not tell, and need not."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MAX_BLOCKS_PER_REPLICA = 65_536
"""A million tokens, 9 MB for each replica. A replica of several GPUs may hold more; what is
forgotten here costs a hit there, no more."""
MAX_BRANCHES = 32_768
"""Blocks whose continuations are remembered, 5 MB."""
SHARED_BY = 4
"""A block after which prompts went on in this many ways is the beginning of unrelated ones. One
conversation has up to three ways on from a block: the end of a prompt, the reasoning that a tool
call follows, and the answer without it."""
_WAY_BYTES = 4


class PrefixIndex:
    """Block hashes (`workers.kv_cache.prefix_cache.block_hashes`) by replica (its key), the least
    recently sent forgotten first.

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


class SharedBeginnings:
    """What prompts of unrelated requests begin with, learnt from how often they part after a block.

    Args:
        max_blocks: that are remembered; the least recently seen is forgotten first.
    """

    def __init__(self, max_blocks: int = MAX_BRANCHES) -> None:
        self._max_blocks = max_blocks
        # Beginnings of the hashes of what came next, joined: at most SHARED_BY different ones.
        self._ways: OrderedDict[bytes, bytes] = OrderedDict()

    def add(self, hashes: Sequence[bytes], tail: bytes) -> int:
        """Note a prompt.

        Args:
            hashes: of its full blocks.
            tail: hash of what follows these; empty where that is unknown.
        Returns:
            Blocks at its beginning that unrelated prompts have as well.
        """
        shared = 0
        nexts = [*hashes[1:], tail]
        # From the end, as in PrefixIndex.
        for position in range(len(hashes) - 1, -1, -1):
            ways = self._ways.get(hashes[position], b"")
            way = nexts[position][:_WAY_BYTES]
            if way and len(ways) < SHARED_BY * _WAY_BYTES and way not in _split(ways):
                ways += way
            self._ways[hashes[position]] = ways
            self._ways.move_to_end(hashes[position])
            if len(ways) >= SHARED_BY * _WAY_BYTES:
                shared = max(shared, position + 1)
        while len(self._ways) > self._max_blocks:
            self._ways.popitem(last=False)
        return shared

    @property
    def num_blocks(self) -> int:
        """How many blocks are remembered."""
        return len(self._ways)


def _split(ways: bytes) -> list[bytes]:
    return [ways[start : start + _WAY_BYTES] for start in range(0, len(ways), _WAY_BYTES)]
