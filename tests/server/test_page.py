"""The page at `/`, in a real headless Chromium in front of the real server."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from fusionrag.default_model import default_model_dir
from fusionrag.errors import ModelNotFound
from fusionrag.rag import Prepared, Question, Source
from index import Retriever
from index.types import IngestProgress, KVObject
from scripts.sample import CORPUS, questions
from server.api.page import FOLDER
from server.config import ServerConfig
from tests.server.echo_rag import CHUNKS, STATS, EchoEngine, EchoRag, LiveServer, eventually, open_app, serving
from tests.server.live_collections import Opened, open_live

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CONFIG = ServerConfig(drain_timeout_s=0, default_collection="planets")
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
EXPLAINED = replace(
    STATS,
    predicted_full_ms=90.0,
    chunks=(replace(CHUNKS[0], recomputed=((1, 2),)), replace(CHUNKS[1], recomputed=((0, 2), (3, 5))), CHUNKS[2]),
)

# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_page_and_its_files_may_load_and_contact_nothing_but_this_server(client: httpx.AsyncClient) -> None:
    for path in ("/", *(f"/assets/{p.name}" for p in FOLDER.iterdir() if p.name != "index.html")):
        reply = await client.get(path)
        assert reply.status_code == 200, path
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert not any("unsafe" in value or "*" in value for value in policy.values())
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


@pytest.mark.anyio
async def test_a_file_is_sent_again_only_when_it_has_changed(client: httpx.AsyncClient) -> None:
    first = await client.get("/assets/style.css")
    tag = first.headers["etag"]
    again = await client.get("/assets/style.css", headers={"If-None-Match": f'"other", {tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await client.get("/assets/style.css", headers={"If-None-Match": '"other"'})).status_code == 200
    assert (await client.get("/assets/app.js")).headers["etag"] != tag


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["nothing.js", "..%2fapi%2fpage.py", "index.html", "", "%00", "a" * 500])
async def test_no_other_file_can_be_had(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/assets/{name}")).status_code == 404


@pytest.mark.anyio
async def test_the_page_opens_without_a_key_and_says_nothing_about_the_server(rag: EchoRag) -> None:
    async with open_app(rag, replace(CONFIG, api_key="sk-1")) as client:
        reply = await client.get("/")
    assert reply.status_code == 200
    assert rag.model_name not in reply.text and "planets" not in reply.text


# --- a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server in a fresh browser profile; at the end, sees that nothing of it went wrong."""
    contexts, problems, urls = [], [], []

    def open_page(url: str, is_locked: bool = False, **options: object) -> Page:
        context = browser.new_context(**{"viewport": WIDE, "base_url": url, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_problem(message.text) else None)
        page.on("request", lambda request: urls.append((url, request.url)))
        page.goto("/")
        if not is_locked:
            expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for base, url in urls if not url.startswith(base + "/")] == [], "requests to other hosts"


def is_problem(console_text: str) -> bool:
    """Chromium itself reports replies with an error status, which some tests provoke."""
    return not console_text.startswith("Failed to load resource")


@pytest.fixture
def live(rag: EchoRag) -> Iterator[LiveServer]:
    """Without collections that change: answers come from the one it is set to."""
    rag.engine.stats = EXPLAINED
    with serving(rag, CONFIG) as server:
        yield server


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    expect(page.locator("#receipt")).to_be_visible()


# --- asking -----------------------------------------------------------------------------------------------------------


FRAMES = """() => {
    window.frames_seen = [];
    const look = () => {
        const text = document.getElementById("answer-text").textContent;
        if (text !== window.frames_seen.at(-1)) window.frames_seen.push(text);
        requestAnimationFrame(look);
    };
    look();
}"""


def test_an_answer_is_painted_while_it_streams(open_page, live: LiveServer) -> None:
    live.rag.engine.delay_s = 0.15
    page = open_page(live.url)
    page.evaluate(FRAMES)
    ask(page, "one two three four five six")
    answered(page)
    frames = page.evaluate("window.frames_seen")
    assert frames[-1] == "one two three four five six"
    assert all(frames[-1].startswith(text) for text in frames)
    assert len(frames) >= 5, "nearly every token was a picture of its own"


