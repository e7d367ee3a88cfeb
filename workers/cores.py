"""The number of cores this process may use, and of compute threads an engine gets."""

import os
from pathlib import Path

from workers.errors import ConfigError

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(quota_file: Path = _QUOTA_FILE) -> int:
    """Return the cores in this process's affinity mask, or fewer if its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return cores


def engine_threads(wanted: int | None, num_engines: int = 1, *, setting: str) -> int:
    """Return the compute threads of each of several engines on this machine.

    Args:
        wanted: requested number; None for an equal share of the cores.
        setting: the setting's name for the user.
    Raises:
        ConfigError: there are too few cores; more threads than cores would only wait for each
            other.
    """
    cores = usable_cores()
    if wanted is None:
        return max(1, cores // num_engines)
    if wanted < 1:
        raise ConfigError(f"{setting} must be at least 1, got {wanted}")
    if wanted * num_engines > cores:
        engines = (
            "" if num_engines == 1 else f" for each of {num_engines} engines, {wanted * num_engines} in total"
        )
        raise ConfigError(
            f"{setting} is {wanted}{engines}, but this process may use {cores} cores: set at most "
            f"{max(1, cores // num_engines)}"
        )
    return wanted


def thread_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a process with `num_threads` compute threads. torch's own threads,
    which are nearly always idle, then sleep instead of keeping the cores from the C++ kernels'
    threads for milliseconds."""
    return {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}


def cores_of_rank(number: int, num_ranks: int, num_threads: int, topology: Path = _TOPOLOGY) -> list[int]:
    """Return the cores reserved for a rank if the ranks of its replica use all cores. Otherwise
    return none: other processes may be assigned the same ones, and the system balances them better.
    Neighbouring cores go together: a rank has a socket, or a part of one, and both threads of a
    core.

    Args:
        number: index of the rank among the num_ranks of this host, each with num_threads threads.
        topology: folder with cpuN/topology/physical_package_id and core_id.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(
        os.sched_getaffinity(0), key=lambda core: (*_place(topology / f"cpu{core}" / "topology"), core)
    )
    if num_ranks * num_threads != len(cores):
        return []
    return cores[number * num_threads : (number + 1) * num_threads]


def _place(folder: Path) -> tuple[int, int]:
    """Return the socket, and the core in it; zeros if the system does not report them."""
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0
