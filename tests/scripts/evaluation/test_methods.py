"""A method's text says everything that it differs in, and nothing that is not a knob is taken for one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fusionrag.config import PreprocessConfig, ReuseConfig
from fusionrag.errors import ConfigError
from scripts.evaluation.methods import FULL, Base, Offline, configurations, offline_of, parse_method, reuse_of
from scripts.evaluation.records import Configuration

BASE = Base(ReuseConfig(), PreprocessConfig())


def grid(
    methods: Sequence[str], ratios: Sequence[float] = (0.1, 0.3), num_related: Sequence[int] = (3,)
) -> list[Configuration]:
    return list(configurations(methods, ratios, num_related, BASE))


def test_the_default_is_the_configured_method_unchanged():
    assert parse_method("default", BASE.reuse) == BASE.reuse
    (_, configuration) = grid(["default"], [0.1])
    assert offline_of(configuration, BASE) == Offline(PreprocessConfig(num_related=3))


def test_prophetkv_is_attention_of_all_layers_without_what_it_does_not_have():
    found = parse_method("prophetkv:probe_rows=question", BASE.reuse)
    expected = ReuseConfig(probe_layers="all", normalize_layers=False, correction=0.0, probe_rows="question")
    assert found == expected


def test_full_is_first_and_each_method_runs_at_every_ratio_but_the_ends_at_one():
    found = grid(["reuse", "default", "full"], num_related=[0, 3])
    assert found[0] == FULL and found.count(FULL) == 1
    assert [(c.method, c.recompute_ratio) for c in found if c.num_related == 3] == [
        ("reuse", 0.0),
        ("default", 0.1),
        ("default", 0.3),
    ]


def test_a_method_may_name_its_own_number_of_related_chunks():
    """So that raw baselines, the paper's five and the shipped three run in one grid."""
    found = grid(["reuse:num_related=0", "fusionrag:num_related=5+fuse_behind=all", "default"], [0.1])
    assert [(c.method, c.num_related) for c in found] == [
        ("full", 0),
        ("reuse", 0),
        ("fusionrag:fuse_behind=all", 5),
        ("default", 3),
    ]


def test_knobs_of_request_and_offline_job_go_where_they_belong():
    (_, configuration) = grid(["attention:probe_layers=all+related_by=meaning+stale_share=0.5+fuse_behind=all"], [0.1])
    offline, reuse = offline_of(configuration, BASE), reuse_of(configuration, BASE)
    assert offline == Offline(PreprocessConfig(3, "meaning", "all"), 0.5)
    assert (reuse.probe_layers, reuse.recompute_ratio, reuse.correction) == ("all", 0.1, BASE.reuse.correction)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("atention", "atention"),
        ("default:probe_layer=all", "probe_layer"),
        ("default:related_by=chance", "related_by"),
        ("default:stale_share=2", "stale_share"),
        ("default:stale_share=much", "stale_share"),
        ("default:num_related=few", "num_related"),
        ("default:correction=much", "correction"),
    ],
)
def test_what_is_wrong_is_refused_by_name_before_anything_runs(text, named):
    with pytest.raises(ConfigError, match=named):
        grid([text])
