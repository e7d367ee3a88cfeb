"""The resources that an engine replica needs from a Ray cluster, and whether they are available."""

from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import placement_group_table

from cluster.config import AppConfig

Bundle = Mapping[str, float]

_ACCELERATOR = "accelerator_type:"


def replica_bundles(config: AppConfig) -> list[dict[str, float]]:
    """Return the resources of a replica, one bundle per rank. The engine's own process runs beside
    rank 0 and reserves nothing."""
    num_ranks, cpus = config.engine.parallel.tensor, config.engine_cpus or 1
    bundle: dict[str, float] = {"CPU": max(1, cpus // num_ranks) if cpus >= 1 else cpus / num_ranks}
    if not config.engine.device.startswith("cpu"):
        bundle["GPU"] = 1
    return [dict(bundle) for _ in range(num_ranks)]


def bundle_strategy(bundles: Sequence[Bundle]) -> str:
    """Return STRICT_PACK if one node of the running cluster is large enough for all bundles, else
    PACK (as few nodes as possible)."""
    return (
        "STRICT_PACK" if any(_num_fitting(node, bundles[0]) >= len(bundles) for node in _nodes()) else "PACK"
    )


def accelerators() -> set[str] | None:
    """Return the GPU types of the running cluster by Ray's names; None if a node does not report
    its type or no node has a GPU."""
    found: set[str] = set()
    for node in _nodes():
        if node.get("GPU", 0):
            kinds = {name.removeprefix(_ACCELERATOR) for name in node if name.startswith(_ACCELERATOR)}
            if not kinds:
                return None
            found |= kinds
    return found or None


def shortage(bundles: Sequence[Bundle], num_replicas: int = 1) -> str | None:
    """Return why the replicas cannot be placed, as a phrase with the resources needed and free;
    None if they can be placed.

    Args:
        bundles: the bundles of one replica; all replicas are alike.
    """
    (bundle, *_), num_bundles = bundles, len(bundles) * num_replicas
    if sum(_num_fitting(node, bundle) for node in _nodes()) >= num_bundles and not _is_pending(bundles):
        return None
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    wanted = " and ".join(_amount(name, amount * num_bundles) for name, amount in bundle.items())
    there = " and ".join(f"{free.get(name, 0):g} of {_amount(name, total.get(name, 0))}" for name in bundle)
    of = f"of {len(bundles)} rank{'s' * (len(bundles) > 1)}"
    return (
        f"{num_replicas} replica{'s' * (num_replicas > 1)} {of} need{'s' * (num_replicas == 1)} "
        f"{wanted}; {there} free"
    )


def num_hosts() -> int:
    """Return the number of hosts of the running cluster, by the addresses of its nodes."""
    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})  # type: ignore[no-untyped-call]


def _nodes() -> list[dict[str, float]]:
    """Return each node's total resources, in use or not; empty without a running Ray, as in `serve
    build`."""
    if not ray.is_initialized():
        return []
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _num_fitting(node: Bundle, bundle: Bundle) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in bundle.items())


def _is_pending(bundles: Sequence[Bundle]) -> bool:
    """Return whether a placement group with these bundles is waiting for room."""
    groups = placement_group_table().values()
    return any(
        group["state"] == "PENDING" and list(group["bundles"].values()) == list(bundles) for group in groups
    )


def _amount(name: str, amount: float) -> str:
    return f"{amount:g} {name}{'s' * (amount != 1)}"
