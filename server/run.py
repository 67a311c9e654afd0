"""From a rag to a listening process that stops gracefully."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import uvicorn

from fusionrag.errors import ConfigError
from fusionrag.rag import Rag
from server import access_log
from server.app import create_app
from server.config import LOOPBACK, ServerConfig
from server.keys import StoredKeys
from server.live import LiveCollections
from server.transport import ImpatientProtocol, check_tls
from server.worker import Worker

logger = logging.getLogger(__name__)
GRACE_S = 5  # for bytes under way, once all answers are finished or cancelled


class DrainingServer(uvicorn.Server):
    """On the first signal: answers 503 to new requests, lets running ones finish, then exits. On the second: exits."""

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._worker, self._drain_timeout_s = worker, drain_timeout_s
        self.announcement = ""  # written to standard output when requests are served

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        sys.stdout.write(self.announcement)
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started or self._worker.is_draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = self._loop.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        logger.info("stopping: running answers have %g s to finish", self._drain_timeout_s)
        if not await self._worker.drain(self._drain_timeout_s):
            logger.warning("answers were cut off after %g s", self._drain_timeout_s)
        self.should_exit = True


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ConfigError naming host or port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError("host", f"{config.host!r} is no address of this machine ({error.strerror})") from error
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        message = (
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); name another port, or 0 for a free one"
        )
        raise ConfigError("port", message) from error


def build_server(
    rag: Rag, config: ServerConfig, live: LiveCollections | None = None, keys: StoredKeys | None = None
) -> DrainingServer:
    """The server that `serve` runs. Raises ConfigError for TLS files that cannot be used."""
    if config.tls_certfile:
        check_tls(config.tls_certfile, config.tls_keyfile)
    worker = Worker(rag.engine, live.background if live else None)
    settings = uvicorn.Config(
        create_app(rag, worker, config, live, keys),
        http=partial(  # type: ignore[arg-type]
            ImpatientProtocol, head_timeout_s=config.head_timeout_s, max_connections=config.max_connections
        ),
        ssl_certfile=config.tls_certfile or None,
        ssl_keyfile=config.tls_keyfile or None,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # ours is server.access_log
        server_header=False,
        h11_max_incomplete_event_size=config.max_header_bytes,
        timeout_graceful_shutdown=GRACE_S,
    )
    return DrainingServer(settings, worker, config.drain_timeout_s)


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """What was made before is no garbage: the collector does not look at it again.

    Half a million objects, most of the libraries', are a quarter of a second in which no token leaves.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def serve(rag: Rag, config: ServerConfig, live: LiveCollections | None = None, keys: StoredKeys | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Writes one line to standard output when it is ready. Raises ConfigError."""
    if not config.api_key and not (keys and keys.all()) and config.host not in LOOPBACK:
        logger.warning("everybody who reaches %s can ask questions: no api_key is set", config.host)
    if config.api_key and not config.tls_certfile and config.host not in LOOPBACK:
        logger.warning(
            "keys and answers go unencrypted to %s: set tls_certfile, or put a TLS proxy in front", config.host
        )
    if config.log_json:
        access_log.to_standard_error()
    with listen(config) as listener:
        host, port = listener.getsockname()[:2]
        server = build_server(rag, config, live, keys)
        address = f"[{host}]" if ":" in host else host
        scheme = "https" if config.tls_certfile else "http"
        server.announcement = f"FusionRAG serves {rag.model_name} on {scheme}://{address}:{port}\n"
        with _nothing_to_collect():
            server.run(sockets=[listener])
