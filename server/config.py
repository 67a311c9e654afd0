"""Every knob of `server`, in the form of `fusionrag.config`: one field = one knob = one CLI flag = one TOML key."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusionrag.config import knob, require

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, whom it answers and what it refuses. Raises ConfigError naming the field."""

    host: str = knob("127.0.0.1", "address to listen on")
    port: int = knob(8000, "port to listen on; 0 takes a free one")
    api_key: str = field(
        default="",
        repr=False,  # configurations are logged, keys must not be
        metadata={"help": "key that every request but /health must bring as 'Authorization: Bearer …'; empty: none"},
    )
    default_collection: str = knob("", "collection that answers chats which name neither collection nor documents")
    max_body_bytes: int = knob(4 << 20, "longest request body in bytes; a longer one is refused with 413")
    max_header_bytes: int = knob(16 << 10, "longest request head in bytes; a longer one closes the connection")
    body_timeout_s: float = knob(30.0, "seconds a client may take to send its request body")
    request_timeout_s: float = knob(300.0, "seconds until an unfinished answer is given up")
    drain_timeout_s: float = knob(30.0, "seconds that running answers get to finish when the server is told to stop")
    keep_alive_s: float = knob(
        15.0, "seconds of silence in a stream after which a comment keeps proxies from closing it"
    )
    num_prepare_threads: int = knob(4, "questions embedded and searched at the same time")
    max_preparing: int = knob(256, "questions that may wait for retrieval; one more is refused with 429")
    log_json: bool = knob(True, "write one JSON line per request to standard error")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", f"must lie in [0, 65535], got {self.port}")
        printable = self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key
        require(printable, "api_key", "must be printable ASCII without spaces, because it travels in a header")
        for name in ("max_body_bytes", "max_header_bytes", "num_prepare_threads", "max_preparing"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("body_timeout_s", "request_timeout_s", "keep_alive_s"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        require(self.drain_timeout_s >= 0, "drain_timeout_s", "must not be negative")
