"""How long somebody is there to wait for an answer: until the client hangs up or the request's time is over.

Knows nothing of answers or formats. Invariant: work that is waited for here never outlives the wait; it is cancelled
and has ended when `ClientConnection` is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ClientGone, RequestTimeout

T = TypeVar("T")


class ClientConnection:
    """Watches one client whose request body has been read. Use as `async with`."""

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self._receive, self._timeout_s = receive, timeout_s
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> ClientConnection:
        self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        self._gone = self.start(self._until_gone())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs `work` beside the watching; it is cancelled with it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def is_done(self, task: asyncio.Task[Any], patience_s: float = float("inf")) -> bool:
        """Waits for `task`; False when `patience_s` ran out first. Raises ClientGone or RequestTimeout."""
        left = self._deadline - asyncio.get_running_loop().time()
        timeout = max(0.0, min(left, patience_s))
        done, _ = await asyncio.wait({task, self._gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return True
        if self._gone in done:
            raise ClientGone("the client closed the connection")
        if left <= patience_s:
            raise RequestTimeout(f"the answer was not finished within {self._timeout_s:g} s and was given up")
        return False

    async def result(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, if the client waits for it. Raises ClientGone, RequestTimeout or what `work` raises."""
        task = self.start(work)
        await self.is_done(task)
        return task.result()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
