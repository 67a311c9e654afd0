"""Uploaded files become searchable in the background: the event loop's side of the ingest process.

Starts the process when there is work, follows what it reports, starts it again when it dies, and ends it with the
server. Knows nothing about how files are read; never touches the data directory but to ask whether anything waits.

Invariants: nothing here blocks the event loop; a file that ended the process twice is failed and the queue goes on;
when the server dies, the process ends by itself, because its standard input closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from index.errors import FusionRAGError
from index.ingest_queue import IngestQueue
from index.types import IngestProgress
from server.ingest_messages import WAKE, GivenUp, JobKey, Report, Setup

logger = logging.getLogger(__name__)
GRACE_S = 5.0  # for the process to end once its standard input is closed
MAX_CRASHES = 2  # of the process by one file, until that is given up
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
_ROOT = Path(__file__).parents[1]


class Ingestion:
    """Supervises the ingest process. All methods belong to the event loop in which `start` was called."""

    def __init__(self, queue: IngestQueue, setup: Setup, timeout_s: float) -> None:
        """timeout_s: how long a file may be worked on without any progress, before it is given up."""
        self._queue, self._setup, self._timeout_s = queue, setup, timeout_s
        self._process: Process | None = None
        self._key: JobKey | None = None  # the job under way
        self._progress: IngestProgress | None = None
        self._is_idle = True
        self._num_wakes = 0  # of the present process
        self._num_crashes: Counter[JobKey] = Counter()
        self._given_up: dict[JobKey, str] = {}
        self._num_failures = 0  # of the process, since a job was last ended
        self.num_restarts = 0
        self._outcomes: Counter[str] = Counter()

    def start(self) -> None:
        """Begins to work on what waits, and goes on until `stop`."""
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._supervise())
        self.wake()

    def wake(self) -> None:
        """There may be new work: a file was attached."""
        self._is_idle = False
        self._wanted.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(WAKE)
            self._num_wakes += 1

    async def stop(self) -> None:
        """Ends the process, after `GRACE_S` by force. What it has not finished waits for the next server."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def progress(self, collection: str, file_id: str) -> IngestProgress | None:
        """How far the file is, where it is being worked on now; None: it waits, or is done."""
        return self._progress if self._key == (collection, file_id) else None

    @property
    def is_busy(self) -> bool:
        """Whether files are being ingested, or may be waiting for it."""
        return not self._is_idle

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How many jobs ended as 'completed', 'failed' and 'withdrawn' since the start."""
        return {name: self._outcomes[name] for name in ("completed", "failed", "withdrawn")}

    @property
    def pid(self) -> int | None:
        """The ingest process, while there is one."""
        return None if self._process is None else self._process.pid

    async def _supervise(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                jobs = await asyncio.to_thread(self._queue.waiting, 1)
                if jobs or self._given_up:
                    await self._run_process()
                else:
                    self._is_idle = True
            except (FusionRAGError, OSError) as error:  # the catalogue cannot be read, or no process be started
                await self._back_off(f"cannot begin: {error}")

    async def _run_process(self) -> None:
        """One life of the process: until it has nothing to do for long, dies, or hangs."""
        given_up = tuple(GivenUp(key, message) for key, message in self._given_up.items())
        process = await self._spawn(replace(self._setup, given_up=given_up))
        self._process, self._num_wakes = process, 0
        try:
            hung = not await self._follow(process)
            if hung:
                process.kill()
            status = await process.wait()
        finally:
            self._process = None
            await asyncio.shield(_end(process))
        key, self._key, self._progress = self._key, None, None
        if hung and key is not None:
            self._given_up[key] = (
                f"no progress for {self._timeout_s:g} s; simplify it, split it, or raise ingest_timeout_s"
            )
        self._wanted.set()  # what came while it ended
        if status not in (0, -signal.SIGTERM):
            self._blame(key)
            await self._back_off(f"has died (status {status})")

    async def _spawn(self, setup: Setup) -> Process:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.ingest_child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**_environment(), **_ONE_THREAD, "PYTHONPATH": path},
            # its own group, so that Ctrl-C does not reach it; not its own session: under Linux's autogroups,
            # niceness counts within a session only
            process_group=0,
        )
        assert process.stdin is not None
        process.stdin.write(setup.encode())
        return process

    async def _follow(self, process: Process) -> bool:
        """Takes reports until the process closes its end. False: it makes no progress with a file."""
        assert process.stdout is not None
        while True:
            try:
                async with asyncio.timeout(None if self._key is None else self._timeout_s):
                    line = await process.stdout.readline()
            except TimeoutError:
                return False
            if not line:
                return True
            self._note(Report.decode(line))

    def _note(self, report: Report) -> None:
        match report.event:
            case "begun":
                self._key, self._progress = report.key, IngestProgress(1, 0, 0, 0)
            case "progress":
                self._progress = report.progress
            case "ended":
                assert report.key is not None
                self._key, self._progress, self._num_failures = None, None, 0
                self._num_crashes.pop(report.key, None)
                self._given_up.pop(report.key, None)
                self._outcomes[str(report.outcome)] += 1
            case "idle":
                self._is_idle = report.num_wakes == self._num_wakes  # else it has not looked since the last
            case "trouble":
                logger.error("uploaded files cannot be ingested now and wait: %s", report.message)

    def _blame(self, key: JobKey | None) -> None:
        if key is None:
            return
        self._num_crashes[key] += 1
        if self._num_crashes[key] >= MAX_CRASHES:
            self._given_up.setdefault(
                key, "reading it ended the ingest process twice (out of memory?); split it or convert it"
            )

    async def _back_off(self, what: str) -> None:
        delay_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**self._num_failures)
        logger.error("the ingest process %s; it is started again in %g s", what, delay_s)
        self._num_failures += 1
        self.num_restarts += 1
        await asyncio.sleep(delay_s)
        self._wanted.set()


def _environment() -> dict[str, str]:
    """Ours, but for the operator's key: the process reads what anybody has sent."""
    return {name: value for name, value in os.environ.items() if name != "FUSIONRAG_API_KEY"}


async def _end(process: Process) -> None:
    """Lets the process end by itself, then by force, and frees its pipes."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(GRACE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
