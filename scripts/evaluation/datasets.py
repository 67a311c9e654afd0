"""Question-answering datasets, in the forms the field publishes them in, as `Example`s.

Knows nothing about tokens, models or stores. A record's form is recognised by its fields, never by the file's name:

    CacheBlend   ctxs [{title?, text}], question, answers (a string, a list, a nested list); optional id, type, gold
    LongBench    context "Passage 1:\\nTitle\\ntext…", input, answers; optional _id, type, dataset
    HotpotQA     context [[title, [sentence]]], supporting_facts [[title, i]], question, answer; 2WikiMultihopQA too
    SQuAD        data [{title, paragraphs [{context, qas [{id, question, answers [{text}]}]}]}]

The first three come as a JSON array or as JSONL; SQuAD is one object.
Invariant: the same file and seed give the same examples, ids and passage order; `limit` only leaves examples out.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scripts.evaluation.errors import DatasetError
from scripts.evaluation.json_records import JsonRecord, read_json_records
from scripts.evaluation.metrics import normalize_answer

NUM_SQUAD_PASSAGES = 10

HopOrder = Literal["before", "after"]
Half = Literal["selection", "reporting"]
HALVES: tuple[Half, ...] = ("selection", "reporting")

_PASSAGE_HEADER = re.compile(r"^Passage \d+:[ \t]*\n", re.MULTILINE)


@dataclass(frozen=True)
class Passage:
    """One retrieved text. `title` is '' where the dataset gives none."""

    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """A question, its gold answers (at least one) and the passages to answer it from, in prompt order.

    `gold` are the positions in `passages` of those that support the answer, in the dataset's order; () if unknown.
    """

    example_id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    type: str = ""
    gold: tuple[int, ...] = ()


def load_dataset(path: str | Path, limit: int | None = None, seed: int = 0, half: Half | None = None) -> list[Example]:
    """Reads a dataset file of any known form, in file order.

    `half` keeps every other question: settings are chosen on `selection` (the 1st, 3rd, …), reported on `reporting`.
    `limit` keeps that many examples, drawn by `seed` over the whole file (files are sorted by type or by article); a
    smaller limit's examples are among a larger one's. `seed` also draws the distractor passages of the SQuAD form.
    Raises DatasetError naming file, record (place in the array, or line) and field.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DatasetError(f"limit: must be at least 1, got {limit}")
    records = read_json_records(path)
    if len(records) == 1 and "data" in records[0].fields:
        examples = _from_squad(records[0], seed)
    else:
        examples = [_from_record(record) for record in records]
    if not examples:
        raise DatasetError(f"{path}: holds no questions with answers")
    seen: set[str] = set()
    for example in examples:
        if example.example_id in seen:
            raise DatasetError(f"{path}: field 'id': {example.example_id!r} names two questions; ids must be unique")
        seen.add(example.example_id)
    if half is not None:
        examples = examples[HALVES.index(half) :: 2]
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    return [examples[i] for i in sorted(order[:limit])]


def hop_order(example: Example) -> HopOrder | None:
    """Whether the passage to read first stands 'before' or 'after' the answer's passage; None unless that is certain.

    Of two gold passages, the answer's is the one that contains an answer. The order of `gold` is not used: most
    datasets list it by position. Questions that compare two passages have no first hop.
    """
    kinds = set(example.type.split("_"))
    if len(example.gold) != 2 or not kinds & {"bridge", "compositional", "inference"} or "comparison" in kinds:
        return None
    with_answer = [place for place in example.gold if contains_answer(example.passages[place].text, example.answers)]
    if len(with_answer) != 1:
        return None
    return "after" if with_answer[0] == min(example.gold) else "before"


def contains_answer(text: str, answers: tuple[str, ...]) -> bool:
    """Whether an answer stands in the text as whole words, after SQuAD's normalisation of both."""
    words = f" {normalize_answer(text)} "
    return any(f" {normalize_answer(answer)} " in words for answer in answers)


