"""Where the time of a loop goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by name, for what one thread does or waits for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return time.perf_counter() - self._started

    def shares(self) -> str:
        """Such as `decode 7 %, forward 91 %, write 2 %`, of the time measured under any name."""
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{name} {part / total:.0%}" for name, part in self.seconds.items())
