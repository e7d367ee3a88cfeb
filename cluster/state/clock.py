"""The time of stored objects, which outlive processes: the only use of the time of day that is more
than display."""

import time


def unix_now() -> float:
    """Return the current time in Unix seconds."""
    return time.time()
