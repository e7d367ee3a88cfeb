"""The chart, through the real helm: valid manifests, a Serve config that Cantata itself reads, and
wrong values refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import AppConfig, GatewayConfig, setting_paths
from cluster.run_time_settings import RUN_TIME_SETTINGS, reconfigured
from cluster.serve.cluster_view import ServeOptions
from cluster.serve.preflight import check_options
from cluster.serve.ray_environment import CLUSTER_ENVIRONMENT
from tests.support.helm_chart import CHART, KUBERNETES_VERSION, ROOT, Helm, check_manifest, pod_templates
from workers.model.make_checkpoint import preset_config
from workers.parallel.shard import plan_shards

CPU = CHART / "ci" / "cpu.yaml"
GPU = CHART / "ci" / "gpu.yaml"
TP2 = CHART / "ci" / "gpu-tp2.yaml"
TP8 = CHART / "ci" / "gpu-tp8.yaml"
PLACED = CHART / "ci" / "placed.yaml"
ALL = [CPU, GPU, TP2, TP8, PLACED]
RUN_TIME_LIMITS = [name for name in RUN_TIME_SETTINGS if name.startswith(("max_", "request_"))]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"))


def ray_service(helm: Helm, *arguments: str | Path) -> dict[str, Any]:
    return next(manifest for manifest in helm.render(*arguments) if manifest["kind"] == "RayService")


def serve_config(service: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


@pytest.mark.parametrize("values", ALL, ids=lambda path: path.stem)
def test_lint_finds_nothing(helm: Helm, values: Path) -> None:
    done = helm.run("lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", ALL, ids=lambda path: path.stem)
def test_manifests_are_valid(helm: Helm, values: Path) -> None:
    manifests = helm.render("--values", values)
    assert {manifest["kind"] for manifest in manifests} == (
        {"ServiceMonitor", "RayService"} if values == GPU else {"RayService"}
    )
    for manifest in manifests:
        check_manifest(manifest)
        assert manifest["metadata"]["namespace"] == "models"


@pytest.mark.parametrize("values", ALL, ids=lambda path: path.stem)
def test_pods_and_service_are_valid_core_objects(helm: Helm, values: Path) -> None:
    # What KubeRay makes of the templates: the schema of the custom resource knows less of pods than
    # that of Pod itself.
    service = ray_service(helm, "--values", values)
    for template in pod_templates(service):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
    made = {"apiVersion": "v1", "kind": "Service", **service["spec"]["serveService"]}
    kubernetes_validate.validate(made, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicaz", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicas", "two"),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.imagePullPolice", "Always"),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports.0.containerPort", "x"),
        ("spec.rayClusterConfig.authOptions.mode", "open"),
        ("spec.serveConfig", "x"),
    ],
)
def test_the_check_refuses_what_an_api_server_would(helm: Helm, path: str, value: object) -> None:
    service = ray_service(helm, "--values", CPU)
    check_manifest(service)
    target: Any = service
    *parents, name = path.split(".")
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    target[name] = value
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(service)


def test_the_serve_config_is_the_application_of_deploy_local(helm: Helm) -> None:
    rendered = serve_config(ray_service(helm, "--values", CPU))
    local = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
    ServeDeploySchema.model_validate(rendered)
    for config in (rendered, local):
        del (
            config["applications"][0]["args"],
            config["applications"][0]["deployments"],
            config["http_options"]["host"],
        )
    assert rendered == local


def test_the_arguments_are_read_by_cantata(helm: Helm) -> None:
    def settings(values: Path) -> tuple[AppConfig, GatewayConfig, dict[str, dict[str, Any]]]:
        (application,) = serve_config(ray_service(helm, "--values", values))["applications"]
        config = AppConfig.model_validate(application["args"])
        options = {deployment["name"]: deployment for deployment in application["deployments"]}
        check_options(config, ServeOptions(application["external_scaler_enabled"], False, options))
        return config, reconfigured(config.gateway, options["gateway"]["user_config"]), options

    least, _, least_options = settings(CPU)
    full, gateway, options = settings(GPU)
    assert least.engine.model_path == Path("/models/tiny")
    assert (least.model_name, least.engine.device, least.engine_cpus) == ("tiny", "cpu", 4)
    assert [least_options[name]["num_replicas"] for name in ("engine", "gateway")] == [1, 1]
    assert full.engine.model_path == Path("/models/openai/gpt-oss-20b")
    assert full.engine.cache.memory_bytes == 40 * 2**30
    assert full.engine.scheduler.max_num_batched_tokens == 4096
    assert full.gateway.max_body_bytes == 16 * 2**20
    assert [options[name]["num_replicas"] for name in ("engine", "gateway")] == [2, 2]
    assert (gateway.conversation_date, gateway.request_timeout_s, gateway.max_in_flight_requests) == (
        "2026-01-31",
        900,
        2048,
    )


def test_what_a_change_replaces(helm: Helm) -> None:
    """In the Serve config only `args` count; in the cluster's, KubeRay ignores the number of
    workers in a group."""

    def rendered(*settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
        service = ray_service(
            helm, "--values", GPU, *(part for setting in settings for part in ("--set", setting))
        )
        cluster = service["spec"]["rayClusterConfig"]
        for group in cluster["workerGroupSpecs"]:
            for name in ("replicas", "minReplicas", "maxReplicas"):
                del group[name]
        return serve_config(service)["applications"][0]["args"], cluster

    before = rendered()
    scaled = [
        f"config.{name}=7"
        for name in ("replicas", "gateways", *(f"gateway.{name}" for name in RUN_TIME_LIMITS))
    ]
    assert (
        rendered(
            *scaled,
            "config.gateway.reasoning_effort=high",
            "config.gateway.conversation_date=none",
            "config.gateway.harmony_constraint=headers",
        )
        == before
    )
    assert rendered("config.engine.max_model_len=4096")[1] == before[1]
    assert rendered("config.engine.max_model_len=4096")[0] != before[0]


def test_the_time_of_idle_connections_goes_to_serve(helm: Helm) -> None:
    """The chart passes the time to Serve; an application's argument would have no effect."""
    rendered = serve_config(
        ray_service(helm, "--values", CPU, "--set", "config.gateway.keep_alive_timeout_s=600")
    )
    assert rendered["http_options"]["keep_alive_timeout_s"] == 600
    assert "keep_alive_timeout_s" not in rendered["applications"][0]["args"]["gateway"]


