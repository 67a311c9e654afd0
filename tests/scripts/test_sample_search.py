"""Search on the demo's own corpus, by the shipped models and settings: the passages that its questions need are found.

A search mode that is better on average may still lose the second hop of these questions; then nothing can answer them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fusionrag.config import ModelConfig, PromptConfig
from fusionrag.default_model import default_model_dir
from fusionrag.errors import ModelNotFound
from fusionrag.model import load_tokenizer
from fusionrag.prompt import PromptBuilder
from index import Catalogue, ChunkingConfig, DataDir, Embedder, EmbeddingConfig, Retriever, SearchConfig, ingest
from scripts.demo import ASKED, TOP_K
from scripts.sample import CORPUS, questions

Find = Callable[[str, str], set[str]]


@pytest.fixture(scope="module")
def find(tmp_path_factory) -> Iterator[Find]:
    """The titles of the passages that the demo would find for a question in a search mode."""
    try:
        default_model_dir()
    except ModelNotFound as error:
        pytest.skip(str(error))
    data_dir, embedder = DataDir(tmp_path_factory.mktemp("data")), Embedder(EmbeddingConfig())
    prompts = PromptBuilder(load_tokenizer(ModelConfig()), PromptConfig())
    with Catalogue(data_dir.catalogue) as catalogue:
        ingest([CORPUS], "demo", catalogue, prompts, embedder, ChunkingConfig(256))
        retriever = Retriever(catalogue, data_dir, embedder)
        yield lambda question, mode: {
            hit.chunk.title for hit in retriever.search("demo", question, SearchConfig(TOP_K, mode))
        }


def test_the_demo_finds_all_that_its_questions_need(find: Find):
    for question in questions():
        if question["question"] in ASKED:
            assert set(question["gold"]) <= find(question["question"], "hybrid"), question["question"]


def test_hybrid_search_answers_no_fewer_questions_than_either_search_alone(find: Find):
    complete = {
        mode: sum(set(q["gold"]) <= find(q["question"], mode) for q in questions())
        for mode in ("dense", "lexical", "hybrid")
    }
    assert complete["hybrid"] >= max(complete["dense"], complete["lexical"]), complete
