"""Turns of random tokens that the automata of all combinations of options allow: none needs a
repair, whatever ends it."""

import random
from collections import Counter
from pathlib import Path

import openai_harmony as oh
import pytest

from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding, byte_alphabet
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.harmony.message import Message, MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.turn_grammar import TurnGrammar, turn_limits
from tests.cluster.harmony.random_turns import Grammars, RandomTurns, all_grammars
from tests.support.gateway import VOCAB_SIZE

MANY = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_bpe_tokenizer(folder, VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def encoding(folder: Path) -> HarmonyEncoding:
    return HarmonyEncoding.load(folder, VOCAB_SIZE)


class Oracle:
    """oss-harmony's parser, which takes each token byte by byte in its own vocabulary."""

    def __init__(self, encoding: HarmonyEncoding, harmony: oh.HarmonyEncoding) -> None:
        self._encoding = encoding
        self._harmony = harmony
        self._bytes = {byte: token_id for token_id, byte in enumerate(byte_alphabet().values())}
        assert harmony.decode([self._bytes[byte] for byte in b"Az \n"]) == "Az \n"
        self._control = {
            token_id: harmony.encode(f"<|{name}|>", allowed_special="all")[0]
            for token_id, name in encoding.control_tokens.items()
        }

    def messages(self, ids: list[int]) -> list[tuple[str | None, str | None]]:
        """Return channel and recipient of each complete message. oss-harmony takes a
        content type without a recipient for one; that counts as none.

        Raises:
            HarmonyError: oss-harmony does not take the turn.
        """
        parser = oh.StreamableParser(self._harmony, role=oh.Role.ASSISTANT)
        for token_id in ids:
            if token_id in self._control:
                parser.process(self._control[token_id])
            for byte in self._encoding.token_bytes(token_id):
                parser.process(self._bytes[byte])
        return [
            (m.channel, None if (m.recipient or "").startswith("<|constrain|>") else m.recipient)
            for m in parser.messages
        ]


def check_turn(
    encoding: HarmonyEncoding, oracle: Oracle, grammar: TurnGrammar, ids: list[int], seen: Counter[str]
) -> HarmonyParser:
    """Parse a turn and check what its grammar says of it; count what it is."""
    parser = HarmonyParser(
        encoding, [tool.name for tool in grammar.tools], several_calls=grammar.max_calls > 1
    )
    events = [event for token_id in ids for event in parser.push(token_id)]
    in_header = parser.message is None and ids[-1] not in (encoding.end, encoding.call)
    if not parser.turn_over and ids.count(encoding.call) < grammar.max_calls:
        seen["limit in a header" if in_header else "limit in a body"] += 1
    messages = [event.message for event in events + parser.finish() if isinstance(event, MessageEnd)]
    assert not parser.repairs, (parser.repairs, encoding.decode(ids, skip_special_tokens=False))
    whole = [message for message in messages if message.end is not None]
    seen["final"] += any(message.end == "return" for message in whole)
    seen["call"] += any(message.end == "call" for message in whole)
    seen["preamble"] += any(is_preamble(message) for message in whole)
    assert grammar.answer is None or not any(map(is_preamble, messages))
    assert grammar.reasoning == "free" or all(message.kind != "reasoning" for message in messages)
    assert sum(message.end == "call" for message in whole) <= grammar.max_calls
    theirs = oracle.messages(ids) if grammar.max_calls == 1 else None
    assert theirs in (None, [(message.channel, message.recipient) for message in whole])
    return parser


def is_preamble(message: Message) -> bool:
    return message.channel == "commentary" and message.recipient is None


@pytest.mark.parametrize("num_turns", [500, pytest.param(MANY, marks=pytest.mark.slow)])
def test_no_turn_needs_a_repair(
    encoding: HarmonyEncoding, folder: Path, oracle: oh.HarmonyEncoding, num_turns: int
) -> None:
    grammars = list(all_grammars())
    makers, theirs = TurnAutomata(encoding, VOCAB_SIZE), Oracle(encoding, oracle)
    matchers = Grammars(folder, VOCAB_SIZE)
    turns = [RandomTurns(g, makers.of(g), encoding, matchers, VOCAB_SIZE) for g in grammars]
    answers = [at for at, grammar in enumerate(grammars) if grammar.calls == "forbidden"]
    seen: Counter[str] = Counter()
    for seed in range(num_turns):
        rng = random.Random(seed)
        if seed % 2:
            at = rng.choices(range(len(turns)), [turn.num_missed + 1 for turn in turns])[0]
            drawn = turns[at].draw_unvisited(rng)
        else:
            at = rng.randrange(len(turns)) if seed % 4 else answers[seed // 4 % len(answers)]
            max_tokens = rng.choice((5, 6, 9, 30, 100))
            limits = turn_limits(
                grammars[at],
                encoding,
                max_tokens=max_tokens if rng.random() < 0.5 else None,
                max_reasoning_tokens=rng.randrange(40) if rng.random() < 0.5 else None,
            )
            drawn = turns[at].draw(rng, max_tokens, limits)
        grammar = grammars[at]
        parser = check_turn(encoding, theirs, grammar, drawn.ids, seen)
        allowed = drawn.limits.max_counted_tokens
        assert allowed is None or parser.num_reasoning_tokens <= allowed + len(
            encoding.encode(grammar.wrap_up)
        )
    edges = [(turn, edge) for turn in turns for edge in sorted(turn.edges())]
    missed = [(turn.automaton.states[edge[0]], edge) for turn, edge in edges if not turn.visits[edge]]
    print(
        f"{num_turns} turns of {len(grammars)} grammars: {dict(seen)}; {len(edges)} edges, "
        f"{len(missed)} missed"
    )
    assert seen["final"] >= num_turns / 5
    assert seen["call"] >= num_turns / 5
    assert min(seen["preamble"], seen["limit in a header"], seen["limit in a body"]) >= num_turns / 20
    if num_turns == MANY:
        assert not missed
    repaired = sum(repairs_without(encoding, seed) for seed in range(num_turns))
    print(f"without a constraint: {repaired} repairs")
    assert repaired > num_turns / 10


def repairs_without(encoding: HarmonyEncoding, seed: int) -> int:
    """Return the number of repairs in a turn of random tokens, a third of them control tokens."""
    rng = random.Random(seed)
    parser = HarmonyParser(encoding, ["get"])
    control = sorted(encoding.control_tokens)
    for _ in range(rng.choice((6, 12, 30, 100))):
        token_id = rng.choice(control) if rng.random() < 0.3 else rng.randrange(VOCAB_SIZE)
        parser.push(token_id)
        if parser.turn_over:
            break
    parser.finish()
    return parser.repairs.total()
