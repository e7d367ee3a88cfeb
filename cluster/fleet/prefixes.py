"""An estimate of the replicas' prefix caches, made from what was sent to them. Engines do not
report their caches and need not."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MAX_BLOCKS_PER_REPLICA = 65_536
"""Maximum number of blocks remembered per replica: a million tokens, 9 MB. A replica of several
GPUs may hold more; a forgotten block only costs a cache hit."""
MAX_BRANCHES = 32_768
"""Maximum number of blocks whose continuations are remembered (5 MB)."""
SHARED_BY = 4
"""Number of different continuations after which a block counts as the beginning of unrelated
prompts. One conversation has up to three from a block: the end of a prompt, reasoning followed by a
tool call, and the answer without it."""
_WAY_BYTES = 4


class PrefixIndex:
    """Block hashes (`workers.kv_cache.prefix_cache.block_hashes`) by replica key; the least
    recently sent are forgotten first.

    Args:
        max_blocks: maximum per replica.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS_PER_REPLICA) -> None:
        self._max_blocks = max_blocks
        self._sent: dict[str, OrderedDict[bytes, None]] = {}

    def match(self, replica_id: str, hashes: Sequence[bytes]) -> int:
        """Return the number of leading blocks that were sent to the replica."""
        sent = self._sent.get(replica_id)
        if not sent:
            return 0
        for count, block in enumerate(hashes):
            if block not in sent:
                return count
        return len(hashes)

    def add(self, replica_id: str, hashes: Sequence[bytes]) -> None:
        """Record that a prompt was sent to the replica."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        # From the end: a prefix must outlive its continuations, which cannot be found without it.
        for block in reversed(hashes):
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._max_blocks:
            sent.popitem(last=False)

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """Number of blocks remembered, by replica."""
        return {replica_id: len(sent) for replica_id, sent in self._sent.items()}

    def forget(self, replica_id: str) -> None:
        """Forget a replica that died or left, since its cache is lost."""
        self._sent.pop(replica_id, None)


class SharedBeginnings:
    """The beginnings that unrelated prompts share, learnt from how often prompts diverge after a
    block.

    Args:
        max_blocks: maximum number of blocks remembered; the least recently seen is forgotten first.
    """

    def __init__(self, max_blocks: int = MAX_BRANCHES) -> None:
        self._max_blocks = max_blocks
        # Prefixes of the hashes of the following blocks, concatenated: at most SHARED_BY different
        # ones.
        self._ways: OrderedDict[bytes, bytes] = OrderedDict()

    def add(self, hashes: Sequence[bytes], tail: bytes) -> int:
        """Record a prompt.

        Args:
            hashes: hashes of its full blocks.
            tail: hash of the tokens after these blocks; empty if unknown.
        Returns:
            Number of leading blocks that unrelated prompts share.
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
        """Number of blocks remembered."""
        return len(self._ways)


def _split(ways: bytes) -> list[bytes]:
    return [ways[start : start + _WAY_BYTES] for start in range(0, len(ways), _WAY_BYTES)]