def test_what_is_set_reaches_pods_service_gateways_and_monitor(helm: Helm) -> None:
    settings = {
        "image.pullPolicy": "Never",
        "probes.startup.failureThreshold": 71,
        "probes.liveness.failureThreshold": 72,
        "probes.readiness.failureThreshold": 73,
        "securityContext.runAsUser": 1234,
        "securityContext.fsGroup": 1235,
        "service.type": "LoadBalancer",
        "serviceMonitor.interval": "41s",
        "config.gateway.reasoning_effort": "high",
    }
    arguments = [part for path, value in settings.items() for part in ("--set", f"{path}={value}")]
    manifests = {manifest["kind"]: manifest["spec"] for manifest in helm.render("--values", GPU, *arguments)}
    service = {"spec": manifests["RayService"]}
    head, *workers = (template["spec"] for template in pod_templates(service))
    for pod in (head, *workers):
        (container,) = pod["containers"]
        assert container["imagePullPolicy"] == "Never"
        assert container["startupProbe"]["failureThreshold"] == 71
        assert container["livenessProbe"]["failureThreshold"] == 72
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1234, 1235)
    http_port = serve_config(service)["http_options"]["port"]
    for pod in workers:
        probe = pod["containers"][0]["readinessProbe"]
        assert probe["failureThreshold"] == 73
        assert f"http://127.0.0.1:{http_port}/-/healthz" in probe["exec"]["command"][-1]
    made = manifests["RayService"]["serveService"]["spec"]
    assert made["type"] == "LoadBalancer"
    assert made["ports"][0]["targetPort"] == http_port
    (endpoint,) = manifests["ServiceMonitor"]["endpoints"]
    assert (endpoint["interval"], endpoint["honorLabels"]) == ("41s", True), "the page has labels of its own"
    (application,) = serve_config(service)["applications"]
    options = {deployment["name"]: deployment for deployment in application["deployments"]}
    args = AppConfig.model_validate(application["args"])
    assert reconfigured(args.gateway, options["gateway"]["user_config"]).reasoning_effort == "high"