def test_the_first_token_is_on_the_screen_long_before_the_last_has_left_the_server(open_page, live, caplog) -> None:
    """The server logs the time from a request's arrival to its first token's departure; printed is what the page adds
    to it (`-rP` shows it). Of several the fastest is looked at: not what else the machine is doing."""
    live.rag.engine.delay_s = 0.1
    page = open_page(live.url)
    caplog.set_level(logging.INFO, "fusionrag.request")
    late_ms = []
    for _ in range(5):
        caplog.clear()
        ask(page, "alpha beta gamma delta epsilon zeta eta theta iota kappa")
        answered(page)
        eventually(lambda: server_ttfts_ms(caplog))
        marks = dict(page.evaluate("performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])"))
        late_ms.append(marks["first-token-painted"] - marks["asked"] - server_ttfts_ms(caplog)[0])
    logging.getLogger(__name__).warning("first token painted %s ms after the server's TTFT", [*map(round, late_ms)])
    assert 0 < min(late_ms) < 900 / 2, "nine more tokens take 900 ms"


def server_ttfts_ms(caplog: pytest.LogCaptureFixture) -> list[float]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "fusionrag.request"]
    return [line["ttft_server_ms"] for line in lines if line["ttft_server_ms"]]


def test_sources_stand_beside_the_answer_and_the_cited_one_is_marked_and_one_click_away(open_page, live) -> None:
    page = open_page(live.url)
    ask(page, "Mars is red. Nothing [1] supports that sentence")
    answered(page)
    expect(page.locator("#answer-text")).to_have_text("Mars is red.1 Nothing [1] supports that sentence")
    sources = page.locator(".source")
    expect(sources.locator("h3 .name")).to_have_text(["Mars", "Venus"])
    expect(sources.nth(1)).to_contain_text("planets/venus.pdf, page 3")
    expect(sources.nth(0)).to_have_class(re.compile(r"\bcited\b"))
    expect(sources.nth(1)).not_to_have_class(re.compile(r"\bcited\b"))
    page.get_by_role("link", name="Source 1").click()
    expect(sources.nth(0)).to_be_focused()
    assert page.locator("#answer").bounding_box()["x"] < sources.nth(0).bounding_box()["x"], "beside it"


def test_the_receipt_compares_this_answers_phases_with_full_prefill(open_page, live: LiveServer) -> None:
    page = open_page(live.url)
    ask(page, "red planet")
    answered(page)
    expect(page.locator("#speed")).to_contain_text("2.5× sooner than full prefill. First token after 36 ms")
    widths = page.locator("#times .bar").evaluate_all(
        "(bars) => bars.map((b) => [...b.children].map((p) => p.getBoundingClientRect().width / b.clientWidth))"
    )
    assert sum(widths[0]) == pytest.approx(36 / 90, abs=0.01)
    assert widths[0] == pytest.approx([ms / 90 for ms in range(1, 9)], abs=0.005)
    assert widths[1] == pytest.approx([1.0], abs=0.01)
    expect(page.locator("#phases")).to_contain_text("Recompute7.0 ms")
    expect(page.locator("#tokens .legend li")).to_have_text(["7 reused", "2 recomputed", "11 computed"])


def test_an_answer_without_a_prediction_still_shows_its_phases(open_page, live: LiveServer) -> None:
    live.rag.engine.stats = replace(EXPLAINED, predicted_full_ms=None)
    page = open_page(live.url)
    ask(page, "red planet")
    answered(page)
    expect(page.locator("#speed")).to_contain_text("cannot be predicted yet")
    expect(page.locator("#times .bar")).to_have_count(1)


@pytest.mark.parametrize(
    ("way", "predicted_ms", "words"),
    [
        ("full", 80.0, "prefilled in full: that was predicted to be faster"),
        ("full", None, "prefilled in full, as asked"),
        ("prefix", 30.0, "Only the first passage's KV was taken"),
    ],
)
def test_an_answer_that_did_not_reuse_all_kv_says_why(way, predicted_ms, words, open_page, live: LiveServer) -> None:
    live.rag.engine.stats = replace(EXPLAINED, way=way, predicted_ms=predicted_ms)
    page = open_page(live.url)
    ask(page, "red planet")
    answered(page)
    expect(page.locator("#speed")).to_contain_text(words)


def test_what_was_recomputed_is_shaded_in_the_text_and_the_origin_of_the_kv_is_named(open_page, live) -> None:
    page = open_page(live.url)
    ask(page, "red planet")
    answered(page)
    sources = page.locator(".source")
    expect(sources.nth(0).locator(".text mark")).to_have_text(["Mars"])
    expect(sources.nth(1).locator(".text mark")).to_have_text(["Venus", "hot."])
    expect(sources.locator(".text")).to_have_text(["Mars is red.", "Venus is hot."])
    expect(sources.locator(".tags")).to_have_text(
        ["KV from memory1 of 4 tokens recomputed", "KV from disk1 of 5 tokens recomputed"]
    )


