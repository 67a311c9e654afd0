"""The exceptions of `fusionrag`. One tree, rooted in `index.errors.FusionRAGError`:

FusionRAGError
├── (index: documents, collections, data directory – see index/errors.py)
├── ConfigError            a knob has a value it cannot have; names the field
├── ModelError
│   ├── ModelNotFound      no such directory, package or alias
│   └── UnsupportedModel   architecture, RoPE kind or attention variant that cannot be reused safely
├── RequestError           this request cannot be served; others are unaffected
│   ├── PromptTooLong      prompt (plus max_tokens) exceeds the context or the arena
│   ├── InvalidSampling    a sampling parameter is out of range
│   └── QueueFull          too many requests are waiting; try again later
├── ArenaFull              no room for a background pass beside the live requests; try again later
└── StoreError             the store cannot be written (a bad *object* is never an error: it is recomputed)
"""

from __future__ import annotations

from index.errors import FusionRAGError

__all__ = [
    "ArenaFull",
    "ConfigError",
    "FusionRAGError",
    "InvalidSampling",
    "ModelError",
    "ModelNotFound",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "StoreError",
    "UnsupportedModel",
]


class ConfigError(FusionRAGError):
    """A knob has a value it cannot have. `field` is the knob's name in TOML, CLI and dataclass alike."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelError(FusionRAGError):
    """The language model cannot be used."""


class ModelNotFound(ModelError):
    """No such directory, package or alias."""


class UnsupportedModel(ModelError):
    """An architecture, RoPE kind or attention variant whose KV cannot be reused safely."""


class ArenaFull(FusionRAGError):
    """No room for a background pass beside the live requests."""


class RequestError(FusionRAGError):
    """This request cannot be served. `field` names the request parameter at fault, if one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(RequestError):
    """Prompt plus max_tokens exceeds the model's context or the arena."""


class InvalidSampling(RequestError):
    """A sampling parameter is out of range."""


class QueueFull(RequestError):
    """Too many requests are waiting; try again later."""


class StoreError(FusionRAGError):
    """The store cannot be written (disk full, no permission)."""
