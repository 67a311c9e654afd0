"""The process: it says when it is ready, and stops without cutting answers off."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fusionrag.errors import ConfigError
from server.config import ServerConfig
from server.run import listen, serve
from tests.server.echo_rag import MODEL, EchoRag, chat, eventually, serving

ROOT = Path(__file__).parents[2]
PROGRAM = """
from tests.server.echo_rag import EchoEngine, EchoRag
from server.config import ServerConfig
from server.run import serve
serve(EchoRag(EchoEngine(delay_s=0.02)), ServerConfig(port=0))
"""


def test_sigterm_lets_a_running_stream_finish_and_exits_cleanly() -> None:
    command = [sys.executable, "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        ready = process.stdout.readline()
        url = re.fullmatch(rf"FusionRAG serves {MODEL} on (http://127\.0\.0\.1:\d+)\n", ready).group(1)
        with httpx.stream("POST", url + "/v1/chat/completions", json=chat("word " * 50, stream=True)) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(url + "/ready").status_code == 503)
            late = httpx.post(url + "/v1/chat/completions", json=chat())
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert int(late.headers["retry-after"]) >= 1
            assert list(lines)[-2] == "data: [DONE]"
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert output == "", "one line when ready, nothing else"
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["finish_reason"] for line in logged] == ["error", "stop"]
    assert "Traceback" not in errors


def test_an_answer_that_outlasts_the_drain_is_cut_off_with_an_error_event(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.02
    with serving(rag, ServerConfig(drain_timeout_s=0.1)) as live:
        with httpx.stream("POST", live.url + "/v1/chat/completions", json=chat("word " * 60, stream=True)) as reply:
            lines = reply.iter_lines()
            next(lines)
            live.server.handle_exit(signal.SIGTERM, None)
            last = [line for line in lines if line][-1]
        live.thread.join(5)
        assert not live.thread.is_alive()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    assert len(rag.engine.cancelled) == 1


def test_a_second_signal_does_not_wait_for_the_drain(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.1
    with serving(rag, ServerConfig(drain_timeout_s=60)) as live:
        asking = threading.Thread(target=ask_and_ignore, args=(live.url,))
        asking.start()
        eventually(lambda: rag.engine.live)
        live.server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: httpx.get(live.url + "/ready").status_code == 503)
        assert not live.server.should_exit
        live.server.handle_exit(signal.SIGTERM, None)
        assert live.server.should_exit
        rag.engine.delay_s = 0
        asking.join(5)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def ask_and_ignore(url: str) -> None:
    httpx.post(url + "/v1/chat/completions", json=chat("word " * 60), timeout=30)


def test_serving_in_this_process_ends_with_the_server(rag: EchoRag, capsys, caplog) -> None:
    """Signals can only be caught in the main thread, which this is."""
    with listen(ServerConfig(port=0)) as listener:
        port = listener.getsockname()[1]

    set_aside = list[int]()

    def interrupt_when_ready() -> None:
        eventually(lambda: is_ready(f"http://127.0.0.1:{port}"))
        set_aside.append(gc.get_freeze_count())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_ready)
    thread.start()
    serve(rag, ServerConfig(host="0.0.0.0", port=port, log_json=False))
    thread.join(5)
    assert capsys.readouterr().out == f"FusionRAG serves {MODEL} on http://0.0.0.0:{port}\n"
    assert "no api_key is set" in caplog.text
    assert set_aside[0] > 10_000 and gc.get_freeze_count() < set_aside[0], "the start is not looked through again"


def test_a_port_in_use_and_a_strange_host_are_named() -> None:
    with listen(ServerConfig(port=0)) as taken, pytest.raises(ConfigError, match=r"^port: cannot listen on 127"):
        listen(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match=r"^host: 'no\.such\.host\.invalid'"):
        listen(ServerConfig(host="no.such.host.invalid"))


def test_ipv6_is_listened_on_where_there_is_one() -> None:
    try:
        with listen(ServerConfig(host="::1", port=0)) as listener:
            assert listener.getsockname()[0] == "::1"
    except ConfigError:
        pytest.skip("this machine has no IPv6")
