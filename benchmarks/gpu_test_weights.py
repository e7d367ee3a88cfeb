"""Writes how long the tests of tests/gpu take, which `gpu_tests.deal` deals them by, from the
results of a run.

python3 -m benchmarks.gpu_test_weights OUT/tests.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from benchmarks.gpu_tests import DEFAULT_WEIGHT, WEIGHTS, name_of_test, read_lines


def weights_of(results: Path) -> dict[str, float]:
    """Return the mean seconds of a case, by test, for those that take longer than the default."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for line in read_lines(results):
        if line.get("outcome") in ("passed", "failed"):
            seconds[name_of_test(line["test"])].append(line["seconds"])
    means = {name: round(mean(cases), 1) for name, cases in sorted(seconds.items())}
    return {name: number for name, number in means.items() if number > DEFAULT_WEIGHT}


if __name__ == "__main__":
    WEIGHTS.write_text(json.dumps(weights_of(Path(sys.argv[1])), indent=1) + "\n")
    print(f"{WEIGHTS} is written")
