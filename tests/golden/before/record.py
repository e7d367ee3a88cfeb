"""`python -m tests.golden.before.record [SECTION …]`: write the recording again, and print what
changes in it.

With `--check`, nothing is written. The files are `*.json.gz` beside this one, a section each.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.golden.before.compare import Json, report
from tests.golden.before.sections import SECTIONS, versions

_FOLDER = Path(__file__).parent


def load(section: str) -> Json:
    """Return what is stored of a section."""
    return json.loads(gzip.decompress((_FOLDER / f"{section}.json.gz").read_bytes()))


def run(section: str, folder: Path) -> Json:
    """Return what the section gives now, as JSON stores it."""
    return json.loads(json.dumps(SECTIONS[section](folder), default=bytes.hex))


def main() -> int:
    """Record the sections that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.before.record", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only print the differences; exit code 1 if there are any"
    )
    options = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory() as folder:
        for section in options.sections or SECTIONS:
            begin, begin_cpu = time.monotonic(), sum(os.times()[:4])
            now = run(section, Path(folder))
            file = _FOLDER / f"{section}.json.gz"
            text = report(load(section), now) if file.exists() else "new"
            different |= bool(text)
            seconds = (
                f"{time.monotonic() - begin:.1f} s, {sum(os.times()[:4]) - begin_cpu:.1f} s of processor time"
            )
            print(f"{section}: {len(now)} cases, {seconds}: {text or 'no difference'}", flush=True)
            if text and not options.check:
                file.write_bytes(
                    gzip.compress(
                        json.dumps(now, ensure_ascii=False, separators=(",", ":")).encode(), 9, mtime=0
                    )
                )
    if not options.check:
        (_FOLDER / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    return int(options.check and different)


if __name__ == "__main__":
    sys.exit(main())
