"""Builds the optional C++ extension of the CPU kernels; everything else is in pyproject.toml.

It is a plain shared library that `kernels/cpu/native.py` loads with ctypes. Without a C++ compiler
the install goes on, and the CPU runs the reference kernels. Each source file picks its instruction
set by itself, so one build serves every processor of its architecture.

`python setup.py compile_commands` writes `compile_commands.json`, by which editors and analysers
know how to compile the sources and headers.
"""

import json
import os
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES, HEADERS = sorted(glob("kernels/cpu/src/*.cpp")), sorted(glob("kernels/cpu/src/*.h"))
STRUCTURES = "kernels/cpu/structures.py"
VERSION = str(runpy.run_path(STRUCTURES)["INTERFACE_VERSION"])

EXTENSION = Extension(
    "kernels.cpu._native",
    sources=SOURCES,
    depends=[*HEADERS, STRUCTURES],
    define_macros=[("CANTATA_INTERFACE_VERSION", VERSION)],
    language="c++",
    extra_compile_args=[
        "-O3",
        "-std=gnu++17",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        # A thrown bad_alloc would end in ctypes either way; without handlers a file of an
        # instruction set shares no symbol.
        "-fno-exceptions",
        "-pthread",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    optional=True,
)


class BuildSideBySide(build_ext):
    """Compiles the source files side by side, on all cores that this process may use."""

    MAX_COMPILERS = 8  # of up to 1 GB each

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **arguments: Any) -> list[str]:
            allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
            with ThreadPoolExecutor(min(len(allowed), self.MAX_COMPILERS)) as pool:
                made = list(pool.map(lambda source: compile_all([source], **arguments), sources))
            return [file for files in made for file in files]

        self.compiler.compile = compile_each
        super().build_extension(ext)


class CompileCommands(Command):
    """Writes compile_commands.json (clang.llvm.org/docs/JSONCompilationDatabase.html)."""

    description = "write compile_commands.json for editors"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("output=", "o", "the file to write (compile_commands.json)")
    ]

    def initialize_options(self) -> None:
        self.output = "compile_commands.json"

    def finalize_options(self) -> None:
        """Nothing depends on another option."""

    def run(self) -> None:
        root = Path(__file__).resolve().parent
        flags = [*EXTENSION.extra_compile_args, f"-DCANTATA_INTERFACE_VERSION={VERSION}"]
        entries = [
            {
                "directory": str(root),
                "file": file,
                "arguments": ["c++", "-x", kind, *flags, *targets(root / file), "-c", file],
            }
            for kind, files in (("c++", SOURCES), ("c++-header", HEADERS))
            for file in files
        ]
        Path(self.output).write_text(json.dumps(entries, indent=1))


def targets(file: Path) -> list[str]:
    """Return the flags that do what a file's target pragma does, or that of isa_bf16.h for the
    headers that include it: clang, which editors run, does not know the pragma."""
    text = file.read_text()
    if '#include "isa_bf16.h"' in text:
        text = file.with_name("isa_bf16.h").read_text()
    pragma = re.search(r'#pragma GCC target\("([^"]*)"\)', text)
    return [f"-m{name}" for name in pragma[1].split(",")] if pragma else []


setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildSideBySide, "compile_commands": CompileCommands})
