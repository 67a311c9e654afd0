"""Command-line flags and TOML keys, generated from the configuration dataclasses.

A knob is one dataclass field; `--chunk-tokens`, `chunk_tokens = …` in the file named by `--config` and
`ChunkingConfig.chunk_tokens` are the same thing under the same name. A flag wins over the file, the file over
the default.
Unknown keys and malformed values are refused by name.
"""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

from fusionrag.config import (
    EngineConfig,
    ModelConfig,
    PreprocessConfig,
    PromptConfig,
    RetrievalConfig,
    ReuseConfig,
    StoreConfig,
)
from fusionrag.errors import ConfigError
from index.config import ChunkingConfig, EmbeddingConfig, SearchConfig, VectorIndexConfig

T = TypeVar("T")

CONFIGS: tuple[type, ...] = (
    ModelConfig,
    PromptConfig,
    ChunkingConfig,
    EmbeddingConfig,
    VectorIndexConfig,
    SearchConfig,
    RetrievalConfig,
    PreprocessConfig,
    ReuseConfig,
    StoreConfig,
    EngineConfig,
)
_KINDS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def all_configs() -> tuple[type, ...]:
    """Every configuration class, the server's too; importing that needs the server's libraries."""
    from server.config import ServerConfig

    return (*CONFIGS, ServerConfig)


def add_config_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One flag per field, in a group per class. A flag that is not given leaves no trace in the namespace."""
    for cls in classes:
        title = (cls.__doc__ or cls.__name__).strip().splitlines()[0]
        group = parser.add_argument_group(cls.__name__.removesuffix("Config").lower(), title)
        for field in fields(cls):
            _add_flag(group, field)


def _add_flag(group: Any, field: Field[Any]) -> None:
    kind, flag = _KINDS[str(field.type)], "--" + field.name.replace("_", "-")
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    help = f"{text} (default: {field.default!r})".replace("(default: '')", "")
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        metavar = {str: "TEXT", int: "N", float: "X"}[kind]
        group.add_argument(flag, type=kind, metavar=metavar, **options)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data lies, and the configuration file."""
    parser.add_argument(
        "--data-dir", type=Path, default=Path("fusionrag-data"), help="data directory (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help="TOML file with any of the knobs below, e.g. top_k = 5")


def build(cls: type[T], args: argparse.Namespace) -> T:
    """The configuration of one class from flags, file and defaults. Raises ConfigError naming the knob."""
    values = dict(read_file(getattr(args, "config", None)))
    given = vars(args)
    chosen = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in given:
            chosen[field.name] = given[field.name]
        elif field.name in values:
            chosen[field.name] = _checked(field, values[field.name])
    return cls(**chosen)


def read_file(path: Path | None) -> dict[str, Any]:
    """The knobs of a TOML file. Raises ConfigError for an unreadable file or a key that is no knob."""
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", f"{path}: {error}") from error
    known = {field.name for cls in all_configs() for field in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError("config", f"{path}: unknown key {unknown[0]!r}; see --help for the names")
    return values


def _checked(field: Field[Any], value: Any) -> Any:
    kind = _KINDS[str(field.type)]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(field.name, f"must be of type {field.type}, got {value!r}")
    return value
