"""Which rows go into the next forward pass: continuous batching and chunked prefill over rows.

Knows nothing of models or text. Decode rows go first (one a request, so that streams keep flowing), then the pending
rows of prefilling requests in order of arrival until the row budget is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedulable(Protocol):
    """What the scheduler needs to know of a request."""

    @property
    def num_pending(self) -> int:
        """Rows that wait to be run; 1 for a decoding request."""
        ...

    @property
    def is_decoding(self) -> bool: ...

    @property
    def is_atomic(self) -> bool:
        """All pending rows must be in one pass (the mean residual needs them together)."""
        ...


@dataclass(frozen=True)
class Share:
    """`num_rows` of a request's pending rows run in this step."""

    request: Schedulable
    num_rows: int


def pack(requests: Sequence[Schedulable], max_batch_tokens: int) -> list[Share]:
    """Shares of one step. At least one share whenever any request has pending rows.

    A request whose rows must stay together is taken when it fits, and alone-with-decodes when it is larger than the
    whole budget: waiting would not make it smaller.
    """
    decoding = [r for r in requests if r.is_decoding]
    shares = [Share(r, 1) for r in decoding]
    left = max(0, max_batch_tokens - len(shares))
    prefilled = 0
    for request in requests:
        if request.is_decoding or not request.num_pending:
            continue
        if request.is_atomic:
            if request.num_pending > left and prefilled:
                break
            num_rows = request.num_pending
        else:
            num_rows = min(request.num_pending, left if prefilled or shares else max(left, 1))
        if num_rows == 0:
            break
        shares.append(Share(request, num_rows))
        prefilled += num_rows
        left = max(0, left - num_rows)
    return shares
