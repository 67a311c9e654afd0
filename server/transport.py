"""Below HTTP: TLS, connections that ask for nothing, and too many of them.

Knows nothing of requests' contents. Invariants: a connection is closed when no whole request head arrives on it in
time, whether it is its first or a later one; so silent or dribbling clients hold no place for long. The requests of a
connection beyond `max_connections` have `state.is_one_too_many`.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from fusionrag.errors import ConfigError


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit of connections, and of the time that a head may take (else: forever)."""

    def __init__(self, *args: Any, head_timeout_s: float, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s, self._max_connections = head_timeout_s, max_connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self.app_state = {**self.app_state, "is_one_too_many": True}  # uvicorn copies it into every scope
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Starts the clock when a head is being waited for, stops it when one is there."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._head_timeout_s, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def check_tls(certfile: str, keyfile: str) -> None:
    """Raises ConfigError naming the file at fault, where the two cannot be used together."""

    def refuse_encrypted() -> str:  # without this OpenSSL would ask on the terminal
        raise ConfigError("tls_keyfile", f"{keyfile} is encrypted; write it without a passphrase, readable by you only")

    for name, path in (("tls_certfile", certfile), ("tls_keyfile", keyfile)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(name, f"{path} cannot be read ({error.strerror})") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certfile)
    except ssl.SSLError as error:
        raise ConfigError("tls_certfile", f"{certfile} holds no certificate in PEM form") from error
    try:
        context.load_cert_chain(certfile, keyfile, refuse_encrypted)
    except ssl.SSLError as error:
        is_other = error.reason == "KEY_VALUES_MISMATCH"
        why = f"is not the key of {certfile}" if is_other else "holds no private key in PEM form"
        raise ConfigError("tls_keyfile", f"{keyfile} {why}") from error
