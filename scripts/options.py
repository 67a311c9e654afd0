"""Command-line flags and TOML keys, generated from the configuration dataclasses.

A knob is one dataclass field; `--chunk-tokens`, the environment variable `FUSIONRAG_CHUNK_TOKENS`, `chunk_tokens = …`
in the file named by `--config` and `ChunkingConfig.chunk_tokens` are the same thing under the same name. A flag wins
over the environment, that over the file, the file over the default. Unknown keys and malformed values are refused by
name; unknown variables are only warned of, for others set variables too.
"""

from __future__ import annotations

import argparse
import logging
import os
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

logger = logging.getLogger(__name__)
T = TypeVar("T")
VARIABLE_PREFIX = "FUSIONRAG_"
# those that are no knob's
OTHER_VARIABLES = ("FUSIONRAG_CACHE", "FUSIONRAG_DATA_DIR", "FUSIONRAG_CONFIG", "FUSIONRAG_HOPPER_KERNEL")

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
_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def all_configs() -> tuple[type, ...]:
    """Every configuration class, the server's too; importing that needs the server's libraries."""
    from server.config import IngestionConfig, ServerConfig

    return (*CONFIGS, ServerConfig, IngestionConfig)


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
    default = "" if field.default == "" else f"default: {field.default!r}; "
    help = f"{text} ({default}{variable(field.name)})"
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        metavar = {str: "TEXT", int: "N", float: "X"}[kind]
        group.add_argument(flag, type=kind, metavar=metavar, **options)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data lies, and the configuration file."""
    add_data_dir_flag(parser)
    file = os.environ.get("FUSIONRAG_CONFIG")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(file) if file else None,
        help="TOML file with any of the knobs below, e.g. top_k = 5 (FUSIONRAG_CONFIG)",
    )


def add_data_dir_flag(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("FUSIONRAG_DATA_DIR") or "fusionrag-data")
    parser.add_argument(
        "--data-dir", type=Path, default=default, help="data directory (default: %(default)s; FUSIONRAG_DATA_DIR)"
    )


def build(cls: type[T], args: argparse.Namespace) -> T:
    """The configuration of one class from flags, environment, file and defaults. Raises ConfigError naming the knob."""
    values = dict(read_file(getattr(args, "config", None)))
    given = vars(args)
    chosen = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in given:
            chosen[field.name] = given[field.name]
        elif (text := os.environ.get(variable(field.name))) is not None:
            chosen[field.name] = _parsed(field, text)
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
        raise ConfigError(field.name, f"must be of type {field.type}, got {_shown(field, value)}")
    return value


def variable(name: str) -> str:
    """The environment variable of a knob."""
    return VARIABLE_PREFIX + name.upper()


def warn_of_unknown_variables() -> None:
    """Logs a warning for every variable that has our prefix and no meaning, because it may be a misspelt one."""
    known = {variable(field.name) for cls in all_configs() for field in fields(cls)} | set(OTHER_VARIABLES)
    for name in sorted(set(os.environ) - known):
        if name.startswith(VARIABLE_PREFIX):
            logger.warning("the environment variable %s is no knob and has no effect; see --help for the names", name)


def _parsed(field: Field[Any], text: str) -> Any:
    """The value that a variable's text stands for. Raises ConfigError naming the knob and the variable."""
    kind = _KINDS[str(field.type)]
    try:
        return _BOOLS[text.strip().lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        choices = "1, true, yes, on, 0, false, no or off" if kind is bool else f"of type {field.type}"
        message = f"{variable(field.name)} must be {choices}, got {_shown(field, text)}"
        raise ConfigError(field.name, message) from error


def _shown(field: Field[Any], value: object) -> str:
    return "a value that is kept secret" if field.metadata.get("secret") else repr(value)
