"""Ingest over HTTP while clients keep asking: TTFT at rest and meanwhile, the event loop's longest block, passages/s.

A real server is started on an empty data directory, a few passages are uploaded and preprocessed, and the clients ask
for a while: that is rest. Then all other passages are uploaded into a vector store while the same clients go on. TTFT
is stamped in the client, at the first non-empty content. `--into other` fills another vector store than the one asked,
so that only the load differs; with `same`, answers also come from passages that have no KV yet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusionrag.errors import ConfigError
from scripts.assembly import versions
from scripts.bench.timing import finish
from scripts.evaluation.json_records import read_json_records
from scripts.sample import passages as sample_passages
from scripts.sample import questions as sample_questions

MAX_TOKENS = 16  # of an answer: TTFT is what is measured
POLL_S = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passages", type=Path, help="JSON list or JSONL of {title, text}; default: the sample corpus")
    parser.add_argument("--questions", type=Path, help="JSON list or JSONL with 'question'; default: the sample's")
    parser.add_argument("--num-passages", type=int, default=5000, help="passages to ingest (default: %(default)s)")
    parser.add_argument("--num-files", type=int, default=10, help="files they come in (default: %(default)s)")
    parser.add_argument("--num-start-passages", type=int, default=50, help="there at rest (default: %(default)s)")
    parser.add_argument("--num-clients", type=int, default=4, help="clients that keep asking (default: %(default)s)")
    parser.add_argument("--rest-s", type=float, default=60.0, help="seconds of asking at rest (default: %(default)s)")
    parser.add_argument(
        "--into", choices=("same", "other"), default="same", help="vector store to fill (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help="TOML file of knobs for the server")
    parser.add_argument("--json", type=Path, help="write the result here as well")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where an answer or a file failed."""
    passages = _passages(args)
    if args.questions:
        questions = [record.string("question") for record in read_json_records(args.questions)]
    else:
        questions = [str(q["question"]) for q in sample_questions()]
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder), args.config) as url:
        rows = asyncio.run(_Bench(args, url, questions).run(passages))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    finish({"command": "bench ingest", "versions": versions(), "args": shown, "rows": rows}, args.json)
    return 1 if any(row["failed"] or row.get("files_failed") for row in rows) else 0


@dataclass(frozen=True)
class Passage:
    """One record of an uploaded file."""

    title: str
    text: str


def _passages(args: argparse.Namespace) -> list[Passage]:
    needed = args.num_start_passages + args.num_passages
    if args.passages:
        found = [Passage(r.optional_string("title"), r.string("text")) for r in read_json_records(args.passages)]
    else:
        found = [Passage(title, text) for title, text in sample_passages()]
    if len(found) < needed:
        raise ConfigError("num_passages", f"there are {len(found)} passages, {needed} are needed; name more --passages")
    return found[:needed]


