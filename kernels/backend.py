"""What an operation's implementation is selected by: whether Triton is there, and for what it
compiles."""

import importlib.util
import os
from functools import cache

import torch

# Fixes whether a product and a sum are fused where a kernel does not say. Triton 3.10 reverses the
# default; results must not change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def triton_runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernels take tensors of a device: a GPU, with Triton installed, or
    the CPU while Triton's interpreter is on (TRITON_INTERPRET=1)."""
    return (device.type == "cuda" and has_triton()) or (device.type == "cpu" and _interpreting())


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; it comes with torch's builds for GPUs."""
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreting() -> bool:
    # Triton reads the variable as each kernel is decorated, so it is fixed for a process. It is not
    # read through Triton itself, whose import takes a second that a server on the CPU can save.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes") and has_triton()


def checks_indices() -> bool:
    """Return whether launchers read indices (expert ids, block tables) back to check their
    range, which makes the host wait for the device: in the interpreter, and with
    CANTATA_CHECK_INDICES=1."""
    return _interpreting() or os.environ.get("CANTATA_CHECK_INDICES", "") == "1"


@cache
def architecture(device: torch.device) -> str:
    """Return the target that Triton compiles for: sm_90, gfx950 and so on; "cpu" for its
    interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
