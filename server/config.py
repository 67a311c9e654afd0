"""Every knob of `server`, in the form of `fusionrag.config`: one field = one knob = one CLI flag = one TOML key."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusionrag.config import knob, require

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIN_INGEST_MEMORY_BYTES = 1 << 30  # the default embedding model and its libraries take half of it


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, whom it answers and what it refuses. Raises ConfigError naming the field."""

    host: str = knob("127.0.0.1", "address to listen on")
    port: int = knob(8000, "port to listen on; 0 takes a free one")
    api_key: str = field(
        default="",
        repr=False,  # configurations are logged, keys must not be
        metadata={
            "help": "the operator's key, which requests bring as 'Authorization: Bearer …'; empty: none. "
            "Better given by the environment: other users of the machine can read command lines",
            "secret": True,
        },
    )
    tls_certfile: str = knob("", "PEM file with the certificate chain to serve HTTPS with; empty: HTTP")
    tls_keyfile: str = knob("", "PEM file with the certificate's private key, not encrypted")
    allowed_hosts: str = knob(
        "", "comma-separated host names by which a server on loopback without keys is reached, beside localhost"
    )
    default_collection: str = knob("", "collection that answers chats which name neither collection nor documents")
    max_body_bytes: int = knob(4 << 20, "longest request body in bytes; a longer one is refused with 413")
    max_file_bytes: int = knob(100 << 20, "longest file that can be uploaded, in bytes; else 413")
    max_owner_bytes: int = knob(
        0, "bytes of uploaded files that the holder of an API key may keep; an upload beyond gets 507; 0: no limit"
    )
    max_connections: int = knob(
        512, "connections open at the same time; a request on one more is answered 503, and that connection closed"
    )
    max_header_bytes: int = knob(16 << 10, "longest request head in bytes; a longer one closes the connection")
    head_timeout_s: float = knob(10.0, "seconds a client may take to send a request head before it is let go")
    body_timeout_s: float = knob(30.0, "seconds a client may take to send its request body")
    upload_timeout_s: float = knob(600.0, "seconds a client may take to upload a file")
    request_timeout_s: float = knob(300.0, "seconds until an unfinished answer is given up")
    drain_timeout_s: float = knob(30.0, "seconds that running answers get to finish when the server is told to stop")
    keep_alive_s: float = knob(
        15.0, "seconds of silence in a stream after which a comment keeps proxies from closing it"
    )
    keep_responses_days: int = knob(30, "days for which /v1/responses are kept; 0: not at all")
    num_prepare_threads: int = knob(4, "questions embedded and searched at the same time")
    max_preparing: int = knob(256, "questions that may wait for retrieval; one more is refused with 429")
    log_json: bool = knob(True, "write one JSON line per request to standard error")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", f"must lie in [0, 65535], got {self.port}")
        printable = self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key
        require(printable, "api_key", "must be printable ASCII without spaces, because it travels in a header")
        counts = ("max_body_bytes", "max_file_bytes", "max_connections", "max_header_bytes")
        for name in (*counts, "num_prepare_threads", "max_preparing"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        both = bool(self.tls_certfile) == bool(self.tls_keyfile)
        missing = "tls_keyfile" if self.tls_certfile else "tls_certfile"
        require(both, missing, "is needed too: TLS takes a certificate and its key")
        for name in ("head_timeout_s", "body_timeout_s", "upload_timeout_s", "request_timeout_s", "keep_alive_s"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        for name in ("drain_timeout_s", "keep_responses_days", "max_owner_bytes"):
            require(getattr(self, name) >= 0, name, "must not be negative")

    @property
    def host_names(self) -> frozenset[str] | None:
        """The names by which a server on loopback is reached; None where it listens to the network."""
        if self.host not in LOOPBACK:
            return None
        return frozenset((*LOOPBACK, *(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())))


@dataclass(frozen=True)
class IngestionConfig:
    """How uploaded files are read in the background. Raises ConfigError naming the field."""

    ingest_nice: int = knob(5, "niceness of the ingest process: 0 shares the processors evenly, 19 hardly takes any")
    ingest_timeout_s: float = knob(300.0, "seconds without any progress after which a file is given up")
    ingest_memory_bytes: int = knob(
        4 << 30,
        "memory that the ingest process may take, embedding model included; 0: no limit. Linux, embedding_device 'cpu'",
    )

    def __post_init__(self) -> None:
        low = MIN_INGEST_MEMORY_BYTES
        require(0 <= self.ingest_nice <= 19, "ingest_nice", f"must lie in [0, 19], got {self.ingest_nice}")
        require(self.ingest_timeout_s > 0, "ingest_timeout_s", f"must be positive, got {self.ingest_timeout_s}")
        fits = self.ingest_memory_bytes == 0 or self.ingest_memory_bytes >= low
        require(fits, "ingest_memory_bytes", f"must be 0 (no limit) or at least {low}, got {self.ingest_memory_bytes}")
