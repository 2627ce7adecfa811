"""A circuit breaker for stores that fail."""

from __future__ import annotations

import threading
import time

PAUSE_S = 10.0  # how long a store that failed is left alone


class Breaker:
    """Admits calls until one fails, then none for PAUSE_S, then one probe at a time until one succeeds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_until: float | None = None
        self._trying = False

    @property
    def open(self) -> bool:
        return self._open_until is not None

    def admit(self) -> bool:
        with self._lock:
            if self._open_until is None:
                return True
            if self._trying or time.monotonic() < self._open_until:
                return False
            self._trying = True
            return True

    def tell(self, good: bool) -> bool:
        """Records how a call ended. Returns whether that opened or closed the breaker."""
        with self._lock:
            changed = good == self.open
            self._open_until = None if good else time.monotonic() + PAUSE_S
            self._trying = False
            return changed