@contextmanager
def _server(folder: Path, config: Path | None) -> Iterator[str]:
    """Its URL, once it serves."""
    command = [sys.executable, "-m", "scripts.cli", "serve", "--data-dir", str(folder / "data"), "--port", "0"]
    command += ["--no-log-json", *(["--config", str(config)] if config else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise ConfigError("config", "the server did not start; its message is above")
        try:
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)


@dataclass
class _Phase:
    """What the clients saw while it was the present one."""

    name: str
    ttfts_ms: list[float] = field(default_factory=list)
    num_failed: int = 0
    sources: dict[str, int] = field(default_factory=dict)  # of the passages' KV
    begin: float = field(default_factory=time.perf_counter)

    def row(self, max_lag_ms: float | None) -> dict[str, Any]:
        found = self.ttfts_ms
        times = {f"ttft_ms_p{p}": round(float(np.percentile(found, p)), 1) if found else None for p in (50, 95, 99)}
        return {
            "phase": self.name,
            "n": len(self.ttfts_ms),
            "failed": self.num_failed,
            **times,
            "seconds": round(time.perf_counter() - self.begin, 2),
            "event_loop_lag_ms_max": None if max_lag_ms is None else round(max_lag_ms, 1),
            "kv_from": dict(sorted(self.sources.items())),
        }


class _Bench:
    def __init__(self, args: argparse.Namespace, url: str, questions: Sequence[str]) -> None:
        from openai import AsyncOpenAI

        self.args, self.url, self.questions = args, url, itertools.cycle(questions)
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.phase, self.is_over = _Phase("warm-up"), False

    async def run(self, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        async with self.client:
            return await self._run(passages)

    async def _run(self, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        start, rest = passages[: self.args.num_start_passages], passages[self.args.num_start_passages :]
        asked = (await self.client.vector_stores.create(name="asked")).id
        filled = asked if self.args.into == "same" else (await self.client.vector_stores.create(name="filled")).id
        await self._ingest(asked, [start])
        await self._preprocessed(asked, len(start))
        async with self._asking(asked):
            await asyncio.sleep(min(5.0, self.args.rest_s))
            await self._begin("rest")
            await asyncio.sleep(self.args.rest_s)
            resting = self.phase.row(await self._max_lag_ms())
            await self._begin("ingest")
            size = -(-len(rest) // self.args.num_files)
            failed = await self._ingest(filled, [rest[i : i + size] for i in range(0, len(rest), size)])
            seconds, max_lag_ms = time.perf_counter() - self.phase.begin, await self._max_lag_ms()
        loaded = self.phase.row(max_lag_ms) | {
            "seconds": round(seconds, 2),
            "files_failed": failed,
        }  # all answers are in
        loaded["passages_per_s"] = round(len(rest) / loaded["seconds"], 1)
        before, under = resting["ttft_ms_p95"], loaded["ttft_ms_p95"]
        loaded["p95_vs_rest"] = round(under / before, 2) if before and under else None
        return [resting, loaded]

    async def _begin(self, name: str) -> None:
        await self._max_lag_ms()  # what was before does not count
        self.phase = _Phase(name)

    async def _ingest(self, store: str, files: Sequence[Sequence[Passage]]) -> int:
        """Uploads each list of passages as a JSONL file and waits until all are searchable; returns how many failed."""
        ids = []
        for number, passages in enumerate(files):
            content = "".join(json.dumps(asdict(passage)) + "\n" for passage in passages).encode()
            sent = await self.client.files.create(file=(f"passages-{number}.jsonl", content), purpose="assistants")
            ids.append(sent.id)
        batches = self.client.vector_stores.file_batches
        batch = await batches.create(store, file_ids=ids)
        while batch.status == "in_progress":
            await asyncio.sleep(POLL_S)
            batch = await batches.retrieve(batch.id, vector_store_id=store)
        return batch.file_counts.failed

    async def _preprocessed(self, store: str, num_chunks: int) -> None:
        """Waits until the KV of the collection is stored (or nothing more is, for a while)."""
        seen, deadline = -1, time.perf_counter() + 120
        while time.perf_counter() < deadline:
            found: Any = await self.client.vector_stores.retrieve(store)
            kv = found.fusionrag["kv"]
            if min(kv["raw"], kv["fused"]) >= num_chunks:
                return
            if (now := kv["raw"] + kv["fused"]) > seen:
                seen, deadline = now, time.perf_counter() + 120
            await asyncio.sleep(POLL_S)
        print(f"the KV of the first passages is not complete after 120 s without progress: {seen} objects")

    @asynccontextmanager
    async def _asking(self, store: str) -> AsyncIterator[None]:
        model = (await self.client.models.list()).data[0].id
        clients = [asyncio.create_task(self._ask_on(store, model)) for _ in range(self.args.num_clients)]
        try:
            yield
        finally:
            self.is_over = True
            await asyncio.gather(*clients)

    async def _ask_on(self, store: str, model: str) -> None:
        while not self.is_over:
            phase, begin = self.phase, time.perf_counter()  # an answer counts where it was asked for
            try:
                ttft_ms = await self._ask(store, model, phase, begin)
                phase.ttfts_ms.append(ttft_ms)
            except Exception as error:  # whatever it is, the client has no answer
                print(f"failed: {type(error).__name__}: {error}")
                phase.num_failed += 1
                await asyncio.sleep(0.1)

    async def _ask(self, store: str, model: str, phase: _Phase, begin: float) -> float:
        first: float | None = None
        messages: Any = [{"role": "user", "content": next(self.questions)}]
        stream = await self.client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"collection": store},
        )
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter()
            if chunk.usage is not None:
                usage: Any = chunk.usage
                for item in usage.fusionrag["chunks"]:
                    phase.sources[item["source"]] = phase.sources.get(item["source"], 0) + 1
        return ((first or time.perf_counter()) - begin) * 1e3  # of an empty answer, when that was known

    async def _max_lag_ms(self) -> float | None:
        """The longest time that the server's event loop was blocked since this was last asked."""

        def read() -> str:
            with contextlib.closing(urllib.request.urlopen(f"{self.url}/metrics")) as reply:
                return str(reply.read().decode())

        found = re.search(r"^fusionrag_event_loop_lag_seconds (\S+)", await asyncio.to_thread(read), re.MULTILINE)
        return None if found is None else float(found[1]) * 1e3
