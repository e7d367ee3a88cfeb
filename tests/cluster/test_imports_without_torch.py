"""Commands that only calculate, and the building of an application, start at once: they import
neither torch nor a kernel."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["cluster.commands.gpus", "cluster.commands.inspect", "cluster.serve.app"])
def test_arithmetic_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'triton'}} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