def test_shading_counts_characters_as_the_server_does(open_page, live: LiveServer) -> None:
    """A character beyond the basic plane is two units of a JavaScript string, and one of Python's."""
    page = open_page(live.url)
    page.evaluate(
        """async () => {
            const sources = await import("/assets/sources.js");
            const text = "🪐🪐 rings";
            const shown = [{ index: 1, chunk_id: "c", title: "T", source: "s", text, score: null, page: null }];
            sources.showSources(shown);
            const receipt = { chunk_id: "c", source: "host", kind: "raw", num_tokens: 2, num_recomputed: 1 };
            sources.showReceipts(shown, [{ ...receipt, recomputed: [[1, 2], [3, 8]] }]);
        }"""
    )
    expect(page.locator(".source mark")).to_have_text(["🪐", "rings"])


def test_text_of_answers_and_documents_never_becomes_markup(open_page, live: LiveServer) -> None:
    page = open_page(live.url)
    text = "<img src=x onerror=alert(1)> <b>bold</b> &lt; **stars**"
    ask(page, text)
    answered(page)
    assert page.locator("#answer-text").text_content() == text
    assert page.locator("#answer-text *").count() == 0


def test_the_ratio_is_the_servers_until_it_is_moved(open_page, live: LiveServer) -> None:
    page = open_page(live.url)
    ratio = page.get_by_label("Recompute", exact=True)
    ask(page, "as the server is set")
    answered(page)
    ratio.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#ratio-value")).to_have_text("1 %")
    ask(page, "with another ratio")
    answered(page)
    page.get_by_role("button", name="Use default").click()
    ask(page, "as before")
    answered(page)
    asked = [q.reuse and q.reuse.recompute_ratio for q in live.rag.questions]
    assert asked == [None, 0.01, None]


# --- giving up, and what goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_cancelling_frees_the_request_and_keeps_what_was_answered(open_page, live: LiveServer, way: str) -> None:
    live.rag.engine.delay_s = 0.05
    page = open_page(live.url)
    ask(page, "word " * 60)
    expect(page.locator("#answer-text")).to_contain_text("word word")
    shoot(page, "streaming")
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#answer-status")).to_have_text("Cancelled.")
    shoot(page, "cancelled")
    eventually(lambda: len(live.rag.engine.cancelled) == 1)
    expect(page.locator("#answer-text")).to_contain_text("word word")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    live.rag.engine.delay_s = 0
    ask(page, "again")
    answered(page)


def test_a_second_question_waits_until_the_first_is_answered(open_page, live: LiveServer) -> None:
    live.rag.engine.delay_s = 0.1
    page = open_page(live.url)
    ask(page, "one two three")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Ask").click(force=True)
    answered(page)
    assert len(live.rag.questions) == 1


def error_shown(page: Page, title: str, *parts: str) -> None:
    alert = page.get_by_role("alert")
    expect(alert.locator("strong")).to_have_text(title)
    for part in parts:
        expect(alert).to_contain_text(part)


def test_a_server_that_has_gone_is_named_and_asked_again_when_it_is_back(open_page, live: LiveServer, rag) -> None:
    page = open_page(live.url)
    live.server.should_exit = True
    live.thread.join(10)
    ask(page, "anybody there")
    error_shown(page, "The server cannot be reached", "See whether it is running")
    shoot(page, "server-gone")
    with serving(EchoRag(), CONFIG) as other:

        def to_the_other(route: Route) -> None:  # as the browser would ask it, if it stood at the same address
            headers = {name: value for name, value in route.request.headers.items() if name != "sec-fetch-site"}
            route.fulfill(response=route.fetch(url=f"{other.url}/v1/chat/completions", headers=headers))

        page.route("**/v1/chat/completions", to_the_other)
        page.get_by_role("button", name="Try again").click()
        answered(page)
    expect(page.locator("#answer-text")).to_have_text("anybody there")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_full_queue_says_when_to_come_back(open_page) -> None:
    with serving(EchoRag(EchoEngine(max_queue=0)), CONFIG) as live:
        page = open_page(live.url)
        ask(page, "red planet")
        error_shown(page, "The server is busy", "Try again in 1 s.")


