"""The number of fields in a serialized message, checked before it is parsed: an empty message takes
two bytes on the wire and hundreds in memory."""

from functools import cache

from google.protobuf.descriptor import Descriptor

from cluster.rpc import inference_pb2 as pb
from workers.errors import ContextLengthExceeded

UNCHECKED_BYTES = 64 * 1024
"""Largest size, in bytes, of a message that is not checked: it is parsed in a few milliseconds,
whatever its fields."""
_COUNTED = {pb.Message.DESCRIPTOR, pb.ToolCall.DESCRIPTOR}
"""Message types counted by `gateway.max_messages`."""
_VARINT, _FIXED64, _BYTES, _BEGIN_GROUP, _END_GROUP, _FIXED32 = range(6)
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


def check_size(data: bytes, *, max_messages: int, max_fields: int) -> None:
    """Check a serialized ChatRequest. A message that is not valid is left to the parser.

    Raises:
        ContextLengthExceeded: it has more messages, with the calls in them, or more fields at all
            depths.
    """
    if len(data) <= UNCHECKED_BYTES:
        return
    num_entries = num_fields = 0
    parts: list[tuple[int, int, Descriptor]] = [(0, len(data), pb.ChatRequest.DESCRIPTOR)]
    while parts:
        position, end, kind = parts.pop()
        kinds = _message_fields(kind)
        while position < end:
            num_fields += 1
            if num_fields > max_fields:
                raise ContextLengthExceeded(
                    f"The request has more than {max_fields} fields, with those of the messages in it; this "
                    f"server takes {max_fields} (gateway.max_json_values).",
                    "messages",
                )
            try:
                tag, position = _varint(data, position)
                number, wire_type = tag >> 3, tag & 7
                if wire_type in _FIXED_BYTES:
                    position += _FIXED_BYTES[wire_type]
                    continue
                if wire_type in (_BEGIN_GROUP, _END_GROUP):
                    # No message of ours has groups, but the parser skips them: what is in one
                    # counts as if it were beside it.
                    continue
                if wire_type not in (_VARINT, _BYTES):
                    return
                value, position = _varint(data, position)
            except IndexError:
                return
            if wire_type == _VARINT:
                continue
            child = kinds.get(number)
            if child in _COUNTED:
                num_entries += 1
                if num_entries > max_messages:
                    raise ContextLengthExceeded(
                        f"messages has more than {max_messages} entries, with the calls in them; this "
                        f"server takes {max_messages} (gateway.max_messages). "
                        "Please reduce the number of messages.",
                        "messages",
                    )
            if child is not None and value:
                parts.append((position, min(position + value, end), child))
            position += value


@cache
def _message_fields(kind: Descriptor) -> dict[int, Descriptor]:
    """Return the types of the fields that hold messages, by field number."""
    fields = {field.number: field.message_type for field in kind.fields}
    return {number: child for number, child in fields.items() if child is not None}


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at the position and the position after it.

    Raises:
        IndexError: the data end within it, or it is longer than 64 bits.
    """
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError
