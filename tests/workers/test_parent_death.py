"""A process that ends with its parent."""

import os
import subprocess
import sys


def test_a_parent_that_had_ended_before_is_noticed() -> None:
    """The kernel tells of no end before the call; the parent is another process by then."""
    code = "import sys; from workers.parent_death import die_with_parent as d; print(d(int(sys.argv[1])))"
    for parent, lives in ((os.getpid(), "True"), (os.getppid(), "False")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(parent)], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == lives
