"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait until the condition holds, at most timeout_s; returns how long it took in seconds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"it did not happen within {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - begin
