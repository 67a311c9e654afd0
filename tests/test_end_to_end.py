"""The whole product on the real model: documents in, KV computed, served by a process, asked by the openai client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from scripts.cli import main
from scripts.sample import CORPUS, questions

ASKED = "Who is the spouse of the director of film Nine Bridges of Ordelle?"
NUM_PASSAGES = 12


@pytest.fixture(scope="module")
def collection(tmp_path_factory, reader_model) -> Path:
    """A data directory with the passages that the question needs and some that it does not, preprocessed."""
    folder = tmp_path_factory.mktemp("e2e")
    records = [json.loads(line) for line in (CORPUS / "encyclopedia.jsonl").read_text().splitlines()]
    gold = next(q["gold"] for q in questions() if q["question"] == ASKED)
    records.sort(key=lambda r: r["title"] not in gold)
    documents = folder / "passages.jsonl"
    documents.write_text("".join(json.dumps(r) + "\n" for r in records[:NUM_PASSAGES]))
    where = ["--collection", "sample", "--data-dir", str(folder / "data")]
    assert main(["ingest", str(documents), *where]) == 0
    assert main(["preprocess", "--num-related", "3", *where]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def url(collection) -> Iterator[str]:
    command = [sys.executable, "-m", "scripts.cli", "serve", "--data-dir", str(collection), "--port", "0"]
    with subprocess.Popen([*command, "--no-log-json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line
        yield "http://" + line.strip().split("http://")[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def client(url) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, **extra):
    return client.chat.completions.create(
        model="smollm2-reader",
        messages=[{"role": "user", "content": ASKED}],
        max_tokens=16,
        extra_body={"collection": "sample", "retrieval_top_k": 8, **extra},
    )


def test_a_two_hop_question_is_answered_from_reused_kv_with_its_sources(client):
    answer = ask(client)
    assert answer.choices[0].message.content.strip() == "Vera Dallimont"
    titles = [source["title"] for source in answer.model_extra["sources"]]
    assert len(titles) == 8 and {"Nine Bridges of Ordelle", "Anselm Korvath"} <= set(titles)
    receipt = answer.usage.model_extra["fusionrag"]
    assert answer.usage.prompt_tokens_details.cached_tokens == receipt["reused_tokens"] > 0
    counted = receipt["reused_tokens"] + receipt["recomputed_tokens"] + receipt["computed_tokens"]
    assert counted == answer.usage.prompt_tokens
    assert {chunk["source"] for chunk in receipt["chunks"]} <= {"disk", "host"}
    assert receipt["recomputed_tokens"] <= 0.15 * sum(chunk["num_tokens"] for chunk in receipt["chunks"]) + 1


def test_full_prefill_of_the_same_prompt_is_one_field_away(client):
    answer = ask(client, method="full")
    assert answer.choices[0].message.content.strip() == "Vera Dallimont"
    receipt = answer.usage.model_extra["fusionrag"]
    assert receipt["computed_tokens"] == answer.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_streamed_text_equals_unstreamed_text_and_brings_sources_first(client):
    chunks = list(
        client.chat.completions.create(
            model="smollm2-reader",
            messages=[{"role": "user", "content": ASKED}],
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"collection": "sample", "retrieval_top_k": 8},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(client).choices[0].message.content
    assert chunks[0].model_extra["sources"] and chunks[0].choices[0].delta.content
    assert chunks[-1].usage.model_extra["fusionrag"]["ttft_ms"] > 0


def test_concurrent_requests_get_the_answers_that_each_gets_alone(client):
    ratios = [0.0, 0.15, 0.5, 1.0]
    alone = [ask(client, recompute_ratio=r).choices[0].message.content for r in ratios]
    together: dict[float, str] = {}
    threads = [
        threading.Thread(
            target=lambda r=r: together.update({r: ask(client, recompute_ratio=r).choices[0].message.content})
        )
        for r in ratios
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[r] for r in ratios] == alone


def test_an_unknown_collection_is_404_and_a_prompt_that_does_not_fit_is_400(client):
    with pytest.raises(NotFoundError, match="nowhere"):
        client.chat.completions.create(
            model="smollm2-reader",
            messages=[{"role": "user", "content": "Who?"}],
            extra_body={"collection": "nowhere"},
        )
    with pytest.raises(BadRequestError) as error:
        client.chat.completions.create(
            model="smollm2-reader", messages=[{"role": "user", "content": "long " * 9000}], max_tokens=8
        )
    assert error.value.code == "context_length_exceeded"


def test_health_and_metrics_speak_of_what_happened(url):
    with urllib.request.urlopen(f"{url}/health") as reply:
        assert reply.status == 200
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        text = reply.read().decode()
    assert 'fusionrag_tokens_total{kind="reused"}' in text
    assert "fusionrag_time_to_first_token_seconds_count" in text
