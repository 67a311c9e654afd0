"""One thing of every kind that clients can make and name by its id."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from tests.server.echo_rag import MODEL, eventually


@dataclass(frozen=True)
class Things:
    """The ids, by the names of path parameters."""

    file_id: str
    vector_store_id: str
    batch_id: str
    response_id: str


NOTHING = Things("file-" + "0" * 24, "vs_" + "0" * 24, "vsfb_" + "0" * 24, "resp_" + "0" * 32)


def make_things(client: httpx.Client) -> Things:
    """A file in a vector store, in a batch, ready to be searched; and a stored response."""

    def made(path: str, **request: object) -> str:
        reply = client.post(path, **request)
        assert reply.status_code == 200, reply.text
        return reply.json()["id"]

    file_id = made("/v1/files", files={"file": ("mars.txt", b"Mars is red.")}, data={"purpose": "assistants"})
    store = "/v1/vector_stores/" + (store_id := made("/v1/vector_stores", json={"name": "planets"}))
    batch_id = made(f"{store}/file_batches", json={"file_ids": [file_id]})
    response_id = made("/v1/responses", json={"model": MODEL, "input": "red planet"})
    eventually(lambda: client.get(f"{store}/files/{file_id}").json()["status"] == "completed")
    return Things(file_id, store_id, batch_id, response_id)
