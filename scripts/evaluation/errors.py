"""The exceptions of `scripts.evaluation`, a branch of the project's one tree:

FusionRAGError
└── EvaluationError
    ├── DatasetError       a dataset file cannot be used; also a ValueError
    ├── RecordError        a run's record, or a comparison of records, cannot be; also a ValueError
    └── PlotError          the figure needs matplotlib; also an ImportError
"""

from __future__ import annotations

from index.errors import FusionRAGError

__all__ = ["DatasetError", "EvaluationError", "PlotError", "RecordError"]


class EvaluationError(FusionRAGError):
    """An evaluation cannot go on; the message says what to change."""


class DatasetError(EvaluationError, ValueError):
    """A dataset file cannot be used. The message names the file, the record and the field."""


class RecordError(EvaluationError, ValueError):
    """A record is malformed or doubled, or a comparison names a configuration that was not run."""


class PlotError(EvaluationError, ImportError):
    """The figure needs matplotlib, which is not installed."""
