"""The automata of chats, made once for each set of tools."""

import asyncio
from collections import OrderedDict

from cluster.generation.prompts import Prompts
from cluster.generation.requests import ChatRequest
from cluster.harmony.automaton import TurnAutomata, TurnGrammar
from workers.constraint.codec import Constraint

MAX_KEPT_BYTES = 16 * 2**20
"""Maximum bytes of encoded automata that are kept."""


class TurnConstraints:
    """The maker of the constraints of chats. Belongs to one event loop.

    Args:
        prompts: has the tokenizer and the deployment's defaults.
        vocab_size: the model's.
    """

    def __init__(self, prompts: Prompts, vocab_size: int) -> None:
        self._prompts = prompts
        self._automata = TurnAutomata(prompts.encoding, vocab_size)
        self._kept: OrderedDict[TurnGrammar, Constraint] = OrderedDict()
        self._num_bytes = 0
        self._making = asyncio.Lock()

    async def of(self, request: ChatRequest) -> Constraint | None:
        """Return the constraint of a chat whose tools were checked; None if it has none. Text that
        goes on after the end of a turn (`ignore_eos`) has none."""
        mode = request.harmony_constraint or self._prompts.defaults.harmony_constraint
        if mode == "off" or request.sampling.ignore_eos:
            return None
        tools = tuple(tool.name for tool in request.tools)
        grammar = TurnGrammar(tools, "allowed" if tools else "forbidden")
        if grammar not in self._kept:
            # One at a time: making one takes a thread up to half a second, with many tools.
            async with self._making:
                if grammar not in self._kept:
                    self._keep(grammar, await asyncio.to_thread(self._make, grammar))
        self._kept.move_to_end(grammar)
        return self._kept[grammar]

    def _make(self, grammar: TurnGrammar) -> Constraint:
        return Constraint.of(self._automata.of(grammar))

    def _keep(self, grammar: TurnGrammar, constraint: Constraint) -> None:
        self._kept[grammar] = constraint
        self._num_bytes += len(constraint.body)
        while self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, forgotten = self._kept.popitem(last=False)
            self._num_bytes -= len(forgotten.body)
