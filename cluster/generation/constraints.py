"""The constraints of chats and completions, made once for each set of tools and forms of the
text."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from cluster.generation.continuation import continued_message
from cluster.generation.prompts import Prompts
from cluster.generation.requests import ChatRequest, Structure
from cluster.generation.turn_rules import WantedBody, WantedTurn, bounded, promises, wanted_turn
from cluster.grammars.check import GrammarChecker
from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar, turn_limits
from cluster.metrics import GatewayMetrics
from workers.constraint.automaton import ConstraintLimits, TokenAutomaton, text_automaton
from workers.constraint.codec import Constraint
from workers.errors import InvalidRequest, Overloaded
from workers.grammars.grammar import json_object

T = TypeVar("T")

MAX_KEPT_BYTES = 16 * 2**20
"""Maximum bytes of the kept constraints, and of the grammars that they were made from."""


@dataclass(frozen=True, slots=True)
class TurnConstraint:
    """The constraint of a chat.

    Attributes:
        grammar: what its turns may consist of.
        max_reasoning_tokens: None: no limit.
        reserves_answer: a share of the turn's length stays for the answer.
    """

    constraint: Constraint
    grammar: TurnGrammar
    max_reasoning_tokens: int | None = None
    reserves_answer: bool = False

    def limits(self, max_tokens: int | None, encoding: HarmonyEncoding) -> ConstraintLimits:
        """Return the limits of a turn.

        Args:
            max_tokens: maximum length of the turn; None: no maximum.
        """
        return turn_limits(
            self.grammar,
            encoding,
            max_tokens=max_tokens if self.reserves_answer else None,
            max_reasoning_tokens=self.max_reasoning_tokens,
        )


class Constraints:
    """The maker of constraints. Belongs to one event loop; the owner calls `close`.

    Args:
        prompts: has the tokenizer and the deployment's defaults.
        vocab_size: the model's.
        checker: tells whether grammars compile; closed with this object.
    """

    def __init__(
        self, prompts: Prompts, vocab_size: int, checker: GrammarChecker, metrics: GatewayMetrics
    ) -> None:
        self._prompts = prompts
        self._vocab_size = vocab_size
        self._automata = TurnAutomata(prompts.encoding, vocab_size)
        self._checker = checker
        self._metrics = metrics
        self._turns: _Kept[TurnConstraint] = _Kept()
        self._texts: _Kept[Constraint] = _Kept()
        # One thread: making an automaton takes up to a second with many tools, and goes on after
        # its client has left.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cantata-constraints")
        self._making = asyncio.Lock()
        if prompts.defaults.harmony_constraint != "off":
            self._thread.submit(self._automata.prepare)

    async def of_chat(self, request: ChatRequest) -> TurnConstraint | None:
        """Return the constraint of a chat whose tools were checked; None if it has none.

        What the client did not ask for is left out where it cannot be made: such a constraint is
        `optional`. Text that goes on after the end of a turn (`ignore_eos`) has none, nor have by
        default turns of certain tokens (`allowed_token_ids`), which are often one token without a
        header.

        Raises:
            InvalidRequest: a grammar that the client asked for does not compile; the names of the
                tools are too long together.
        """
        mode = request.harmony_constraint or self._prompts.defaults.harmony_constraint
        promised = any(promises(request))
        sampling = request.sampling
        scores_begun = request.continues_last and sampling.prompt_logprobs is not None
        if scores_begun and (promised or request.harmony_constraint == "headers"):
            raise InvalidRequest(
                "prompt_logprobs with continue_final_message needs a chat without a constraint: set "
                "harmony_constraint to off.",
                "prompt_logprobs",
            )
        bare = scores_begun or (bool(sampling.allowed_token_ids) and request.harmony_constraint is None)
        if not promised and (mode == "off" or sampling.ignore_eos or bare):
            return None
        defaults, size = self._prompts.defaults, request.num_bytes if request.tools else 0
        wanted = await self._prompts.threads.run(size, lambda: wanted_turn(request, defaults))
        optional = not promised and request.harmony_constraint is None
        try:
            found = await self._turn(wanted)
        except InvalidRequest:
            if not optional:
                raise
            self._metrics.constraints_left_out.labels("tools").inc()
            return None
        continued = continued_message(request)
        if continued is not None and continued.kind == "text" and request.structure is not None:
            asked = request.structure
            await self._checker.check_beginning(
                asked.grammar, continued.content, asked.param, request.names.continues
            )
        return replace(
            found,
            constraint=replace(found.constraint, optional=optional),
            max_reasoning_tokens=request.max_reasoning_tokens,
            reserves_answer=defaults.reserves_answer,
        )

    async def of_text(self, structure: Structure) -> Constraint:
        """Return the constraint of a completion.

        Raises:
            InvalidRequest: its grammar does not compile.
        """
        grammar, encoding = structure.grammar, self._prompts.encoding
        ends = (encoding.return_, encoding.endoftext)

        def make() -> TokenAutomaton:
            # The model's vocabulary can be larger than the tokenizer's.
            no_text = (i for i in range(self._vocab_size) if not encoding.token_bytes(i))
            return text_automaton(grammar.text, ends, no_text)

        if (kept := self._texts.get(grammar)) is None:
            await self._checker.check(grammar, structure.param)
            async with self._making:
                if (kept := self._texts.get(grammar)) is None:
                    kept = await self._encoded(make)
                    self._texts.keep(grammar, kept, len(kept.body))
        return kept

    def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    async def _turn(self, wanted: WantedTurn) -> TurnConstraint:
        key = wanted.key()
        if (kept := self._turns.get(key)) is None:
            grammar, settled = await self._compiling(wanted)
            async with self._making:
                if (kept := self._turns.get(key)) is None:
                    kept = TurnConstraint(await self._encoded(lambda: self._automata.of(grammar)), grammar)
                    # The key has other grammars than the automaton where some did not compile.
                    if settled:
                        num_bytes = len(kept.constraint.body) + wanted.num_chars()
                        self._turns.keep(key, kept, num_bytes)
        return kept

    async def _compiling(self, wanted: WantedTurn) -> tuple[TurnGrammar, bool]:
        """Return the grammar of a turn with bodies that compile, and whether it would be the same
        again: a default that cannot be checked now is any JSON object for this time."""
        settled = True
        if wanted.structure is not None:
            await self._checker.check(wanted.structure.grammar, wanted.structure.param)
        bodies: list[ToolBody] = []
        for tool in wanted.bodies:
            body, checked = await self._compiling_body(tool)
            settled = settled and checked
            bodies.append(body)
        promised = {tool.body.name for tool in wanted.bodies if tool.promised}
        return bounded(wanted.grammar(bodies), promised), settled

    async def _compiling_body(self, tool: WantedBody) -> tuple[ToolBody, bool]:
        """Return a body that compiles, and whether it would be the same again."""
        if tool.body.arguments is None:
            return tool.body, True
        found, settled = json_object(), True
        for grammar in (tool.body.arguments, *tool.looser):
            try:
                await self._checker.check(grammar, tool.param)
            except (InvalidRequest, Overloaded) as error:
                if tool.promised:
                    raise
                if isinstance(error, Overloaded):
                    settled = False
                    break
            else:
                found = grammar
                break
        self._metrics.schema_fallbacks.inc(tool.fell_back or found != tool.body.arguments)
        return replace(tool.body, arguments=found), settled

    async def _encoded(self, make: Callable[[], TokenAutomaton]) -> Constraint:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: Constraint.of(make()))


class _Kept(Generic[T]):
    """Results by what they were made from; the least recently used is dropped first."""

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Hashable) -> T | None:
        found = self._results.get(key)
        if found is None:
            return None
        self._results.move_to_end(key)
        return found[0]

    def keep(self, key: Hashable, result: T, num_bytes: int) -> None:
        self._results[key] = (result, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > MAX_KEPT_BYTES and len(self._results) > 1:
            _, (_, dropped) = self._results.popitem(last=False)
            self._num_bytes -= dropped
