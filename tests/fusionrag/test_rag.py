"""From a question to an engine request: retrieval over a real catalogue, and passages that requests bring along."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusionrag.config import RetrievalConfig, ReuseConfig
from fusionrag.errors import ConfigError, RequestError
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.rag import InlineDocument, Question, Rag, with_ratio
from index import Catalogue, DataDir, Document, Ingestor, Retriever, Section
from index.config import SearchConfig
from index.errors import CollectionNotFound
from index.filters import Comparison
from tests.letters import LetterEmbedder

REUSE = ReuseConfig(recompute_ratio=0.999999, recompute_depth=1.0)
TEXTS = {"zebras": "zzz zz zzzz", "queens": "qqq qqqq q", "zebras and queens": "zzz qqq zzz q", "others": "mno lmn"}


@pytest.fixture
def catalogue(bench, tmp_path):
    """Collection 'c' of four documents of one passage each."""
    with Catalogue(DataDir(tmp_path).catalogue) as catalogue:
        documents = [
            Document(name, name.title(), (Section("", text, page=i + 1),), f"{name}.txt")
            for i, (name, text) in enumerate(TEXTS.items())
        ]
        Ingestor(catalogue, bench.prompts, LetterEmbedder()).add_documents(documents, "c")
        yield catalogue


@pytest.fixture
def make_rag(bench, catalogue, tmp_path):
    def make(prompts=bench.prompts, reuse=REUSE, search=None, **retrieval):
        retriever = Retriever(catalogue, DataDir(tmp_path), LetterEmbedder())
        return Rag(bench.engine(), prompts, RetrievalConfig(**retrieval), reuse, catalogue, retriever, search)

    return make


def asking(text, **fields):
    return Question(turns=(Turn("user", text),), **fields)


# --- retrieval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("similarity_first", ["zebras", "zebras and queens", "queens"]),
        ("similarity_last", ["queens", "zebras and queens", "zebras"]),
    ],
)
def test_passages_stand_in_the_configured_order_and_are_cited_as_they_stand(order, expected, make_rag, bench):
    search = SearchConfig(top_k=3, search_mode="dense")
    prepared = make_rag(order=order).prepare(asking("zzzz q", collections=("c",), search=search), "r")
    assert [s.document_id for s in prepared.sources] == expected
    assert [s.index for s in prepared.sources] == [1, 2, 3]
    for source, segment in zip(prepared.sources, prepared.request.plan.chunks, strict=True):
        assert source.chunk_id == segment.chunk.chunk_id
        text = bench.model.tokenizer.decode(segment.token_ids)
        assert source.title in text and source.text in text
        assert (source.text, source.source) == (TEXTS[source.document_id], f"{source.document_id}.txt")
        assert source.page == 1 + list(TEXTS).index(source.document_id)
    scores = [s.score for s in prepared.sources]
    assert scores == sorted(scores, reverse=order == "similarity_first")


def test_what_a_question_leaves_open_is_as_configured(make_rag):
    rag = make_rag(search=SearchConfig(top_k=2))
    prepared = rag.prepare(asking("zzz", collections=("c",)), "r")
    assert len(prepared.sources) == 2 and prepared.request.reuse == rag.reuse
    own = rag.prepare(
        asking("zzz", collections=("c",), search=SearchConfig(top_k=4), reuse=ReuseConfig(method="full")), "r"
    )
    assert len(own.sources) == 4 and own.request.reuse.method == "full"


def test_passages_below_the_threshold_are_left_out(make_rag):
    prepared = make_rag(search=SearchConfig(score_threshold=0.5, search_mode="dense")).prepare(
        asking("zzz", collections=("c",)), "r"
    )
    assert {s.document_id for s in prepared.sources} == {"zebras", "zebras and queens"}


def test_retrieval_is_timed_from_the_arrival(make_rag):
    prepared = make_rag().prepare(asking("zzz", collections=("c",)), "r")
    assert prepared.request.retrieve_ms > 0
    stats = make_rag().engine.generate(prepared.request)[0].stats
    assert stats.phases.retrieve_ms == prepared.request.retrieve_ms < stats.ttft_ms


def test_related_chunks_come_from_the_catalogue_and_their_fused_kv_from_the_store(make_rag, bench, catalogue):
    ids = [stored.chunk.chunk_id for stored in catalogue.chunks("c")]
    related = {chunk_id: (ids[i - 1], ids[i - 2]) for i, chunk_id in enumerate(ids)}
    catalogue.set_related("c", related)
    rag = make_rag()
    prepared = rag.prepare(asking("zzzz q", collections=("c",)), "r")
    chunks = [segment.chunk for segment in prepared.request.plan.chunks]
    assert {c.chunk_id: c.related for c in chunks} == related
    bench.preprocess(chunks)
    prefilled = rag.engine.prefill(prepared.request)
    prefilled.release()
    assert [r.kind for r in prefilled.stats.chunks] == ["raw", "fused", "fused", "fused"]
    torch.testing.assert_close(prefilled.logits, bench.full(prepared.request.plan), rtol=0, atol=1e-4)


def test_a_collection_chunked_for_another_tokenizer_is_refused(make_rag, make_tokenizer):
    other = PromptBuilder(make_tokenizer(merges=[("a", "b")]), make_rag().prompts._config)
    with pytest.raises(ConfigError, match="model: collection 'c' was chunked for another tokenizer"):
        make_rag(prompts=other).prepare(asking("zzz", collections=("c",)), "r")


def test_a_collection_that_is_not_there_is_named(make_rag):
    rag = make_rag()
    with pytest.raises(CollectionNotFound, match="'d'"):
        rag.prepare(asking("zzz", collections=("d",)), "r")


# --- without collections ----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(bench):
    return Rag(bench.engine(), bench.prompts, RetrievalConfig(), ReuseConfig())


def test_passages_that_a_request_brings_are_used_in_their_order(bare, bench):
    documents = (InlineDocument("B", "bbb", "mine"), InlineDocument("", "aaa"))
    prepared = bare.prepare(asking("who", documents=documents), "r")
    text = bench.model.tokenizer.decode(prepared.request.plan.token_ids)
    assert text.index("B: bbb") < text.index("aaa") < text.index("who")
    assert [(s.index, s.document_id, s.title, s.text, s.score) for s in prepared.sources] == [
        (1, "mine", "B", "bbb", None),
        (2, "document-2", "", "aaa", None),
    ]


def test_a_passage_brought_along_reuses_the_kv_of_the_same_passage_in_a_collection(make_rag, bench):
    rag = make_rag()
    stored = rag.prepare(asking("q", collections=("c",), search=SearchConfig(top_k=4)), "r").request.plan.chunks
    bench.preprocess([segment.chunk for segment in stored])
    document = InlineDocument("Zebras", TEXTS["zebras"])
    stats = rag.engine.generate(rag.prepare(asking("q", documents=(document,)), "r").request)[-1].stats
    assert [r.source.value for r in stats.chunks] == ["host"]


def test_a_question_may_do_without_passages(bare):
    prepared = bare.prepare(asking("who"), "r")
    assert prepared.sources == () and prepared.request.plan.chunks == ()


def test_a_server_without_collections_says_so(bare):
    with pytest.raises(RequestError, match="no collections") as error:
        bare.prepare(asking("who", collections=("c",)), "r")
    assert error.value.field == "collection"


def test_plain_text_is_neither_retrieved_for_nor_put_in_a_template(bare, bench):
    prepared = bare.prepare(Question(prompt="Once upon"), "r")
    assert bench.model.tokenizer.decode(prepared.request.plan.token_ids) == "Once upon"
    assert prepared.sources == ()


def test_the_rag_says_which_model_it_runs(bare, bench):
    assert (bare.model_name, bare.max_model_len) == (bench.model.name, 1024)


# --- a request's own method and ratio ---------------------------------------------------------------------------------


def test_a_requests_method_and_ratio_stand_over_the_configured_ones():
    configured = ReuseConfig(method="epic", recompute_ratio=0.3, correction=0.5)
    assert with_ratio(configured, None, None) == configured
    published = replace(configured, method="random", correction=0.0, recompute_depth=1.0)
    assert with_ratio(configured, "random", None) == published
    assert with_ratio(configured, "attention", None) == replace(configured, method="attention")
    assert with_ratio(configured, None, 0.0) == replace(configured, recompute_ratio=0.0)


@pytest.mark.parametrize(
    ("method", "ratio", "field"),
    [("best", None, "method"), (None, 1.5, "recompute_ratio"), (None, -0.1, "recompute_ratio")],
)
def test_a_method_or_ratio_that_does_not_exist_is_refused_by_name(method, ratio, field):
    with pytest.raises(ConfigError, match=f"^{field}: ") as error:
        with_ratio(ReuseConfig(), method, ratio)
    assert error.value.field == field


def test_somebody_elses_collection_is_as_unknown_as_one_that_is_not_there(make_rag):
    with pytest.raises(CollectionNotFound, match="existing: none"):
        make_rag().prepare(asking("zzz", collections=("c",), owner="somebody else"), "r")


def test_passages_of_several_collections_compete_by_score(make_rag, bench, catalogue):
    more = Document("more", "More", (Section("", "zzz zzzz zzz"),), "more.txt")
    Ingestor(catalogue, bench.prompts, LetterEmbedder()).add_documents([more], "d")
    search = SearchConfig(top_k=2, search_mode="dense")
    prepared = make_rag().prepare(asking("zzz", collections=("c", "d", "c"), search=search), "r")
    assert {s.document_id for s in prepared.sources} == {"zebras", "more"}
    scores = [s.score for s in prepared.sources]
    assert scores == sorted(scores)


def test_an_explained_answer_names_the_recomputed_text_of_every_passage(make_rag, bench):
    rag = make_rag(reuse=ReuseConfig(method="epic", recompute_ratio=0.3))
    stored = rag.prepare(asking("zzz", collections=("c",)), "r").request.plan.chunks
    bench.preprocess([segment.chunk for segment in stored])
    prepared = rag.prepare(asking("zzz", collections=("c",), explain=True), "r")
    stats = rag.engine.generate(prepared.request)[0].stats
    texts = prepared.recomputed_text(stats.chunks)
    assert texts[0] == () and any(texts)  # the first one is exact
    for source, receipt, ranges in zip(prepared.sources, stats.chunks, texts, strict=True):
        assert sum(end - begin for begin, end in receipt.recomputed) == receipt.num_recomputed
        flat = [edge for edges in ranges for edge in edges]
        assert flat == sorted(set(flat)) and all(0 <= edge <= len(source.text) for edge in flat)
        # the tokenizer has one token a character: what was recomputed before the text is title and template
        before = len(f"{source.title}: ")
        inside = [t - before for begin, end in receipt.recomputed for t in range(begin, end)]
        inside = [t for t in inside if 0 <= t < len(source.text)]
        assert [t for begin, end in ranges for t in range(begin, end)] == inside


def test_an_unexplained_answer_has_no_ranges(make_rag, bench):
    prepared = make_rag().prepare(asking("zzz", collections=("c",)), "r")
    stats = make_rag().engine.generate(prepared.request)[0].stats
    assert prepared.offsets == () and all(r.recomputed == () for r in stats.chunks)


def test_stored_kv_of_another_owner_is_never_used(make_rag, bench):
    stored = make_rag().prepare(asking("q", collections=("c",)), "r").request.plan.chunks
    bench.preprocess([segment.chunk for segment in stored])
    document = InlineDocument("Zebras", TEXTS["zebras"])
    asked = [asking("q", documents=(document,), owner=owner) for owner in ("", "somebody else")]
    stats = [make_rag().engine.generate(make_rag().prepare(a, "r").request)[-1].stats for a in asked]
    assert [s.chunks[0].source.value for s in stats] == ["host", "computed"]


# --- conversations ----------------------------------------------------------------------------------------------------

TALK = (
    Turn("system", "be brief"),
    Turn("user", "one"),
    Turn("assistant", "ein"),
    Turn("user", "two"),
    Turn("assistant", "zwei"),
    Turn("user", "three"),
)


@pytest.mark.parametrize(
    ("history_turns", "expected"), [(0, "three"), (1, "two\nzwei\nthree"), (2, "one\nein\ntwo\nzwei\nthree")]
)
def test_a_conversation_is_searched_for_its_last_questions_and_their_answers(history_turns, expected, make_rag):
    rag = make_rag(history_turns=history_turns)
    assert rag.search_text(TALK) == expected
    assert rag.search_text(TALK[-1:]) == "three"
    assert rag.search_text(()) == ""


def test_a_question_that_names_nothing_finds_what_was_spoken_of_before(make_rag):
    talk = (Turn("user", "zzzz"), Turn("assistant", "zz"), Turn("user", "n"))
    asked = Question(turns=talk, collections=("c",), search=SearchConfig(top_k=1, search_mode="dense"))
    assert make_rag().prepare(asked, "r").sources[0].document_id == "zebras"
    assert make_rag(history_turns=0).prepare(asked, "r").sources[0].document_id == "others"


def test_a_bad_number_of_history_turns_is_refused_by_name():
    with pytest.raises(ConfigError, match="history_turns"):
        RetrievalConfig(history_turns=-1)


def test_only_passages_that_fit_the_filter_of_a_question_are_found(make_rag, bench, catalogue):
    for year in (1999, 2020):
        document = Document(f"of {year}", "", (Section("", f"zzz zz {year}"),), f"{year}.txt", {"year": year})
        Ingestor(catalogue, bench.prompts, LetterEmbedder()).add_documents([document], "c")
    recent = Comparison("year", "gte", 2000)
    prepared = make_rag().prepare(asking("zzz", collections=("c",), filter=recent), "r")
    assert [s.document_id for s in prepared.sources] == ["of 2020"]
