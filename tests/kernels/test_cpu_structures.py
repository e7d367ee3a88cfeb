"""The interface between Python and the C++ library: the structures that Python fills are those that
the C++ reads, each field at the same offset, of the same size, and all of them stand in one file.
And each header can be compiled by itself, as editors do."""

import ctypes
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels.cpu
from kernels.cpu import structures

PACKAGE = Path(kernels.cpu.__file__).parent
SOURCES = PACKAGE / "src"
ROOT = Path(__file__).parents[2]
NESTED = {
    f"{part}_{field}": f"{part}.{field}" for part in ("gate_up", "down") for field in ("blocks", "scales")
}


def all_structures() -> dict[str, type[ctypes.Structure]]:
    """Return all structures by their names in C++."""
    classes = [value for value in vars(structures).values() if isinstance(value, type)]
    return {found.__name__: found for found in classes if issubclass(found, ctypes.Structure)}


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
    flags = ["-std=gnu++17", "-fsyntax-only", "-Wno-invalid-offsetof", "-Wno-psabi", f"-I{SOURCES}"]
    return subprocess.run(
        [compiler, *flags, "-x", "c++", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def with_structures(lines: Iterator[str]) -> subprocess.CompletedProcess[str]:
    includes = ["#include <cstddef>", "#include <utility>", '#include "ops.h"']
    return compiled([*includes, "using namespace cantata; using std::declval;", *lines])


def test_the_structures_are_those_of_the_sources() -> None:
    found = all_structures()
    declared = {
        line.split()[1] for line in (SOURCES / "ops.h").read_text().splitlines() if line.startswith("struct ")
    }
    assert set(found) == declared - {"Mxfp4", "StepOps", "Ops", "Bf16Ops"}
    result = with_structures(
        line for name, structure in found.items() for line in assertions(name, structure)
    )
    assert result.returncode == 0, result.stderr


def test_a_structure_out_of_step_would_be_noticed() -> None:
    class Swapped(ctypes.Structure):
        _fields_ = (("num_bytes", ctypes.c_int64), ("memory", ctypes.c_void_p))

    result = with_structures(assertions("ReadArgs", Swapped))
    assert result.returncode != 0
    assert result.stderr.count("static assertion failed") == 2


def test_structures_stand_in_one_file() -> None:
    defining = [
        file.name for file in sorted(PACKAGE.glob("*.py")) if "(ctypes.Structure)" in file.read_text()
    ]
    assert defining == ["structures.py"]


def test_each_operation_that_takes_a_structure_is_listed() -> None:
    exported = re.findall(
        r"^EXPORT (\w+) cantata_(\w+)\(const cantata::(\w+)\* args\)",
        (SOURCES / "dispatch.cpp").read_text(),
        re.MULTILINE,
    )
    results = {None: "void", ctypes.c_int: "int", ctypes.c_uint64: "uint64_t"}
    listed = [
        (results[operation.result], name, operation.arguments.__name__)
        for name, operation in structures.OPERATIONS.items()
    ]
    assert sorted(exported) == sorted(listed)


def test_each_header_compiles_by_itself() -> None:
    headers = sorted(file.name for file in SOURCES.glob("*.h"))
    assert "isa_bf16.h" in headers
    if platform.machine() != "x86_64":
        headers = [name for name in headers if "bf16" not in name]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: compiled([f'#include "{name}"']), headers)
        failed = {name: said.stderr for name, said in zip(headers, results, strict=True) if said.returncode}
    assert failed == {}


def test_a_header_that_needs_another_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "alone.h").write_text("inline Vec twice(Vec value) { return value + value; }\n")
    assert "Vec" in compiled([f'#include "{tmp_path / "alone.h"}"']).stderr


def test_compile_commands_name_every_file(tmp_path: Path) -> None:
    target = tmp_path / "compile_commands.json"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "compile_commands", f"--output={target}"],
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    entries = {Path(entry["file"]).name: entry for entry in json.loads(target.read_text())}
    assert set(entries) == {file.name for file in (*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))}
    assert "-mavx512bf16" in entries["bf16.h"]["arguments"]
    assert not [flag for flag in entries["simd.h"]["arguments"] if flag.startswith("-m")]
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    for name in ("dispatch.cpp", "simd.h"):
        arguments = [compiler, *entries[name]["arguments"][1:], "-fsyntax-only"]
        subprocess.run(arguments, cwd=entries[name]["directory"], check=True, timeout=120)
