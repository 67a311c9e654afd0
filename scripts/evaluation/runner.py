"""Answers the questions of a dataset in every configuration and measures each against full prefill.

One worker holds one model; several workers share the questions (`num_workers`), which is how a small model fills a
GPU or a many-core CPU. A question's KV is computed for it alone and dropped afterwards, so memory stays bounded
whatever the corpus. TTFT runs from the plan to the first logits, the selector's own work included; retrieval is not
part of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch

from fusionrag.config import EngineConfig, ModelConfig, PromptConfig, StoreConfig
from fusionrag.engine import Engine, Prefilled
from fusionrag.layout import naming
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel, load_model, resolve_device
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore
from fusionrag.types import PromptChunk, PromptPlan
from index.types import chunk_id_of
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.methods import Base, Offline, offline_of, reuse_of
from scripts.evaluation.metrics import exact_match, f1_score, kl_to_full
from scripts.evaluation.records import Configuration, Record

MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to build its model and engine."""

    model: ModelConfig
    prompt: PromptConfig
    engine: EngineConfig
    base: Base
    num_threads: int = 0  # of torch, per worker; 0 leaves torch's choice


@dataclass(frozen=True)
class Task:
    """One question, and for each offline job what its passages are fused behind: passage → related passages."""

    example: Example
    related: Mapping[Offline, Mapping[Passage, tuple[Passage, ...]]]
    configurations: tuple[Configuration, ...]


def run(setup: Setup, tasks: Sequence[Task], num_workers: int = 1) -> Iterator[list[Record]]:
    """The records of one question at a time, in order of completion. Several workers take turns on all visible GPUs.

    With several workers a question that fails costs the others nothing; what it raised is raised at the end.
    """
    if num_workers <= 1:
        worker = Worker(setup)
        yield from (worker.answer(task) for task in tasks)
        return
    context = get_context("spawn")
    places: SimpleQueue[str] = context.SimpleQueue()
    for place in devices(setup.model.device, num_workers):
        places.put(place)
    failed: BaseException | None = None
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(setup, places)) as pool:
        for future in as_completed([pool.submit(_answer, task) for task in tasks]):
            if future.exception() is None:
                yield future.result()
            failed = failed or future.exception()
    if failed is not None:
        raise failed


def devices(device: str, num_workers: int, num_gpus: int | None = None) -> list[str]:
    """Where each worker runs: 'cuda' and 'auto' mean every GPU in turn (`num_gpus`, else those torch sees)."""
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    if device not in ("auto", "cuda") or num_gpus == 0:
        return [device] * num_workers
    return [f"cuda:{i % num_gpus}" for i in range(num_workers)]


