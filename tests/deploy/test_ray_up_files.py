"""The files for `ray up`: accepted by Ray's own check, and every node starts Ray with what Cantata
needs."""

import argparse
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.serve.ray_environment import CLUSTER_ENVIRONMENT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray"
VERSIONS = ROOT / "scripts" / "torch_versions.env"
FILES = [FOLDER / f"{name}.yaml" for name in ("aws", "gcp", "local")]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def exported(command: str) -> dict[str, str]:
    """Return the variables that the shell command exports before `ray start`."""
    found: dict[str, str] = {}
    for part in command.split("ray start")[0].split(";"):
        words = shlex.split(part)
        if words[:1] == ["export"]:
            found |= dict(word.split("=", 1) for word in words[1:])
    found.pop("PATH")
    return found


def downloads(text: str) -> list[argparse.Namespace]:
    """Return the `hf download` commands in it, read as that command reads them: a flag takes one
    value."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("repository")
    parser.add_argument("--include", action="append")
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
    wanted = CLUSTER_ENVIRONMENT
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_head_compiles_and_every_node_has_the_torch_that_was_chosen(path: Path) -> None:
    content = read(path)
    head, worker = content["head_setup_commands"], content["worker_setup_commands"]
    assert any(
        "uv build --wheel" in command and "--out-dir ~/cantata-wheel ~/cantata" in command for command in head
    )
    assert content["cluster_synced_files"] == ["~/cantata-wheel/"]
    assert not any(
        "uv build" in command or command.endswith("~/cantata")
        for command in worker + content["setup_commands"]
    )
    for commands in (head, worker):
        (install,) = [command for command in commands if "uv pip install" in command]
        assert ". ~/cantata/scripts/torch_versions.env;" in install
        assert '"torch==$TORCH"' in install
        assert "~/cantata-wheel/cantata-*.whl" in install
    # Refused before anything is installed where the driver is too old.
    assert worker[0] == "~/cantata/scripts/check_driver.sh"


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_head_has_the_clouds_libraries_and_no_weights(cloud: str) -> None:
    content = read(FOLDER / f"{cloud}.yaml")
    head = " ".join(content["head_setup_commands"])
    assert f'cantata-*.whl)[{cloud}]"' in head
    assert "--torch-backend cpu" in head
    (few,) = downloads(head)
    assert (few.include, few.exclude) == (["*.json"], ["original/*"])
    (all_of_it,) = downloads(" ".join(content["worker_setup_commands"]))
    assert (all_of_it.include, all_of_it.exclude) == (None, ["original/*", "metal/*"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[cloud]


def test_images_are_named() -> None:
    """If no image is named Ray takes an old one of its own list."""
    nodes = read(FOLDER / "aws.yaml")["available_node_types"].values()
    assert all(node["node_config"]["ImageId"].startswith("ami-") for node in nodes)
    for node in read(FOLDER / "gcp.yaml")["available_node_types"].values():
        assert node["node_config"]["disks"][0]["initializeParams"]["sourceImage"].endswith("nvidia-580")
    versions = dict(line.split("=") for line in VERSIONS.read_text().splitlines() if not line.startswith("#"))
    assert versions["NVIDIA_DRIVER"].startswith("580.")
    for name in ("aws", "gcp"):
        assert f"for CUDA {versions['CUDA']}" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("580.65.06", None),
        ("590.48.01", None),
        ("570.211.01", "The NVIDIA driver is 570.211.01, and torch"),
        ("580.9", "The NVIDIA driver is 580.9, and torch"),
        (None, "nvidia-smi finds no NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old_is_refused(driver: str | None, said: str | None, tmp_path: Path) -> None:
    if driver is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = ROOT / "scripts" / "check_driver.sh"
    ran = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == (0 if said is None else 1)
    assert ran.stderr.startswith(said or "")
    assert (ran.stderr == "") == (said is None)


def test_the_checkpoint_is_downloaded_without_its_other_formats() -> None:
    texts = ["; ".join(read(FOLDER / f"{name}.yaml")["worker_setup_commands"]) for name in ("aws", "gcp")]
    texts.append((ROOT / "docs" / "operations.md").read_text())
    for text in texts:
        *_, download = found = downloads(text)
        assert {(each.repository, each.local_dir) for each in found} == {
            ("openai/gpt-oss-120b", "/models/gpt-oss-120b")
        }
        assert download.exclude == ["original/*", "metal/*"]
