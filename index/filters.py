"""Conditions on a document's metadata: which documents a search may find.

The form is that of OpenAI's vector stores: a comparison of one key, or several conditions joined by `and` or `or`.
Knows nothing of how metadata is stored.

Invariant: a key that a document lacks, or has with a value of another type (text, number, truth value), fits no
comparison but `ne` and `nin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Scalar: TypeAlias = str | float | bool  # int is a float here
ComparisonOperator = Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]


@dataclass(frozen=True)
class Comparison:
    """`key` compared with `value`; a tuple of values for `in` and `nin`, one value otherwise."""

    key: str
    operator: ComparisonOperator
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Compound:
    """All (`and`) or any (`or`) of the conditions."""

    operator: Literal["and", "or"]
    filters: tuple[Filter, ...]


Filter: TypeAlias = Comparison | Compound
