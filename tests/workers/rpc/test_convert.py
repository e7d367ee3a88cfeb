"""engine.proto ⇄ dataclasses: nothing is lost on the wire, and what no engine can run is refused
with the field's name."""

import math
import re
from dataclasses import replace

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.automata import automata
from workers import errors
from workers.constraint.automaton import (
    MAX_AUTOMATON_STATES,
    AutomatonState,
    ConstraintLimits,
    TokenAutomaton,
)
from workers.constraint.codec import Constraint
from workers.constraint.registry import KnownAutomata
from workers.errors import InvalidRequest
from workers.request import EngineLoad, EngineOutput, EngineRequest, SamplingParams, TokenLogprobs
from workers.rpc import convert
from workers.rpc import engine_pb2 as pb
from workers.rpc.validate import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    check_request,
    check_sampling,
)

VOCAB = 1000
REQUEST = EngineRequest("r1", (1, 2, 3), SamplingParams(seed=7))

token_id = st.integers(0, VOCAB - 1)
id_list = st.lists(token_id, max_size=6).map(tuple)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


samplings = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(100, 2**31 - 1),
    temperature=st.floats(0, 10, width=32),
    top_p=st.floats(0.0, 1.0, width=32, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    repetition_penalty=st.floats(0, 10, width=32, exclude_min=True),
    logit_bias=st.dictionaries(token_id, st.floats(-100, 100, width=32), max_size=4).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
    seed=st.none() | st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    stop_token_ids=id_list,
    min_tokens=st.integers(0, 100),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    allowed_token_ids=id_list,
    bad_words_token_ids=st.lists(st.lists(token_id, min_size=1, max_size=4).map(tuple), max_size=3).map(
        tuple
    ),
)
requests = st.builds(
    EngineRequest,
    request_id=st.text(min_size=1, max_size=20),
    prompt_token_ids=st.lists(token_id, min_size=1, max_size=50).map(tuple),
    sampling=samplings,
    output_token_ids=id_list,
    constraint=st.none() | automata(token_id).map(Constraint.of),
    cache_salt=st.none() | st.text(min_size=1, max_size=20),
    priority=st.just(0) | st.integers(-(2**63), 2**63 - 1),
    constraint_limits=st.builds(
        ConstraintLimits, st.none() | st.integers(0, 2**31 - 1), st.none() | st.integers(0, 2**31 - 1)
    ),
    ignored_stop_token_ids=id_list,
)
outputs = st.builds(
    EngineOutput,
    token_ids=id_list,
    logprobs=st.lists(
        st.builds(TokenLogprobs, float32, st.lists(st.tuples(token_id, float32), max_size=3).map(tuple)),
        max_size=3,
    ).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_token_id=st.none() | token_id,
    num_cached_tokens=st.integers(0, 2**31),
    error=st.none() | st.text(min_size=1),
    prompt_logprobs=st.lists(st.builds(TokenLogprobs, float32), max_size=3).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(requests, st.none() | st.floats(0.001, 1e6), st.booleans())
def test_a_request_survives_the_wire(
    request_: EngineRequest, deadline_s: float | None, by_reference: bool
) -> None:
    data = convert.request_to_wire(request_, by_reference=by_reference).SerializeToString()
    back = convert.request_from_wire(
        pb.GenerateRequest.FromString(data), vocab_size=VOCAB, deadline_s=deadline_s
    )
    assert back == replace(request_, deadline_s=deadline_s)


@settings(max_examples=150, deadline=None)
@given(outputs)
def test_an_output_survives_the_wire(output: EngineOutput) -> None:
    data = convert.output_to_wire(output).SerializeToString()
    assert convert.output_from_wire(pb.GenerateResponse.FromString(data)) == output


def test_absent_fields_take_the_documented_defaults() -> None:
    message = pb.GenerateRequest(request_id="r", prompt_token_ids=[1])
    sampling = convert.request_from_wire(message, vocab_size=VOCAB).sampling
    assert sampling == SamplingParams(max_tokens=None)
    zero = pb.GenerateRequest(
        request_id="r", prompt_token_ids=[1], sampling=pb.SamplingParams(temperature=0.0, logprobs=0, seed=0)
    )
    sampling = convert.request_from_wire(zero, vocab_size=VOCAB).sampling
    assert (sampling.temperature, sampling.logprobs, sampling.seed) == (0.0, 0, 0)


def test_the_longest_prompt_fits_a_message() -> None:
    message = convert.request_to_wire(replace(REQUEST, prompt_token_ids=(201_087,) * 131_072))
    assert len(message.SerializeToString()) < convert.MAX_MESSAGE_BYTES / 16


def test_info_and_load_survive_the_wire() -> None:
    info = convert.EngineInfo(
        "0.1.0", "tiny", "abc", 4096, 512, 16, "cpu", "float32", 10_000, 1, "a1b2", ("a", "b")
    )
    assert convert.info_from_wire(convert.info_to_wire(info)) == info
    load = EngineLoad(3, 4, 0.25, False)
    assert convert.load_from_wire(convert.load_to_wire(load)) == load


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": -2.01}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
        ({"logit_bias": ((1, 100.5),)}, "logit_bias"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": MAX_LOGPROBS + 1}, "prompt_logprobs"),
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple(range(MAX_STOP_TOKEN_IDS + 1))}, "stop_token_ids"),
        ({"allowed_token_ids": (1, VOCAB)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,) * (VOCAB + 1)}, "allowed_token_ids"),
        ({"bad_words_token_ids": ((1,), (VOCAB,))}, "bad_words[1]"),
        ({"bad_words_token_ids": ((1,), ())}, "bad_words[1]"),
        ({"bad_words_token_ids": ((1,) * (MAX_BAD_WORD_TOKENS + 1),)}, "bad_words[0]"),
        ({"bad_words_token_ids": ((1,),) * (MAX_BAD_WORDS + 1)}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sampling_outside_its_range_names_the_field(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(param)) as caught:
        check_sampling(replace(SamplingParams(), **change), VOCAB)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"request_id": ""}, "request_id"),
        ({"prompt_token_ids": ()}, "prompt"),
        ({"prompt_token_ids": (1, VOCAB)}, "prompt"),
        ({"prompt_token_ids": (1, -1)}, "prompt"),
        ({"output_token_ids": (VOCAB,)}, "output_token_ids"),
        ({"sampling": SamplingParams(n=2)}, "n"),
        ({"sampling": SamplingParams(n=0)}, "n"),
        ({"sampling": SamplingParams(max_tokens=-1)}, "max_tokens"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "s" * 257}, "cache_salt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_no_engine_can_run_names_the_field(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(replace(REQUEST, **change), VOCAB)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("automaton", "param"),
    [
        (TokenAutomaton((AutomatonState((VOCAB,)),)), "constraint.states[0].allowed"),
        (TokenAutomaton((AutomatonState(None, (VOCAB,)),)), "constraint.states[0].forbidden"),
        (TokenAutomaton((AutomatonState(None, (), ((VOCAB, 0),)),)), "constraint.states[0].transitions"),
        (
            TokenAutomaton((AutomatonState((1,)), AutomatonState(None, tuple(range(VOCAB))))),
            "constraint.states[1].forbidden",
        ),
        (TokenAutomaton((AutomatonState(),) * (MAX_AUTOMATON_STATES + 1)), "constraint"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("by_reference", [False, True])
def test_an_automaton_no_engine_can_run_names_the_field_and_is_not_remembered(
    automaton: TokenAutomaton, param: str, by_reference: bool
) -> None:
    constraint, automata = Constraint.of(automaton), KnownAutomata()
    message = convert.request_to_wire(replace(REQUEST, constraint=constraint), by_reference=by_reference)
    with pytest.raises(InvalidRequest) as caught:
        convert.request_from_wire(message, vocab_size=VOCAB, automata=automata)
    assert caught.value.param == param
    assert automata.get(constraint.id) is None


def test_an_automaton_is_named_once_it_was_sent() -> None:
    constraint, automata = Constraint.of(TokenAutomaton((AutomatonState((1,)),))), KnownAutomata()
    named = convert.request_to_wire(
        replace(REQUEST, constraint=constraint), by_reference=True, with_body=False
    )
    with pytest.raises(errors.UnknownAutomaton):
        convert.request_from_wire(named, vocab_size=VOCAB, automata=automata)
    sent = convert.request_to_wire(replace(REQUEST, constraint=constraint), by_reference=True)
    assert convert.request_from_wire(sent, vocab_size=VOCAB, automata=automata).constraint == constraint
    assert convert.request_from_wire(named, vocab_size=VOCAB, automata=automata).constraint == constraint


def test_an_automaton_under_the_id_of_another_is_refused() -> None:
    """It would be used for everybody who names that id."""
    first, second = (Constraint.of(TokenAutomaton((AutomatonState((token,)),))) for token in (1, 2))
    message = convert.request_to_wire(replace(REQUEST, constraint=first), by_reference=True)
    message.constraint_ref.automaton = second.body
    automata = KnownAutomata()
    with pytest.raises(InvalidRequest) as caught:
        convert.request_from_wire(message, vocab_size=VOCAB, automata=automata)
    assert caught.value.param == "constraint_ref.id"
    assert automata.get(first.id) is None


def test_an_adapter_that_the_engine_does_not_have_is_not_found() -> None:
    message = convert.request_to_wire(replace(REQUEST, adapter="polite"))
    with pytest.raises(errors.ModelNotFound, match="'polite'"):
        convert.request_from_wire(message, vocab_size=VOCAB)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    edges = SamplingParams(
        max_tokens=1, temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, -100.0), (VOCAB - 1, 100.0)), seed=2**64 - 1, logprobs=MAX_LOGPROBS, min_tokens=1,
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)), prompt_logprobs=MAX_LOGPROBS,
        allowed_token_ids=(VOCAB - 1,) * VOCAB,
        bad_words_token_ids=((1,) * MAX_BAD_WORD_TOKENS,) * MAX_BAD_WORDS,
    )  # fmt: skip
    check_request(replace(REQUEST, sampling=edges, cache_salt="s" * 256), VOCAB)


