"""The reason that `cantata serve` on Ray reports when Serve cannot start the application; Serve's
own error leaves it out."""

from types import SimpleNamespace

import pytest

from cluster.config import load_config
from cluster.serve import launch

TRACEBACK = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:cantata:engine.initialize_and_get_metadata() (pid=1)
Traceback (most recent call last):
  File "workers/rank/rank.py", line 1, in prepare_device
    raise ConfigError(str(error)) from None
workers.errors.ConfigError: cpu_isa is neon, which is not here
"""
DEATH = "The deployment failed to start 3 times in a row. Error:\nThe actor died unexpectedly.\n"


def test_the_reason_is_printed_before_serves_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = pytest.importorskip("ray.serve")
    schema = pytest.importorskip("ray.serve.schema")

    def run(application: object, **options: object) -> None:
        raise RuntimeError("Deploying application cantata failed.")

    def deployment(status: str, message: str) -> SimpleNamespace:
        return SimpleNamespace(status=schema.DeploymentStatus(status), message=message)

    deployments = {
        "engine": deployment("DEPLOY_FAILED", TRACEBACK),
        "dead": deployment("DEPLOY_FAILED", DEATH),
        "gateway": deployment("UPDATING", "waits"),
    }
    status = SimpleNamespace(applications={launch.APPLICATION: SimpleNamespace(deployments=deployments)})
    for name, value in {"start": lambda **options: None, "run": run, "status": lambda: status}.items():
        monkeypatch.setattr(serve, name, value)
    monkeypatch.setattr("cluster.serve.app.application", lambda args, **counts: None)
    monkeypatch.setenv("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
    with pytest.raises(RuntimeError, match="Deploying application cantata failed"):
        launch._serve_application(load_config(None, {}, {"engine.model_path": "somewhere/tiny"}))
    assert capsys.readouterr().err == (
        "engine: workers.errors.ConfigError: cpu_isa is neon, which is not here\n"
        "dead: The deployment failed to start 3 times in a row. Error:\nThe actor died unexpectedly.\n"
    )