def test_a_server_that_drains_says_so(open_page, rag: EchoRag) -> None:
    rag.engine.delay_s = 0.2
    with serving(rag, replace(CONFIG, drain_timeout_s=8)) as live:
        page = open_page(live.url)
        running = threading.Thread(target=lambda: httpx.post(f"{live.url}/v1/completions", json=LONG, timeout=20))
        running.start()
        eventually(lambda: rag.engine.live)
        live.server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: httpx.post(f"{live.url}/v1/completions", json=LONG).status_code == 503)
        ask(page, "red planet")
        error_shown(page, "The server is shutting down", "Try again in 5 s.")
        running.join()


LONG = {"model": EchoRag.model_name, "prompt": "word " * 15}


def test_an_error_in_mid_stream_keeps_the_text_and_is_shown_below_it(open_page, live: LiveServer) -> None:
    page = open_page(live.url)
    ask(page, "so far !error")
    error_shown(page, "The server failed", "its log has the details")
    expect(page.locator("#answer-text")).to_have_text("so far")


def test_a_question_that_is_too_long_is_refused_in_the_servers_words(open_page, live: LiveServer) -> None:
    page = open_page(live.url)
    ask(page, "word " * 65)
    error_shown(page, "The server refused this", "the prompt has 65 tokens, but at most 64 fit")


def test_a_key_is_asked_for_until_it_fits_and_is_kept_in_the_session_only(open_page, rag: EchoRag) -> None:
    with serving(rag, replace(CONFIG, api_key="sk-secret")) as live, httpx.Client(base_url=live.url) as probe:
        assert probe.get("/v1/models").status_code == 401
        page = open_page(live.url, is_locked=True)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.type("sk-wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not accept this key")
        shoot(page, "key")
        page.keyboard.type("sk-secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text(rag.model_name)
        ask(page, "red planet")
        answered(page)
        assert page.evaluate("Object.values(sessionStorage)") == ["sk-secret"]
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        page.reload()
        expect(page.locator("#model")).to_have_text(rag.model_name)


# --- how it looks and feels -------------------------------------------------------------------------------------------

CONTRAST = """(selectors) => {
    const luminance = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" ? background(node.parentElement) : color;
    };
    return selectors.map((selector) => {
        const node = document.querySelector(selector);
        const [a, b] = [luminance(getComputedStyle(node).color), luminance(background(node))];
        return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""
READ = ["#model", "#answer-text", ".cite", "#answer-status", "#speed", "#phases dt", ".tag", ".tag.cited", "mark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_reader_and_all_text_has_contrast(open_page, live: LiveServer, scheme: str) -> None:
    page = open_page(live.url, color_scheme=scheme)
    ask(page, "Mars is red.")
    answered(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    for selector, ratio in page.evaluate(CONTRAST, [*READ, ".source .text", "#send", "#question-keys"]):
        assert ratio >= 4.5, f"{selector} in {scheme}: {ratio:.2f}"


@pytest.mark.parametrize("viewport", [WIDE, NARROW])
def test_nothing_is_cut_off_or_needs_scrolling_sideways(open_page, live: LiveServer, viewport) -> None:
    page = open_page(live.url, viewport=viewport)
    ask(page, "Mars is red. " + "unbroken" * 40)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    too_wide = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((n) => n.scrollWidth > n.clientWidth + 1
            && n.clientWidth > 1 && getComputedStyle(n).textOverflow !== "ellipsis").map((n) => n.id || n.className)"""
    )
    assert too_wide == []


# --- collections that change ------------------------------------------------------------------------------------------


@dataclass
class LibraryRag(EchoRag):
    """Echoes the question, and finds passages in real collections."""

    retriever: Retriever | None = None

    def prepare(self, question: Question, request_id: str) -> Prepared:
        prepared = super().prepare(replace(question, collections=()), request_id)
        hits = [
            hit for name in question.collections for hit in self.retriever.search(name, asked(question), self.search)
        ]
        sources = tuple(
            Source(
                i, h.chunk.chunk_id, h.chunk.document_id, h.chunk.title, h.source, h.chunk.text, h.score, h.chunk.page
            )
            for i, h in enumerate(hits, 1)
        )
        return replace(prepared, sources=sources, offsets=((),) * len(CHUNKS))


def asked(question: Question) -> str:
    return question.turns[-1].content


