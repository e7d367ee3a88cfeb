"""Threads for large texts: small work does not wait for large work, abandoned work is not begun,
and waiting work is bounded."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from cluster.generation import threads
from cluster.generation.threads import INLINE_CHARS, LARGE_CHARS, TextThreads
from workers.errors import Overloaded

LIMIT_S = 60


@pytest.fixture
async def pool() -> AsyncIterator[TextThreads]:
    pool = TextThreads()
    yield pool
    pool.close()


async def test_small_work_does_not_wait_for_large(pool: TextThreads) -> None:
    gate = threading.Event()
    large = [asyncio.create_task(pool.run(LARGE_CHARS + 1, gate.wait)) for _ in range(5)]
    try:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.sleep(0)
            assert await pool.run(LARGE_CHARS, threading.current_thread) is not threading.main_thread()
            assert await pool.run(INLINE_CHARS, threading.current_thread) is threading.main_thread()
        assert not any(task.done() for task in large)
    finally:
        gate.set()
    assert await asyncio.gather(*large) == [True] * 5


async def test_what_waits_is_bounded(pool: TextThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MAX_WAITING_CHARS", 3 * LARGE_CHARS)
    gate = threading.Event()
    first = asyncio.create_task(pool.run(2 * LARGE_CHARS, gate.wait))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pool.run(LARGE_CHARS + 1, gate.wait)
    first.cancel()  # its work goes on, and counts
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(Overloaded):
        await pool.run(LARGE_CHARS + 1, gate.wait)
    gate.set()
    async with asyncio.timeout(LIMIT_S):
        while pool._waiting_chars:  # noqa: ASYNC110 - the thread tells the loop a moment later
            await asyncio.sleep(0.001)
        assert (
            await pool.run(4 * LARGE_CHARS, lambda: "more than the bound, but alone")
            == "more than the bound, but alone"
        )


async def test_work_without_a_thread_does_not_count(
    pool: TextThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_memory)
        with pytest.raises(RuntimeError):
            await pool.run(threads.MAX_WAITING_CHARS, lambda: None)
    async with asyncio.timeout(LIMIT_S):
        assert await pool.run(threads.MAX_WAITING_CHARS, lambda: "done") == "done"
        assert await pool.run(LARGE_CHARS, lambda: "done") == "done"


async def test_work_that_nobody_waits_for_is_not_begun(pool: TextThreads) -> None:
    gate = threading.Event()
    begun: list[int] = []
    first = asyncio.create_task(pool.run(LARGE_CHARS + 1, gate.wait))
    second = asyncio.create_task(pool.run(LARGE_CHARS + 1, lambda: begun.append(2)))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(LIMIT_S):
        await first
        await pool.run(LARGE_CHARS + 1, lambda: begun.append(3))
    assert begun == [3]


async def test_an_error_of_the_work_is_its_waiters(pool: TextThreads) -> None:
    def fail() -> None:
        raise KeyError("x")

    for num_chars in (1, LARGE_CHARS, LARGE_CHARS + 1):
        with pytest.raises(KeyError):
            await pool.run(num_chars, fail)
