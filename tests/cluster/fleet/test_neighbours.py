"""Gateways and engines of neighbouring versions: the previous contract, from its descriptor, on one
side and today's code on the other.

After a release the file is written again: `python -m tests.cluster.fleet.test_neighbours`.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.fleet.client import EngineClient
from cluster.fleet.table import Replica
from tests.workers.engine.test_engine_server import Served, checkpoint
from workers import errors
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint, decode
from workers.request import EngineOutput, EngineRequest, SamplingParams
from workers.rpc import convert
from workers.rpc import engine_pb2 as pb

__all__ = ["checkpoint"]  # a fixture

PREVIOUS = Path(__file__).parent.parent.parent / "golden" / "engine_before.binpb"
"""The serialized FileDescriptorProto of the previous version's engine.proto."""
AUTOMATON = TokenAutomaton((AutomatonState((5, 9), (), ((5, 1),)), AutomatonState(None, (7,))))
EVERYTHING = SamplingParams(
    max_tokens=9, temperature=0.5, top_p=0.5, top_k=4, min_p=0.25, presence_penalty=0.5,
    frequency_penalty=0.5, repetition_penalty=1.5, logit_bias=((3, 1.0),), seed=2**64 - 1, logprobs=2,
    stop_token_ids=(9,), min_tokens=1, ignore_eos=True,
)  # fmt: skip
REQUEST = EngineRequest("r1", (5, 6), EVERYTHING, (7,), constraint=Constraint.of(AUTOMATON))


def previous() -> tuple[descriptor_pb2.FileDescriptorProto, DescriptorPool]:
    file = descriptor_pb2.FileDescriptorProto.FromString(PREVIOUS.read_bytes())
    pool = DescriptorPool()
    pool.Add(file)
    return file, pool


def previous_class(name: str) -> type[Message]:
    """Return a message class of the previous version; today's stubs stay out of its pool."""
    _, pool = previous()
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"cantata.engine.v1.{name}"))


def unknown_fields(message: Message) -> list[str]:
    """Return the fields of this message, or of one inside, that its version does not know."""
    found = [f"{message.DESCRIPTOR.name}.{field.field_number}" for field in UnknownFieldSet(message)]
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else (value,):
                found += unknown_fields(part)
    return found


def test_the_contract_only_grows() -> None:
    def fields(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}

        def walk(prefix: str, message: descriptor_pb2.DescriptorProto) -> None:
            for field in message.field:
                kind = (field.type, field.type_name, field.label, field.proto3_optional)
                found[f"{prefix}.{field.name}"] = (field.number, *kind)
            for nested in message.nested_type:
                walk(f"{prefix}.{nested.name}", nested)

        for message in file.message_type:
            walk(message.name, message)
        for enum in file.enum_type:
            found |= {f"{enum.name}.{value.name}": (value.number,) for value in enum.value}
        for service in file.service:
            found |= {
                method.name: (method.input_type, method.output_type, method.server_streaming)
                for method in service.method
            }
        return found

    now = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(now)
    before, after = fields(previous()[0]), fields(now)
    assert len(before) > 50
    assert {name: after.get(name) for name in before} == before
    added = after.keys() - before.keys()
    assert added, "the stored contract is today's: neighbours are not tested"
    fields_with_presence = (descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,)
    for name in added:
        if name.rpartition(".")[0] in {before_name.rpartition(".")[0] for before_name in before}:
            _, kind, _, label, is_optional = after[name]
            is_list = label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            assert is_optional or is_list or kind in fields_with_presence, f"{name} has no presence"


