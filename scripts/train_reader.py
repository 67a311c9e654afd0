"""Trains the reader in the box: `python -m scripts.train_reader --help`.

Makes questions from real passages, trains a LoRA adapter on them, and scores it by full prefill on evaluation files,
of which nothing is trained on. Writes adapter.safetensors, log.jsonl, loss.png and scores.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from fusionrag.default_model import base_model_dir, merge_adapter_
from scripts.evaluation.datasets import Example, load_dataset
from scripts.options import add_config_flags, build
from scripts.reader.adapter import add_adapter, load_adapter_, save_adapter
from scripts.reader.config import ContextConfig, TrainingConfig
from scripts.reader.contexts import Composer, Context
from scripts.reader.corpus import build_corpus
from scripts.reader.encoding import Encoder
from scripts.reader.holdout import Holdout, exclude, set_aside
from scripts.reader.passages import read_human_questions, read_passages
from scripts.reader.scoring import Answered, answer_all, by_type, differences, predicted_by_kind
from scripts.reader.stream import load_rows, rows_by_kind
from scripts.reader.training import Trainer, plot_loss


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_reader", description=__doc__)
    parser.add_argument(
        "--base", type=Path, help="directory of the model without an adapter (default: the packaged one)"
    )
    parser.add_argument("--passages", type=Path, required=True, help="JSON: [{title, text}]")
    parser.add_argument("--human", type=Path, required=True, help="JSON: [{question, answers, gold: [{title, text}]}]")
    parser.add_argument("--evaluate", type=Path, nargs="*", default=[], help="files to score on, never to train on")
    parser.add_argument("--hold-out", type=Path, nargs="*", default=[], help="more files never to train on")
    parser.add_argument("--start-from", type=Path, help="adapter to go on from, instead of a new one")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="other adapters to score beside")
    parser.add_argument("--validation-share", type=float, default=0.03, help="of the names, never trained on")
    parser.add_argument("--validation-contexts", type=int, default=60, help="made of those to score on; 0 for none")
    parser.add_argument("--out", type=Path, required=True, help="directory for what is written")
    add_config_flags(parser, TrainingConfig, ContextConfig)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Scores:
    """What a model answers to each evaluation file, and how many held-out answers it predicts, by kind of question."""

    answered: dict[str, list[Answered]]
    held_out: dict[str, tuple[int, float]]


@dataclass(frozen=True)
class Material:
    """What is trained on, and what is not."""

    training: Composer
    validation: list[Context]
    examples: dict[str, list[Example]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.base = args.base or base_model_dir()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    config, adapter = build(TrainingConfig, args), args.out / "adapter.safetensors"
    material = prepare(args)
    train(args, config, material, adapter)
    print(f"adapter after {time.perf_counter() - began:.0f} s")
    scores = {path: score(args.base, path, material) for path in [*args.compare, adapter]}
    for path in args.compare:
        _print_differences(f"new minus {path}", scores[adapter].answered, scores[path].answered)
    report = {
        "args": {name: str(value) for name, value in vars(args).items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "training": asdict(config),
        "scores": {str(path): _as_json(found) for path, found in scores.items()},
    }
    (args.out / "scores.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"done after {time.perf_counter() - began:.0f} s")


def prepare(args: argparse.Namespace) -> Material:
    """Training material without what the evaluation files ask about, and contexts of passages that are set aside."""
    examples = {path.stem: load_dataset(path) for path in args.evaluate}
    held_out = [e for found in examples.values() for e in found]
    held_out += [e for path in args.hold_out for e in load_dataset(path)]
    passages, human, dropped = exclude(
        read_passages(args.passages), read_human_questions(args.human), Holdout(held_out)
    )
    training, validation = set_aside(passages, human, args.validation_share)
    corpus = build_corpus(*training)
    contexts: list[Context] = []
    if args.validation_contexts:
        composer, rng = Composer(build_corpus(*validation), ContextConfig()), Random(0)  # the same whatever the flags
        drills = (composer.drill(rng) for _ in range(args.validation_contexts))
        contexts = [composer.compose(rng) for _ in range(args.validation_contexts)] + [d for d in drills if d]
    print(
        f"{len(passages)} passages ({dropped.passages} dropped), {len(human)} human questions "
        f"({dropped.human_questions} dropped), {len(corpus.with_facts)} passages with facts, "
        f"{len(corpus.links)} links, {len(corpus.sources)} sources and {len(corpus.people)} people for other ones",
        flush=True,
    )
    return Material(Composer(corpus, build(ContextConfig, args)), contexts, examples)


def train(args: argparse.Namespace, config: TrainingConfig, material: Material, adapter: Path) -> None:
    """From the base model, or from an earlier adapter, to a saved adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    kind = {"dtype": torch.bfloat16, "attn_implementation": "flex_attention"} if cuda else {"dtype": torch.float32}
    encoder = Encoder(AutoTokenizer.from_pretrained(args.base))
    rows = load_rows(material.training, encoder, config)
    first = next(rows)  # the workers start before CUDA does
    validation = rows_by_kind(material.validation, encoder, config)
    base: Any = AutoModelForCausalLM.from_pretrained(args.base, **kind)
    check_end(encoder.end_id, base.generation_config)
    model = add_adapter(base.to("cuda" if cuda else "cpu"), config)
    if args.start_from:
        load_adapter_(model, args.start_from, config.scale)
    trainer = Trainer(model, config)
    if config.max_steps:
        trainer.warm_up(first)
        plot_loss(trainer.train(rows, args.out / "log.jsonl", validation), args.out / "loss.png")
    save_adapter(model, adapter, config.scale)
    if cuda:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


def check_end(end_id: int, generation: Any) -> None:
    """Raises ValueError if what is trained to end answers is not what generation stops at."""
    stops = generation.eos_token_id
    if end_id not in (stops if isinstance(stops, list) else [stops]):
        raise ValueError(f"answers would be trained to end with token {end_id}, but generation stops at {stops}")


def score(base: Path, adapter: Path, material: Material) -> Scores:
    """Full prefill on every file, the adapter merged as the server merges it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = model.state_dict()
    merge_adapter_(weights, load_file(adapter))
    model.load_state_dict(weights)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    tokenizer, answered = AutoTokenizer.from_pretrained(base), {}
    for name, wanted in material.examples.items():
        answered[name] = answer_all(model.eval(), tokenizer, wanted)
        groups = by_type(answered[name]).items()
        print(adapter, name, *(f"{kind}: {f1:.1f} ({n})" for kind, (n, f1, _) in groups), flush=True)
    held_out = predicted_by_kind(model.eval(), tokenizer, material.validation)
    print(adapter, "held out", *(f"{k}: {right:.1f} ({n})" for k, (n, right) in held_out.items()), flush=True)
    return Scores(answered, held_out)


def _print_differences(title: str, new: dict[str, list[Answered]], old: dict[str, list[Answered]]) -> None:
    for name, answered in new.items():
        kinds = differences(answered, old[name]).items()
        print(title, name, *(f"{kind}: {d.mean:+.1f} [{d.low:.1f}, {d.high:.1f}]" for kind, d in kinds), flush=True)


def _as_json(scores: Scores) -> dict[str, Any]:
    files = {
        name: {"groups": by_type(answered), "answers": [[a.answer, round(100 * a.f1, 1)] for a in answered]}
        for name, answered in scores.answered.items()
    }
    return {**files, "held_out": scores.held_out}


if __name__ == "__main__":
    main()
