"""The files for `ray up`: accepted by Ray's own check, and every node starts Ray with what Cantata needs."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.serve.launch import RAY_ENVIRONMENT

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"
FILES = [FOLDER / f"{name}.yaml" for name in ("aws", "gcp", "local")]
# Of one machine without a load balancer; the others hold for a cluster too.
ONE_MACHINE_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def exported(command: str) -> dict[str, str]:
    """What the shell command exports before `ray start`."""
    found: dict[str, str] = {}
    for part in command.split("ray start")[0].split(";"):
        words = shlex.split(part)
        if words[:1] == ["export"]:
            found |= dict(word.split("=", 1) for word in words[1:])
    found.pop("PATH")
    return found


def downloads(text: str) -> list[argparse.Namespace]:
    """The `hf download` commands in it, read as that command reads them: a flag takes one value."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("repository")
    parser.add_argument("--exclude", action="append")
    parser.add_argument("--local-dir")
    found = re.findall(r"/hf download ([^&`]*)", " ".join(text.split()))
    return [parser.parse_args(shlex.split(command)) for command in found]


def test_all_files_are_checked() -> None:
    assert sorted(FOLDER.glob("*")) == FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_the_file(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rays_check_would_refuse_a_wrong_name(path: Path) -> None:
    with pytest.raises(Exception, match="head_start_ray_comands"):
        validate_config(prepare_config(read(path) | {"head_start_ray_comands": []}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_node_starts_ray_as_cantata_does(path: Path) -> None:
    wanted = {name: value for name, value in RAY_ENVIRONMENT.items() if name not in ONE_MACHINE_ONLY}
    content = read(path)
    head = exported(content["head_start_ray_commands"][-1])
    # Autoscaler v2 of Ray 2.60 starts no workers with this provider.
    assert head == (wanted | {"RAY_enable_autoscaler_v2": "0"} if path.stem == "local" else wanted)
    assert exported(content["worker_start_ray_commands"][-1]) == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_token_reaches_every_node_and_the_dashboard_stays_private(path: Path) -> None:
    content = read(path)
    assert content["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert any(command.endswith("~/cantata") and "pip install" in command for command in content["setup_commands"])


def test_the_checkpoint_is_downloaded_without_its_other_formats() -> None:
    texts = [(FOLDER / f"{name}.yaml").read_text() for name in ("aws", "gcp")]
    texts.append((FOLDER.parents[1] / "docs" / "operations.md").read_text())
    for text in texts:
        (download,) = downloads(text)
        assert (download.repository, download.local_dir) == ("openai/gpt-oss-120b", "/models/gpt-oss-120b")
        assert download.exclude == ["original/*", "metal/*"]