@dataclass(frozen=True)
class Library:
    url: str
    opened: Opened
    rag: LibraryRag


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with open_live(tmp_path / "data") as opened:
        rag = LibraryRag(retriever=opened.live.retriever)
        with serving(rag, ServerConfig(drain_timeout_s=0), live=opened.live) as live:
            yield Library(live.url, opened, rag)


@pytest.fixture
def planets(library: Library) -> str:
    """A collection without files, made over HTTP."""
    return httpx.post(f"{library.url}/v1/vector_stores", json={"name": "Planets"}).json()["id"]


def text_file(name: str, text: str) -> dict[str, object]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": text.encode()}


def upload(page: Page, *files: dict[str, object]) -> None:
    page.locator("#files").set_input_files(list(files))


def row(page: Page, name: str) -> Locator:
    return page.locator(".file").filter(has=page.locator(".name", has_text=name))


def is_ready(page: Page, name: str) -> None:
    expect(row(page, name).locator(".state")).to_have_text("Ready")


def test_from_a_new_collection_to_an_answer_and_back_to_nothing(open_page, library: Library) -> None:
    page = open_page(library.url)
    page.get_by_label("Name of the new collection").fill("Planets")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_label("Collection to ask").locator("option:checked")).to_have_text("Planets")
    upload(page, text_file("mars.md", "# Mars\n\nMars is red."), text_file("venus.txt", "Venus is hot."))
    is_ready(page, "mars.md")
    is_ready(page, "venus.txt")
    expect(page.locator("#collection-size")).to_contain_text("2 documents · 2 passages")
    ask(page, "Mars is red.")
    answered(page)
    expect(page.locator(".source").first).to_contain_text("mars.md")
    expect(page.locator(".source.cited")).to_have_count(1)
    row(page, "mars.md").get_by_role("button", name="Delete mars.md").click()
    page.get_by_role("button", name="Delete everywhere").click()
    expect(page.locator(".file .name")).to_have_text(["venus.txt"])
    ask(page, "Mars is red.")
    answered(page)
    expect(page.locator(".source .place, .source .name")).not_to_contain_text(["mars"])
    assert [f["filename"] for f in httpx.get(f"{library.url}/v1/files").json()["data"]] == ["venus.txt"]


def test_a_file_that_is_only_removed_from_the_collection_stays_on_the_server(open_page, library, planets) -> None:
    page = open_page(library.url)
    upload(page, text_file("mars.txt", "Mars is red."))
    is_ready(page, "mars.txt")
    remove = page.get_by_role("button", name="Delete mars.txt")
    remove.click()
    shoot(page, "delete")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert len(httpx.get(f"{library.url}/v1/vector_stores/{planets}/files").json()["data"]) == 1
    remove.click()
    page.get_by_role("button", name="Remove from this collection").click()
    expect(page.locator(".file")).to_have_count(0)
    assert httpx.get(f"{library.url}/v1/vector_stores/{planets}/files").json()["data"] == []
    assert len(httpx.get(f"{library.url}/v1/files").json()["data"]) == 1


def test_the_way_of_a_file_is_followed_and_its_end_announced(open_page, library: Library, planets: str) -> None:
    ingestion = library.opened.ingestion
    ingestion.is_held = True
    page = open_page(library.url)
    upload(page, text_file("mars.txt", "Mars is red."))
    expect(row(page, "mars.txt").locator(".state")).to_have_text("Waiting")
    file_id = httpx.get(f"{library.url}/v1/files").json()["data"][0]["id"]
    ingestion.show(planets, file_id, IngestProgress(1, 0, 3, 4, 10, "embedding"))
    expect(row(page, "mars.txt").locator(".state")).to_have_text("Embedding")
    expect(row(page, "mars.txt").get_by_role("progressbar")).to_have_js_property("value", 0.4)
    shoot(page, "ingesting")
    remove = page.get_by_role("button", name="Delete mars.txt")
    remove.focus()
    ingestion.is_held = False
    ingestion.wake()
    is_ready(page, "mars.txt")
    expect(page.locator("#file-news")).to_have_text("mars.txt: Ready.")
    expect(remove).to_be_focused()


