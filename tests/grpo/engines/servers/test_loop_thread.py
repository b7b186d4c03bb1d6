"""The event loop in a thread: limits, interruptions, its end."""

import asyncio

import pytest
from limits import run_within

from grpo.engines import EngineTimeoutError
from grpo.engines.servers.loop_thread import LoopThread


async def nothing():
    pass


def test_a_coroutine_past_its_limit_is_cancelled_and_the_error_says_what_was_going_on():
    loop = LoopThread("drill", describe=lambda: "s0 lost, 3 pending")
    cancelled = []

    async def hang():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(
        EngineTimeoutError, match=r"the drill did not respond within 0.3 s; s0 lost, 3 pending"
    ):
        run_within(10, lambda: loop.run(hang(), 0.3))
    loop.run(asyncio.sleep(0.05))
    assert cancelled == [True]
    loop.close(nothing())


def test_a_timeout_that_the_work_itself_raises_is_not_the_loops():
    loop = LoopThread("drill")

    async def late():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run_within(10, lambda: loop.run(late(), 1000))
    loop.close(nothing())


def test_what_on_wait_raises_ends_the_wait():
    def interrupt():
        raise KeyboardInterrupt

    loop = LoopThread("drill", on_wait=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_within(10, lambda: loop.run(asyncio.sleep(1000), 1000))
    loop.close(nothing())


def test_nobody_is_left_waiting_when_the_loop_is_closed():
    loop = LoopThread("drill")
    closed = []

    async def cleanup():
        closed.append(True)

    future = loop.submit(asyncio.sleep(1000))
    run_within(10, lambda: loop.close(cleanup()))
    assert closed == [True] and future.cancelled()
