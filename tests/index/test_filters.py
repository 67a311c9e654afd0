"""Filters: SQL finds exactly what the definition says; what is not OpenAI's form is refused by the place at fault."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.shared import ComparisonFilter, CompoundFilter

from index import Chunk, Document, InvalidValue, Section
from index.filters import (
    MAX_CHARS,
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_VALUES,
    Comparison,
    Compound,
    Filter,
    parse_filter,
)

_ORDER = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


def kind(value: object) -> type:
    return float if type(value) is int else type(value)


def fits(condition: Filter, metadata: dict) -> bool:
    """The definition, in plain Python."""
    if isinstance(condition, Compound):
        return (all if condition.operator == "and" else any)(fits(part, metadata) for part in condition.filters)
    values = condition.value if isinstance(condition.value, tuple) else (condition.value,)
    compare = _ORDER.get(condition.operator, operator.eq)
    had = metadata.get(condition.key)
    is_found = any(kind(had) is kind(value) and compare(had, value) for value in values)
    return is_found != (condition.operator in ("ne", "nin"))


@pytest.fixture
def add_all(catalogue):
    def add(*metadata: dict) -> None:
        for i, fields in enumerate(metadata):
            chunk = Chunk("", f"text {i}", (i,), str(i), 0)
            document = Document(str(i), "", (Section("", "x"),), "", fields)
            catalogue.replace_document("c", document, [chunk], np.zeros((1, 64), np.float32))

    return add


@pytest.fixture
def found(catalogue):
    def documents(condition: Filter) -> list[int]:
        rows = catalogue.rows_where("c", condition)
        assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
        return sorted(int(c.chunk.document_id) for c in catalogue.chunks_by_row("c", rows).values())

    return documents


keys = st.sampled_from(["year", "author", "a.b", 'q"k', "é", "$", "", "x'; --"])
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
numbers = (
    st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.1, 1, 1.0])
)
scalars = text | numbers | st.booleans()
comparisons = (
    st.builds(Comparison, keys, st.sampled_from(["eq", "ne"]), scalars)
    | st.builds(Comparison, keys, st.sampled_from(["gt", "gte", "lt", "lte"]), text | numbers)
    | st.builds(Comparison, keys, st.sampled_from(["in", "nin"]), st.lists(scalars, min_size=1, max_size=3).map(tuple))
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.builds(
        Compound, st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(condition=conditions, metadata=st.lists(st.dictionaries(keys, scalars, max_size=4), min_size=1, max_size=4))
def test_sql_finds_what_the_definition_says(catalogue, add_all, found, condition, metadata):
    for document_id in catalogue.document_ids("c"):
        catalogue.delete_document("c", document_id)
    add_all(*metadata)
    assert found(condition) == [i for i, fields in enumerate(metadata) if fits(condition, fields)]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Comparison("n", "eq", 1.0), [0]),
        (Comparison("n", "eq", True), [1]),
        (Comparison("n", "eq", "1"), [2]),
        (Comparison("n", "ne", 1.0), [1, 2, 3]),
        (Comparison("n", "gte", 0), [0]),
        (Comparison("n", "gte", ""), [2]),
        (Comparison("n", "in", (1, "1")), [0, 2]),
        (Comparison("n", "nin", (1, "1")), [1, 3]),
    ],
)
def test_a_value_of_another_type_fits_nothing_but_ne_and_nin(add_all, found, condition, expected):
    add_all({"n": 1}, {"n": True}, {"n": "1"}, {})
    assert found(condition) == expected


def test_only_the_collection_asked_is_looked_at(catalogue, add_all, found):
    add_all({"n": 1})
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    assert len(catalogue.rows_where("other", Comparison("n", "ne", 5))) == 0


def test_the_clients_own_filter_types_are_read():
    one = ComparisonFilter(key="year", type="gte", value=2020)
    many = ComparisonFilter(key="lang", type="in", value=["en", "de"])
    both = CompoundFilter(type="and", filters=[one, many])
    assert parse_filter(both.model_dump()) == Compound(
        "and", (Comparison("year", "gte", 2020), Comparison("lang", "in", ("en", "de")))
    )


def nested(depth: int) -> dict:
    inner: dict = {"type": "eq", "key": "k", "value": 1}
    for _ in range(depth - 1):
        inner = {"type": "or", "filters": [inner]}
    return inner


def eq(**changes) -> dict:
    return {"type": "eq", "key": "k", "value": 1, **changes}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, "filters"),
        ([], "filters"),
        ({}, "filters.type"),
        ({"type": "like", "key": "k", "value": "x"}, "filters.type"),
        ({"type": ["eq"], "key": "k", "value": "x"}, "filters.type"),
        ({"type": "and"}, "filters.filters"),
        ({"type": "and", "filters": []}, "filters.filters"),
        ({"type": "and", "filters": {}}, "filters.filters"),
        ({"type": "and", "filters": [eq()], "key": "k"}, "filters"),
        ({"type": "or", "filters": [eq(), eq(value=None)]}, "filters.filters[1].value"),
        (eq(extra=1), "filters"),
        (eq(key=""), "filters.key"),
        (eq(key=5), "filters.key"),
        (eq(key="k" * (MAX_CHARS + 1)), "filters.key"),
        (eq(key="k\0"), "filters.key"),
        ({"type": "eq", "key": "k"}, "filters.value"),
        (eq(value=[1]), "filters.value"),
        (eq(value={}), "filters.value"),
        (eq(value=float("nan")), "filters.value"),
        (eq(value=float("inf")), "filters.value"),
        (eq(value=10**400), "filters.value"),
        (eq(value="\ud800"), "filters.value"),
        (eq(value="v" * (MAX_CHARS + 1)), "filters.value"),
        (eq(type="gt", value=True), "filters.value"),
        (eq(type="in"), "filters.value"),
        (eq(type="in", value=[]), "filters.value"),
        (eq(type="nin", value=[1] * (MAX_VALUES + 1)), "filters.value"),
        (eq(type="in", value=[1, [2]]), "filters.value[1]"),
        ({"type": "or", "filters": [eq()] * (MAX_CONDITIONS + 1)}, f"filters.filters[{MAX_CONDITIONS}]"),
        (nested(MAX_DEPTH + 1), "filters" + ".filters[0]" * (MAX_DEPTH - 1) + ".filters"),
    ],
)
def test_what_is_no_filter_is_refused_by_the_place_at_fault(value, field):
    with pytest.raises(InvalidValue) as caught:
        parse_filter(value)
    assert caught.value.field == field


def test_the_largest_filter_allowed_is_answered(add_all, found):
    add_all({"k": 1}, {"k": "v"})
    assert found(parse_filter(nested(MAX_DEPTH))) == [0]
    values = [*range(MAX_VALUES - 1), "v"]
    wide = {"type": "and", "filters": [eq(type="in", value=values)] * MAX_CONDITIONS}
    assert found(parse_filter(wide)) == [0, 1]


@given(
    value=st.recursive(
        scalars | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "key", "value", "filters"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_is_read_or_refused_as_invalid(value):
    try:
        parse_filter(value)
    except InvalidValue as error:
        assert error.field.startswith("filters")
