"""Ranks as Ray actors, each in its bundle of the placement group of the process that starts
them."""

import hashlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers.cores import thread_environment
from workers.crash_notes import CrashNotes
from workers.errors import ConfigError
from workers.executor.launcher import OnExit, Placement
from workers.rank.process import RankSpec, serve_rank

logger = logging.getLogger(__name__)


class _RankActor:
    """One rank. Its only call lasts as long as the rank."""

    def run(self, spec: str) -> None:
        """Serve until the engine sends STOP."""
        # The engine's process owns this actor: Ray ends it when that process is gone.
        rank = RankSpec.from_json(spec)
        serve_rank(rank, begin=lambda: crash_notes(rank.config, f"rank-{rank.local_rank}").begin())


def crash_notes(config: str, place: str) -> CrashNotes:
    """Return the notes of the crashes on this node, in this Ray session, of engines with this
    configuration (JSON) or of their ranks.

    Args:
        place: part of the file's name: `engine`, or the rank's number on this node. A crash of all
            ranks at once is one crash of each.
    """
    context = ray.get_runtime_context()
    name = hashlib.sha256(config.encode()).hexdigest()[:32]
    return CrashNotes(
        Path(context.get_temp_dir()) / context.get_session_name() / "cantata-crashes" / f"{name}-{place}"
    )


class RayRanks:
    """A RankLauncher for Ray actors. Created in a process of a placement group with a bundle for
    each rank.

    Args:
        group: None for the group of this process.
    """

    def __init__(self, group: PlacementGroup | None = None) -> None:
        self._group = group
        self._actors: list[Any] = []
        self._watchers: list[threading.Thread] = []

    @property
    def host(self) -> str:
        """The engine's own address (see RankLauncher)."""
        return str(get_node_ip_address())  # type: ignore[no-untyped-call]

    def place(self, num_ranks: int, device: str, num_threads: int, timeout_s: float) -> Sequence[Placement]:
        """Wait for the placement group (see RankLauncher)."""
        group = self._group = self._group or get_current_placement_group()
        if group is None or len(group.bundle_specs) < num_ranks:
            found = 0 if group is None else len(group.bundle_specs)
            raise ConfigError(
                f"{num_ranks} ranks need a placement group with one bundle each; this process runs in one "
                f"with {found}"
            )
        if not group.wait(timeout_s):
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            amounts = ", ".join(
                f"{free.get(name, 0):g} of {total.get(name, 0):g} {name} free"
                for name in group.bundle_specs[0]
            )
            raise ConfigError(
                f"after {timeout_s:g} s (engine.parallel.start_timeout_s) there is no room for {num_ranks} "
                f"ranks "
                f"of {group.bundle_specs[0]}: "
                f"{amounts}"
            )
        nodes = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}  # type: ignore[no-untyped-call]
        by_bundle = placement_group_table(group)["bundles_to_node_id"]
        hosts = [nodes[by_bundle[index]] for index in range(num_ranks)]
        # Ray shows each actor only its own GPU, as the first one.
        alone = not device.startswith("cpu")
        return [
            Placement(
                host,
                0 if alone else hosts[:index].count(host),
                hosts.count(host),
                max(1, int(group.bundle_specs[index].get("CPU", 1))),
            )
            for index, host in enumerate(hosts)
        ]

    def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
        """Start a rank (see RankLauncher)."""
        assert self._group is not None
        bundle = self._group.bundle_specs[spec.rank]
        actor_class: Any = ray.remote(_RankActor)
        actor = actor_class.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            runtime_env={"env_vars": thread_environment(spec.num_threads)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=spec.rank
            ),
        ).remote()
        self._actors.append(actor)
        watcher = threading.Thread(
            target=_watch,
            args=(actor.run.remote(spec.to_json()), on_exit),
            name=f"cantata-rank-{spec.rank}",
            daemon=True,
        )
        self._watchers.append(watcher)
        watcher.start()

    def end(self, grace_s: float) -> None:
        """End the ranks (see RankLauncher)."""
        for watcher in self._watchers:
            watcher.join(grace_s / max(len(self._watchers), 1))
        for actor, watcher in zip(self._actors, self._watchers, strict=True):
            if watcher.is_alive() and ray.is_initialized():
                ray.kill(actor, no_restart=True)
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(_KILL_S)


_KILL_S = 10.0
"""Seconds for Ray to end a killed actor."""


def _watch(running: "ray.ObjectRef[None]", on_exit: OnExit) -> None:
    try:
        ray.get(running)
        on_exit("ended by itself", None)
    except ray.exceptions.RayError as error:
        # Ray does not report the signal; the next rank there does (`workers.crash_notes`).
        on_exit(f"ended ({type(error).__name__})", None)
