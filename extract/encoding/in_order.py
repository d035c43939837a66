"""Do something in a second thread without losing order or errors."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

CALLS_BEHIND = 4


class InOrder:
    """Runs calls one after another in a thread of its own.

    An error is raised from a later `submit` or at the end of the `with` block, and nothing
    submitted after the call that failed is run. At most four calls wait, so that memory stays
    bounded. Where the block itself ends with an error, what was submitted is still run.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= CALLS_BEHIND):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, call, arguments))

    def _run(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            call(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()
        if kind is None:
            for call in self._pending:
                call.result()