class Worker:
    """One model and one engine, answering one question after the other."""

    def __init__(self, setup: Setup) -> None:
        if setup.num_threads:
            torch.set_num_threads(setup.num_threads)
        device = resolve_device(setup.model.device)
        self._is_on_gpu = device.type == "cuda"
        if device.index is not None and self._is_on_gpu:  # kernels are launched on the current device
            torch.cuda.set_device(device)
        self._setup = setup
        self._model: LanguageModel = load_model(setup.model)
        self._prompts = PromptBuilder(self._model.tokenizer, setup.prompt)

    def answer(self, task: Task) -> list[Record]:
        """One record per configuration, `full` first."""
        example, store = task.example, MemoryStore(is_decoded=not self._is_on_gpu)
        tier = StoreConfig().device_tier_bytes if self._is_on_gpu else 0
        engine = Engine(self._model, store, replace(self._setup.engine, route="reuse"), device_tier_bytes=tier)
        plans: dict[Offline, PromptPlan] = {}
        records: list[Record] = []
        full_logits: torch.Tensor | None = None
        for configuration in task.configurations:
            offline = offline_of(configuration, self._setup.base)
            if offline not in plans:
                plans[offline] = self._prepare(task, offline, store)
            prefilled = self._prefill(engine, plans[offline], configuration)
            logits = prefilled.logits.cpu()
            full_logits = logits if full_logits is None else full_logits
            records.append(self._record(example, configuration, prefilled, full_logits))
            prefilled.release()
        return records

    def _prepare(self, task: Task, offline: Offline, store: MemoryStore) -> PromptPlan:
        """Computes the KV of the question's chunks behind their related ones, and lays out the prompt."""
        token_ids_of: dict[str, tuple[int, ...]] = {}
        fuse_behind, related = offline.preprocess.fuse_behind, task.related.get(offline, {})

        def chunk_id(passage: Passage) -> str:
            token_ids = tuple(self._prompts.encode(passage.title, passage.text))
            token_ids_of[chunk_id_of(token_ids)] = token_ids
            return chunk_id_of(token_ids)

        chunks, here = [], {chunk_id(passage) for passage in task.example.passages}
        for passage in task.example.passages:
            name = chunk_id(passage)
            near = tuple(chunk_id(other) for other in related.get(passage, ()))
            if fuse_behind == "each":  # what no chunk of this prompt is behind would not be looked for
                near = tuple(other for other in near if other in here)
            chunks.append(PromptChunk(name, token_ids_of[name], near, fuse_behind))
        names = naming(self._model, "none", self._prompts.prefix_ids)
        job = PreprocessJob(self._model, store, names, token_ids_of, self._setup.engine)
        for _ in job.run(list(dict.fromkeys(chunks))):
            pass
        return self._prompts.plan(chunks, (Turn("user", task.example.question),))

    def _prefill(self, engine: Engine, plan: PromptPlan, configuration: Configuration) -> Prefilled:
        """On a GPU the second of two runs: the first compiles kernels and brings the KV to the device."""
        reuse = reuse_of(configuration, self._setup.base)
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS * 4, seed=0)
        if self._is_on_gpu:
            engine.prefill(EngineRequest("warm up", plan, sampling, reuse, time.perf_counter())).release()
        return engine.prefill(EngineRequest("evaluate", plan, sampling, reuse, time.perf_counter()))

    def _record(
        self, example: Example, configuration: Configuration, prefilled: Prefilled, full_logits: torch.Tensor
    ) -> Record:
        logits = prefilled.logits.cpu()
        prediction = self._greedy(prefilled)
        return Record(
            example_id=example.example_id,
            type=example.type,
            method=configuration.method,
            recompute_ratio=configuration.recompute_ratio,
            num_related=configuration.num_related,
            prediction=prediction,
            f1=f1_score(prediction, example.answers),
            em=exact_match(prediction, example.answers),
            answer_nll=self._answer_nll(prefilled, example.answers[0]),
            kl_to_full=kl_to_full(full_logits, logits),
            top1_agreement=float(full_logits.argmax() == logits.argmax()),
            recomputed_tokens=prefilled.stats.recomputed_tokens
            if configuration.recompute_ratio < 1
            else prefilled.num_tokens,
            prompt_tokens=prefilled.num_tokens,
            ttft_ms=prefilled.stats.ttft_ms,
        )

    def _greedy(self, prefilled: Prefilled) -> str:
        answer: list[int] = []
        token = int(prefilled.logits.argmax())
        while token not in self._model.eos_ids and len(answer) < MAX_ANSWER_TOKENS:
            answer.append(token)
            token = int(prefilled.extend([token], len(answer) - 1)[0].argmax())
        text: str = self._model.tokenizer.decode(answer, skip_special_tokens=True)
        return text

    def _answer_nll(self, prefilled: Prefilled, answer: str) -> float:
        """Mean negative log-likelihood, nats per token, of the gold answer and the end of the turn."""
        token_ids = self._model.tokenizer(answer, add_special_tokens=False)["input_ids"][: MAX_ANSWER_TOKENS * 3]
        token_ids = [*token_ids, self._model.tokenizer.eos_token_id]
        logits = torch.cat([prefilled.logits[None], prefilled.extend(token_ids[:-1])])
        target = torch.tensor(token_ids, device=logits.device)
        return float(torch.nn.functional.cross_entropy(logits, target))


_worker: Worker | None = None  # of a spawned process; a process pool has no other place for what each worker keeps


def _start_worker(setup: Setup, places: SimpleQueue[str]) -> None:
    global _worker
    _worker = Worker(replace(setup, model=replace(setup.model, device=places.get())))


def _answer(task: Task) -> list[Record]:
    assert _worker is not None
    return _worker.answer(task)
