"""Settings that would change nothing in the way of serving that is asked for are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import AppConfig, load_config, setting_paths
from cluster.serve.launch import serve_on_ray
from cluster.standalone.serve import serve_standalone
from cluster.ways_of_serving import check_on_ray, check_serve_application, check_standalone
from workers.errors import ConfigError

ROOT = Path(__file__).parents[2]
Check = Callable[[AppConfig], None]
WAYS: dict[str, tuple[Check, ...]] = {
    "gateway.max_header_bytes": (check_on_ray, check_serve_application),
    "gateway.header_timeout_s": (check_on_ray, check_serve_application),
    "gateway.keep_alive_timeout_s": (check_serve_application,),
    "gateways": (check_standalone,),
    "engine_host": (check_standalone,),
    "engine_drain_timeout_s": (check_standalone,),
}
"""Checks of the ways of serving in which a setting has no effect, by setting."""


def config_with(path: str, value: object) -> Any:
    return load_config(None, {}, {"engine.model_path": "somewhere", path: value})


@pytest.mark.parametrize("path", WAYS)
def test_a_setting_without_an_effect_is_refused(path: str) -> None:
    config = config_with(path, "127.0.0.2" if path == "engine_host" else 1024)
    for check in (check_on_ray, check_serve_application, check_standalone):
        if check in WAYS[path]:
            with pytest.raises(ConfigError, match=f"^{path} is (1024|127.0.0.2)"):
                check(config)
        else:
            check(config)
    check_standalone(config_with("gateways", 1))  # as it is without it


def test_each_way_of_serving_checks() -> None:
    with pytest.raises(ConfigError, match="gateways is 3, which applies only on Ray"):
        serve_standalone(config_with("gateways", 3))
    with pytest.raises(ConfigError, match=r"gateway\.header_timeout_s is 3"):
        serve_on_ray(config_with("gateway.header_timeout_s", 3))


def test_the_documentation_marks_them() -> None:
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "operations.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    meanings = {row[0].strip("| `"): row[-1] for row in rows}
    marked = {
        path: ("standalone" in meanings[path], "only on Ray" in meanings[path])
        for path in setting_paths()
        if not path.startswith("listen.") and path != "replicas"
    }
    assert {path for path, (standalone, _) in marked.items() if standalone} == {
        path for path, ways in WAYS.items() if check_on_ray in ways
    }
    assert {path for path, (_, ray) in marked.items() if ray} == {
        path for path, ways in WAYS.items() if check_standalone in ways
    }