def test_a_surge_has_workers_to_run_on(helm: Helm) -> None:
    for values, replicas, percent, workers in (
        (GPU, 2, 0, 2),
        (GPU, 2, 50, 3),
        (GPU, 4, 30, 6),
        (GPU, 4, 100, 8),
    ):
        service = ray_service(
            helm, "--values", values, "--set", f"config.replicas={replicas},engineSurgePercent={percent}"
        )
        (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        engine = serve_config(service)["applications"][0]["deployments"][0]
        assert (group["replicas"], engine["num_replicas"], engine["max_surge_percent"]) == (
            workers,
            replicas,
            percent,
        )


def test_large_numbers_stay_whole(helm: Helm) -> None:
    flags = ("--set", "config.engine.cache.memory_bytes=42949672960,config.engine.max_model_len=131072")
    config = AppConfig.model_validate(
        serve_config(ray_service(helm, "--values", CPU, *flags))["applications"][0]["args"]
    )
    assert (config.engine.cache.memory_bytes, config.engine.max_model_len) == (42949672960, 131072)


def test_the_schema_knows_exactly_the_settings(helm: Helm) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def leaves(node: dict[str, Any], prefix: str) -> set[str]:
        if "properties" not in node:
            return {prefix}
        return {
            leaf
            for name, inner in node["properties"].items()
            for leaf in leaves(inner, f"{prefix}.{name}" if prefix else name)
        }

    # The model's path is model.path, keys would stand in the clear, and engines must be reachable
    # from other nodes.
    elsewhere = {"engine.model_path", "gateway.api_keys", "gateway.secret", "engine_host"}
    elsewhere |= {"gateway.max_header_bytes", "gateway.header_timeout_s"}  # of --standalone
    deployments = {"replicas", "gateways"}
    assert (
        leaves(schema["properties"]["config"], "") == set(setting_paths(AppConfig)) - elsewhere | deployments
    )


def test_the_schema_is_closed() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)

    def objects(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, list):
            return [found for entry in node for found in objects(entry)]
        if not isinstance(node, dict):
            return []
        return ([node] if "properties" in node and node.get("type") == "object" else []) + objects(
            list(node.values())
        )

    found = objects(schema)
    assert len(found) > 20
    assert all(node["additionalProperties"] is False for node in found)


def test_ray_is_started_as_it_should_be(helm: Helm) -> None:
    service = ray_service(helm, "--values", GPU)
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    head, worker = pod_templates(service)
    for template in (head, worker):
        container = template["spec"]["containers"][0]
        environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        keys = {
            "name": "CANTATA_GATEWAY__API_KEYS",
            "valueFrom": {"secretKeyRef": {"name": "cantata-keys", "key": "api_keys"}},
        }
        secret = {
            "name": "CANTATA_GATEWAY__SECRET",
            "valueFrom": {"secretKeyRef": {"name": "cantata-keys", "key": "secret", "optional": True}},
        }
        url = {
            "name": "CANTATA_STATE__URL",
            "valueFrom": {"secretKeyRef": {"name": "cantata-state", "key": "url"}},
        }
        assert [entry for entry in container["env"] if "value" not in entry] == [keys, secret, url]
        # What `cantata serve` sets, but for what holds for one machine without a load balancer; and
        # what the values add.
        assert environment == CLUSTER_ENVIRONMENT | {"RAY_BACKEND_LOG_LEVEL": "warning"}
        # KubeRay builds the Service from the ports of these names.
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert (ports["serve"], ports["serve-grpc"]) == (8000, 9000)
        assert {"name": "model", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
        assert container["image"] == "registry.example.com/team/cantata:0.1.0-cuda"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    group = cluster["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert worker["spec"]["containers"][0]["resources"]["limits"] == {
        "cpu": "8",
        "memory": "64Gi",
        "nvidia.com/gpu": "1",
    }
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]


def test_where_and_how_pods_run_can_be_said(helm: Helm) -> None:
    values = yaml.safe_load(PLACED.read_text())
    service = ray_service(helm, "--values", PLACED)
    head, worker = pod_templates(service)
    for template, own in ((head, values["head"]), (worker, values["worker"])):
        pod, container = template["spec"], template["spec"]["containers"][0]
        assert container["image"] == f"{values['image']['repository']}@{values['image']['digest']}"
        for name in ("affinity", "topologySpreadConstraints", "priorityClassName"):
            assert pod.get(name) == own.get(name)
        assert template["metadata"].get("annotations") == own.get("podAnnotations")
        assert own.get("podLabels", {}).items() <= template["metadata"]["labels"].items()
        assert pod["serviceAccountName"] == "cantata"
        assert values["extraVolumes"][0] in pod["volumes"]
        assert values["extraVolumeMounts"][0] in container["volumeMounts"]
        assert container["envFrom"] == values["envFrom"]
    limits = worker["spec"]["containers"][0]["resources"]["limits"]
    assert {name for name in limits if "gpu" in name} == {"amd.com/gpu"}
    strategy = service["spec"]["upgradeStrategy"]
    assert strategy == {
        "type": values["upgradeStrategy"],
        "clusterUpgradeOptions": values["clusterUpgradeOptions"],
    }


