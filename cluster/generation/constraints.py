"""The automata of chats, made once for each set of tools."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from cluster.generation.prompts import Prompts
from cluster.generation.requests import ChatRequest
from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar
from workers.constraint.codec import Constraint

MAX_KEPT_BYTES = 16 * 2**20
"""Maximum bytes of encoded automata that are kept."""


class TurnConstraints:
    """The maker of the constraints of chats. Belongs to one event loop; the owner calls `close`.

    Args:
        prompts: has the tokenizer and the deployment's defaults.
        vocab_size: the model's.
    """

    def __init__(self, prompts: Prompts, vocab_size: int) -> None:
        self._prompts = prompts
        self._automata = TurnAutomata(prompts.encoding, vocab_size)
        self._kept: OrderedDict[TurnGrammar, Constraint] = OrderedDict()
        self._num_bytes = 0
        # One thread: making an automaton takes up to a second with many tools, and goes on after
        # its client has left.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cantata-constraints")
        self._making = asyncio.Lock()

    async def of(self, request: ChatRequest) -> Constraint | None:
        """Return the constraint of a chat whose tools were checked; None if it has none. Text that
        goes on after the end of a turn (`ignore_eos`) has none.

        Raises:
            InvalidRequest: the names of the tools are too long together.
        """
        mode = request.harmony_constraint or self._prompts.defaults.harmony_constraint
        if mode == "off" or request.sampling.ignore_eos:
            return None
        tools = tuple(ToolBody(name) for name in sorted(tool.name for tool in request.tools))
        grammar = TurnGrammar(tools, "allowed" if tools else "forbidden")
        if grammar not in self._kept:
            async with self._making:
                if grammar not in self._kept:
                    made = asyncio.get_running_loop().run_in_executor(self._thread, self._make, grammar)
                    self._keep(grammar, await made)
        self._kept.move_to_end(grammar)
        return self._kept[grammar]

    def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, grammar: TurnGrammar) -> Constraint:
        return Constraint.of(self._automata.of(grammar))

    def _keep(self, grammar: TurnGrammar, constraint: Constraint) -> None:
        self._kept[grammar] = constraint
        self._num_bytes += len(constraint.body)
        while self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, forgotten = self._kept.popitem(last=False)
            self._num_bytes -= len(forgotten.body)
