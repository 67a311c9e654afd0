"""How long the event loop was kept from its work: by code that blocks it, or by threads that hold the interpreter.

Knows nothing about what blocks. A timer that should ring every `INTERVAL_S` says how late it was; a block is measured
short by at most that interval.
"""

from __future__ import annotations

import asyncio

INTERVAL_S = 0.01


class LoopLag:
    """Watches the event loop in which `start` is called."""

    def __init__(self) -> None:
        self._longest_s = 0.0

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        self._task.cancel()

    def take(self) -> float:
        """The longest delay since it was last asked for, in seconds."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._longest_s = max(self._longest_s, loop.time() - due)
