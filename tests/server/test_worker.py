"""The thread that owns the engine: what its streams promise, whatever happens to the engine and to the readers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from fusionrag.errors import QueueFull
from fusionrag.sampling import SamplingParams
from fusionrag.types import TokenEvent
from server.errors import Draining, EngineDown
from server.worker import Worker
from tests.server.echo_rag import EchoEngine, EchoRequest, until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def started(engine: EchoEngine) -> AsyncIterator[Worker]:
    worker = Worker(engine)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def request(text: str, request_id: str = "r") -> EchoRequest:
    return EchoRequest(request_id, tuple(text.split()), SamplingParams())


async def events_of(worker: Worker, asked: EchoRequest) -> list[TokenEvent]:
    async with aclosing(worker.stream(asked)) as events:
        return [event async for event in events]


async def test_events_arrive_in_order_and_the_last_one_has_the_reason() -> None:
    async with started(EchoEngine()) as worker:
        events = await events_of(worker, request("a b c"))
    assert [(e.text, e.finish_reason) for e in events] == [("a", None), (" b", None), (" c", "stop")]


async def test_only_the_workers_thread_calls_the_engine() -> None:
    engine = EchoEngine()
    async with started(engine) as worker:
        await asyncio.gather(*(events_of(worker, request("a b", str(i))) for i in range(5)))
    assert engine.threads == {"engine"}


async def test_leaving_a_stream_cancels_that_request_and_no_other() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        other = asyncio.create_task(events_of(worker, request("x " * 20, "stays")))
        async with aclosing(worker.stream(request("y " * 1000, "leaves"))) as events:
            await anext(events)
        assert len(await other) == 20
    assert engine.cancelled == ["leaves"]


async def test_a_finished_stream_is_not_cancelled() -> None:
    engine = EchoEngine()
    async with started(engine) as worker:
        await events_of(worker, request("a b"))
    assert engine.cancelled == []


async def test_a_reader_that_is_cancelled_cancels_its_request() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        reader = asyncio.create_task(events_of(worker, request("y " * 1000)))
        await until(lambda: engine.live)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(lambda: not engine.live)
    assert engine.cancelled == ["r"]


async def test_a_request_that_the_engine_refuses_ends_with_its_error() -> None:
    async with started(EchoEngine(max_queue=0)) as worker:
        (event,) = await events_of(worker, request("a"))
        assert (event.finish_reason, type(event.error)) == ("error", QueueFull)
        worker.check_ready()


async def test_a_crash_of_the_engine_ends_every_stream_and_every_later_one() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        live = asyncio.create_task(events_of(worker, request("x " * 1000, "live")))
        await until(lambda: engine.live)
        for last in (await events_of(worker, request("!crash", "crash")))[-1], (await live)[-1]:
            assert (last.finish_reason, type(last.error)) == ("error", EngineDown)
        with pytest.raises(EngineDown, match="RuntimeError"):
            worker.check_ready()
        with pytest.raises(EngineDown):
            await events_of(worker, request("late"))
        assert worker.load.num_running > 0, "the last known load stays readable"
    assert "late" not in engine.live


async def test_a_request_that_meets_the_crash_on_its_way_to_the_engine_ends_too() -> None:
    engine = EchoEngine(delay_s=0.05)
    async with started(engine) as worker:
        crash = asyncio.create_task(events_of(worker, request("!crash", "crash")))
        await until(lambda: engine.live)  # the step that crashes has begun; its sleep leaves room for one more
        (event,) = await events_of(worker, request("a", "late"))
        assert type(event.error) is EngineDown
        await crash


async def test_draining_lets_live_requests_finish_and_takes_no_new_ones() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        live = asyncio.create_task(events_of(worker, request("x " * 20)))
        await until(lambda: engine.live)
        drained = asyncio.create_task(worker.drain(timeout_s=5))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await events_of(worker, request("late"))
        assert await drained
        assert (await live)[-1].finish_reason == "stop"


async def test_draining_cancels_what_does_not_finish_in_time() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        live = asyncio.create_task(events_of(worker, request("x " * 1000)))
        await until(lambda: engine.live)
        assert not await worker.drain(timeout_s=0.01)
        assert (await live)[-1].finish_reason == "cancelled"
        await until(lambda: engine.cancelled == ["r"])


async def test_an_idle_worker_does_not_step_and_stops_at_once() -> None:
    engine = EchoEngine()
    async with started(engine) as worker:
        await events_of(worker, request("a b"))
        num_steps = engine.num_steps
        await asyncio.sleep(0.05)
        assert engine.num_steps == num_steps == 2
    assert "engine" not in {thread.name for thread in threading.enumerate()}


async def test_the_load_is_the_engines_after_its_latest_step() -> None:
    engine = EchoEngine(delay_s=0.002)
    async with started(engine) as worker:
        reader = asyncio.create_task(events_of(worker, request("x " * 20)))
        await until(lambda: worker.load.num_running == 1 and worker.load.arena_used_tokens == 32)
        await reader
        await until(lambda: worker.load.num_running == 0)


async def test_the_engine_may_rest_whenever_nothing_is_left_to_do() -> None:
    engine = EchoEngine()
    async with started(engine) as worker:
        for number in (1, 2):
            await events_of(worker, request("x y"))
            await until(lambda number=number: engine.num_rests == number)


class Chores:
    """Background work of so many pieces; fails at piece number `fails_at`."""

    def __init__(self, num_pieces: int, piece_s: float = 0.0, fails_at: int = -1, share: float = 0.1) -> None:
        self.left, self.piece_s, self.fails_at, self.share = num_pieces, piece_s, fails_at, share
        self.threads: set[str] = set()

    def step(self) -> bool:
        self.threads.add(threading.current_thread().name)
        if self.left == self.fails_at:
            self.fails_at = -1
            raise RuntimeError("a chore went wrong")
        if self.left == 0:
            return False
        time.sleep(self.piece_s)
        self.left -= 1
        return True


@asynccontextmanager
async def with_chores(engine: EchoEngine, chores: Chores) -> AsyncIterator[Worker]:
    worker = Worker(engine, chores)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


async def test_an_idle_engine_does_its_background_work_in_its_own_thread() -> None:
    chores = Chores(50)
    async with with_chores(EchoEngine(), chores):
        await until(lambda: chores.left == 0)
    assert chores.threads == {"engine"}


async def test_background_work_takes_its_share_of_a_busy_engine_and_no_more() -> None:
    chores, engine = Chores(10_000, piece_s=0.005, share=0.2), EchoEngine(delay_s=0.005)
    async with with_chores(engine, chores) as worker:
        first = asyncio.create_task(events_of(worker, request("a " * 60)))
        await first
    done = 10_000 - chores.left
    assert done >= 5  # 60 steps of 5 ms: a fifth of the time is 15 pieces
    assert done <= 40


async def test_background_work_that_fails_is_tried_again_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    chores = Chores(5, fails_at=3)
    async with with_chores(EchoEngine(), chores) as worker:
        assert len(await events_of(worker, request("a b"))) == 2
        await until(lambda: chores.left == 0)
        worker.check_ready()
    assert "a chore went wrong" in caplog.text
