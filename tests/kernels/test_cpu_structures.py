"""The structures that Python fills are those that the C++ reads: each field at the same offset, of
the same size."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels.cpu
from kernels.cpu import attention, experts, gate, pointwise, program, sampling, structures

SOURCES = Path(kernels.cpu.__file__).parent / "src"
MODULES = (structures, attention, experts, gate, pointwise, program, sampling)
NESTED = {
    f"{part}_{field}": f"{part}.{field}" for part in ("gate_up", "down") for field in ("blocks", "scales")
}


def all_structures() -> dict[str, type[ctypes.Structure]]:
    """By their names in C++."""
    classes = [value for module in MODULES for value in vars(module).values() if isinstance(value, type)]
    return {found.__name__.lstrip("_"): found for found in classes if issubclass(found, ctypes.Structure)}


def assertions(name: str, structure: type[ctypes.Structure]) -> Iterator[str]:
    yield f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});"
    for python_name, *_ in structure._fields_:
        field, descriptor = NESTED.get(python_name, python_name), getattr(structure, python_name)
        yield (
            f"static_assert(offsetof({name}, {field}) == {descriptor.offset} && "
            f"sizeof(declval<{name}>().{field}) == {descriptor.size});"
        )


def compiled(lines: list[str]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = [
        "#include <cstddef>",
        "#include <utility>",
        '#include "ops.h"',
        "using namespace cantata; using std::declval;",
        *lines,
    ]
    command = [
        compiler,
        "-std=gnu++17",
        "-fsyntax-only",
        "-Wno-invalid-offsetof",
        f"-I{SOURCES}",
        "-x",
        "c++",
        "-",
    ]
    return subprocess.run(
        command, input="\n".join(source), capture_output=True, text=True, check=False, timeout=120
    )


def test_the_structures_are_those_of_the_sources() -> None:
    found = all_structures()
    declared = {
        line.split()[1] for line in (SOURCES / "ops.h").read_text().splitlines() if line.startswith("struct ")
    }
    assert set(found) == declared - {"Mxfp4", "StepOps", "Ops", "Bf16Ops"}
    result = compiled([line for name, structure in found.items() for line in assertions(name, structure)])
    assert result.returncode == 0, result.stderr


def test_a_structure_out_of_step_would_be_noticed() -> None:
    class Swapped(ctypes.Structure):
        _fields_ = (("num_bytes", ctypes.c_int64), ("memory", ctypes.c_void_p))

    result = compiled(list(assertions("ReadArgs", Swapped)))
    assert result.returncode != 0
    assert result.stderr.count("static assertion failed") == 2
