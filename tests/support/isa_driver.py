"""Runs stored calls of the CPU kernels and compares what they write with stored results.

Uses neither torch nor any other package, so that it starts quickly on an emulated processor:

    python isa_driver.py LIBRARY CASES --names amx,avx2,… [--quick] [--threads N,…]

Each case runs on every named instruction set that the processor has. Prints one line of JSON:

    {"picked": the instruction set chosen on loading, "ran": {name: number of cases},
     "faults": [sentences]}

`stored_calls.py` describes the cases, `isa_cases.py` makes them.
"""

import argparse
import ctypes
import gzip
import json
import math
import struct
from array import array
from pathlib import Path
from typing import Any

GUARD = b"\xa5" * 64
"""Bytes on both sides of each buffer; nothing may write there."""
RETURN_STATUS = ("attention", "rope_and_store")
RETURNS = {
    "attention": ctypes.c_int,
    "rope_and_store": ctypes.c_int,
    "pack_rows16": ctypes.c_int,
    "read_through": ctypes.c_uint64,
}
CALL = "QQQi4x"
"""src/ops.h `Call`"""


class Buffer:
    """Memory of one case, aligned to 64 bytes."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.before = (
            bytes.fromhex(description["data"])
            if "data" in description
            else b"\xff" * description["num_bytes"]
        )
        self.size = len(self.before)
        self._memory = ctypes.create_string_buffer(self.size + 192)
        start = ctypes.addressof(self._memory)
        self.address = start + 64 + -start % 64
        ctypes.memmove(self.address - 64, GUARD + self.before + GUARD, self.size + 128)

    def faults(self) -> str | None:
        """Return the faults of the contents after the calls; None if there are none."""
        found = ctypes.string_at(self.address - 64, self.size + 128)
        if found[:64] != GUARD or found[-64:] != GUARD:
            return "memory beside it was written"
        found, description = found[64:-64], self.description
        if "expected" in description:
            return difference(found, bytes.fromhex(description["expected"]), description)
        if "data" in description and found != self.before:
            return "was changed"
        return None


def numbers(data: bytes, kind: str) -> array:
    """Return the elements of a buffer."""
    if kind == "bfloat16":
        data, kind = array("I", [half << 16 for half in array("H", data)]).tobytes(), "float32"
    return array({"float32": "f", "int64": "q", "int32": "i", "int8": "b", "uint8": "B"}[kind], data)


def difference(found: bytes, expected: bytes, tolerance: dict[str, Any]) -> str | None:
    """Return the way in which elements differ by more than the tolerance; None if they do not.

    The tolerance is `atol + rtol * |expected|` for each element or, where `norm` is given, `norm`
    times the norm of what is expected for all of them together.
    """
    got, wanted = numbers(found, tolerance["type"]), numbers(expected, tolerance["type"])
    atol, rtol, norm = (tolerance.get(name, 0.0) for name in ("atol", "rtol", "norm"))
    if norm:
        distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True)))
        bound = norm * math.sqrt(sum(b**2 for b in wanted))
        return None if distance <= bound else f"is {distance} from the expected values, more than {bound}"
    wrong = [
        i
        for i, (a, b) in enumerate(zip(got, wanted, strict=True))
        if not (a == b or abs(a - b) <= atol + rtol * abs(b))
    ]
    if not wrong:
        return None
    return (
        f"has {len(wrong)} of {len(wanted)} elements wrong, the first at {wrong[0]}: "
        f"{got[wrong[0]]} instead of {wanted[wrong[0]]}"
    )


def arguments(call: dict[str, Any], buffers: list[Buffer]) -> ctypes.Array:
    """Return the structure of a call with the addresses of its buffers."""
    packed = ctypes.create_string_buffer(call["num_bytes"])
    for offset, kind, value in call["fields"]:
        struct.pack_into(
            f"={kind.replace('P', 'Q')}", packed, offset, buffers[value].address if kind == "P" else value
        )
    return packed


def run(library: ctypes.CDLL, case: dict[str, Any]) -> list[str]:
    """Run a case once and return its faults."""
    buffers = [Buffer(description) for description in case["buffers"]]
    structures = [arguments(call, buffers) for call in case["calls"]]
    functions = [library[f"cantata_{call['operation']}"] for call in case["calls"]]
    faults = []
    if case["program"] is not None:
        seconds = (ctypes.c_double * len(functions))()
        program = b"".join(
            struct.pack(
                CALL,
                ctypes.cast(function, ctypes.c_void_p).value,
                ctypes.addressof(structure),
                ctypes.addressof(seconds) + index * ctypes.sizeof(ctypes.c_double),
                call["operation"] in RETURN_STATUS,
            )
            for index, (function, structure, call) in enumerate(
                zip(functions, structures, case["calls"], strict=True)
            )
        )
        library.cantata_run_program.restype = ctypes.c_int64
        done = library.cantata_run_program(program, ctypes.c_int64(len(functions)))
        if done != case["program"]:
            faults.append(f"run_program returned {done} instead of {case['program']}")
    else:
        for function, structure, call in zip(functions, structures, case["calls"], strict=True):
            function.restype = RETURNS.get(call["operation"])
            returned = function(structure)
            if returned != call["returns"]:
                faults.append(f"{call['operation']} returned {returned} instead of {call['returns']}")
    faults += [
        f"buffer {index} {fault}" for index, buffer in enumerate(buffers) if (fault := buffer.faults())
    ]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared_object", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--names", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", default="1")
    options = parser.parse_args()
    cases = json.loads(gzip.decompress(options.cases.read_bytes()))
    library = ctypes.CDLL(str(options.shared_object))
    library.cantata_isa.restype = ctypes.c_char_p
    result: dict[str, Any] = {"picked": library.cantata_isa().decode(), "ran": {}, "faults": []}
    for name in options.names.split(","):
        if not library.cantata_use_isa(name.encode()):
            continue
        result["ran"][name] = 0
        for threads in map(int, options.threads.split(",")):
            library.cantata_set_threads(threads)
            for case in cases:
                if options.quick and not case["quick"]:
                    continue
                result["ran"][name] += 1
                result["faults"] += [
                    f"{name}, {threads} threads, {case['name']}: {fault}" for fault in run(library, case)
                ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