def test_who_needs_twice_the_gpus_is_told(helm: Helm) -> None:
    assert "TWICE the GPUs" in (CHART / "values.yaml").read_text()
    told = "needs twice the GPUs"
    for values, strategy, wanted in (
        (GPU, "NewCluster", True),
        (GPU, "None", False),
        (CPU, "NewCluster", False),
    ):
        done = helm.run(
            "install",
            "chat",
            CHART,
            "--values",
            values,
            "--set",
            f"upgradeStrategy={strategy}",
            "--dry-run=client",
        )
        assert done.returncode == 0, done.stderr
        assert (told in done.stdout.split("NOTES:")[1]) == wanted


def test_a_second_cluster_lets_requests_on_the_first_finish(helm: Helm) -> None:
    for flags, seconds in (
        ((), AppConfig.model_fields["gateway_drain_timeout_s"].default),
        (("--set-json", "config.gateway_drain_timeout_s=90.5"), 91),
        (("--set", "config.gateway_drain_timeout_s=0"), 0),
    ):
        spec = ray_service(helm, "--values", CPU, *flags)["spec"]
        assert spec["rayClusterDeletionDelaySeconds"] == seconds
    assert isinstance(spec["rayClusterDeletionDelaySeconds"], int)


def test_no_pod_depends_on_what_kuberay_adds_by_default(helm: Helm) -> None:
    """Before 1.6 its probes need wget, and it counts GPUs only under names that it knows."""
    service = ray_service(helm, "--values", PLACED, "--set", "worker.gpuResource=nvidia.com/gpu.shared")
    for template in pod_templates(service):
        container = template["spec"]["containers"][0]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert "wget" not in json.dumps(container)
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["workerGroupSpecs"][0]["rayStartParams"] == {"num-gpus": "1"}
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["readinessProbe"]
    assert head["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_shared_memory_of_each_pod_is_its_own(helm: Helm) -> None:
    service = ray_service(helm, "--values", TP8)
    head, worker = (
        next(
            volume["emptyDir"] for volume in template["spec"]["volumes"] if volume["name"] == "shared-memory"
        )
        for template in pod_templates(service)
    )
    assert (head["sizeLimit"], worker["sizeLimit"]) == ("1Gi", "16Gi")


def test_no_variable_is_set_twice(helm: Helm) -> None:
    own = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "7200"}
    flags = ("--set-string", ",".join(f"env.{name}={value}" for name, value in own.items()))
    for template in pod_templates(ray_service(helm, "--values", GPU, *flags)):
        names = [entry["name"] for entry in template["spec"]["containers"][0]["env"]]
        assert len(set(names)) == len(names)
        for name, value in own.items():
            assert {"name": name, "value": value} in template["spec"]["containers"][0]["env"]


