"""`make demo`: the whole path on the sample corpus – ingest, preprocess, serve, ask over HTTP, and what it saved.

Every step is the command that a user would run; it is printed before it runs. Nothing leaves this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from openai import OpenAI

from scripts.commands.ask import PHASES
from scripts.sample import CORPUS, questions

COLLECTION, DATA_DIR = "demo", Path("demo-data")
TOP_K, REPEATS = 10, 3
ASKED = (  # two hops each: one passage names the person, another has the answer
    "When did the author of The Tidewrights die?",
    "Who is the sibling of the director of Quiet Hour at Sennet Quay?",
    "What is the date of birth of the director of film A Lamp for Grell Point?",
)


def main() -> int:
    _say("1/4  ingest: documents → chunks → vectors")
    _fusionrag("ingest", str(CORPUS), "--collection", COLLECTION, "--data-dir", str(DATA_DIR), "--chunk-tokens", "256")
    _say("2/4  preprocess: every chunk's KV cache, computed behind its related chunks (once per corpus)")
    _fusionrag("preprocess", "--collection", COLLECTION, "--data-dir", str(DATA_DIR))
    _say("3/4  serve: an OpenAI-compatible endpoint")
    with _server() as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        asked = [q for q in questions() if q["question"] in ASKED]
        for question in asked:
            _ask(client, model, question)
        _say("4/4  time to first token: full prefill and FusionRAG, side by side, same prompt")
        _compare(client, model, asked[0]["question"])
    return 0


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _fusionrag(*args: str) -> None:
    print("$ fusionrag " + " ".join(args), flush=True)
    subprocess.run([sys.executable, "-m", "scripts.cli", *args], check=True)


@contextmanager
def _server() -> Iterator[str]:
    """Starts `fusionrag serve` on a free port and waits until it is ready."""
    args = ["serve", "--data-dir", str(DATA_DIR), "--port", "0", "--top-k", str(TOP_K), "--no-log-json"]
    print("$ fusionrag " + " ".join(args), flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.cli", *args], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start (exit code {process.wait()})")
        print(f"{line.strip()}   (ready after {time.perf_counter() - begin:.1f} s)", flush=True)
        yield "http://" + line.strip().split("http://")[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _ask(client: OpenAI, model: str, question: dict[str, Any]) -> None:
    print(f"\nQ: {question['question']}\nA: ", end="", flush=True)
    sources: list[dict[str, Any]] = []
    for chunk in _stream(client, model, question["question"]):
        sources = sources or (chunk.model_extra or {}).get("sources") or []
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print(f"        (expected: {question['answers'][0]})")
    gold = [s for s in sources if s["title"] in question["gold"]]
    for s in gold:
        print(f"   [{s['index']}] {s['title']} – {s['source']}")
    print(f"   and {len(sources) - len(gold)} more sources")


def _stream(client: OpenAI, model: str, question: str, **extra: Any) -> Iterator[Any]:
    yield from client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=24,
        extra_body={"collection": COLLECTION, **extra},
    )


def _compare(client: OpenAI, model: str, question: str) -> None:
    """Both ways take turns; the median of each is shown."""
    ways: dict[str, dict[str, Any]] = {"full prefill": {"method": "full"}, "FusionRAG": {}}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, extra in ways.items():
            last = list(_stream(client, model, question, **extra))[-1]
            seen[name].append(last.usage.model_extra["fusionrag"])
    print(f"{'':<16}" + "".join(f"{name:>16}" for name in ways))
    for phase in PHASES:
        times = [median(r["phases_ms"][phase] for r in runs) for runs in seen.values()]
        print(f"{phase + ' ms':<16}" + "".join(f"{t:>16.1f}" for t in times))
    ttft = [median(r["ttft_ms"] for r in runs) for runs in seen.values()]
    print(f"{'TTFT ms':<16}" + "".join(f"{t:>16.1f}" for t in ttft) + f"   {ttft[0] / ttft[1]:.1f}× faster")
    for count in ("computed_tokens", "recomputed_tokens", "reused_tokens"):
        print(f"{count:<16.16}" + "".join(f"{runs[-1][count]:>16}" for runs in seen.values()))


if __name__ == "__main__":
    sys.exit(main())
