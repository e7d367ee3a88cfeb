"""A token automaton as bytes: the one form in which gateways send it to engines, and engines to
ranks. The bytes are a serialized `TokenAutomaton` of engine.proto, identified by a hash of its
content."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.constraint.automaton import AutomatonState, TokenAutomaton

if TYPE_CHECKING:
    from workers.rpc import engine_pb2 as pb

ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Constraint:
    """An encoded automaton, as requests and plans carry it.

    Attributes:
        id: `automaton_id(body)`.
        body: `encode` of the automaton.
        extended: whether the automaton has grammars, counted states or overflows, which engines of
            the first version do not know; set where automata are made.
        optional: an engine that does not know what it needs may run the sequence without it; never
            sent.
    """

    id: bytes
    body: bytes
    extended: bool = field(default=False, compare=False)
    optional: bool = field(default=False, compare=False)

    @staticmethod
    def of(automaton: TokenAutomaton) -> "Constraint":
        """Return the encoded form of an automaton."""
        body = encode(automaton)
        extended = bool(automaton.grammars) or any(
            state.counted or state.overflow is not None for state in automaton.states
        )
        return Constraint(automaton_id(body), body, extended)


def automaton_id(body: bytes) -> bytes:
    """Return the id of an encoded automaton: BLAKE2b-128 of its bytes."""
    return hashlib.blake2b(body, digest_size=ID_BYTES).digest()


def encode(automaton: TokenAutomaton) -> bytes:
    """Return the automaton as bytes; equal automata give equal bytes within a version."""
    from workers.rpc import engine_pb2 as pb  # lazy: most processes have no constraint

    message = pb.TokenAutomaton(
        states=[
            pb.TokenAutomaton.State(
                restrict=state.allowed is not None,
                allowed=state.allowed or (),
                forbidden=state.forbidden,
                transitions=[
                    pb.TokenAutomaton.State.Transition(token_id=token_id, state=target)
                    for token_id, target in state.transitions
                ],
                grammar=state.grammar,
                counted=state.counted or None,
                overflow=state.overflow,
            )
            for state in automaton.states
        ],
        start=automaton.start,
        grammars=automaton.grammars,
    )
    return message.SerializeToString(deterministic=True)


def decode(body: bytes) -> TokenAutomaton:
    """Return the automaton that `encode` encoded.

    Raises:
        ValueError: in one sentence: the bytes are no automaton, or an invalid one.
    """
    message = parse(body)
    return TokenAutomaton(
        tuple(
            AutomatonState(
                allowed=tuple(state.allowed) if state.restrict else None,
                forbidden=tuple(state.forbidden),
                transitions=tuple((entry.token_id, entry.state) for entry in state.transitions),
                grammar=state.grammar if state.HasField("grammar") else None,
                counted=state.counted,
                overflow=state.overflow if state.HasField("overflow") else None,
            )
            for state in message.states
        ),
        message.start,
        tuple(message.grammars),
    )


def parse(body: bytes) -> "pb.TokenAutomaton":
    """Return the message, which takes about as much memory as the bytes do.

    Raises:
        ValueError: the bytes are no automaton.
    """
    from google.protobuf.message import DecodeError

    from workers.rpc import engine_pb2 as pb

    try:
        return pb.TokenAutomaton.FromString(body)
    except DecodeError as error:
        raise ValueError("the bytes are not a TokenAutomaton") from error
