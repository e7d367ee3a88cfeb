"""The functions of a library for x86-64 with instructions beyond that architecture's first
processors, by objdump and readelf."""

import bisect
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LEGACY, VEX, EVEX, TILE = "SSE3 to SSE4, AES or popcnt", "VEX", "EVEX", "AMX"
_PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
_SSE3 = {
    (0xF2, 0x12),
    (0xF3, 0x12),
    (0xF3, 0x16),
    (0xF2, 0xF0),
    *((p, op) for p in (0x66, 0xF2) for op in (0x7C, 0x7D, 0xD0)),
}
_LINE = re.compile(r"^\s+([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*(?:\t(.*))?$")


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the library.

    Attributes:
        name: demangled.
        file: the source file that it is local to; empty if it can be called from others.
    """

    address: int
    size: int
    name: str
    file: str


def tool(name: str) -> str:
    """Return the path of a program of binutils; skips the test without it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: binutils)")
    return path


def functions(library: Path) -> list[Function]:
    """Return all functions by address.

    In the symbol table a file's local symbols follow the file's name, and symbols of wider linkage
    come after all files.
    """
    found, file = [], ""
    for line in output([tool("readelf"), "-sWC", str(library)]):
        # Number, address, size, type, binding, visibility, section, name.
        parts = line.split(maxsplit=7)
        if len(parts) < 7 or not re.fullmatch(r"\d+:", parts[0]):
            continue
        name = parts[7] if len(parts) == 8 else ""
        if parts[3] == "FILE":
            file = name
        elif parts[3] in ("FUNC", "IFUNC") and parts[6] != "UND":
            found.append(
                Function(int(parts[1], 16), int(parts[2], 0), name, file if parts[4] == "LOCAL" else "")
            )
    return sorted(found, key=lambda function: function.address)


def extension(code: bytes, mnemonic: str) -> str | None:
    """Return what an instruction needs beyond SSE2, by its encoding; None for nothing.

    In 64-bit code, C4 and C5 begin only VEX instructions, whatever their registers, and 62 only
    EVEX ones. tzcnt is not counted: processors without it run it as bsf, and compilers rely on
    that.
    """
    prefixes = 0
    while code[prefixes] in _PREFIXES:
        prefixes += 1
    rest = code[prefixes:]
    if rest[0] == 0x62:
        return EVEX
    if rest[0] in (0xC4, 0xC5) or (rest[0] == 0x8F and rest[1] & 0x1F >= 8):  # 8F: XOP, or pop
        return TILE if re.match(r"tile|tdp|ldtilecfg|sttilecfg", mnemonic) else VEX
    opcode = rest[1:] if rest[0] & 0xF0 == 0x40 else rest  # after REX
    if opcode[0] != 0x0F:
        return None
    before = code[:prefixes]
    newer = (
        opcode[1] in (0x38, 0x3A)
        or (opcode[1] == 0xB8 and 0xF3 in before)
        or any((p, opcode[1]) in _SSE3 for p in before)
    )
    return LEGACY if newer else None


def extensions(library: Path) -> dict[Function, set[str]]:
    """Return what each function needs beyond SSE2, an empty set for nothing."""
    found = functions(library)
    starts, outside = [function.address for function in found], Function(0, 0, "outside all functions", "")
    needs: dict[Function, set[str]] = {function: set() for function in [*found, outside]}
    for address, code, mnemonic in _instructions(library):
        if (kind := extension(code, mnemonic)) is None:
            continue
        last = found[max(0, bisect.bisect_right(starts, address) - 1)]
        needs[last if last.address <= address < last.address + last.size else outside].add(kind)
    return needs


def _instructions(library: Path) -> Iterator[tuple[int, bytes, str]]:
    for line in output([tool("objdump"), "-dw", str(library)]):
        if match := _LINE.match(line):
            yield int(match[1], 16), bytes.fromhex(match[2]), match[3] or ""


def output(command: list[str]) -> list[str]:
    """Return the lines that a program prints."""
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
