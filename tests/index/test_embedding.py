"""Embeddings of the packaged model: unit length, independent of the batch, never truncated."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from index import Embedder, EmbeddingConfig, EmbeddingModelError

FILLER = "The committee met in the afternoon and talked about the budget of the town hall. " * 40


def test_vectors_are_unit_float32_one_per_text(minilm):
    vectors = minilm.embed(["A cat sat on the mat.", "", FILLER])
    assert vectors.shape == (3, minilm.dim) == (3, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_text_within_the_window_gets_the_models_own_vector(minilm):
    text = "A cat sat on the mat."
    own = minilm._model.encode(text, normalize_embeddings=True, show_progress_bar=False)
    assert np.allclose(minilm.embed([text])[0], own, atol=1e-5)
    assert np.allclose(minilm.embed_question(text), own, atol=1e-5)


def test_a_text_has_the_same_vector_whatever_stands_beside_it(minilm):
    texts = ["One short text.", FILLER, "Another text.", "A third text, a little longer than the others."]
    together = minilm.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(minilm.embed([text])[0], vector, atol=1e-5)


def test_the_second_half_of_a_long_text_counts(minilm):
    """A model cut off at its window would give both texts one and the same vector."""
    fact = "Penguins are flightless birds of the Antarctic that swim after krill and fish. " * 8
    with_fact, without = minilm.embed([FILLER + fact, FILLER])
    question = minilm.embed_question("Which birds live in the Antarctic?")
    assert with_fact @ question > without @ question + 0.1


def test_a_long_text_is_the_mean_of_its_windows_weighted_by_their_tokens(minilm):
    windows = list(minilm._windows([FILLER + "A short rest."]))
    assert len(windows) > 1
    assert "".join("".join(w.content.split()) for w in windows) == "".join((FILLER + "A short rest.").split())
    weights = np.array([w.num_tokens for w in windows], np.float32)
    mean = weights @ minilm.embed([w.content for w in windows])
    assert np.allclose(minilm.embed([FILLER + "A short rest."])[0], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("text", ["東京都" * 400, ("1234567890" * 9 + " ") * 20, "word-" * 500, "a b\n" * 600])
def test_no_window_holds_more_tokens_than_the_model_reads(minilm, text):
    windows = list(minilm._windows([text]))
    assert len(windows) > 1
    assert max(minilm.num_tokens([w.content for w in windows])) <= minilm._window_tokens


def test_progress_counts_the_texts_that_are_done_up_to_all(minilm):
    told: list[int] = []
    minilm.embed([f"Text number {i}." for i in range(40)], told.append)
    assert told == sorted(told) and told[-1] == 40 and len(told) == 3


def test_nothing_to_embed_gives_no_vectors(minilm):
    assert minilm.embed([]).shape == (0, 384)


def test_threads_share_one_model(minilm):
    texts = [f"Question number {i}?" for i in range(16)] + [FILLER]
    alone = np.array([minilm.embed_question(t) for t in texts])
    with ThreadPoolExecutor(4) as threads:
        together = np.array(list(threads.map(minilm.embed_question, texts)))
    assert np.allclose(alone, together, atol=1e-5)


def test_the_fingerprint_names_the_model_and_changes_with_its_weights(minilm, tmp_path):
    minilm._model.save(str(tmp_path / "tuned"))
    same = Embedder(EmbeddingConfig(embedding_model=str(tmp_path / "tuned")))
    name, digest = minilm.fingerprint.split("@")
    assert name == "all-MiniLM-L6-v2"
    assert same.fingerprint == f"tuned@{digest}"

    from safetensors.numpy import load_file, save_file

    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    largest = max(weights, key=lambda k: weights[k].size)
    weights[largest] = weights[largest] * np.float32(1.01)
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    assert Embedder(EmbeddingConfig(embedding_model=str(tmp_path / "tuned"))).fingerprint != same.fingerprint


def test_a_models_own_prompts_are_used_for_questions_and_passages(tmp_path, minilm):
    minilm._model.save(str(tmp_path / "prompted"))
    import json

    path = tmp_path / "prompted" / "config_sentence_transformers.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"prompts": {"query": "question: ", "document": "text: "}})
    )
    prompted = Embedder(EmbeddingConfig(embedding_model=str(tmp_path / "prompted")))
    assert np.allclose(prompted.embed_question("who?"), minilm.embed_question("question: who?"), atol=1e-5)
    assert np.allclose(prompted.embed(["him"])[0], minilm.embed(["text: him"])[0], atol=1e-5)
    assert prompted._window_tokens < minilm._window_tokens
    assert prompted.fingerprint.split("@")[1] != minilm.fingerprint.split("@")[1]


@pytest.mark.parametrize(
    "config", [EmbeddingConfig(embedding_model="/no/such/model"), EmbeddingConfig(embedding_device="cuda:63")]
)
def test_a_model_that_cannot_be_loaded_is_named_with_what_could_be(config):
    with pytest.raises(EmbeddingModelError, match="all-MiniLM-L6-v2"):
        Embedder(config)


def test_the_default_model_loads_without_a_network_and_without_a_word(capfd):
    connections, is_watching = [], True
    sys.addaudithook(
        lambda event, args: connections.append(args) if is_watching and event == "socket.connect" else None
    )
    Embedder(EmbeddingConfig(embedding_model="sentence-transformers/all-MiniLM-L6-v2"))
    is_watching = False
    assert connections == []
    assert capfd.readouterr() == ("", "")