def test_files_that_cannot_be_used_say_why_and_what_to_do(open_page, library: Library, planets: str) -> None:
    page = open_page(library.url)
    upload(page, text_file("scan.pdf", "no pdf"), text_file("song.mp3", "la"), text_file("empty.txt", ""))
    for name in ("scan.pdf", "song.mp3"):
        expect(row(page, name).locator(".state")).to_have_text("Failed")
        expect(row(page, name).locator(".problem")).not_to_be_empty()
    expect(row(page, "empty.txt").locator(".problem")).to_contain_text("empty")
    shoot(page, "failed-files")
    page.get_by_role("button", name="Dismiss empty.txt").click()
    expect(row(page, "empty.txt")).to_have_count(0)
    assert len(httpx.get(f"{library.url}/v1/files").json()["data"]) == 2


def test_files_can_be_dropped_anywhere_on_the_page(open_page, library: Library, planets: str) -> None:
    page = open_page(library.url)
    dropped = page.evaluate_handle(
        """() => {
            const dropped = new DataTransfer();
            dropped.items.add(new File(["Mars is red."], "mars.txt"));
            return dropped;
        }"""
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("over")
    page.dispatch_event("#answer", "drop", {"dataTransfer": dropped})
    expect(page.locator("#drop")).not_to_have_class("over")
    is_ready(page, "mars.txt")


def test_an_upload_can_be_cancelled(open_page, library: Library, planets: str) -> None:
    page = open_page(library.url)
    waiting = threading.Event()
    page.route("**/v1/files", lambda route: waiting.set() if route.request.method == "POST" else route.continue_())
    upload(page, text_file("mars.txt", "Mars is red."))
    page.get_by_role("button", name="Cancel the upload of mars.txt").click()
    expect(page.locator(".file")).to_have_count(0)
    assert httpx.get(f"{library.url}/v1/files").json()["data"] == []


def test_the_kv_of_a_collection_is_followed(open_page, library: Library, planets: str) -> None:
    page = open_page(library.url)
    upload(page, text_file("mars.txt", "Mars is red."), text_file("venus.txt", "Venus is hot."))
    is_ready(page, "venus.txt")
    progress = page.locator("#kv-bar")
    expect(progress).to_have_attribute("aria-valuenow", "0")
    catalogue = library.opened.catalogue
    ids = catalogue.chunk_ids_by_row(planets).values()
    catalogue.record_kv(planets, [KVObject(f"{i:064x}", c, "raw", 500) for i, c in enumerate(ids)])
    expect(page.locator("#kv-count")).to_have_text("2 of 2 passages")
    expect(progress).to_have_attribute("aria-valuenow", "2")
    expect(page.locator("#kv-note")).to_have_text("0 behind related passages · 1.0 kB")


def test_a_collection_that_was_deleted_elsewhere_is_named_and_the_others_are_offered(open_page, library) -> None:
    made = [httpx.post(f"{library.url}/v1/vector_stores", json={"name": n}).json()["id"] for n in ("Moons", "Planets")]
    page = open_page(library.url)
    expect(page.get_by_label("Collection to ask").locator("option")).to_have_text(["Planets", "Moons"])
    httpx.delete(f"{library.url}/v1/vector_stores/{made[1]}")
    ask(page, "Mars is red.")
    error_shown(page, "That is not there any more", "Choose a collection")
    expect(page.get_by_label("Collection to ask").locator("option")).to_have_text(["Moons"])


def test_the_address_names_the_collection(open_page, library: Library) -> None:
    for name in ("Moons", "Planets"):
        httpx.post(f"{library.url}/v1/vector_stores", json={"name": name})
    page = open_page(library.url)
    page.get_by_label("Collection to ask").select_option("Moons")
    page.reload()
    expect(page.get_by_label("Collection to ask").locator("option:checked")).to_have_text("Moons")


def test_everything_can_be_done_by_keyboard_alone(open_page, library: Library) -> None:
    page = open_page(library.url)
    page.on("filechooser", lambda _: None)  # the browser is told to hand choosers out long before one opens
    keys = page.keyboard
    expect(page.get_by_label("Name of the new collection")).to_be_focused()
    keys.type("Planets")
    keys.press("Enter")
    expect(page.locator("#files")).to_be_focused()
    with page.expect_file_chooser(timeout=30_000) as chooser:
        keys.press("Space")
    chooser.value.set_files([text_file("mars.txt", "Mars is red.")])
    is_ready(page, "mars.txt")
    tab_to(page, "#question")
    keys.type("Mars is red.")
    keys.press("Enter")
    answered(page)
    tab_to(page, ".cite")
    keys.press("Enter")
    expect(page.locator(".source").first).to_be_focused()
    tab_to(page, "#collection", key="Shift+Tab")
    tab_to(page, "button[aria-label='Delete mars.txt']")
    keys.press("Enter")
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    expect(page.locator(".file")).to_have_count(0)
    expect(page.locator("#files")).to_be_focused()


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Presses the key until the element has the focus, which must then be visible."""
    for _ in range(25):
        page.keyboard.press(key)
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"{selector} cannot be reached by {key}")


# --- the whole product ------------------------------------------------------------------------------------------------

ASKED = "Who is the spouse of the director of film Nine Bridges of Ordelle?"
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS")  # a folder, to take those in docs/images anew


@pytest.fixture
def product(tmp_path: Path) -> Iterator[str]:
    """`fusionrag serve` with the packaged models on an empty data directory."""
    try:
        default_model_dir()
    except ModelNotFound as error:
        pytest.skip(str(error))
    flags = ["--data-dir", str(tmp_path / "data"), "--port", "0", "--top-k", "6", "--no-log-json"]
    command = [sys.executable, "-m", "scripts.cli", "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield "http://" + line.strip().split("http://")[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_the_page_works_with_the_real_model_from_upload_to_receipt(open_page, product: str) -> None:
    page = open_page(product)
    shoot(page, "empty")
    expect(page.get_by_label("Name of the new collection")).to_be_focused()
    page.keyboard.type("Lorvia")
    page.keyboard.press("Enter")
    expect(page.locator("#files")).to_be_focused()
    upload(page, text_file("encyclopedia.jsonl", passages()), text_file("scan.pdf", "not a PDF"))
    expect(row(page, "encyclopedia.jsonl").locator(".state")).to_have_text("Ready", timeout=90_000)
    expect(row(page, "scan.pdf").locator(".state")).to_have_text("Failed", timeout=90_000)
    expect(page.locator("#kv-bar")).to_have_attribute("aria-valuenow", "12", timeout=90_000)
    shoot(page, "ready")
    logging.getLogger(__name__).warning("first token painted %.0f ms after the server's TTFT", painted_late_ms(page))
    expect(page.locator("#answer-text")).to_contain_text("Vera Dallimont")
    expect(page.locator(".source.cited").first).to_contain_text("Vera Dallimont")
    expect(page.locator(".source .tags").first).to_contain_text(re.compile("KV from (memory|disk)"))
    expect(page.locator(".source mark").first).to_be_visible()
    assert page.locator("#times .bar").count() == 2, "full prefill's time is predicted by now"
    shoot(page, "answer-light")
    page.emulate_media(color_scheme="dark")
    shoot(page, "answer-dark")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(NARROW)
    shoot(page, "answer-phone", full_page=True)


def passages() -> str:
    """Those that the question needs, and some that it does not."""
    records = [json.loads(line) for line in (CORPUS / "encyclopedia.jsonl").read_text().splitlines()]
    gold = next(q["gold"] for q in questions() if q["question"] == ASKED)
    records.sort(key=lambda record: record["title"] not in gold)
    return "".join(json.dumps(record) + "\n" for record in records[:12])


def painted_late_ms(page: Page) -> float:
    """Asks, and says how much later than the server's own time to first token the screen had it."""
    with page.expect_response("**/v1/chat/completions") as response:
        ask(page, ASKED)
    expect(page.locator("#receipt")).to_be_visible(timeout=60_000)
    events = [line.removeprefix("data: ") for line in response.value.text().split("\n\n")]
    ttft_ms = next(json.loads(e)["usage"]["fusionrag"]["ttft_ms"] for e in events if '"usage"' in e)
    marks = dict(page.evaluate("performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])"))
    return marks["first-token-painted"] - marks["asked"] - ttft_ms


def shoot(page: Page, name: str, full_page: bool = False) -> None:
    """A picture for the documentation, where they are asked for; in its 256 most frequent colours, to keep it small."""
    if SCREENSHOTS:
        from PIL import Image

        picture = Image.open(io.BytesIO(page.screenshot(full_page=full_page, animations="disabled"))).convert("RGB")
        colors = sorted(picture.getcolors(picture.width * picture.height), reverse=True)[:256]
        palette = Image.new("P", (1, 1))
        palette.putpalette([channel for _, color in colors for channel in color])
        few = picture.quantize(palette=palette, dither=Image.Dither.NONE)
        few.save(Path(SCREENSHOTS) / f"page-{name}.png", optimize=True)
