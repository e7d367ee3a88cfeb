"""Triton's cache of compiled kernels in a file, made on a machine without a GPU for one that should
not spend its time on compiling.

    # with the torch and Triton of that machine
    python3 -m benchmarks.gpu_check --pack-cache FILE [--preset 20b] …
    python3 -m benchmarks.gpu_check --cache FILE …                         # there

Packing runs the parts, and tests/gpu, on tensors without memory under a driver that launches
nothing (`absent_gpu.py`), so that the variants that are compiled are those that are asked for. What
finds an entry again is a hash of Triton's own files, the kernel's source and the line where it
begins, its arguments' types and alignments, options, ptxas's version and the environment variables
that change code. Triton 3.6 also compiles a C module for each signature; those are packed where
there are a C compiler and Python's headers, and fit the same minor version of Python.
"""

import hashlib
import io
import json
import lzma
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

KERNELS = Path(__file__).parent.parent / "kernels"
_MANIFEST = "manifest.json"
_KEPT = (".cubin", ".json", ".so")
"""Suffixes of the files that are read again; the stages before the binary are ten times as
large."""
_GROUP = "__grp__"
"""Prefix of the names of the files in which Triton lists, by absolute paths, the files of a
kernel."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The versions from which a packed cache was made.

    Attributes:
        triton: version and a hash of its components.
        python: suffix of C modules, as ".cpython-312-x86_64-linux-gnu.so".
        target: such as "sm_90".
        kernels: digests of the files under kernels/, by path.
    """

    triton: str
    python: str
    target: str
    kernels: dict[str, str]

    @classmethod
    def of_this_machine(cls, target: str) -> "Manifest":
        files = {
            str(path.relative_to(KERNELS)): _digest(path.read_bytes())
            for path in sorted(KERNELS.rglob("*.py"))
        }
        return cls(_triton_build(), str(sysconfig.get_config_var("EXT_SUFFIX")), target, files)


def pack(file: Path, target: str, work: Callable[[Path], object]) -> str:
    """Write all that `work` has Triton compile for the target into a file; return a sentence about
    it.

    Args:
        work: launches kernels on tensors without memory, given the folder of Triton's cache.
    """
    from benchmarks.absent_gpu import can_build_launchers, fake_driver

    launchers = can_build_launchers()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        with fake_driver(target, build_launchers=launchers):
            work(Path(folder))
        kernels = _write(file, Path(folder), Manifest.of_this_machine(target))
    without = "" if launchers else ", without the C modules that launch them: there is no gcc or no Python.h"
    return (
        f"{file}: {kernels} kernels for {target} of Triton {triton.__version__}, "
        f"{file.stat().st_size / 1e6:.1f} MB{without}"
    )


def _write(file: Path, folder: Path, manifest: Manifest) -> int:
    """Write the cache; return the number of kernels."""
    kept = [path for path in sorted(folder.rglob("*")) if path.suffix in _KEPT]
    with tarfile.open(file, "w:xz") as archive:
        described = json.dumps(asdict(manifest)).encode()
        entry = tarfile.TarInfo(_MANIFEST)
        entry.size = len(described)
        archive.addfile(entry, io.BytesIO(described))
        for path in kept:
            archive.add(path, str(path.relative_to(folder)), recursive=False)
    return sum(path.suffix == ".cubin" for path in kept)


def unpack(file: Path, folder: Path, target: str | None) -> str:
    """Put the entries that fit this machine into Triton's cache; return a sentence about it.

    Kernels whose files have changed are compiled: their entries are not found.

    Args:
        folder: Triton's cache, made if it is not there.
        target: target of the GPU here; None: unknown.
    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a packed cache.
    """
    try:
        with tarfile.open(file, "r:xz") as archive:
            manifest = Manifest(**json.loads(_read(archive, _MANIFEST)))
            here = Manifest.of_this_machine(target or manifest.target)
            for what, packed, found in (
                ("with Triton", manifest.triton, here.triton),
                ("for", manifest.target, here.target),
            ):
                if packed != found:
                    return (
                        f"{file} was packed {what} {packed}, here is {found}: nothing of it is "
                        f"taken, kernels are compiled"
                    )
            names = [name for name in archive.getnames() if name != _MANIFEST]
            if manifest.python != here.python:
                names = [name for name in names if not name.endswith(".so")]
            folder.mkdir(parents=True, exist_ok=True)
            archive.extractall(folder, [archive.getmember(name) for name in names], filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a cache that --pack-cache wrote: {error}") from None
    for group in folder.rglob(f"{_GROUP}*"):
        _bring_home(group)
    said = (
        f"{file}: {sum(name.endswith('.cubin') for name in names)} kernels for {manifest.target} "
        f"are in {folder}"
    )
    if manifest.python != here.python:
        said += (
            f"; the C modules that launch them are for another Python ({manifest.python}) and are "
            f"compiled here"
        )
    if changed := sorted(
        name
        for name in {*manifest.kernels, *here.kernels}
        if manifest.kernels.get(name) != here.kernels.get(name)
    ):
        said += f"; {', '.join(changed)} changed since: what is launched from there may have to be compiled"
    return said


def _bring_home(group: Path) -> None:
    """Correct the paths of the listed files, which are in the folder of the list."""
    listed = json.loads(group.read_text())
    beside = {name: group.parent / name for name in listed["child_paths"]}
    listed["child_paths"] = {name: str(path) for name, path in beside.items() if path.exists()}
    group.write_text(json.dumps(listed))


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    if found is None:
        raise KeyError(f"{name} is no file")
    return found.read()


def _triton_build() -> str:
    from triton.runtime.cache import triton_key

    return f"{triton.__version__} ({_digest(triton_key().encode())[:12]})"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class CompileCounter:
    """A counter of the kernels that Triton compiles in this process, and of those that it finds in
    its cache."""

    def __init__(self) -> None:
        self.compiled, self.found, self.seconds = 0, 0, 0.0
        triton.knobs.compilation.listener = self._note

    def _note(self, *, times: "triton.knobs.CompileTimes", cache_hit: bool, **about: object) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled += 1
            self.seconds += times.total / 1e6

    def sentence(self) -> str:
        return (
            f"{self.found} kernels were in Triton's cache, {self.compiled} were compiled in "
            f"{self.seconds:.1f} s"
        )
