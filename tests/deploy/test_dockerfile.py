"""The Dockerfile, read and not built: what it copies is there and not ignored, and it runs as the
chart expects."""

import json
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORE = ROOT / "deploy" / "Dockerfile.dockerignore"


def instructions() -> list[tuple[str, str]]:
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, value in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, value))
    return found


def test_only_known_instructions() -> None:
    assert {name for name, _ in instructions()} == {
        "ARG",
        "FROM",
        "RUN",
        "ENV",
        "WORKDIR",
        "COPY",
        "USER",
        "EXPOSE",
        "HEALTHCHECK",
        "CMD",
    }


def test_what_is_copied_is_there_and_in_the_context() -> None:
    allowed = {line[1:] for line in IGNORE.read_text().splitlines() if line.startswith("!")}
    copied = {source for name, value in stages()[0] if name == "COPY" for source in value.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert copied == allowed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert (
        packages
        | {
            "scripts/torch_versions.env",
            "pyproject.toml",
            "setup.py",
            project["project"]["readme"],
            *project["project"]["license-files"],
        }
        == copied
    )


def test_the_image_is_what_the_chart_wants() -> None:
    values = yaml.safe_load((ROOT / "helm" / "cantata" / "values.yaml").read_text())
    last = stages()[-1]
    assert [value for name, value in last if name == "USER"] == [str(values["securityContext"]["runAsUser"])]
    assert ("EXPOSE", "8000 9000") in last
    command = json.loads(next(value for name, value in last if name == "CMD"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert command[0] in scripts
    # KubeRay gives the pod's command.
    assert "ENTRYPOINT" not in {name for name, _ in last}


def test_torch_is_the_version_that_every_installation_takes() -> None:
    install = next(value for name, value in stages()[0] if name == "RUN" and "torch==" in value)
    assert install.startswith(". scripts/torch_versions.env && pip install")
    assert install.endswith('"torch==$TORCH"')
    script = (ROOT / "scripts" / "install.sh").read_text()
    assert ". scripts/torch_versions.env\n" in script
    assert "torch=torch==$TORCH\n" in script
    assert "torchs_triton=triton==$TRITON\n" in script


def test_health_is_asked_where_the_server_listens() -> None:
    (check,) = [value for name, value in stages()[-1] if name == "HEALTHCHECK"]
    assert "--start-period=" in check
    command = json.loads(check.split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    assert "http://127.0.0.1:8000/health'" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")
