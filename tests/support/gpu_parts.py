"""Parts of benchmarks/gpu_check.py, run in this process."""

import json
from collections.abc import Callable

from benchmarks.gpu_attempts import Attempts, Result
from benchmarks.gpu_parts import Options


def measured(part: Callable[[Options, Attempts], None], options: Options) -> Result:
    """What the part finds, as a report reads it."""
    attempts = Attempts(options.device)
    part(options, attempts)
    return dict(json.loads(json.dumps(attempts.result)))