def test_a_request_needs_the_capabilities_of_what_it_has() -> None:
    def needed(*, sampling: dict[str, object] | None = None, **request: object) -> set[str]:
        params = replace(SamplingParams(), **(sampling or {}))
        return set(convert.capabilities_of(EngineRequest("r", (1,), params, **request)))

    assert needed() == set()
    assert needed(adapter="a") == {"adapter"}
    assert needed(cache_salt="s") == {"cache_salt"}
    assert needed(sampling={"prompt_logprobs": 0}) == {"prompt_logprobs"}
    assert needed(sampling={"allowed_token_ids": (0,)}) == {"allowed_token_ids"}
    assert needed(sampling={"bad_words_token_ids": ((0,),)}) == {"bad_words"}
    automaton = Constraint.of(TokenAutomaton((AutomatonState((1,)),)))
    assert needed(constraint=automaton) == set(), "an old engine is sent all of it"


def test_unknown_states_on_the_wire_are_refused() -> None:
    message = convert.request_to_wire(REQUEST)
    message.constraint.states.add().transitions.add(token_id=1, state=3)
    with pytest.raises(InvalidRequest, match="not one of the 1 states") as caught:
        convert.request_from_wire(message, vocab_size=VOCAB)
    assert caught.value.param == "constraint"


