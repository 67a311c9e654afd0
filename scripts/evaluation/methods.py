"""How a method is spelled: `default`, `attention:probe_layers=all`, `fusionrag:num_related=5+fuse_behind=all`.

A knob belongs to the request (a field of ReuseConfig) or to the offline job that the KV comes from (`Offline`). Knows
nothing of models. Invariant: a configuration says, by its method's text and its two numbers, all that it differs in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from fusionrag.config import METHODS, PreprocessConfig, ReuseConfig, require
from fusionrag.errors import ConfigError
from scripts.evaluation.records import Configuration

FULL = Configuration("full", 1.0, 0)
PUBLISHED = {"prophetkv": "attention:probe_layers=all+normalize_layers=false+correction=0"}
STALE_SHARE = "stale_share"

T = TypeVar("T")
Config = TypeVar("Config", ReuseConfig, PreprocessConfig)


@dataclass(frozen=True)
class Offline:
    """The offline job that a configuration's KV comes from.

    stale_share: of all passages, those that have changed since KV was computed behind them, and that KV was kept.
    """

    preprocess: PreprocessConfig
    stale_share: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.stale_share <= 1, STALE_SHARE, f"must lie in [0, 1], got {self.stale_share}")


@dataclass(frozen=True)
class Base:
    """What a method's knobs are changes of."""

    reuse: ReuseConfig
    preprocess: PreprocessConfig


def parse_method(text: str, base: ReuseConfig) -> ReuseConfig:
    """'attention' or 'attention:probe_layers=late+correction=1': a method and knobs of ReuseConfig to change.

    Raises ConfigError naming the method or the knob.
    """
    name, knobs = _split(text)
    if name in PUBLISHED:
        name, published = _split(PUBLISHED[name])
        knobs = published | knobs
    if name == "default":
        name = base.method
    if name not in METHODS:
        known = ", ".join(("default", *METHODS, *PUBLISHED))
        raise ConfigError("methods", f"unknown method {name!r}; one of {known}")
    return _changed(base.with_method(name), knobs, text)


def reuse_of(configuration: Configuration, base: Base) -> ReuseConfig:
    """How a request of this configuration is answered."""
    name, knobs = _split(configuration.method)
    own = {key: value for key, value in knobs.items() if not _is_offline(key)}
    return replace(parse_method(_spelled(name, own), base.reuse), recompute_ratio=configuration.recompute_ratio)


def offline_of(configuration: Configuration, base: Base) -> Offline:
    """The offline job that the configuration's KV comes from."""
    knobs = {key: value for key, value in _split(configuration.method)[1].items() if _is_offline(key)}
    stale_share = _number(float, STALE_SHARE, knobs.pop(STALE_SHARE, "0"))
    changed = _changed(base.preprocess, knobs, configuration.method)
    return Offline(replace(changed, num_related=configuration.num_related), stale_share)


def configurations(
    methods: Sequence[str], ratios: Sequence[float], num_related: Sequence[int], base: Base
) -> tuple[Configuration, ...]:
    """The grid. `full` and `reuse` have one ratio each, and `full` does not depend on the related chunks.

    `full` is always first: everything else is measured against it. A method that names its own `num_related` takes that
    instead of the grid's. Raises ConfigError naming the method or knob that is wrong.
    """
    grid = [FULL]
    for related in num_related:
        for method in methods:
            name, knobs = _split(method)
            own_related = _number(int, "num_related", knobs.pop("num_related", str(related)))
            found = Configuration(_spelled(name, knobs), 0.0, own_related)
            offline_of(found, base)
            kind = reuse_of(found, base).method
            if kind == "reuse":
                grid.append(found)
            elif kind != "full":
                grid += [replace(found, recompute_ratio=ratio) for ratio in ratios]
    return tuple(dict.fromkeys(grid))


def _is_offline(knob: str) -> bool:
    return knob == STALE_SHARE or knob in {f.name for f in fields(PreprocessConfig)}


def _split(text: str) -> tuple[str, dict[str, str]]:
    name, _, knobs = text.partition(":")
    pairs = [knob.partition("=") for knob in knobs.split("+") if knob]
    return name, {key: value for key, _, value in pairs}


def _spelled(name: str, knobs: Mapping[str, str]) -> str:
    return ":".join(filter(None, [name, "+".join(f"{key}={value}" for key, value in knobs.items())]))


def _number(kind: Callable[[str], T], knob: str, value: str) -> T:
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(knob, f"must be a number, got {value!r}") from error


def _changed(config: Config, knobs: Mapping[str, str], text: str) -> Config:
    """`config` with these knobs. Raises ConfigError naming one that it does not have."""
    kinds = {f.name: type(getattr(config, f.name)) for f in fields(config)}
    changes: dict[str, object] = {}
    for key, value in knobs.items():
        if key not in kinds:
            raise ConfigError("methods", f"{text!r}: unknown knob {key!r}; one of {', '.join(kinds)}")
        kind = kinds[key]
        changes[key] = value.lower() in ("1", "true", "yes") if kind is bool else _number(kind, key, value)
    return replace(config, **changes)  # type: ignore[arg-type]
