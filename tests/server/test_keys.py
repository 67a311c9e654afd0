"""Keys: who gets in, whose request it is, and that a running server follows what the command line does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from index import Catalogue
from index.api_keys import ApiKeys, key_hash
from index.errors import Conflict, InvalidValue, NotFound
from scripts.cli import main
from server.config import ServerConfig
from server.keys import FOLLOW_S, KeyRing
from tests.server.echo_rag import EchoRag, chat, open_app, until

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
OPEN = ServerConfig(drain_timeout_s=0)
LOCKED = ServerConfig(api_key="sk-operator", drain_timeout_s=0)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[ApiKeys]:
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        yield ApiKeys(catalogue)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- the books ---


def test_a_key_is_256_random_bits_and_only_its_hash_is_on_disk(keys: ApiKeys, tmp_path: Path) -> None:
    key = keys.add("alice")
    assert key.startswith("frk_") and len(key) == 4 + 43
    assert keys.add("bob") != key
    alice, _ = keys.all()
    assert (alice.name, alice.key_hash) == ("alice", hashlib.sha256(key.encode()).digest())
    assert abs(alice.created_at - time.time()) < 60
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.encode() not in on_disk and key.removeprefix("frk_").encode() not in on_disk
    assert alice.key_hash in on_disk


def test_a_name_has_one_key_at_a_time_and_a_removed_key_is_gone(keys: ApiKeys) -> None:
    first = keys.add("alice")
    with pytest.raises(Conflict, match="'alice' has a key already"):
        keys.add("alice")
    keys.remove("alice")
    assert keys.all() == ()
    with pytest.raises(NotFound):
        keys.remove("alice")
    assert keys.add("alice") != first


@pytest.mark.parametrize("name", ["", "two words", "a/b", "ä", "x" * 65, "new\nline"])
def test_a_name_that_could_be_misread_is_refused(keys: ApiKeys, name: str) -> None:
    with pytest.raises(InvalidValue, match="name"):
        keys.add(name)


# --- the ring ---


def test_every_key_stands_for_its_owner_and_nothing_else_stands_for_anybody(keys: ApiKeys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    ring = KeyRing("sk-operator", keys)
    given = {f"Bearer {alice}": "alice", f"bearer  {bob} ": "bob", "BEARER sk-operator": ""}
    assert {header: ring.owner(header.encode()) for header in given} == given
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {alice}",
        alice,
        f"Bearer {alice}x",
        f"Bearer {alice[:-1]}",
        "Bearer \xff",
    ]
    wrong += [f"Bearer {alice} {bob}", "Bearer " + keys.all()[0].key_hash.hex()]
    assert {header: ring.owner(header.encode("latin-1")) for header in wrong} == dict.fromkeys(wrong)


def test_an_empty_operator_key_opens_nothing(keys: ApiKeys) -> None:
    keys.add("alice")
    assert KeyRing("", keys).owner(b"Bearer ") is None
    assert key_hash(b"") not in [entry[0] for entry in KeyRing("", keys)._entries]


async def test_keys_are_read_again_only_when_it_is_time_and_once_for_all_who_wait(keys: ApiKeys) -> None:
    class Counting:
        num_reads = 0

        def all(self):
            self.num_reads += 1
            return keys.all()

    counting = Counting()
    ring = KeyRing(stored=counting, follow_s=0.05)
    alice = keys.add("alice")
    await ring.follow()
    assert (ring.is_locked, counting.num_reads) == (False, 1)
    await until(lambda: time.monotonic() - ring._read_at > 0.05)
    await asyncio.gather(*(ring.follow() for _ in range(5)))
    assert (ring.is_locked, counting.num_reads) == (True, 2)
    assert ring.owner(f"Bearer {alice}".encode()) == "alice"


async def test_the_known_keys_go_on_to_hold_where_the_catalogue_cannot_be_read(keys: ApiKeys, tmp_path, caplog) -> None:
    alice = keys.add("alice")
    ring = KeyRing(stored=keys, follow_s=0)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as broken:
        broken.execute("ALTER TABLE api_keys RENAME TO elsewhere")
    await ring.follow()
    assert ring.owner(f"Bearer {alice}".encode()) == "alice"
    assert "could not be read again" in caplog.text and alice not in caplog.text


# --- the wire ---


async def test_a_question_belongs_to_the_owner_of_the_key_it_came_with(rag: EchoRag, keys: ApiKeys) -> None:
    alice = keys.add("alice")
    async with open_app(rag, LOCKED, keys=keys) as client:
        for key in (alice, "sk-operator"):
            assert (await client.post(CHAT, json=chat(), headers=bearer(key))).status_code == 200
        assert (await client.post(CHAT, json=chat(), headers=bearer("frk_wrong"))).status_code == 401
        assert (await client.post(CHAT, json=chat())).status_code == 401
    assert [q.owner for q in rag.questions] == ["alice", ""]


async def test_without_any_key_everybody_is_the_operator(rag: EchoRag, keys: ApiKeys) -> None:
    async with open_app(rag, OPEN, keys=keys) as client:
        assert (await client.post(CHAT, json=chat(), headers=bearer("anything"))).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    assert rag.questions[0].owner == ""


async def test_metrics_are_for_the_operator_alone(rag: EchoRag, keys: ApiKeys) -> None:
    alice = keys.add("alice")
    async with open_app(rag, LOCKED, keys=keys) as client:
        replies = [await client.get("/metrics", headers=bearer(key)) for key in ("sk-operator", alice, "wrong")]
    assert [r.status_code for r in replies] == [200, 403, 401]
    assert "operator" in replies[1].json()["error"]["message"]


async def test_a_running_server_follows_keys_that_are_added_and_removed(rag: EchoRag, keys: ApiKeys) -> None:
    async with open_app(rag, OPEN, keys=keys) as client:
        assert (await client.get("/v1/models")).status_code == 200
        alice = keys.add("alice")
        await follows(client, 401)
        assert (await client.get("/v1/models", headers=bearer(alice))).status_code == 200
        bob = keys.add("bob")
        await follows(client, 200, bob)
        keys.remove("alice")
        await follows(client, 401, alice)
        keys.remove("bob")
        await follows(client, 401, bob)
        assert (await client.get("/v1/models")).status_code == 401, "the last key's removal must not open the server"


async def follows(client: httpx.AsyncClient, status: int, key: str = "") -> None:
    """Waits until the server answers so: FOLLOW_S and a little."""
    deadline = time.monotonic() + FOLLOW_S + 4
    while (await client.get("/v1/models", headers=bearer(key) if key else {})).status_code != status:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key_but_only_when_they_read(rag: EchoRag, path: str) -> None:
    async with open_app(rag, LOCKED) as client:
        assert (await client.get(path)).status_code == 200
        assert (await client.post(path)).status_code == 401
        assert (await client.get(path + "/")).status_code == 401
        assert (await client.get("/assets")).status_code == 401


async def test_keys_are_in_no_log_line_and_in_no_reply(rag: EchoRag, keys: ApiKeys, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    alice = keys.add("alice")
    async with open_app(rag, LOCKED, keys=keys) as client:
        replies = [await client.post(CHAT, json=chat(), headers=bearer(key)) for key in (alice, "frk_guessed")]
    said = caplog.text + "".join(r.text + str(r.headers) for r in replies)
    assert alice not in said and "sk-operator" not in said and "frk_guessed" not in said


# --- the command ---


def keys_command(data_dir: Path, *args: str) -> int:
    return main(["keys", *args, "--data-dir", str(data_dir)])


def test_the_command_prints_a_new_key_once_and_lists_names_only(tmp_path: Path, capsys) -> None:
    assert keys_command(tmp_path, "add", "alice") == 0
    key, error = capsys.readouterr()
    assert key.startswith("frk_") and key.count("\n") == 1 and "cannot be shown again" in error
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        assert KeyRing("", ApiKeys(catalogue)).owner(f"Bearer {key.strip()}".encode()) == "alice"
    assert keys_command(tmp_path, "list") == 0
    listed = capsys.readouterr().out
    assert listed.startswith("alice\tadded 20") and key.strip() not in listed
    assert keys_command(tmp_path, "remove", "alice") == 0
    assert "no key is left" in capsys.readouterr().err
    assert keys_command(tmp_path, "list") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("args", [("add",), ("remove",), ("list", "alice"), ("add", "a b"), ("remove", "nobody")])
def test_the_command_names_what_is_wrong_with_its_arguments(tmp_path: Path, capsys, args: tuple[str, ...]) -> None:
    assert keys_command(tmp_path, *args) == 2
    assert capsys.readouterr().err.startswith("fusionrag keys: ")


def test_the_folder_with_the_hashes_is_for_its_owner_alone(tmp_path: Path) -> None:
    keys_command(tmp_path / "data", "add", "alice")
    assert os.stat(tmp_path / "data").st_mode & 0o077 == 0
