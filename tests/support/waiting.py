"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until the condition holds, at most timeout_s."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"it did not happen within {timeout_s} s"
        time.sleep(0.01)
