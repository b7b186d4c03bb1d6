"""The event loop in a thread: timeouts, interruptions and closing."""

import asyncio

import pytest
from limits import run_within

from grpo.engines import EngineTimeoutError
from grpo.engines.servers.loop_thread import LoopThread


async def no_cleanup():
    pass


def test_coroutine_is_cancelled_after_its_timeout_and_the_error_contains_the_state():
    loop = LoopThread("engine pool", describe=lambda: "s0 lost, 3 pending")
    cancelled = []

    async def hang():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(
        EngineTimeoutError,
        match=r"the engine pool did not respond within 0.3 s; s0 lost, 3 pending",
    ):
        run_within(10, lambda: loop.run(hang(), 0.3))
    loop.run(asyncio.sleep(0.05))
    assert cancelled == [True]
    loop.close(no_cleanup())


def test_timeout_error_of_the_coroutine_itself_is_raised_unchanged():
    loop = LoopThread("engine pool")

    async def raise_timeout():
        raise TimeoutError("raised by the coroutine")

    with pytest.raises(TimeoutError, match="raised by the coroutine"):
        run_within(10, lambda: loop.run(raise_timeout(), 1000))
    loop.close(no_cleanup())


def test_exception_of_on_wait_ends_the_wait():
    def interrupt():
        raise KeyboardInterrupt

    loop = LoopThread("engine pool", on_wait=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_within(10, lambda: loop.run(asyncio.sleep(1000), 1000))
    loop.close(no_cleanup())


def test_close_cancels_pending_coroutines_and_runs_the_cleanup():
    loop = LoopThread("engine pool")
    cleanups = []

    async def cleanup():
        cleanups.append(True)

    future = loop.submit(asyncio.sleep(1000))
    run_within(10, lambda: loop.close(cleanup()))
    assert cleanups == [True]
    assert future.cancelled()