def test_an_empty_constraint_on_the_wire_is_refused() -> None:
    message = convert.request_to_wire(REQUEST)
    message.constraint.SetInParent()
    with pytest.raises(InvalidRequest, match="at least one state"):
        convert.request_from_wire(message, vocab_size=VOCAB)


def test_a_finish_reason_of_a_newer_engine_is_an_error() -> None:
    output = convert.output_from_wire(pb.GenerateResponse(finish_reason=17))
    assert output.finish_reason == "error"
    assert "17" in (output.error or "")


def all_errors() -> list[type[errors.CantataError]]:
    # By name, not by __subclasses__: the gateway adds classes of its own, which no engine sends.
    return [
        entry
        for entry in vars(errors).values()
        if isinstance(entry, type) and issubclass(entry, errors.CantataError)
    ]


@pytest.mark.parametrize("error_class", all_errors(), ids=lambda error_class: error_class.__name__)
def test_every_error_crosses_by_class(error_class: type[errors.CantataError]) -> None:
    assert hasattr(grpc.StatusCode, error_class.status)
    back = convert.error_from_status(
        error_class.status, "why", dict(convert.error_to_metadata(error_class("why")))
    )
    assert type(back) is error_class
    assert back.message == "why"


def test_a_param_is_sent_as_far_as_grpc_can_carry_it() -> None:
    metadata = dict(convert.error_to_metadata(InvalidRequest("no", "tools[0].größe\n" + "x" * 600)))
    assert metadata[convert.PARAM_KEY] == ("tools[0].gr??e?" + "x" * 600)[:500]


def test_param_and_retry_after_cross_with_the_error() -> None:
    invalid = convert.error_from_status(
        "INVALID_ARGUMENT", "why", dict(convert.error_to_metadata(InvalidRequest("why", "top_p")))
    )
    assert isinstance(invalid, InvalidRequest)
    assert invalid.param == "top_p"
    overloaded = convert.error_from_status(
        "RESOURCE_EXHAUSTED", "why", dict(convert.error_to_metadata(errors.Overloaded("why", 2.5)))
    )
    assert isinstance(overloaded, errors.Overloaded)
    assert overloaded.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("UNAVAILABLE", errors.EngineDead),
        ("INVALID_ARGUMENT", InvalidRequest),
        ("INTERNAL", errors.CantataError),
        ("ABORTED", errors.CantataError),
    ],
)
def test_without_metadata_the_status_decides(status: str, expected: type[errors.CantataError]) -> None:
    assert type(convert.error_from_status(status, "why", {})) is expected
