"""HTTPS with a certificate made here: clients that verify it are served, files that cannot be used are named."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from fusionrag.errors import ConfigError
from server.config import ServerConfig
from server.run import build_server
from tests.server.echo_rag import MODEL, EchoRag, chat, eventually, serving

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl command to make a certificate with")


@dataclass(frozen=True)
class Files:
    folder: Path

    def __getattr__(self, name: str) -> str:
        return str(self.folder / f"{name}.pem")

    def config(self, **changes: object) -> ServerConfig:
        return ServerConfig(tls_certfile=self.cert, tls_keyfile=self.key, drain_timeout_s=0, **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """cert and key belong together; other is another key, locked the same key encrypted, junk is neither."""
    files = Files(tmp_path_factory.mktemp("tls"))
    curve = ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    openssl(
        "req",
        "-x509",
        "-newkey",
        "ec",
        *curve,
        "-nodes",
        "-days",
        "2",
        *names,
        "-keyout",
        files.key,
        "-out",
        files.cert,
    )
    openssl("genpkey", "-algorithm", "EC", *curve, "-out", files.other)
    openssl("pkey", "-in", files.key, "-aes256", "-passout", "pass:x", "-out", files.locked)
    Path(files.junk).write_text("-----BEGIN NOTHING-----\n")
    return files


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def trusting(files: Files) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=files.cert)


def test_a_client_that_verifies_the_certificate_is_answered_whole_and_streamed(rag: EchoRag, files: Files) -> None:
    with serving(rag, files.config()) as live, httpx.Client(verify=trusting(files)) as http:
        assert live.url.startswith("https://")
        with openai.OpenAI(base_url=live.url + "/v1", api_key="none", http_client=http, max_retries=0) as client:
            ask = {"model": MODEL, "messages": chat("red planet")["messages"]}
            assert client.chat.completions.create(**ask).choices[0].message.content == "red planet"
            chunks = list(client.chat.completions.create(**ask, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "red planet"


def test_a_client_that_does_not_know_the_certificate_does_not_connect(rag: EchoRag, files: Files) -> None:
    with serving(rag, files.config()) as live:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(live.url + "/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(live.url.replace("https", "http") + "/health")
        assert httpx.get(live.url + "/health", verify=trusting(files)).status_code == 200


def test_nothing_older_than_tls_1_2_is_spoken(rag: EchoRag, files: Files) -> None:
    with serving(rag, files.config()) as live:
        port = int(live.url.rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            trusting(files).wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            assert connection.version() in ("TLSv1.2", "TLSv1.3")
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
            input=b"",
            capture_output=True,
        )
        assert done.returncode != 0


@pytest.mark.parametrize(
    "certfile, keyfile, says",
    [
        ("cert", "", r"^tls_keyfile: is needed too"),
        ("", "key", r"^tls_certfile: is needed too"),
        ("absent", "key", r"^tls_certfile: .*absent.pem cannot be read \(No such file"),
        ("cert", "absent", r"^tls_keyfile: .*absent.pem cannot be read \(No such file"),
        ("junk", "key", r"^tls_certfile: .*junk.pem holds no certificate"),
        ("cert", "junk", r"^tls_keyfile: .*junk.pem holds no private key"),
        ("key", "cert", r"^tls_certfile: .*key.pem holds no certificate"),
        ("cert", "other", r"^tls_keyfile: .*other.pem is not the key of .*cert.pem"),
        ("cert", "locked", r"^tls_keyfile: .*locked.pem is encrypted"),
    ],
)
def test_files_that_cannot_be_used_are_named_before_anything_is_served(
    rag: EchoRag, files: Files, certfile: str, keyfile: str, says: str
) -> None:
    paths = {"tls_certfile": certfile, "tls_keyfile": keyfile}
    with pytest.raises(ConfigError, match=says):
        build_server(rag, ServerConfig(**{k: getattr(files, v) if v else "" for k, v in paths.items()}))


def test_a_folder_is_no_certificate(rag: EchoRag, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tls_certfile: .* cannot be read"):
        build_server(rag, ServerConfig(tls_certfile=str(tmp_path), tls_keyfile=files.key))


# --- connections that ask for nothing ---

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_a_connection_without_a_whole_head_is_closed_in_time(rag, files: Files, sent: bytes, tls: bool) -> None:
    config = files.config(head_timeout_s=0.2) if tls else ServerConfig(head_timeout_s=0.2, drain_timeout_s=0)
    with serving(rag, config) as live, socket.create_connection(address_of(live.url), timeout=5) as plain:
        connection = trusting(files).wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain
        begin = time.monotonic()
        connection.sendall(sent)
        received = read_to_the_end(connection)
        assert 0.15 < time.monotonic() - begin < 3, "uvicorn's own limit, for idle connections only, is 5 s"
        assert received.startswith(b"HTTP/1.1 200" if sent.count(b"GET") == 2 else b"")
        connection.close()


def test_dribbling_a_head_does_not_prolong_its_time(rag: EchoRag) -> None:
    with serving(rag, ServerConfig(head_timeout_s=0.3, drain_timeout_s=0)) as live:
        begin = time.monotonic()
        with socket.create_connection(address_of(live.url), timeout=5) as connection, pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"G")
                time.sleep(0.03)
        assert time.monotonic() - begin < 2


def test_an_answer_may_take_longer_than_a_head(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.02
    with serving(rag, ServerConfig(head_timeout_s=0.1, drain_timeout_s=0)) as live, httpx.Client() as client:
        for _ in range(2):  # the second on the same connection
            reply = client.post(live.url + "/v1/chat/completions", json=chat("word " * 20))
            assert reply.json()["choices"][0]["finish_reason"] == "stop"
        eventually(lambda: not rag.engine.live)


def test_a_connection_too_many_is_told_so_and_closed_but_probes_are_answered(rag: EchoRag) -> None:
    with serving(rag, ServerConfig(max_connections=2, drain_timeout_s=0)) as live, httpx.Client() as first:
        assert first.get(live.url + "/v1/models").status_code == 200  # this connection stays open
        with socket.create_connection(address_of(live.url), timeout=5) as second:
            eventually(lambda: len(live.server.server_state.connections) == 2)
            with httpx.Client() as third:
                refused = third.get(live.url + "/v1/models")
                assert (refused.status_code, refused.headers["connection"]) == (503, "close")
                assert refused.json()["error"]["type"] == "server_error" and refused.headers["retry-after"] == "1"
                assert third.get(live.url + "/health").status_code == 200
            assert first.get(live.url + "/v1/models").status_code == 200
            second.close()
        eventually(lambda: len(live.server.server_state.connections) == 1)
        assert httpx.get(live.url + "/v1/models").status_code == 200


def address_of(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


def read_to_the_end(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received
