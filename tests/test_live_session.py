"""A session as a user has it, with the official client, sync and async: files in, questions, citations, a file out.

The server is the real process with the packaged model; nothing is preprocessed by hand.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docx
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from reportlab.lib.pagesizes import A4
from reportlab.pdfgen import canvas

pytestmark = pytest.mark.slow
MODEL = "smollm2-reader"
FACTS = {  # file → (title, what it says, a question that only it answers, the answer)
    "bridge.txt": (
        "Tessin Bridge",
        "Tessin Bridge crosses the river Amblow at Orvane. It was designed by the engineer Ludo Ferrant and opened "
        "in 1931.",
        "Who designed Tessin Bridge?",
        "Ludo Ferrant",
    ),
    "painter.md": (
        "Mirel Osk",
        "Mirel Osk was a painter from Dravenholt. She was born on 4 May 1887 and is known for her winter harbours.",
        "When was Mirel Osk born?",
        "4 May 1887",
    ),
    "film.html": (
        "The Salt Road",
        "The Salt Road is a 1954 film directed by Pavel Anstrum. It was shot in eleven days near Kestrow.",
        "Who directed the film The Salt Road?",
        "Pavel Anstrum",
    ),
    "opera.pdf": (
        "Nightjar",
        "Nightjar is an opera in two acts. Its music was composed by Ines Vorlund. It was first given in 1902.",
        "Who composed the music of Nightjar?",
        "Ines Vorlund",
    ),
    "town.docx": (
        "Kestrow",
        "Kestrow is a town on the coast of Lorvia. Its mayor since 1998 is Bertil Hauge. It has a salt museum.",
        "What is the name of the mayor of Kestrow?",
        "Bertil Hauge",
    ),
}


def write(folder: Path, name: str) -> Path:
    """The fact as a real file of the format that its name says."""
    title, text, *_ = FACTS[name]
    path = folder / name
    match path.suffix:
        case ".txt":
            path.write_text(f"{title}\n\n{text}\n")
        case ".md":
            path.write_text(f"# {title}\n\n{text}\n")
        case ".html":
            path.write_text(
                f"<html><head><title>{title}</title></head><body><h1>{title}</h1><p>{text}</p></body></html>"
            )
        case ".pdf":
            page = canvas.Canvas(str(path), pagesize=A4)
            page.setTitle(title)
            for i, line in enumerate([title, *text.replace(". ", ".\n").splitlines()]):
                page.drawString(72, 760 - 18 * i, line)
            page.save()
        case ".docx":
            document = docx.Document()
            document.add_heading(title, level=1)
            document.add_paragraph(text)
            document.save(str(path))
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory, reader_model) -> Iterator[str]:
    command = [sys.executable, "-m", "scripts.cli", "serve", "--port", "0", "--no-log-json"]
    command += ["--data-dir", str(tmp_path_factory.mktemp("live"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line
        yield "http://" + line.strip().split("http://")[1] + "/v1"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def chat(client: OpenAI, store_id: str, question: str, **extra):
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=16,
        extra_body={"collection": store_id},
        **extra,
    )


def cited_files(annotations) -> set[str]:
    """The files of `file_citation` annotations, whichever form the client gives them in."""
    dumped = [a if isinstance(a, dict) else a.model_dump() for a in annotations or []]
    return {(a.get("file_citation") or a)["file_id"] for a in dumped if a["type"] == "file_citation"}


def test_a_session_with_the_synchronous_client(url, tmp_path):
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    files = {name: client.files.create(file=write(tmp_path, name), purpose="assistants") for name in FACTS}
    store = client.vector_stores.create(name="facts", file_ids=[f.id for f in files.values()])
    for name, file in files.items():
        attached = client.vector_stores.files.poll(file.id, vector_store_id=store.id, poll_interval_ms=200)
        assert attached.status == "completed", (name, attached.last_error)
    assert client.vector_stores.retrieve(store.id).file_counts.completed == len(FACTS)

    for name, (_, _, question, answer) in FACTS.items():
        whole = chat(client, store.id, question).choices[0].message
        assert whole.content.strip() == answer
        assert cited_files(whole.annotations) == {files[name].id}
        text, annotations = "", []
        for chunk in chat(client, store.id, question, stream=True):
            delta = chunk.choices[0].delta
            text += delta.content or ""
            annotations += (delta.model_extra or {}).get("annotations", [])
        assert text == whole.content
        assert cited_files(annotations) == {files[name].id}

    name, (_, _, question, answer) = "opera.pdf", FACTS["opera.pdf"]
    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    asked = {"model": MODEL, "input": question, "tools": [tool], "max_output_tokens": 16}
    response = client.responses.create(**asked, include=["file_search_call.results"])
    call, message = response.output
    assert call.type == "file_search_call" and files[name].id in {r.file_id for r in call.results}
    assert response.output_text.strip() == answer
    assert cited_files(message.content[0].annotations) == {files[name].id}
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == response.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.file_search_call.completed" in kinds and "response.output_text.annotation.added" in kinds

    assert client.files.delete(files[name].id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(files[name].id)
    with pytest.raises(NotFoundError):
        client.vector_stores.files.retrieve(files[name].id, vector_store_id=store.id)
    after = chat(client, store.id, question)
    assert answer not in after.choices[0].message.content
    assert files[name].id not in json.dumps(after.model_dump())
    found = client.responses.create(**asked, include=["file_search_call.results"]).output[0].results
    assert {r.file_id for r in found} == {f.id for n, f in files.items() if n != name}


def test_a_session_with_the_asynchronous_client(url, tmp_path):
    async def session() -> None:
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        store = await client.vector_stores.create(name="facts again")
        paths = [write(tmp_path, name) for name in FACTS]
        batch = await client.vector_stores.file_batches.upload_and_poll(
            store.id, files=paths, poll_interval_ms=200, max_concurrency=5
        )
        assert (batch.status, batch.file_counts.completed) == ("completed", len(FACTS))
        names = {f.id: f.filename async for f in client.files.list()}

        async def ask(name: str) -> None:
            _, _, question, answer = FACTS[name]
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_tokens=16,
                stream=True,
                extra_body={"collection": store.id},
            )
            text, annotations = "", []
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                annotations += (chunk.choices[0].delta.model_extra or {}).get("annotations", [])
            assert text.strip() == answer
            assert {names[file_id] for file_id in cited_files(annotations)} == {name}

        await asyncio.gather(*(ask(name) for name in FACTS))
        await client.vector_stores.delete(store.id)
        with pytest.raises(NotFoundError):
            await client.vector_stores.retrieve(store.id)
        await client.close()

    asyncio.run(session())
