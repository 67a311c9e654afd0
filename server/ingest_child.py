"""The ingest process: takes waiting files from the queue, one after the other, until its standard input closes.

Started by `server.ingestion` as `python -m server.ingest_child`, niced and with one thread, so that answers do not
wait for it. Knows nothing of HTTP. Standard output carries `Report`s and nothing else.

Invariant: it may be killed at any moment. All that it changes, it changes in transactions of the queue and the
catalogue; so when the server goes (standard input closes), it just ends.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from index.catalogue import Catalogue
from index.data_dir import DataDir
from index.embedding import Embedder
from index.errors import CatalogueError, FusionRAGError, JobWithdrawn
from index.formats.parsed import clean
from index.ingest import Ingestor
from index.ingest_job import ingest_job
from index.ingest_queue import IngestJob, IngestQueue
from index.types import IngestProgress
from server.ingest_messages import GivenUp, Report, Setup

logger = logging.getLogger("server.ingest_child")
IDLE_S = 300.0  # without work the process ends after this long, and gives its memory back
RETRY_S = 10.0  # until the catalogue is tried again after it could not be written
TELL_EVERY_S = 0.2
BAD_SETUP = 3  # exit status: the models cannot be loaded; no file is to blame


@dataclass
class _Channel:
    """Both directions to the server. `wake` is set when there may be new work; it has been so `num_wakes` times."""

    descriptor: int
    wake: threading.Event = field(default_factory=threading.Event)
    num_wakes: int = 0
    told_at: float = 0.0

    def tell(self, report: Report) -> None:
        try:
            os.write(self.descriptor, report.encode())
        except BrokenPipeError:  # the server has died
            os._exit(0)

    def tell_progress(self, job: IngestJob, progress: IngestProgress) -> None:
        """Not more often than anybody looks."""
        if time.monotonic() >= self.told_at + TELL_EVERY_S:
            self.told_at = time.monotonic()
            self.tell(Report("progress", job.key, progress))

    def listen(self) -> None:
        """Ends the process, whatever it is doing, when the server has closed its end or died."""
        while sys.stdin.readline():
            self.num_wakes += 1
            self.wake.set()
        os._exit(0)


def main() -> int:
    channel = _Channel(os.dup(1))
    os.dup2(2, 1)  # what libraries print goes to the server's log
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server; it tells us by closing the pipe
    setup = Setup.decode(sys.stdin.readline())
    threading.Thread(target=channel.listen, daemon=True).start()
    os.nice(setup.nice)
    if setup.memory_bytes and setup.embedding.embedding_device == "cpu":  # a GPU's driver maps as it likes
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    data_dir = DataDir(setup.data_dir)
    with Catalogue(data_dir.catalogue) as catalogue:
        queue = IngestQueue(catalogue, data_dir)
        try:
            _give_up(channel, queue, setup.given_up)
            ingestor = _ingestor(setup, catalogue)
        except FusionRAGError as error:
            channel.tell(Report("trouble", message=str(error)))
            return BAD_SETUP
        while _work(channel, queue, ingestor):
            pass
    return 0


def _ingestor(setup: Setup, catalogue: Catalogue) -> Ingestor:
    from fusionrag.model import load_tokenizer  # now: seconds of work, which are niced only in here
    from fusionrag.prompt import PromptBuilder

    encoder = PromptBuilder(load_tokenizer(setup.model), setup.prompt)
    return Ingestor(catalogue, encoder, Embedder(setup.embedding), setup.chunking)


def _work(channel: _Channel, queue: IngestQueue, ingestor: Ingestor) -> bool:
    """Does all jobs that wait, then waits for more. False: there were none for long."""
    channel.wake.clear()
    num_wakes = channel.num_wakes
    try:
        while queue.waiting(1):
            _next(channel, queue, ingestor)
    except CatalogueError as error:
        channel.tell(Report("trouble", message=str(error)))
        time.sleep(RETRY_S)
        return True
    channel.tell(Report("idle", num_wakes=num_wakes))
    return channel.wake.wait(IDLE_S)


def _next(channel: _Channel, queue: IngestQueue, ingestor: Ingestor) -> None:
    """Does the oldest job, once no other server's process works on this queue."""
    with queue.working():
        for job in queue.waiting(1):  # looked up anew: the other one may have done it
            channel.tell(Report("begun", job.key))
            outcome = ingest_job(job, queue, ingestor, partial(channel.tell_progress, job))
            channel.tell(Report("ended", job.key, outcome=outcome))


def _give_up(channel: _Channel, queue: IngestQueue, given_up: tuple[GivenUp, ...]) -> None:
    """Fails the jobs that have ended this process before."""
    for one in given_up:
        with queue.working(), suppress(JobWithdrawn):
            for job in (job for job in queue.waiting() if job.key == one.key):
                with queue.writing():
                    queue.fail(job, "server_error", f"{clean(job.filename)}: {one.message}")
        channel.tell(Report("ended", one.key, outcome="failed"))


if __name__ == "__main__":
    sys.exit(main())
