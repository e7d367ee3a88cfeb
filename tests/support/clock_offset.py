"""A time of day that a test changes in the processes that it starts."""

import os
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


class ClockOffset:
    """The time of day of processes with `environment`, and of their children.

    Args:
        folder: where the library that they load is built.
    """

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock_offset.so", folder / "clock-offset"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self.environment = {"LD_PRELOAD": str(library), "CANTATA_TEST_CLOCK": str(self._file)}
        self._file.write_bytes(struct.pack("=q", 0))

    def set(self, offset_s: int) -> None:
        """Jump to this many seconds after the real time."""
        with self._file.open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack("=q", offset_s), 0)
