"""Ranks wait for the slowest at a meeting place, and not for ever; and over which interface they
talk."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.parallel.collectives import join_store, meet_at, serve_store, use_interface_of

TIMEOUT_S = 30.0


def test_no_rank_goes_on_before_the_last_has_come() -> None:
    first = serve_store("127.0.0.1", timeout_s=TIMEOUT_S)
    stores = [first, *(join_store("127.0.0.1", first.port, timeout_s=TIMEOUT_S) for _ in range(2))]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meet_at, stores[rank], "weights", 3, TIMEOUT_S) for rank in (0, 1)]
        with pytest.raises(
            RuntimeError, match=r"^after 0\.1 s only 1 of 2 ranks have reached: another place$"
        ):
            meet_at(stores[2], "another place", 2, 0.1)
        assert not any(future.done() for future in waiting)
        meet_at(stores[2], "weights", 3, TIMEOUT_S)
        for future in waiting:
            future.result(TIMEOUT_S)


def test_collectives_take_exactly_the_interface_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    use_interface_of("127.0.0.1")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib"})
    use_interface_of("127.0.0.1")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib"}
