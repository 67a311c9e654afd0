"""Shared by the tests of `index`: a deterministic embedder, two passage encoders, and files of binary formats."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from index import Catalogue, Chunk, DataDir, Document, Embedder, EmbeddingConfig, Section

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")


class WordEncoder:
    """One token per word, run of white space or punctuation mark. Its ids cannot be told from a real tokenizer's."""

    fingerprint = "words-1"

    def encode(self, title: str, text: str) -> list[int]:
        return [zlib.crc32(t.encode()) & 0xFFFF for t in _TOKEN.findall(f"{title}: {text}\n\n")]


class ByteEncoder:
    """One token per UTF-8 byte: nothing merges, so the costs of parts add up exactly."""

    fingerprint = "bytes-1"

    def encode(self, title: str, text: str) -> list[int]:
        return list(f"{title}: {text}\n\n".encode())


class HashingEmbedder:
    """The normalised sum of one fixed random vector per word: texts that share words are near each other."""

    fingerprint = "hashing-1"
    dim = 64

    def __init__(self) -> None:
        self.num_texts = 0

    def embed(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> np.ndarray:
        self.num_texts += len(texts)
        if progress is not None:
            progress(len(texts))
        return np.array([self.embed_question(text) for text in texts], np.float32).reshape(-1, self.dim)

    def embed_question(self, question: str) -> np.ndarray:
        words = re.findall(r"\w+", question.lower()) or [""]
        total = sum(np.random.default_rng(zlib.crc32(w.encode())).standard_normal(self.dim) for w in words)
        return (total / np.linalg.norm(total)).astype(np.float32)


@pytest.fixture(scope="session")
def word_encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture(scope="session")
def byte_encoder() -> ByteEncoder:
    return ByteEncoder()


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    """The packaged model, loaded once."""
    return Embedder(EmbeddingConfig(embedding_batch_size=16))


@pytest.fixture
def data_dir(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


@pytest.fixture
def catalogue(data_dir: DataDir) -> Iterator[Catalogue]:
    """A catalogue with the empty collection 'c' for HashingEmbedder and WordEncoder."""
    with Catalogue(data_dir.catalogue) as opened:
        opened.open_collection("c", WordEncoder.fingerprint, HashingEmbedder.fingerprint, HashingEmbedder.dim)
        yield opened


@pytest.fixture
def add(catalogue: Catalogue) -> Callable[..., list[str]]:
    """add('doc', 'text a', 'text b', collection='c'): stores a document of these chunks, returns their chunk ids."""

    def add_document(document_id: str, *texts: str, collection: str = "c") -> list[str]:
        document = Document(document_id, document_id, tuple(Section("", t) for t in texts), f"{document_id}.txt")
        chunks = [
            Chunk("", text, tuple(WordEncoder().encode("", text)), document_id, i) for i, text in enumerate(texts)
        ]
        catalogue.replace_document(collection, document, chunks, HashingEmbedder().embed(texts))
        return [chunk.chunk_id for chunk in chunks]

    return add_document


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real third-party data beside the checkout; never part of the project."""
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path.name} beside the checkout")
    return path


@pytest.fixture
def make_pdf(tmp_path: Path) -> Callable[..., Path]:
    """make_pdf(['line', …], [], title='T'): a PDF with one page per list of lines."""

    def write(*pages: Sequence[str], title: str = "", name: str = "file.pdf") -> Path:
        from reportlab.pdfgen.canvas import Canvas

        canvas = Canvas(str(tmp_path / name))
        canvas.setTitle(title)
        for lines in pages:
            for i, line in enumerate(lines):
                canvas.drawString(72, 720 - 16 * i, line)
            canvas.showPage()
        canvas.save()
        return tmp_path / name

    return write
