"""Pieces of a part of `benchmarks/gpu_check.py`, tried one after the other, so that one which fails
costs the others nothing.

The result is written as it grows, and the name of a piece before it is begun, so that the process
that started the part knows which piece a death or a time-out fell into. A piece that raises is
recorded, its traceback goes to stderr, and the next one is begun. After an error that leaves CUDA's
context unusable ("sticky", such as an illegal address) the process ends with CONTEXT_LOST: the part
is started again, and the new process leaves out the pieces that were tried.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Result = dict[str, Any]
CONTEXT_LOST = 70
"""Exit code of a process whose CUDA context is unusable."""
DOING, TRIED, FAILURES = "doing", "tried", "failures"
"""Keys of a result: the piece that is running, the names of those that were begun, and [{"what",
"error"}] of those that failed."""


class Attempts:
    """The pieces of one part, and its result.

    Args:
        path: file of the result; the result that an earlier process of the part wrote there is
            taken over. None: no file.
    """

    def __init__(self, device: "torch.device", path: Path | None = None) -> None:
        self._device = device
        self._path = path
        self.result: Result = read_result(path) if path is not None else {}
        self.result.pop(DOING, None)

    def begin(self, about: Result, *, lists: tuple[str, ...] = ()) -> Result:
        """Return the result, with `about` in it and a list under each of these keys: an earlier
        process's, or empty."""
        self.result |= about
        for key in lists:
            self.result.setdefault(key, [])
        self.keep()
        return self.result

    def keep(self) -> None:
        """Write the result."""
        if self._path is not None:
            write_result(self._path, self.result)

    def was_tried(self, name: str) -> bool:
        """Return whether `run` would skip the piece."""
        return name in self.result.get(TRIED, ())

    def run(self, name: str, piece: Callable[[], None], *, again: bool = False) -> bool:
        """Run a piece; return whether it succeeded: False if it raised, or was tried by an earlier
        process.

        Args:
            again: run it even if an earlier process completed it, since its side effects are
                needed.
        """
        if self.was_tried(name):
            return False
        result, around = self.result, self.result.get(DOING)
        if not again:
            result.setdefault(TRIED, []).append(name)
        result[DOING] = name
        self.keep()
        try:
            piece()
        except Exception as error:
            traceback.print_exc()
            add_failure(result, name, f"{type(error).__name__}: {_first_line(error)}")
            if is_context_lost(self._device):
                del result[DOING]
                self.keep()
                print(f"{name}: CUDA's context is lost, so this process ends", file=sys.stderr, flush=True)
                # No destructors: they would call CUDA, and some hang.
                os._exit(CONTEXT_LOST)
            return False
        else:
            return True
        finally:
            if around is None:
                result.pop(DOING, None)
            else:
                result[DOING] = around
            self.keep()


def is_context_lost(device: "torch.device") -> bool:
    """Return whether CUDA answers every call with an error."""
    if device.type != "cuda":
        return False
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() != 1)
    except RuntimeError as error:
        # A lack of memory is temporary.
        return not isinstance(error, torch.OutOfMemoryError)


def add_failure(result: Result, what: str, error: str) -> None:
    """Add a failure; a piece that failed counts as tried."""
    result.setdefault(FAILURES, []).append({"what": what, "error": error})
    tried = result.setdefault(TRIED, [])
    if what not in tried:
        tried.append(what)


def read_result(path: Path) -> Result:
    """Return the result in the file; empty if there is no file."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write_result(path: Path, result: Result) -> None:
    """Write all or nothing: the process may be stopped meanwhile."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(result, indent=1))
    beside.replace(path)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "without a message")[:500]
