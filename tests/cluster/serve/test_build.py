"""The application that Serve gets, and the configs refused before anything is started or
replaced."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeApplicationSchema

from cluster.config import WRAP_UP, AppConfig, GatewayConfig
from cluster.generation import Capacity, ChatDefaults
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.run_time_settings import RUN_TIME_SETTINGS
from cluster.serve import cluster_view
from cluster.serve.app import application, build
from cluster.serve.cluster_view import ServeOptions
from cluster.serve.gateway import GatewayReplica
from cluster.serve.preflight import check_options
from cluster.serve.replica import EngineReplica
from tests.support.tiny_model import TINY
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.model.make_checkpoint import write_checkpoint

VOCAB_SIZE = 2048


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny"
    model = replace(TINY, vocab_size=VOCAB_SIZE)
    write_checkpoint(path, model, seed=0, add_files=lambda folder: write_bpe_tokenizer(folder, VOCAB_SIZE))
    return path


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tiny")


def arguments(path: Path, **engine: object) -> dict[str, Any]:
    return {"engine": {"model_path": str(path), "cache": {"memory_bytes": "16MiB"}, **engine}}


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(RayServeException) as caught:
        build(args)
    return str(caught.value)


def options(app: Any) -> dict[str, Any]:
    """Return each deployment's config, by name, as Serve will read it."""
    gateway = app._bound_deployment
    engine = gateway._replica_config.init_args[0]._bound_deployment
    return {deployment.name: deployment._deployment_config for deployment in (engine, gateway)}


def test_how_replicas_are_replaced_and_what_they_get_to_end(checkpoint: Path) -> None:
    args = arguments(checkpoint) | {"engine_drain_timeout_s": 77, "gateway_drain_timeout_s": 99}
    found = options(build(args))
    engine, gateway = found["engine"], found["gateway"]
    # Gateways reserve nothing: there is always room for the new ones. A GPU for a surge of engines
    # is the operator's to have.
    assert (engine.max_surge_percent, gateway.max_surge_percent) == (0, 100)
    assert engine.graceful_shutdown_timeout_s > 77
    assert gateway.graceful_shutdown_timeout_s > 99
    # Serve calls `reconfigure` at the start only where there is something, and both take the first
    # call for the start's.
    assert engine.user_config == gateway.user_config == {}
    (_, _, drain_timeout_s) = (
        build(args)._bound_deployment._replica_config.init_args[0]._bound_deployment._replica_config.init_args
    )
    assert drain_timeout_s == 77


def test_by_default_running_requests_have_minutes() -> None:
    config = AppConfig(engine=EngineConfig(Path("somewhere")))
    assert config.engine_drain_timeout_s >= 300
    assert config.gateway_drain_timeout_s >= 300


def test_how_many_replicas_is_said_outside_the_arguments(checkpoint: Path) -> None:
    for name, deployment in (("replicas", "engine"), ("gateways", "gateway")):
        said = refusal(arguments(checkpoint) | {name: 3})
        assert said.startswith(f"{name} is not a setting of a Serve application's args")
        assert f"`deployments: [{{name: {deployment}, num_replicas: 3}}]`" in said
    config = AppConfig.model_validate(arguments(checkpoint))
    found = options(application(config, replicas=3, gateways=2))
    assert (found["engine"].num_replicas, found["gateway"].num_replicas) == (3, 2)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"dtyp": "float32"}, "engine.dtyp is not a known setting; did you mean engine.dtype?"),
        ({"max_model_len": 513}, "max_model_len must be 2 to 512, the model's context; got 513"),
        ({"parallel": {"tensor": 5}}, "tensor"),
        ({"cache": {"memory_bytes": "1KiB"}}, "engine.cache.memory_bytes"),
    ],
)
def test_settings_that_cannot_work(checkpoint: Path, engine: dict[str, Any], said: str) -> None:
    assert said in refusal(arguments(checkpoint, **engine))


