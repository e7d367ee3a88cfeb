"""Notes that a crashing process leaves on its host for the process that is started in its place.

A parent learns the signal that ended its child. Ray's workers are children of the raylet, which
reports no signal: there a crash is known only to what reads these notes.
"""

import faulthandler
import logging
import signal
import threading
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from workers.errors import RankCrashed
from workers.exit_codes import MAX_SAME_CRASHES, STABLE_AFTER_S, ending

logger = logging.getLogger(__name__)

_BEGIN = "Fatal Python error: "
"""Beginning of each of faulthandler's notes; a description of the signal follows."""
_SIGNALS = {
    "Illegal instruction": signal.SIGILL,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "Floating point exception": signal.SIGFPE,
    "Aborted": signal.SIGABRT,
}
_MAX_BYTES = 2**20
"""Maximum size of a file that is read."""


class CrashNotes:
    """The notes of the processes that follow one another in one place of an engine on this host.

    Args:
        file: holds the notes since the last process that ran for STABLE_AFTER_S; its folder is
            created.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._own: BinaryIO | None = None

    def begin(self) -> None:
        """Read the notes and log the last crash; from now on a crash of this process is noted. A
        file that cannot be written, as on a full disk, is a warning: only the notes are missing.

        Raises:
            RankCrashed: the last MAX_SAME_CRASHES crashes were illegal instructions (SIGILL), which
                come again.
        """
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._own = self._file.open("ab", buffering=0)
            notes = self._notes()
        except OSError as error:
            logger.warning("a crash of this process cannot be noted in %s: %s", self._file, error.strerror)
            return
        if notes:
            number, note = notes[-1]
            logger.error("a process that ran here before crashed (%s):\n%s", ending(-number), note)
        in_a_row = list(takewhile(lambda entry: entry[0] == signal.SIGILL, reversed(notes)))
        if len(in_a_row) >= MAX_SAME_CRASHES:
            raise RankCrashed(
                f"processes of this engine crashed {len(in_a_row)} times in a row on this host, and it is "
                f"not started again with these settings ({ending(-signal.SIGILL)})",
                signal.SIGILL,
            )
        if not in_a_row:
            self._forget()
        faulthandler.enable(self._own, all_threads=False)
        stable = threading.Timer(STABLE_AFTER_S, self._forget)
        stable.daemon = True
        stable.start()

    def _notes(self) -> list[tuple[signal.Signals, str]]:
        """Return the signal and the stack of each crash, oldest first."""
        with self._file.open("rb") as notes:
            text = notes.read(_MAX_BYTES).decode(errors="replace")
        found = []
        for note in text.split(_BEGIN)[1:]:
            name, _, stack = note.partition("\n")
            if name in _SIGNALS:
                found.append((_SIGNALS[name], stack.strip().partition("\n\n")[0]))
        return found

    def _forget(self) -> None:
        assert self._own is not None
        self._own.truncate(0)
