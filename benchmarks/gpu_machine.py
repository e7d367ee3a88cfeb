"""Properties of a GPU machine on which a check of it depends. Nothing here creates a CUDA context,
which would take memory from the processes being checked."""

import os
import platform
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

_LONGEST_S = 30.0
"""Maximum seconds for a tool's answer."""


def describe() -> dict[str, str]:
    """Return by name: Python, torch, Triton, GPU, driver, its free memory, the C compiler that
    Triton takes, and where Python.h is; each in words, also where it is missing."""
    gpu = _said(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.free,memory.total", "--format=csv,noheader"
    ).split("\n")[0]
    name, driver, free, total = (
        [part.strip() for part in gpu.split(",")]
        if gpu.count(",") == 3
        else ("unknown (no nvidia-smi)", *["?"] * 3)
    )
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "gpu": name,
        "driver": driver,
        "free memory": f"{free} of {total}",
        "C compiler": _compiler(),
        "Python.h": _python_h(),
    }


def triton_target() -> str | None:
    """Return Triton's target for the first NVIDIA GPU, as "sm_90"; None if nvidia-smi does not
    report one."""
    said = _said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split("\n")[0].strip()
    return f"sm_{said.replace('.', '')}" if said.replace(".", "").isdigit() else None


def sentence(machine: dict[str, str]) -> str:
    """Return the description as one line."""
    return ", ".join(f"{name}: {value}" for name, value in machine.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _compiler() -> str:
    """Return the compiler that `triton.runtime.build` would choose."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return "none: Triton can launch only what it has launchers for in its cache"
    version = _said(found, "-dumpfullversion") or _said(found, "-dumpversion") or "(does not run)"
    return f"{Path(found).name} {version}".strip()


def _python_h() -> str:
    return f"in {_headers()}" if has_python_h() else f"not in {_headers()}"


def has_python_h() -> bool:
    """Return whether C modules can be compiled, as Triton does for its launchers."""
    return (_headers() / "Python.h").exists()


def _headers() -> Path:
    scheme = sysconfig.get_default_scheme()
    # As Triton looks for it: Debian's own scheme names another folder.
    return Path(sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"])


def _said(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
