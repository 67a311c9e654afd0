"""Tiny random models, a byte tokenizer, and a bench to drive the engine with. Nothing is patched: all is passed in.

The models' weights are far larger than at a fresh initialisation, so that attention is sharp and a stale cache changes
the logits by far more than rounding does (`test_identities` checks that it does).
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fusionrag.config import EngineConfig, ModelConfig, PromptConfig, ReuseConfig
from fusionrag.default_model import ALIAS, default_model_dir
from fusionrag.engine import Engine, Prefilled
from fusionrag.errors import ModelNotFound
from fusionrag.layout import Naming, naming
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel, load_model
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.store import KVStore, MemoryStore
from fusionrag.types import ChunkKV, KVKind, KVSpec, PromptChunk, PromptPlan, Segment, SegmentKind, TokenEvent
from index.types import chunk_id_of

torch.set_num_threads(1)
# commands and servers of the tests go the way that is asked for: models this small prefill faster than they reuse
os.environ.setdefault("FUSIONRAG_ROUTE", "reuse")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start: threads that wait for each other take cores too
settings.register_profile("unhurried", deadline=None)  # a busy machine is not a failure
settings.load_profile("unhurried")

# --- tokenizer --------------------------------------------------------------------------------------------------------

SPECIALS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(chat_template: str | None = CHAT_TEMPLATE, merges: Sequence[tuple[str, str]] = ()) -> Any:
        """One token per byte, but for the merges asked for; ids 256 + len(merges) and up are the special tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", chat_template=chat_template
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


# --- models -----------------------------------------------------------------------------------------------------------

_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
        }
    },
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 20},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "phi3": {},
    "phi3-partial": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},  # not hidden_size / num_attention_heads
    "qwen3-sliding": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3_moe": {"head_dim": 8, **_MOE},
}


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    return tuple(FAMILIES)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """A test that takes it runs for every family, unless it names its own."""
    return request.param


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    def make(family: str, **changes: Any) -> Any:
        """The configuration of a tiny model of a family of FAMILIES (or of any model type)."""
        sizes = {
            "vocab_size": 300,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 257,
        }
        sizes = {**sizes, **FAMILIES.get(family, {}), **changes}
        return AutoConfig.for_model(family.partition("-")[0], **sizes)

    return make


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., Any]:
    def make(config: Any, implementation: str, seed: int = 0) -> Any:
        """A transformers decoder with weights that depend on configuration and seed alone."""
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.dim() > 1:
                    weight.copy_(noise if "embed" in name else 1.5 * noise / weight.shape[-1] ** 0.5)
                else:
                    weight.copy_(0.3 * noise + float("norm" in name))
        return hf.eval()

    return make


@pytest.fixture(scope="session")
def make_model(make_config, make_hf, tokenizer) -> Callable[..., LanguageModel]:
    made: dict[object, LanguageModel] = {}

    def make(family: str = "llama", seed: int = 0, **changes: Any) -> LanguageModel:
        key = (family, seed, repr(sorted(changes.items())))
        if key not in made:
            hf = make_hf(make_config(family, **changes), "eager", seed)
            made[key] = LanguageModel(hf, tokenizer, family)
        return made[key]

    return make


@pytest.fixture(scope="session")
def model(make_model) -> LanguageModel:
    return make_model()


@pytest.fixture(scope="session")
def reader_model() -> LanguageModel:
    """The packaged model, fp32 on the CPU. The first use on a machine converts it, which takes half a minute."""
    try:
        default_model_dir()
    except ModelNotFound as error:
        pytest.skip(str(error))
    return load_model(ModelConfig(model=ALIAS, device="cpu", dtype="float32"))


# --- the engine and what stands around it -----------------------------------------------------------------------------

PROMPT = PromptConfig(instruction="Answer.", passages_header="P:\n", question_template="Q: {question}\nA:")
MAX_STEPS = 1000  # far more than any test needs
LETTERS = string.ascii_lowercase + "     "


@dataclass(frozen=True)
class FirstToken:
    """A request's first event, what its prompt's slots then held (keys rotated), and the steps it took."""

    event: TokenEvent
    kv: ChunkKV
    num_steps: int