def _from_record(record: JsonRecord) -> Example:
    if "ctxs" in record.fields:
        return _from_cacheblend(record)
    if "supporting_facts" in record.fields:
        return _from_hotpotqa(record)
    if "context" in record.fields and "input" in record.fields:
        return _from_longbench(record)
    raise DatasetError(
        f"{record.path}: record {record.number}: unknown form, fields: {', '.join(sorted(record.fields)) or 'none'}; "
        "known are CacheBlend (ctxs), LongBench (context, input), HotpotQA (context, supporting_facts), SQuAD (data)"
    )


def _example(record: JsonRecord, passages: list[Passage], *, question: str, answers: str, gold: list[int]) -> Example:
    """What three forms share; `question` and `answers` are the names of the fields."""
    example_id = record.optional_string("id", "_id") or f"{record.path.stem}-{record.number}"
    kind = record.optional_string("type", "dataset")
    text, golds = record.string(question), record.strings(answers)
    return Example(example_id, text, golds, tuple(passages), kind, tuple(dict.fromkeys(gold)))


def _from_cacheblend(record: JsonRecord) -> Example:
    passages = [Passage(ctx.optional_string("title"), ctx.string("text")) for ctx in record.objects("ctxs")]
    gold = record.fields.get("gold") or []
    if not isinstance(gold, list) or not all(type(place) is int and 0 <= place < len(passages) for place in gold):
        raise record.error("gold", f"must be a list of positions in ctxs (0 to {len(passages) - 1}), got {gold!r}")
    return _example(record, passages, question="question", answers="answers", gold=gold)


def _from_longbench(record: JsonRecord) -> Example:
    before, *parts = _PASSAGE_HEADER.split(record.string("context"))
    if before.strip() or not parts:
        raise record.error("context", "must start with a line 'Passage 1:'; only LongBench's multi-passage sets do")
    passages = []
    for part in parts:
        title, _, text = (piece.strip() for piece in part.strip().partition("\n"))
        passages.append(Passage(title, text) if text else Passage("", title))
    return _example(record, passages, question="input", answers="answers", gold=[])


def _from_hotpotqa(record: JsonRecord) -> Example:
    passages = []
    for i, entry in enumerate(record.items("context")):
        match entry:
            case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
                passages.append(Passage(title.strip(), " ".join(sentence.strip() for sentence in sentences).strip()))
            case _:
                raise record.error(f"context[{i}]", "must be [title, [sentence, …]]")
    places = {passage.title: place for place, passage in enumerate(passages)}
    gold = []
    for i, fact in enumerate(record.items("supporting_facts")):
        match fact:
            case [str(title), int()]:
                gold.append(places.get(title.strip(), -1))
            case _:
                raise record.error(f"supporting_facts[{i}]", "must be [title, sentence number]")
    # the full-wiki files may lack a supporting passage: what their retrieval missed is not gold here
    return _example(
        record, passages, question="question", answers="answer", gold=[place for place in gold if place >= 0]
    )


def _from_squad(record: JsonRecord, seed: int) -> list[Example]:
    """Each question with its own paragraph at a seeded place among seeded distractors from the other paragraphs."""
    paragraphs = [
        (Passage(article.optional_string("title").replace("_", " "), paragraph.string("context")), paragraph)
        for article in record.objects("data")
        for paragraph in article.objects("paragraphs")
    ]
    passages = list({passage.text: passage for passage, _ in paragraphs}.values())
    places = {passage.text: place for place, passage in enumerate(passages)}
    num_distractors = min(NUM_SQUAD_PASSAGES, len(passages)) - 1
    examples = []
    for passage, paragraph in paragraphs:
        own = places[passage.text]
        for item in paragraph.objects("qas") if paragraph.fields.get("qas") != [] else []:
            if item.fields.get("is_impossible"):  # SQuAD 2.0: there is no answer to score against
                continue
            example_id, question = item.string("id"), item.string("question")
            answers = tuple(dict.fromkeys(answer.string("text") for answer in item.objects("answers")))
            draw = random.Random(f"{seed}:{example_id}")  # by id: other questions do not change this one's passages
            shown = [i + (i >= own) for i in draw.sample(range(len(passages) - 1), num_distractors)]
            gold = draw.randint(0, num_distractors)
            shown.insert(gold, own)
            picked = tuple(passages[i] for i in shown)
            examples.append(Example(example_id, question, answers, picked, "single", (gold,)))
    return examples
