"""Re-ranking: any cross-encoder of one score, passages of any length read to their end, clear errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from index import Reranker, RerankModelError

WORDS = [
    "where",
    "do",
    "penguins",
    "live",
    "on",
    "the",
    "ice",
    "granite",
    "is",
    "hard",
    "and",
    "grey",
    "camels",
    "cross",
]
WINDOW = 16


def write_model(path: Path, num_labels: int = 1, seed: int = 0) -> Path:
    """A tiny random BERT cross-encoder, as any user's model would lie there."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=WINDOW,
    )
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=WINDOW,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
def reranker(model_dir) -> Reranker:
    return Reranker(str(model_dir))


def test_scores_are_the_logits_through_a_sigmoid(reranker, model_dir):
    from sentence_transformers import CrossEncoder

    texts = ["penguins live on the ice", "granite is hard", "camels cross the ice"]
    plain = CrossEncoder(str(model_dir), device="cpu")
    pairs = [("where do penguins live", t) for t in texts]
    logits = plain.predict(pairs, activation_fn=lambda x: x, show_progress_bar=False)
    scores = reranker.scores("where do penguins live", texts)
    assert scores == pytest.approx((1 / (1 + np.exp(-logits))).tolist(), abs=1e-6)
    assert len(set(scores)) == 3 and reranker.name == str(model_dir)


def test_a_long_passage_is_worth_its_best_part(reranker):
    """4 words of question and 3 special tokens leave 9 of 16 tokens for the passage."""
    question, parts = "where do penguins live", [" ".join(WORDS[i : i + 9]) for i in (0, 3, 6)]
    best = max(reranker.scores(question, parts))
    assert reranker.scores(question, [" ".join(parts)]) == [pytest.approx(best, abs=1e-6)]
    assert reranker.scores(question, [parts[0]])[0] < best or reranker.scores(question, [parts[1]])[0] < best


def test_a_question_longer_than_the_window_is_answered(reranker):
    (score,) = reranker.scores("penguins " * 200, ["ice " * 100])
    assert 0 < score < 1


@pytest.mark.parametrize("text", ["", " ", "zzz"])
def test_a_passage_without_known_words_has_a_score(reranker, text):
    assert 0 <= reranker.scores("penguins", [text])[0] <= 1


def test_no_passages_have_no_scores(reranker):
    assert reranker.scores("penguins", []) == []


def test_threads_share_it(reranker):
    texts = ["penguins live on the ice", "granite is hard"]
    expected = reranker.scores("penguins", texts)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: reranker.scores("penguins", texts), range(16)))
    assert all(scores == pytest.approx(expected) for scores in found)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RerankModelError, match=r"nothing-here.*directory or a hub id"):
        Reranker(str(tmp_path / "nothing-here"))


def test_a_model_of_several_classes_is_refused(tmp_path):
    with pytest.raises(RerankModelError, match="3 values"):
        Reranker(str(write_model(tmp_path / "nli", num_labels=3)))
