"""Builds the optional C++ extension of the CPU kernels; everything else is in pyproject.toml.

It is a plain shared library that `kernels/cpu/native.py` loads with ctypes. Without a C++ compiler
the install goes on, and the CPU runs the reference kernels. Each source file picks its instruction
set by itself, so one build serves every processor of its architecture.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "kernels.cpu._native",
            sources=sorted(glob("kernels/cpu/src/*.cpp")),
            depends=sorted(glob("kernels/cpu/src/*.h")),
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
    ]
)
