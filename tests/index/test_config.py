"""Knobs: defaults are valid, values out of range are refused by name, every knob explains itself."""

from dataclasses import fields

import pytest

from index import ChunkingConfig, EmbeddingConfig, FusionRAGError, InvalidValue, SearchConfig, VectorIndexConfig


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (ChunkingConfig, "chunk_tokens", 15),
        (ChunkingConfig, "chunk_tokens", 40_000),
        (ChunkingConfig, "chunk_overlap_tokens", -1),
        (ChunkingConfig, "chunk_overlap_tokens", 257),
        (EmbeddingConfig, "embedding_model", " "),
        (EmbeddingConfig, "embedding_batch_size", 0),
        (EmbeddingConfig, "embedding_device", "gpu"),
        (EmbeddingConfig, "embedding_device", "cuda:"),
        (VectorIndexConfig, "faiss_factory", ""),
        (VectorIndexConfig, "faiss_factory", "IDMap,Flat"),
        (SearchConfig, "top_k", 0),
        (SearchConfig, "top_k", 201),
        (SearchConfig, "search_mode", "fuzzy"),
        (SearchConfig, "lexical_weight", 1.01),
        (SearchConfig, "score_threshold", -0.1),
        (SearchConfig, "score_threshold", float("nan")),
        (SearchConfig, "max_similarity", 0.0),
        (SearchConfig, "rerank_candidates", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(config, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        config(**{name: value})
    assert isinstance(caught.value, InvalidValue | FusionRAGError)
    assert caught.value.field == name


@pytest.mark.parametrize("config", [ChunkingConfig, EmbeddingConfig, SearchConfig, VectorIndexConfig])
def test_every_knob_has_a_valid_default_and_a_help_text(config):
    config()
    assert all(len(field.metadata["help"]) > 20 for field in fields(config))


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_every_documented_device_is_accepted(device):
    assert EmbeddingConfig(embedding_device=device).embedding_device == device
