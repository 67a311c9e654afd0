"""The record of an evaluation run: one line per question and configuration, and the rows they add up to.

Knows nothing about datasets, models or how a figure was measured.
Invariants: the file only grows, and a line counts once its newline is on disk, so that a killed run can go on where
it stopped; no two records share example and configuration; what is compared is compared on the same questions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median

from scripts.evaluation.errors import RecordError
from scripts.evaluation.metrics import normalized_f1

_LINE_START = b'{"example_id": '


@dataclass(frozen=True)
class Configuration:
    """What is compared: a method with its two knobs."""

    method: str
    recompute_ratio: float
    num_related: int


@dataclass(frozen=True)
class Record:
    """One question answered in one configuration.

    `f1`, `em` and `top1_agreement` (greedy first token equals full prefill's) are shares in [0, 1]; `answer_nll` is
    per token, `kl_to_full` of the first token, both in nats. Raises RecordError naming a field outside its range.
    """

    example_id: str
    type: str
    method: str
    recompute_ratio: float
    num_related: int
    prediction: str
    f1: float
    em: float
    answer_nll: float
    kl_to_full: float
    top1_agreement: float
    recomputed_tokens: int
    prompt_tokens: int
    ttft_ms: float

    def __post_init__(self) -> None:
        for name in ("recompute_ratio", "f1", "em", "top1_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecordError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        for name in ("num_related", "answer_nll", "kl_to_full", "recomputed_tokens", "prompt_tokens", "ttft_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecordError(f"{name}: must be finite and not negative, got {getattr(self, name)}")

    @property
    def configuration(self) -> Configuration:
        return Configuration(self.method, self.recompute_ratio, self.num_related)

    @property
    def key(self) -> tuple[str, Configuration]:
        return self.example_id, self.configuration


@dataclass(frozen=True)
class Row:
    """A configuration over its `n` questions: means, and the median TTFT. A row of the `evaluate` command's JSON.

    `f1` and `em` in percent points, `top1_agreement` a share in [0, 1]; `normalized_f1` is None where `full` or
    `reuse` was not run on all of these questions, or the two are closer than half a point.
    """

    method: str
    recompute_ratio: float
    num_related: int
    f1: float
    em: float
    answer_nll: float
    kl_to_full: float
    top1_agreement: float
    normalized_f1: float | None
    recomputed_tokens: float
    prompt_tokens: float
    ttft_ms_p50: float
    n: int


@dataclass(frozen=True)
class GroupRow:
    """F1 in percent points of a configuration over the `n` questions of one group (a type, a hop order)."""

    configuration: Configuration
    group: str
    f1: float
    n: int


class RecordLog:
    """The run's JSONL file; creates it, and cuts off a last line that a killed run left torn.

    `(example_id, configuration) in log` says what need not be run again. One process at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        records, self._num_bytes = _read(self.path) if self.path.exists() else ([], 0)
        self._records = {record.key: record for record in records}
        with self.path.open("ab") as file:
            file.truncate(self._num_bytes)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(self._records.values())

    def __contains__(self, key: tuple[str, Configuration]) -> bool:
        return key in self._records

    def append(self, record: Record) -> None:
        """Writes the record and waits until it is on disk.

        Raises RecordError if its key is already there, or if the file is not as this log left it.
        """
        if record.key in self:
            raise RecordError(f"{self.path}: {_name(record)} is already recorded; check `key in log` before running")
        line = json.dumps(asdict(record)).encode() + b"\n"
        written = _parse(f"{self.path}: new record", line)  # write nothing that cannot be read back
        with self.path.open("ab") as file:
            if file.tell() != self._num_bytes:  # also after a write that failed half-way
                raise RecordError(f"{self.path}: was changed during this run; end other runs on it, then start again")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(line)
        self._records[record.key] = written


def read_records(path: str | Path) -> list[Record]:
    """All whole lines of a run's file. Raises RecordError naming file, line and field; OSError if unreadable."""
    return _read(Path(path))[0]


def merged(paths: Iterable[str | Path]) -> list[Record]:
    """The records of several files of one dataset; where two hold the same question and configuration, the first's."""
    found: dict[tuple[str, Configuration], Record] = {}
    for path in paths:
        for record in read_records(path):
            found.setdefault(record.key, record)
    return list(found.values())


def by_configuration(records: Iterable[Record]) -> dict[Configuration, list[Record]]:
    """Records per configuration, both in order of first appearance. Raises RecordError if a key appears twice."""
    groups: dict[Configuration, dict[str, Record]] = {}
    for record in records:
        group = groups.setdefault(record.configuration, {})
        if record.example_id in group:
            raise RecordError(f"{_name(record)} is recorded twice")
        group[record.example_id] = record
    return {configuration: list(group.values()) for configuration, group in groups.items()}


def summarise(records: Iterable[Record]) -> list[Row]:
    """One row per configuration, F1 normalised between `reuse` (num_related 0) and `full` on the row's questions."""
    groups = by_configuration(records)
    full = next((group for c, group in groups.items() if c.method == "full"), [])
    reuse = next((group for c, group in groups.items() if c.method == "reuse" and c.num_related == 0), [])
    return [_row(configuration, group, _f1_points(full), _f1_points(reuse)) for configuration, group in groups.items()]


def f1_by_type(records: Iterable[Record]) -> list[GroupRow]:
    """F1 per family of question types: bridge, comparison, single; any other type is a family of its own."""
    records = list(records)
    return f1_by_group(records, {record.example_id: _family(record.type) for record in records})


def f1_by_group(records: Iterable[Record], group_of: Mapping[str, str | None]) -> list[GroupRow]:
    """F1 per configuration and group; `group_of`: example_id → group, questions without one are left out."""
    rows = []
    for configuration, members in by_configuration(records).items():
        values: dict[str, list[float]] = {}
        for record in members:
            group = group_of.get(record.example_id)
            if group is not None:
                values.setdefault(group, []).append(100 * record.f1)
        rows += [GroupRow(configuration, group, fmean(f1), len(f1)) for group, f1 in sorted(values.items())]
    return rows


def _row(
    configuration: Configuration, group: list[Record], full: Mapping[str, float], reuse: Mapping[str, float]
) -> Row:
    f1 = _f1_points(group)
    normalized = None
    if f1.keys() <= full.keys() and f1.keys() <= reuse.keys():  # else the means would be of other questions
        normalized = normalized_f1(fmean(f1.values()), fmean(reuse[i] for i in f1), fmean(full[i] for i in f1))
    return Row(
        **asdict(configuration),
        f1=fmean(f1.values()),
        em=100 * fmean(record.em for record in group),
        answer_nll=fmean(record.answer_nll for record in group),
        kl_to_full=fmean(record.kl_to_full for record in group),
        top1_agreement=fmean(record.top1_agreement for record in group),
        normalized_f1=normalized,
        recomputed_tokens=fmean(record.recomputed_tokens for record in group),
        prompt_tokens=fmean(record.prompt_tokens for record in group),
        ttft_ms_p50=median(record.ttft_ms for record in group),
        n=len(group),
    )


def _f1_points(group: Iterable[Record]) -> dict[str, float]:
    """example_id → F1 in percent points."""
    return {record.example_id: 100 * record.f1 for record in group}


def _family(kind: str) -> str:
    names = {"bridge": "bridge", "comp": "comparison", "comparison": "comparison", "single": "single"}
    found = {names[part] for part in kind.split("_") if part in names}
    return found.pop() if len(found) == 1 else kind or "untyped"


def _name(record: Record) -> str:
    c = record.configuration
    return f"example {record.example_id!r} with {c.method}, ratio {c.recompute_ratio}, {c.num_related} related"


def _read(path: Path) -> tuple[list[Record], int]:
    """The records of all lines that end in a newline, and the bytes these lines take."""
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    if torn[: len(_LINE_START)] != _LINE_START[: len(torn)]:  # somebody else's file: a resumed run would cut it
        raise RecordError(f"{path}: line {len(lines) + 1}: is no record of an evaluation; name another file")
    records: dict[tuple[str, Configuration], Record] = {}
    for number, line in enumerate(lines, start=1):
        record = _parse(f"{path}: line {number}", line)
        if record.key in records:
            raise RecordError(f"{path}: line {number}: {_name(record)} is recorded twice; delete one of the lines")
        records[record.key] = record
    return list(records.values()), len(content) - len(torn)


def _parse(where: str, line: bytes) -> Record:
    kinds = {"str": (str,), "int": (int,), "float": (float, int)}
    try:
        found = json.loads(line)
        for field in fields(Record):
            if type(found.get(field.name)) not in kinds[str(field.type)]:
                raise RecordError(f"{field.name}: must be of type {field.type}, got {found.get(field.name)!r}")
        return Record(**found)
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError(f"{where}: {error}") from error
