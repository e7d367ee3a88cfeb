"""The committed gRPC stubs are what proto/generate.sh makes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_stubs_match_the_protos(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run([ROOT / "proto" / "generate.sh", tmp_path], check=True, env=environment, timeout=120)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert len(generated) == 8
    for path in generated:
        assert (ROOT / path).read_bytes() == (tmp_path / path).read_bytes(), (
            f"{path} is stale: run `make proto`"
        )
