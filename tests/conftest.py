"""Puts the repository's root on the path, so that tests can import `tests.support` however pytest is started."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