def test_checkpoints_that_are_not_whole(checkpoint: Path) -> None:
    assert refusal(arguments(Path("/nowhere"))).startswith("/nowhere is not a folder")
    (weights,) = checkpoint.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert str(weights) in refusal(arguments(checkpoint))
    weights.write_bytes(content.replace(b'"lm_head.weight"', b'"lm_head.height"'))
    assert "tensor lm_head.weight of shape" in refusal(arguments(checkpoint))
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(arguments(checkpoint))


def test_settings_in_the_environment_of_a_node_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANTATA_GATEWAY__API_KEYS", "key")
    build(arguments(checkpoint))
    monkeypatch.setenv("CANTATA_ENGINE__DTYPE", "float32")
    assert refusal(arguments(checkpoint)).startswith("CANTATA_ENGINE__DTYPE is set in the environment")


def test_settings_without_an_effect_on_serve_are_refused(checkpoint: Path) -> None:
    args = arguments(checkpoint) | {"gateway": {"keep_alive_timeout_s": 600}}
    assert "write http_options.keep_alive_timeout_s in the YAML" in refusal(args)
    build(arguments(checkpoint) | {"gateway": {"keep_alive_timeout_s": 120}})


def test_a_node_without_weights_may_build(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    (weights,) = checkpoint.glob("*.safetensors")
    weights.unlink()
    build(arguments(checkpoint))
    assert "has no weights on the node that builds the application" in caplog.text


def test_what_has_no_effect_in_a_checkpoint_is_warned_of(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = json.loads((checkpoint / "config.json").read_text())
    del fields["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(fields))
    (checkpoint / "adapter_config.json").write_text("{}")
    build(arguments(checkpoint))
    assert "the experts are stored in MXFP4 and are read as that" in caplog.text
    assert "adapter_config.json describes an adapter, which is not applied" in caplog.text


@pytest.mark.parametrize(
    ("said", "deployments"),
    [
        (
            "deployment engine: Serve's autoscaling does not see the requests",
            {"engine": {"autoscaling_config": {"min_replicas": 1}}},
        ),
        (
            "deployment engine: Serve's autoscaling does not see the requests",
            {"engine": {"num_replicas": "auto"}},
        ),
        (
            "deployment gateway: Serve's autoscaling does not see the requests",
            {"gateway": {"num_replicas": "auto"}},
        ),
        (
            "max_body_bytes is not a run-time setting",
            {"gateway": {"user_config": {"max_body_bytes": 1}}},
        ),
        (
            "gateway: max_in_flight_requests must be greater than or equal to 1",
            {"gateway": {"user_config": {"max_in_flight_requests": 0}}},
        ),
        ("use args.engine instead of user_config", {"engine": {"user_config": {"dtype": "float32"}}}),
    ],
)
def test_what_stands_beside_the_arguments(said: str, deployments: dict[str, Any]) -> None:
    config = AppConfig(engine=EngineConfig(Path("somewhere")))
    right = {"engine": {"num_replicas": 2}, "gateway": {"user_config": {"request_timeout_s": 3}}}
    check_options(config, ServeOptions(True, False, right))
    with pytest.raises(ConfigError, match=said):
        check_options(config, ServeOptions(True, False, deployments))


class Controller:
    """Serve's controller, which has been told of these applications."""

    def __init__(self, *applications: dict[str, Any]) -> None:
        self._configs = {
            str(number): ServeApplicationSchema.model_validate(application)
            for number, application in enumerate(applications)
        }
        self._controller = self
        self.get_app_configs = SimpleNamespace(remote=lambda: self._configs)

    def be_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cluster_view, "_get_global_client", lambda **_: self)
        got = SimpleNamespace(is_initialized=lambda: True, get=lambda configs, timeout: configs)
        monkeypatch.setattr(cluster_view, "ray", got)


AUTO = {"name": "engine", "num_replicas": "auto"}
NUMBER = {"name": "engine", "num_replicas": 1}


@pytest.mark.parametrize(
    ("said", "applications"),
    [
        ("Serve's autoscaling does not see", [{"deployments": [AUTO]}]),
        # Whatever the builder is called, and whatever else runs with these arguments.
        ("Serve's autoscaling does not see", [{"import_path": "mine.app", "deployments": [AUTO]}]),
        ("Serve's autoscaling does not see", [{"deployments": [AUTO]}, {"deployments": [NUMBER]}]),
        ("autoscaling_policy: ", [{"autoscaling_policy": {"policy_function": "a:b"}}]),
        ("external_scaler_enabled: set it to true", [{"deployments": [NUMBER]}]),
    ],
)
def test_autoscaling_is_refused_wherever_it_is_switched_on(
    said: str, applications: list[dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"import_path": "cluster.serve.app:build", "args": arguments(checkpoint)}
    Controller(*(mine | application for application in applications)).be_found(monkeypatch)
    assert said in refusal(arguments(checkpoint))
    other = mine | {"args": {"something": "else"}, "deployments": [AUTO]}
    Controller(mine | {"external_scaler_enabled": True, "deployments": [NUMBER]}, other).be_found(monkeypatch)
    build(arguments(checkpoint))


@pytest.mark.parametrize("where", [{}, {"engine": {}}, {"gateway": {}}])
@pytest.mark.parametrize("setting", ["autoscaling_config", "num_replicas"])
def test_the_arguments_have_no_autoscaling(where: dict[str, Any], setting: str, checkpoint: Path) -> None:
    args = arguments(checkpoint)
    for name in where:
        args.setdefault(name, {})[setting] = "auto"
    if not where:
        args[setting] = "auto"
    assert f"{setting} is not" in refusal(args)


class Service:
    """A service that records its gateway's calls."""

    def __init__(self) -> None:
        self.told: list[tuple[ChatDefaults, Capacity]] = []

    def reconfigure(self, defaults: ChatDefaults, capacity: Capacity) -> None:
        self.told.append((defaults, capacity))


async def test_a_running_gateway_takes_settings_over_and_survives_wrong_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gateway = GatewayConfig(request_timeout_s=30, reasoning_effort="low")
    config = AppConfig(engine=EngineConfig(Path("somewhere")), gateway=gateway)
    replica: Any = SimpleNamespace(_config=config, _configured=False, _service=Service())
    wrong = {"max_in_flight_requests": "many"}
    with pytest.raises(ConfigError):  # at its start
        await GatewayReplica.reconfigure(replica, wrong)
    await GatewayReplica.reconfigure(replica, {})
    await GatewayReplica.reconfigure(replica, {"max_in_flight_requests": 7, "conversation_date": "none"})
    await GatewayReplica.reconfigure(replica, wrong)
    assert (
        "keeps its previous settings: user_config of the deployment gateway: max_in_flight_requests"
        in caplog.text
    )
    await GatewayReplica.reconfigure(replica, {"request_timeout_s": None, "reasoning_effort": "high"})
    constraint = {
        "harmony_constraint": "headers",
        "tool_arguments": "json",
        "reasoning_wrap_up": "So.",
        "reserve_answer": False,
    }
    await GatewayReplica.reconfigure(replica, constraint)
    assert replica._service.told == [
        (ChatDefaults("auto", "low", wrap_up=WRAP_UP), Capacity(1024, 30)),
        (ChatDefaults("none", "low", wrap_up=WRAP_UP), Capacity(7, 30)),
        (ChatDefaults("auto", "high", wrap_up=WRAP_UP), Capacity(1024, None)),
        (ChatDefaults("auto", "low", "headers", "json", "So.", False), Capacity(1024, 30)),
    ]
    tried = {"max_in_flight_requests", "conversation_date", "request_timeout_s", "reasoning_effort"}
    assert tried | constraint.keys() == set(RUN_TIME_SETTINGS)


async def test_a_running_engine_survives_a_user_config(caplog: pytest.LogCaptureFixture) -> None:
    replica: Any = SimpleNamespace(_started=False)
    with pytest.raises(ConfigError, match=r"use args\.engine instead of user_config"):
        await EngineReplica.reconfigure(replica, {"dtype": "float32"})
    await EngineReplica.reconfigure(replica, {})
    with caplog.at_level(logging.ERROR):
        await EngineReplica.reconfigure(replica, {"dtype": "float32"})
    assert "user_config is ignored" in caplog.text