def test_the_monitor_finds_the_service(helm: Helm) -> None:
    monitor, service = sorted(
        helm.render("--values", GPU), key=lambda manifest: manifest["kind"] == "RayService"
    )
    wanted = monitor["spec"]["selector"]["matchLabels"]
    labels = service["spec"]["serveService"]["metadata"]["labels"]
    assert wanted.items() <= labels.items()
    assert monitor["spec"]["endpoints"][0]["port"] in {
        port["name"] for port in service["spec"]["serveService"]["spec"]["ports"]
    }
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_long_release_names_leave_room_for_kuberay(helm: Helm) -> None:
    # KubeRay appends to the name and Kubernetes allows 63 characters.
    (service,) = helm.render("--values", CPU, release="a-release-with-a-name-of-fifty-three-characters-in-it")
    assert re.fullmatch(r"[a-z0-9][-a-z0-9]{0,38}[a-z0-9]", service["metadata"]["name"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("replicaz=2", "'replicaz' not allowed"),
        ("config.replicaz=2", "'replicaz' not allowed"),
        ("config.engine.dtypo=x", "'dtypo' not allowed"),
        ("config.gateway.api_keys={a}", "'api_keys' not allowed"),
        ("config.engine.model_path=/x", "'model_path' not allowed"),
        ("config.engine.dtype=float16", "/config/engine/dtype"),
        ("config.replicas=two", "/config/replicas"),
        ("config.replicas=auto", "/config/replicas"),
        ("config.gateways=auto", "/config/gateways"),
        ("config.replicas=0", "/config/replicas"),
        ("engineSurgePercent=101", "/engineSurgePercent"),
        ("config.engine.parallel.tensor=17", "/config/engine/parallel/tensor"),
        ("image.repository=", "/image/repository"),
        ("image.repository=name:tag", "/image/repository"),
        ("model.claimName=", "/model/claimName"),
        ("model.path=../secrets", "/model/path"),
        ("model.path=/tiny", "/model/path"),
        ("worker.resources.cpu=500m", "/worker/resources/cpu"),
        ("worker.resources.memory=lots", "/worker/resources/memory"),
        ("worker.gpus=9", "/worker/gpus"),
        ("service.type=Open", "/service/type"),
        ("securityContext.runAsUser=0", "/securityContext/runAsUser"),
        ("env.RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE"),
        ("env.CANTATA_ENGINE__DTYPE=float32", "CANTATA_ENGINE__DTYPE"),
        ("image.digest=latest", "/image/digest"),
        ("worker.gpuResource=gpus", "/worker/gpuResource"),
        ("upgradeStrategy=Rolling", "/upgradeStrategy"),
        ("upgradeStrategy=NewClusterWithIncrementalUpgrade", "needs clusterUpgradeOptions"),
        ("clusterUpgradeOptions.step=1", "'step' not allowed"),
        ("rayVersion=2.9.0", "/rayVersion"),
        ("worker.gpus=1", "config.engine.device is cpu"),
        ("config.engine.device=cuda", "worker.gpus is 0"),
        ("config.engine_cpus=5", "worker.resources.cpu is less than config.engine_cpus"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, setting: str, said: str) -> None:
    done = helm.run("template", "chat", CHART, "--values", CPU, "--set", setting)
    assert done.returncode != 0
    assert said in done.stderr


def test_values_that_must_be_given_are_asked_for(helm: Helm) -> None:
    done = helm.run("template", "chat", CHART)
    assert done.returncode != 0
    assert "/image/repository" in done.stderr
    assert "/model/claimName" in done.stderr


@pytest.mark.parametrize(("values", "ranks"), [(TP2, 2), (TP8, 8)], ids=["tp2", "tp8"])
def test_an_engine_of_several_ranks_has_a_pod_with_a_gpu_for_each(
    helm: Helm, values: Path, ranks: int
) -> None:
    service = ray_service(helm, "--values", values, "--set", "config.replicas=3")
    config = AppConfig.model_validate(serve_config(service)["applications"][0]["args"])
    plan_shards(preset_config("120b"), config.engine.parallel)
    _, worker = pod_templates(service)
    assert config.engine.parallel.tensor == ranks
    assert worker["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(ranks)
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in worker["spec"][
        "volumes"
    ]
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 3


def test_sixteen_ranks_are_two_pods(helm: Helm) -> None:
    flags = ("--set", "config.replicas=3,config.engine.parallel.tensor=16,config.engine.parallel.expert=16")
    group = ray_service(helm, "--values", TP8, *flags)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (6, 6, 6)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("worker.gpus=4", "worker.gpus is 4 but config.engine.parallel.tensor is 8"),
        (
            "worker.gpus=8,config.engine.parallel.tensor=4",
            "worker.gpus is 8 but config.engine.parallel.tensor is 4",
        ),
        (
            "config.engine_cpus=1,worker.resources.cpu=7",
            "worker.resources.cpu is less than config.engine.parallel.tensor",
        ),
    ],
)
def test_pods_that_hold_no_engine_are_refused(helm: Helm, setting: str, said: str) -> None:
    done = helm.run("template", "chat", CHART, "--values", TP8, "--set", setting)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("document", ["docs/operations.md", "helm/cantata/README.md"])
def test_the_documented_command_renders(helm: Helm, document: str) -> None:
    (command,) = re.findall(r"helm install ([^`\n]*)", (ROOT / document).read_text())
    release, chart, *flags = [
        str(ROOT / word) if word.startswith("helm/") else word for word in command.split()
    ]
    assert Path(chart) == CHART
    (service,) = helm.render(*flags, release=release)
    check_manifest(service)
    AppConfig.model_validate(serve_config(service)["applications"][0]["args"])
    assert service["metadata"]["name"] == "chat-cantata"
