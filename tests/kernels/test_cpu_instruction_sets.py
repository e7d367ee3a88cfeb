"""Every kernel against stored results (tests/support/isa_cases.py), on this processor and on
emulated ones."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.cpu import native
from tests.support import isa_cases, isa_driver, stored_calls
from tests.support.run_report import EMULATED_ISA, NATIVE_ISA

DRIVER = Path(isa_driver.__file__)
DISPATCH = Path(native.__file__).parent / "src" / "dispatch.cpp"
PROCESSORS = {
    "qemu64": ["portable"],
    "Nehalem": ["portable"],
    "SandyBridge": ["portable"],  # AVX without AVX2
    "Haswell": ["avx2", "portable"],
    "EPYC-Milan": ["avx2", "portable"],
    "max": ["avx2", "portable"],
}
"""Processors of qemu 7.2 with the instruction sets that it emulates of theirs, the best first. It
has no AVX-512 and no AMX."""
IN_SHORT = ("Nehalem", "Haswell")

Recorder = Callable[[str, object], None]


def drive(*options: str, cases: Path = stored_calls.GOLDEN, emulator: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the driver's output on all instruction sets."""
    library = native.built_file()
    assert library is not None, "the C++ library was not built"
    command = [*emulator, sys.executable, "-I", "-S", str(DRIVER), str(library), str(cases)]
    command += ["--names", ",".join(native.ISAS), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, f"it ended with {ended.returncode}: {ended.stderr}"
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def emulated(processor: str, *options: str, record: Recorder) -> None:
    if "avx2" not in native.ISAS:
        pytest.skip(
            "this processor has no instruction sets of x86, for which the library would have to be built"
        )
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is not installed (Debian: qemu-user)")
    said = drive(*options, emulator=(qemu, "-cpu", processor))
    assert said["faults"] == []
    assert list(said["ran"]) == PROCESSORS[processor]
    assert said["picked"] == PROCESSORS[processor][0]
    assert all(count > 40 for count in said["ran"].values())
    for name in said["ran"]:
        record(EMULATED_ISA, name)


@pytest.mark.isa
@pytest.mark.parametrize("processor", IN_SHORT)
def test_emulated_processors(processor: str, record_property: Recorder) -> None:
    emulated(processor, "--quick", record=record_property)


@pytest.mark.isa
@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_emulated_processors_with_larger_shapes_and_threads(
    processor: str, record_property: Recorder
) -> None:
    emulated(processor, "--threads", "1,2,3", record=record_property)


def test_this_processor(record_property: Recorder) -> None:
    said = drive("--threads", "1,2")
    assert said["faults"] == []
    assert list(said["ran"]) == native.available()
    assert said["picked"] == native.available()[0]
    for name in said["ran"]:
        record_property(NATIVE_ISA, name)


def test_what_is_stored_is_what_the_references_give() -> None:
    """If this fails, `python -m tests.support.isa_cases` stores the results again."""
    stored, made = stored_calls.load(), json.loads(json.dumps(isa_cases.cases()))
    assert [case["name"] for case in stored] == [case["name"] for case in made]
    for old, new in zip(stored, made, strict=True):
        for before, after in zip(old.pop("buffers"), new.pop("buffers"), strict=True):
            for part, tolerance in (("data", {"rtol": 1e-6}), ("expected", {})):
                pair = [bytes.fromhex(buffer.pop(part, "")) for buffer in (before, after)]
                if pair != [b"", b""]:
                    assert isa_driver.difference(*pair, {**before, **tolerance}) is None, old["name"]
            assert before == after, old["name"]
        assert old == new


def test_every_operation_of_the_library_has_a_case() -> None:
    exported = set(re.findall(r"^EXPORT .*?cantata_(\w+)\(", DISPATCH.read_text(), re.MULTILINE))
    called = {call["operation"] for case in stored_calls.load() if case["quick"] for call in case["calls"]}
    assert called == exported - {"version", "isa", "use_isa", "run_program"}
    assert sum(case["program"] is not None for case in stored_calls.load() if case["quick"]) == 2


def test_the_driver_notices_whatever_is_wrong(tmp_path: Path) -> None:
    tampered = stored_calls.load()
    for case in tampered:
        if case["program"] is not None:
            case["program"] += 1
        changed = False
        for buffer in case["buffers"]:
            if "expected" in buffer:
                # Minus one, or NaN.
                buffer["expected"], changed = "ff" * (len(buffer["expected"]) // 2), True
        for call in case["calls"]:
            call["returns"] = (call["returns"] or 0) + (not changed)
    stored_calls.save(tampered, tmp_path / "cases.json.gz")
    said = drive("--names", "portable", cases=tmp_path / "cases.json.gz")
    named = {
        case["name"]
        for case in tampered
        if any(f" threads, {case['name']}: " in fault for fault in said["faults"])
    }
    assert named == {case["name"] for case in tampered}


def test_the_driver_notices_what_is_written_outside_and_into_inputs() -> None:
    def faults(written: int, **description: Any) -> str | None:
        buffer = isa_driver.Buffer({"type": "int8", **description})
        ctypes.c_uint8.from_address(buffer.address + written).value = 1
        return buffer.faults()

    assert [faults(at, num_bytes=3) for at in (-1, 0, 2, 3)] == [
        "memory beside it was written",
        None,
        None,
        "memory beside it was written",
    ]
    assert faults(1, data="000000") == "was changed"
    assert faults(1, data="000000", expected="000100") is None
    assert (
        faults(1, data="000000", expected="000000")
        == "has 1 of 3 elements wrong, the first at 1: 1 instead of 0"
    )