@dataclass(frozen=True)
class Bench:
    """A model, a store and the prompts between them, with short words for what most tests do."""

    model: LanguageModel
    prompts: PromptBuilder
    store: KVStore

    @property
    def names(self) -> Naming:
        return naming(self.model, "none", self.prompts.prefix_ids)

    def chunks(self, *lengths: int, seed: int = 0) -> list[PromptChunk]:
        """Chunks of random letters, of so many tokens each; nobody is anybody's related chunk."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(len(LETTERS), (length,), generator=generator).tolist() for length in lengths]
        texts = ["".join(LETTERS[i] for i in letters) for letters in drawn]
        return [self.chunk(text) for text in texts]

    def chunk(self, text: str, related: Sequence[PromptChunk] | None = None) -> PromptChunk:
        token_ids = tuple(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self.behind(PromptChunk(chunk_id_of(token_ids), token_ids), related)

    @staticmethod
    def behind(chunk: PromptChunk, related: Sequence[PromptChunk] | None) -> PromptChunk:
        """The same chunk, its fused KV computed behind `related`."""
        ids = None if related is None else tuple(r.chunk_id for r in related)
        return PromptChunk(chunk.chunk_id, chunk.token_ids, ids)

    def with_neighbours(self, chunks: Sequence[PromptChunk], num_related: int) -> list[PromptChunk]:
        """Each chunk behind the `num_related` that follow it in the list, which is taken as a ring."""
        ring = [*chunks, *chunks]
        return [self.behind(c, ring[i + 1 : i + 1 + num_related]) for i, c in enumerate(chunks)]

    def plan(self, chunks: Sequence[PromptChunk], question: str = "who is it") -> PromptPlan:
        return self.prompts.plan(chunks, (Turn("user", question),))

    def text_plan(self, token_ids: Sequence[int]) -> PromptPlan:
        """A prompt without a prefix or passages."""
        segments = (Segment(SegmentKind.PREFIX, 0, ()), Segment(SegmentKind.TAIL, 0, tuple(token_ids)))
        return PromptPlan(segments, (0, len(token_ids)))

    def job(self, chunks: Sequence[PromptChunk], store: KVStore | None = None, **config: int) -> PreprocessJob:
        token_ids_of = {c.chunk_id: c.token_ids for c in chunks}
        target = self.store if store is None else store
        return PreprocessJob(self.model, target, self.names, token_ids_of, EngineConfig(**config))

    def preprocess(self, chunks: Sequence[PromptChunk]) -> None:
        """Raw and fused KV of all of `chunks`, which must hold all related ones."""
        for _ in self.job(chunks).run(chunks):
            pass

    def spec(self, chunk: PromptChunk, kind: KVKind = "raw") -> KVSpec:
        return self.names.spec(chunk.token_ids, kind, (chunk.related or ()) if kind == "fused" else ())

    def garbage(self, chunk: PromptChunk, seed: int = 0) -> ChunkKV:
        """KV of the right shape that nothing has computed."""
        shape, generator = self.model.shape, torch.Generator().manual_seed(seed)
        size = (shape.num_layers, shape.num_kv_heads, len(chunk.token_ids), shape.head_dim)
        return ChunkKV(torch.randn(size, generator=generator), torch.randn(size, generator=generator))

    def engine(self, store: KVStore | None = None, **config: int) -> Engine:
        """It goes the way that a test asks for, whatever would be faster for so small a model."""
        chosen = EngineConfig(**{"route": "reuse", **config})
        return Engine(self.model, self.store if store is None else store, chosen)

    def request(
        self, plan: PromptPlan, request_id: str = "r", sampling: SamplingParams | None = None, **reuse: Any
    ) -> EngineRequest:
        """Greedy and 8 tokens long, unless said otherwise."""
        # selection alone and through all layers, unless a test asks for the correction or for fewer
        config = ReuseConfig(**{"correction": 0.0, "recompute_depth": 1.0, **reuse})
        return EngineRequest(request_id, plan, sampling or SamplingParams(max_tokens=8), config)

    def prefill(self, plan: PromptPlan, engine: Engine | None = None, **reuse: Any) -> Prefilled:
        """The request before its first token; its span is free again, so only logits and stats are of use."""
        prefilled = (engine or self.engine()).prefill(self.request(plan, **reuse))
        prefilled.release()
        return prefilled

    def prefill_beside_another(self, request: EngineRequest, max_batch_tokens: int) -> FirstToken:
        """The same, beside a request that decodes: so `max_batch_tokens` holds, which it does not for one alone."""
        engine = self.engine(max_batch_tokens=max_batch_tokens)
        other = self.text_plan(range(60, 70))
        engine.submit(self.request(other, "other", SamplingParams(max_tokens=200, ignore_eos=True)))
        engine.step()
        engine.submit(request)
        events: list[TokenEvent] = []
        num_steps = 0
        while not events and num_steps < 190:
            events = [e for e in engine.step() if e.request_id == request.request_id]
            num_steps += 1
        span = slice(210, 210 + request.plan.num_tokens)  # slots are given out from the beginning
        kv = ChunkKV(engine.arena.keys[:, :, span], engine.arena.values[:, :, span])
        return FirstToken(events[0], kv, num_steps)

    def full(self, plan: PromptPlan) -> torch.Tensor:
        """(V,) logits of full prefill, which never looks at the store."""
        return self.prefill(plan, method="full").logits

    @staticmethod
    def tokens(events: Sequence[TokenEvent], request_id: str = "r") -> list[int]:
        return [e.token_id for e in events if e.request_id == request_id and e.token_id is not None]

    @staticmethod
    def run(engine: Engine, requests: Sequence[EngineRequest]) -> list[TokenEvent]:
        """Submits all at once and steps until nothing is left."""
        for request in requests:
            engine.submit(request)
        events, num_steps = [], 0
        while engine.has_work:
            assert num_steps < MAX_STEPS, "the engine has work and does none"
            events += engine.step()
            num_steps += 1
        return events


@pytest.fixture
def make_bench(make_model) -> Callable[..., Bench]:
    def make(family: str = "llama", store: KVStore | None = None, **changes: Any) -> Bench:
        model = make_model(family, **changes)
        return Bench(model, PromptBuilder(model.tokenizer, PROMPT), MemoryStore() if store is None else store)

    return make


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench()
