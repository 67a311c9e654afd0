"""The one thread that owns the engine, and the bridge between it and the event loop.

Two sides that share nothing: the thread alone touches the engine and takes commands from a queue; the event loop alone
touches the inboxes, into which the thread's events are dropped by `call_soon_threadsafe`. Knows nothing of HTTP.

Invariant: every stream ends with exactly one event that has a finish_reason, whatever happens to the engine; and a
stream whose reader goes away is cancelled in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fusionrag.engine import Engine, EngineLoad
from fusionrag.live_request import EngineRequest
from fusionrag.types import TokenEvent
from index.errors import FusionRAGError
from server.errors import Draining, EngineDown

logger = logging.getLogger(__name__)
BACKGROUND_LOOK_S = 0.5  # how long an idle engine sleeps before it asks for background work again


@dataclass(frozen=True)
class _Submit:
    request: EngineRequest


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    pass


def _failed(request_id: str, error: Exception) -> TokenEvent:
    return TokenEvent(request_id, "", None, finish_reason="error", error=error)


class Background(Protocol):
    """Work for the engine's thread that no request waits for."""

    @property
    def share(self) -> float:
        """The share of the time that it may take while requests are running."""
        ...

    def step(self) -> bool:
        """Does one bounded piece. False: there is nothing to do now."""
        ...


class Worker:
    """Runs `engine` in a thread of its own. All methods belong to the event loop in which `start` was called.

    `background` is stepped while the engine is idle, and while it is not, for its share of the time.
    """

    def __init__(self, engine: Engine, background: Background | None = None) -> None:
        self._engine, self._background = engine, background
        self._engine_s = self._background_s = 0.0  # spent since the engine was last idle
        self._commands: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._inboxes: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._load = engine.load
        self._failure: Exception | None = None
        self._draining = False
        self._has_background = True  # there may be some
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def load(self) -> EngineLoad:
        """The engine's load after its latest step."""
        return self._load

    @property
    def is_draining(self) -> bool:
        return self._draining

    def check_alive(self) -> None:
        """Raises EngineDown when nothing will ever be answered again."""
        if self._failure is not None or not self._thread.is_alive():
            cause = type(self._failure).__name__ if self._failure else "its thread is not running"
            raise EngineDown(f"the engine has stopped ({cause}); the server must be restarted, its log has the details")

    def check_ready(self) -> None:
        """Raises EngineDown or Draining when no request can be served."""
        self.check_alive()
        if self._draining:
            raise Draining("the server is stopping; send the request to another one")

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenEvent, None]:
        """The events of one request. Close it (`aclosing`) to cancel the request; raises EngineDown or Draining.

        The last event has a finish_reason; with "error" it carries the exception.
        """
        self.check_ready()
        inbox = self._inboxes[request.request_id] = asyncio.Queue()
        self._commands.put(_Submit(request))
        finished = False
        try:
            while not finished:
                event = await inbox.get()
                finished = event.finish_reason is not None
                yield event
        finally:
            del self._inboxes[request.request_id]
            if not finished:
                self._commands.put(_Cancel(request.request_id))

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the live ones; cancels what is left after `timeout_s`. True: none was."""
        self._draining = True
        deadline = self._loop.time() + timeout_s
        while self._inboxes and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        left = list(self._inboxes)
        for request_id in left:
            self._commands.put(_Cancel(request_id))
            self._inboxes[request_id].put_nowait(TokenEvent(request_id, "", None, finish_reason="cancelled"))
        return not left

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread once its current step is done; a step that hangs is left behind after `timeout_s`."""
        self._draining = True
        self._commands.put(_Stop())
        self._thread.join(timeout_s)

    # -- the event loop's side -----------------------------------------------------------------------------------------

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:  # else: its reader has gone, the cancel command is on its way
                inbox.put_nowait(event)

    def _deliver_failure(self) -> None:
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(_failed(request_id, EngineDown("the engine has stopped while it worked on this request")))

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        running = True
        while running:
            try:
                running = self._obey_commands()
                if running and not self._is_idle():
                    begin = time.perf_counter()
                    self._post(self._engine.step())
                    self._engine_s += time.perf_counter() - begin
                    if not self._engine.has_work:
                        self._engine.rest()
                if running and self._failure is None:
                    self._step_background()
                if self._failure is None:
                    self._load = self._engine.load
            except Exception as error:
                self._fail(error)

    def _is_idle(self) -> bool:
        return self._failure is not None or not self._engine.has_work

    def _step_background(self) -> None:
        """One piece of background work, if it is its turn. What goes wrong there is no reason to stop serving."""
        if self._background is None:
            return
        if not self._engine.has_work:
            self._engine_s = self._background_s = 0.0
        elif self._background_s > self._background.share * (self._engine_s + self._background_s):
            return
        begin = time.perf_counter()
        try:
            self._has_background = self._background.step()
        except Exception:
            logger.exception("background work failed; it is tried again later")
            self._has_background = False
        self._background_s += time.perf_counter() - begin

    def _obey_commands(self) -> bool:
        """Takes all waiting commands, sleeping until there is one if there is nothing else to do. False: stop."""
        wait_s = 0.0
        if self._is_idle() and not (self._has_background and self._failure is None):
            wait_s = BACKGROUND_LOOK_S if self._background is not None and self._failure is None else math.inf
        with suppress(queue.Empty):
            while True:
                command = self._commands.get(block=wait_s > 0, timeout=None if wait_s in (0, math.inf) else wait_s)
                wait_s = 0.0
                if isinstance(command, _Stop):
                    return False
                self._obey(command)
        return True

    def _obey(self, command: _Submit | _Cancel) -> None:
        if isinstance(command, _Submit):
            try:
                if self._failure is not None:
                    raise EngineDown("the engine has stopped")
                self._engine.submit(command.request)
            except FusionRAGError as error:  # this request's own fault; anything else is the engine's
                self._post([_failed(command.request.request_id, error)])
        elif self._failure is None:
            self._engine.cancel(command.request_id)

    def _post(self, events: Sequence[TokenEvent]) -> None:
        if events:
            with suppress(RuntimeError):  # the loop has closed: nobody is listening
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _fail(self, error: Exception) -> None:
        """After this the engine is never called again: its state cannot be trusted."""
        logger.critical("the engine raised and is stopped; /health says 503 from now on", exc_info=error)
        self._failure = error
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver_failure)
