"""scripts/install.sh: what uv is told of pip's settings; Makefile: the environment of commands."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
uv_variables = runpy.run_path(str(ROOT / "scripts/uv_settings.py"))["uv_variables"]


def test_pips_settings_are_uvs() -> None:
    config = (
        "global.index-url='https://index.example/simple'",
        "global.extra-index-url='https://second.example/simple\\nhttps://third.example/simple'",
        "global.find-links='/first\\n/second'",
        "install.constraint='/a/constraints.txt'",
        "global.timeout='60'",
        ":env:.timeout='180'",
        "user.username='of no matter here'",
    )
    assert uv_variables(config, {}) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://index.example/simple",
        "UV_INDEX": "https://second.example/simple https://third.example/simple",
        "UV_FIND_LINKS": "/first,/second",
        "UV_CONSTRAINT": "/a/constraints.txt",
        "UV_HTTP_TIMEOUT": "180",
    }


def test_what_is_set_for_uv_stays() -> None:
    found = uv_variables(
        ["global.index-url='https://index.example'"], {"UV_DEFAULT_INDEX": "https://own.example"}
    )
    assert found == {"UV_INDEX_STRATEGY": "unsafe-best-match"}


def test_the_script_prints_commands_for_a_shell(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment = variables | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "/a /b",
        "PIP_INDEX_URL": "file:///x",
    }
    said = subprocess.run(
        [
            "bash",
            "-c",
            'eval "$("$0" scripts/uv_settings.py)" && echo "$UV_FIND_LINKS $UV_DEFAULT_INDEX"',
            sys.executable,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "/a,/b file:///x\n"


def test_make_lets_python_keep_what_it_compiles() -> None:
    """Images set this variable, and uv compiles nothing: every process would compile torch anew."""
    said = subprocess.run(
        ["make", "--no-print-directory", "--eval", "show:; @env", "show"],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OTHER": "stays"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "OTHER=stays" in said
    assert not any(line.startswith("PYTHONDONTWRITEBYTECODE=") for line in said)
