"""A rag and an engine that can be calculated by hand, and ways to put the real app and the real uvicorn around them.

The engine answers with the words of the question, one word a step. Its statistics are constants. Words with a meaning:
`~` is a token without text (as when half a character is held back), `!error` makes the request fail at that word,
`!crash` makes the engine itself raise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

import httpx
import numpy as np

from fusionrag.config import EngineConfig, ReuseConfig
from fusionrag.engine import EngineLoad
from fusionrag.errors import PromptTooLong, QueueFull
from fusionrag.rag import Prepared, Question, Source, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.types import ChunkReceipt, KVSource, Phases, RequestStats, TokenEvent
from index.catalogue import Catalogue
from index.config import SearchConfig
from index.errors import CollectionNotFound
from server.app import create_app
from server.config import ServerConfig
from server.run import DrainingServer, build_server, listen
from server.worker import Worker

MODEL = "acme/echo-1"
PHASES = Phases(
    queue_ms=1, retrieve_ms=2, load_ms=3, reposition_ms=4, probe_ms=5, select_ms=6, recompute_ms=7, sample_ms=8
)
CHUNKS = (
    ChunkReceipt("c1", num_tokens=4, source=KVSource.HOST, kind="fused", num_recomputed=1),
    ChunkReceipt("c2", num_tokens=5, source=KVSource.DISK, kind="raw", num_recomputed=1),
    ChunkReceipt("c3", num_tokens=6, source=KVSource.COMPUTED, kind="raw"),
)
STATS = RequestStats(
    prompt_tokens=20,
    reused_tokens=7,
    recomputed_tokens=2,
    computed_tokens=11,
    ttft_ms=36.0,
    way="reuse",
    phases=PHASES,
    chunks=CHUNKS,
)
SOURCES = (
    Source(1, "c1", "d1", "Mars", "planets/mars.md", "Mars is red.", 0.9, None),
    Source(2, "c2", "d2", "Venus", "planets/venus.pdf", "Venus is hot.", 0.8, 3),
)
OFFSETS = (  # of the tokens of CHUNKS in the passages' texts; (0, 0): a token of the title
    ((0, 0), (0, 4), (5, 7), (8, 12)),
    ((0, 0), (0, 5), (6, 8), (9, 12), (12, 13)),
    ((0, 0),) * 6,
)


@dataclass(frozen=True)
class EchoRequest:
    request_id: str
    words: tuple[str, ...]
    sampling: SamplingParams


@dataclass
class EchoEngine:
    """Says what it is told. `threads` are the threads that called it, `cancelled` the ids it was told to forget."""

    delay_s: float = 0.0
    max_queue: int = 64
    stats: RequestStats = STATS
    live: dict[str, tuple[EchoRequest, int]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    num_steps: int = 0
    num_rests: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(max_queue=max(0, self.max_queue - 1), max_num_requests=1)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(len(self.live), 0, 1024, 32 * len(self.live))

    def submit(self, request: EchoRequest) -> None:
        self.threads.add(threading.current_thread().name)
        if len(self.live) >= self.max_queue:
            raise QueueFull(f"{len(self.live)} requests are waiting; try again later")
        self.live[request.request_id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.live.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        self.num_steps += 1
        time.sleep(self.delay_s)
        return [self._advance(request, at) for request, at in list(self.live.values())]

    def rest(self) -> None:
        self.num_rests += 1

    def _advance(self, request: EchoRequest, at: int) -> TokenEvent:
        word, words = request.words[at], request.words
        if word == "!crash":
            raise RuntimeError("secret detail of a crash")
        if word == "!error":
            del self.live[request.request_id]
            return TokenEvent(
                request.request_id, "", None, "error", self.stats, RuntimeError("secret detail of an error")
            )
        text = "" if word == "~" else (" " + word if at else word)
        at += 1
        finish = "stop" if at == len(words) else "length" if at == request.sampling.max_tokens else None
        self.live[request.request_id] = (request, at)
        if finish:
            del self.live[request.request_id]
        stats = replace(self.stats, completion_tokens=at) if finish or at == 1 else None
        return TokenEvent(request.request_id, text, at, finish, stats)


class EchoEmbedder:
    """The vector of a text is the direction of (its words, its letters)."""

    name, dim = "acme/letters-1", 2

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([(len(t.split()), len(t.replace(" ", ""))) for t in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@dataclass
class EchoRag:
    """Finds the same two passages for every question. `questions` are those it was asked."""

    engine: EchoEngine = field(default_factory=EchoEngine)
    prepare_s: float = 0.0
    questions: list[Question] = field(default_factory=list)
    model_name: str = MODEL
    max_model_len: int = 64
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    catalogue: Catalogue | None = None
    embedder: EchoEmbedder | None = None

    def search_text(self, turns: Sequence[Turn]) -> str:
        return turns[-1].content

    def prepare(self, question: Question, request_id: str) -> Prepared:
        self.questions.append(question)
        time.sleep(self.prepare_s)
        for name in question.collections:
            if name != "planets":
                raise CollectionNotFound(name, ["planets"])
        words = tuple((question.prompt or question.turns[-1].content).split())
        if len(words) > self.max_model_len:
            raise PromptTooLong(f"the prompt has {len(words)} tokens, but at most {self.max_model_len} fit")
        sources = SOURCES if question.collections else ()
        for i, document in enumerate(question.documents, 1):
            sources += (Source(i, f"c{i}", document.document_id, document.title, "", document.text, None, None),)
        request = EchoRequest(request_id, words, question.sampling)
        return Prepared(request, sources, OFFSETS if question.explain else ())


@asynccontextmanager
async def open_app(
    rag: EchoRag, config: ServerConfig | None = None, **parts: object
) -> AsyncIterator[httpx.AsyncClient]:
    """The app without a socket. Its lifespan runs; errors come back as replies, as from a real server.

    parts: `live` and `keys` of `create_app`.
    """
    app = create_app(rag, Worker(rag.engine), config or ServerConfig(drain_timeout_s=0), **parts)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=10) as client,
    ):
        yield client


@dataclass(frozen=True)
class LiveServer:
    url: str
    rag: EchoRag
    server: DrainingServer
    thread: threading.Thread


@contextmanager
def serving(rag: EchoRag, config: ServerConfig, **parts: object) -> Iterator[LiveServer]:
    """The real server on a free port of the loopback interface, in a thread. parts: as for `open_app`."""
    with listen(replace(config, port=0)) as listener:
        server = build_server(rag, config, **parts)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            scheme = "https" if config.tls_certfile else "http"
            yield LiveServer(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", rag, server, thread)
        finally:
            server.should_exit = True
            thread.join(10)


async def until(condition: Callable[[], object]) -> None:
    """Waits, on the event loop, until `condition()` holds."""
    await asyncio.to_thread(eventually, condition)


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Waits until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def chat(text: str = "red planet", **more: object) -> dict[str, object]:
    """A chat request's body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
