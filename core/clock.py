"""Time left, from the evaluations that were really made."""

from __future__ import annotations

import time

# An evaluation faster than this came from the cache and says nothing of the time left.
CACHED_SECONDS = 2e-3


class Clock:
    """Extrapolates the mean time of measured evaluations to those that remain."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = 0.0
        self._made = 0

    def restart(self) -> None:
        """Leave out the time since the last evaluation: something else was done."""
        self._last = time.monotonic()

    def left(self, remaining: int) -> float | None:
        """Seconds for `remaining` evaluations; called right after each evaluation."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if took > CACHED_SECONDS:
            self._seconds += took
            self._made += 1
        return remaining * self._seconds / self._made if self._made else None