class PreviousEngine:
    """An engine that serves Generate and GetInfo with the previous version's messages."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.address = ""
        self._server = grpc.aio.server()

    async def start(self) -> "PreviousEngine":
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=previous_class("GenerateRequest").FromString,
                response_serializer=previous_class("GenerateResponse").SerializeToString,
            ),
            "GetInfo": grpc.unary_unary_rpc_method_handler(
                self._info,
                request_deserializer=previous_class("GetInfoRequest").FromString,
                response_serializer=previous_class("EngineInfo").SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("cantata.engine.v1.Engine", handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _generate(self, request: Message, context: object) -> AsyncIterator[Message]:
        self.requests.append(request)
        response = previous_class("GenerateResponse")
        yield response(token_ids=[5], logprobs=[{"logprob": -0.5, "top": [{"token_id": 5, "logprob": -0.5}]}])
        yield response(token_ids=[9], finish_reason=1, stop_token_id=9, num_cached_tokens=3)

    async def _info(self, request: Message, context: object) -> Message:
        return previous_class("EngineInfo")(version="0", max_model_len=100, vocab_size=2048, start_id="a")


async def read(client: EngineClient, address: str, request: EngineRequest) -> list[EngineOutput]:
    async with aclosing(client.generate(Replica("r", address), request)) as outputs:
        return [output async for output in outputs]


async def test_todays_gateway_sends_an_engine_of_the_previous_version_what_that_knows() -> None:
    engine, client = await PreviousEngine().start(), EngineClient()
    try:
        first, last = await read(client, engine.address, REQUEST)
        assert (first.token_ids, last.token_ids, last.finish_reason, last.stop_token_id) == (
            (5,), (9,), "stop", 9,
        )  # fmt: skip
        assert first.logprobs[0].top == ((5, -0.5),)
        (request,) = engine.requests
        assert unknown_fields(request) == []
        assert decode(request.constraint.SerializeToString()) == AUTOMATON  # type: ignore[attr-defined]
        today = pb.GenerateRequest.FromString(request.SerializeToString())
        assert convert.request_from_wire(today, vocab_size=2048) == REQUEST
        for wanted in (
            replace(REQUEST, cache_salt="tenant"),
            replace(REQUEST, adapter="polite"),
            replace(REQUEST, sampling=replace(EVERYTHING, prompt_logprobs=1)),
            replace(REQUEST, sampling=replace(EVERYTHING, allowed_token_ids=(5, 6))),
            replace(REQUEST, sampling=replace(EVERYTHING, bad_words_token_ids=((5, 6),))),
        ):
            with pytest.raises(errors.NoReplica):
                await read(client, engine.address, wanted)
        assert len(engine.requests) == 1
        await read(client, engine.address, replace(REQUEST, priority=-3))  # served, in its turn
        assert unknown_fields(engine.requests[1]) == []
        info = await client.info(Replica("r", engine.address), 5)
        assert (info.max_model_len, info.capabilities) == (100, ())
    finally:
        await client.close()
        await engine.stop()


async def test_todays_engine_serves_a_gateway_of_the_previous_version(checkpoint: Path) -> None:
    """Its executor counts on from the last token."""
    request_class, response_class = previous_class("GenerateRequest"), previous_class("GenerateResponse")
    request = request_class.FromString(convert.request_to_wire(REQUEST).SerializeToString())
    assert unknown_fields(request) == []
    async with Served(checkpoint) as served:
        responses = [
            response
            async for response in served.channel.unary_stream(
                "/cantata.engine.v1.Engine/Generate",
                request_serializer=request_class.SerializeToString,
                response_deserializer=response_class.FromString,
            )(request)
        ]
        info = await served.channel.unary_unary(
            "/cantata.engine.v1.Engine/GetInfo",
            request_serializer=previous_class("GetInfoRequest").SerializeToString,
            response_deserializer=previous_class("EngineInfo").FromString,
        )(previous_class("GetInfoRequest")())
        (start,) = [start for plan in served.executor.plans for start in plan.starts]
        ((automaton_id, body),) = [entry for plan in served.executor.plans for entry in plan.automata]
    assert [token for response in responses for token in response.token_ids] == list(range(8, 16))
    assert responses[-1].finish_reason == 2
    assert sum(len(response.logprobs) for response in responses) == 8
    assert [field for response in responses for field in unknown_fields(response)] == []
    assert (info.max_model_len, info.block_size) == (140_000, 16)
    assert (start.sampling, start.token_ids) == (EVERYTHING, (5, 6, 7))
    assert start.constraint == automaton_id
    assert decode(body) == AUTOMATON


def main() -> None:
    """Store today's contract as the previous one."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    PREVIOUS.write_bytes(file.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
