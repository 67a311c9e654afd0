"""Two tenants and the operator on one server: for each, what the others have is as if it were not there.

Every route of the app that takes an id is tried with somebody else's, and every body and query that takes one; the
reply must be, but for the id in it, that to an id which nobody has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import httpx
import pytest

from index.api_keys import ApiKeys
from server.config import ServerConfig
from tests.server.echo_rag import MODEL, EchoRag, chat, eventually, serving
from tests.server.live_collections import open_live
from tests.server.things import NOTHING, Things, make_things

OPERATOR_KEY = "sk-operator"
WITHOUT_OWNER = {"/assets/{name}", "/v1/models/{model:path}"}  # ids that are everybody's
# what a route must be sent to look at its ids at all
BODIES: dict[tuple[str, str], object] = {
    ("POST", "/v1/vector_stores/{vector_store_id}"): {"name": "mine"},
    ("POST", "/v1/vector_stores/{vector_store_id}/search"): {"query": "mars"},
    ("POST", "/v1/vector_stores/{vector_store_id}/files"): {"file_id": "{file_id}"},
    ("POST", "/v1/vector_stores/{vector_store_id}/files/{file_id}"): {"attributes": {"mine": True}},
    ("POST", "/v1/vector_stores/{vector_store_id}/file_batches"): {"file_ids": ["{file_id}"]},
}
# requests whose ids are not in the path, or not only: {owner} is what the asker has
INDIRECT: list[tuple[str, str, object]] = [
    ("POST", "/v1/vector_stores", {"file_ids": ["{file_id}"]}),
    ("POST", "/v1/vector_stores/{own_store}/files", {"file_id": "{file_id}"}),
    ("POST", "/v1/vector_stores/{own_store}/file_batches", {"file_ids": ["{file_id}"]}),
    ("POST", "/v1/vector_stores/{own_store}/file_batches", {"files": [{"file_id": "{file_id}"}]}),
    ("GET", "/v1/vector_stores/{own_store}/files/{file_id}", None),
    ("GET", "/v1/vector_stores/{own_store}/files/{file_id}/content", None),
    ("POST", "/v1/vector_stores/{own_store}/files/{file_id}", {"attributes": {}}),
    ("DELETE", "/v1/vector_stores/{own_store}/files/{file_id}", None),
    ("GET", "/v1/vector_stores/{own_store}/file_batches/{batch_id}", None),
    ("GET", "/v1/vector_stores/{own_store}/file_batches/{batch_id}/files", None),
    ("POST", "/v1/vector_stores/{own_store}/file_batches/{batch_id}/cancel", None),
    ("GET", "/v1/files?after={file_id}", None),
    ("GET", "/v1/vector_stores?after={vector_store_id}", None),
    ("GET", "/v1/vector_stores?before={vector_store_id}", None),
    ("GET", "/v1/vector_stores/{own_store}/files?after={file_id}", None),
    ("POST", "/v1/responses", {"model": MODEL, "input": "and Venus", "previous_response_id": "{response_id}"}),
]


@dataclass(frozen=True)
class Tenant:
    client: httpx.Client
    things: Things

    def ask(self, method: str, path: str, body: object, ids: Things) -> tuple[int, str]:
        """Status and text of the reply, in which the ids are spelled by their names."""
        known = asdict(ids) | {"own_store": self.things.vector_store_id}
        body = None if body is None else _filled(body, known)
        reply = self.client.request(method, _filled(path.replace(":path", ""), known), json=body)
        text = reply.text
        for name, value in known.items():
            text = text.replace(value, f"<{name}>")
        return reply.status_code, text

    def all_that_it_has(self) -> list[object]:
        store = f"/v1/vector_stores/{self.things.vector_store_id}"
        paths = ["/v1/files", "/v1/vector_stores", f"{store}/files", f"/v1/responses/{self.things.response_id}"]
        paths += [f"{store}/file_batches/{self.things.batch_id}", f"/v1/files/{self.things.file_id}/content"]
        replies = [self.client.get(path) for path in paths]
        assert [r.status_code for r in replies] == [200] * len(paths)
        return [{**r.json(), "last_active_at": 0} if "json" in r.headers["content-type"] else r.text for r in replies]


def _filled(value: object, known: dict[str, str]) -> object:
    if isinstance(value, str):
        for name, text in known.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, dict):
        return {name: _filled(item, known) for name, item in value.items()}
    return [_filled(item, known) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class House:
    """The server and who lives there; nobody has anything of the others."""

    rag: EchoRag
    routes: list[tuple[str, str]]
    keys: ApiKeys
    alice: Tenant
    bob: Tenant
    operator: Tenant


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[House]:
    with ExitStack() as stack:
        opened = stack.enter_context(open_live(tmp_path_factory.mktemp("house")))
        keys, rag = ApiKeys(opened.catalogue), EchoRag(catalogue=opened.catalogue)
        alice, bob = keys.add("alice"), keys.add("bob")
        config = ServerConfig(api_key=OPERATOR_KEY, drain_timeout_s=0)
        live = stack.enter_context(serving(rag, config, live=opened.live, keys=keys))

        def tenant(key: str) -> Tenant:
            headers = {"Authorization": f"Bearer {key}"}
            client = stack.enter_context(httpx.Client(base_url=live.url, headers=headers, timeout=20))
            return Tenant(client, make_things(client))

        routes = [(m, r.path) for r in live.server.config.app.routes for m in sorted(r.methods)]
        yield House(rag, routes, keys, tenant(alice), tenant(bob), tenant(OPERATOR_KEY))


@pytest.fixture(params=["bob", "operator"])
def stranger(house: House, request) -> Tenant:
    return getattr(house, request.param)


def test_every_route_with_an_id_knows_nothing_of_somebody_elses(house: House, stranger: Tenant, subtests) -> None:
    before = house.alice.all_that_it_has()
    tried = [(m, path) for m, path in house.routes if "{" in path and path not in WITHOUT_OWNER]
    assert len(tried) >= 20
    for method, path in tried:
        with subtests.test(f"{method} {path}"):
            body = BODIES.get((method, path))
            found, missing = (stranger.ask(method, path, body, ids) for ids in (house.alice.things, NOTHING))
            assert found[0] == 404, found
            assert found == missing
    assert house.alice.all_that_it_has() == before


def test_ids_in_bodies_and_queries_are_checked_like_those_in_paths(house: House, stranger: Tenant, subtests) -> None:
    before, own = house.alice.all_that_it_has(), stranger.all_that_it_has()
    for method, path, body in INDIRECT:
        with subtests.test(f"{method} {path} {body}"):
            found, missing = (stranger.ask(method, path, body, ids) for ids in (house.alice.things, NOTHING))
            assert found == missing
            assert found[0] in (400, 404) or "?" in path, "only a list may have an unknown place to begin at"
    assert house.alice.all_that_it_has() == before
    assert stranger.all_that_it_has() == own, "a refused request has made something"


def test_the_same_requests_are_answered_to_whom_the_things_belong(house: House, subtests) -> None:
    """So that the 404s above mean something. What deletes comes last, from the inside out."""
    owner = Tenant(house.alice.client, make_things(house.alice.client))
    tried = [(m, path) for m, path in house.routes if "{" in path and path not in WITHOUT_OWNER]
    tried.sort(key=lambda route: (route[0] == "DELETE", -len(route[1])))
    for method, path in tried:
        with subtests.test(f"{method} {path}"):
            status, text = owner.ask(method, path, BODIES.get((method, path)), owner.things)
            assert status == 200, text


def test_lists_show_what_is_the_askers_and_nothing_else(house: House) -> None:
    tenants = (house.alice, house.bob, house.operator)
    for path in ("/v1/files", "/v1/vector_stores"):
        shown = [{item["id"] for item in tenant.client.get(path).json()["data"]} for tenant in tenants]
        assert all(shown), "everybody has something"
        assert sum(len(ids) for ids in shown) == len(set.union(*shown))


def test_every_question_carries_its_askers_name(house: House) -> None:
    """The rag looks up collections and stored KV by it: test_rag."""
    store_id = house.alice.things.vector_store_id
    for tenant, owner in ((house.bob, "bob"), (house.operator, ""), (house.alice, "alice")):
        tool = {"type": "file_search", "vector_store_ids": [store_id]}
        tenant.client.post("/v1/chat/completions", json=chat(collection=store_id))
        tenant.client.post("/v1/responses", json={"model": MODEL, "input": "red planet", "tools": [tool]})
        tenant.client.post("/v1/completions", json={"model": MODEL, "prompt": "red planet"})
        assert [q.owner for q in house.rag.questions[-3:]] == [owner] * 3


def test_whoever_gets_a_new_key_under_the_same_name_has_the_same_things(house: House) -> None:
    house.keys.remove("bob")
    headers = {"Authorization": f"Bearer {house.keys.add('bob')}"}
    with httpx.Client(base_url=house.bob.client.base_url, headers=headers) as client:
        eventually(lambda: client.get("/v1/files").status_code == 200)
        assert replace(house.bob, client=client).all_that_it_has()
    assert house.bob.client.get("/v1/files").status_code == 401
