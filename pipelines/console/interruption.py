"""Ctrl-C, also where Python's own way with it does not work: while packages are loaded."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130

Handler = Callable[[int, FrameType | None], object]


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for a process that has done nothing yet: say one line and be gone."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())  # noqa: PTH119
    os._exit(EXIT_INTERRUPTED)


def handle(handler: Handler) -> bool:
    """Let Ctrl-C call `handler`, in the main thread and unless a caller has a handler of its own.

    Returns whether it does now.
    """
    ours = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave_at_once)
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
        return True
    return False


@contextmanager
def noticed() -> Iterator[list[bool]]:
    """Ctrl-C raises KeyboardInterrupt, and fills the list that this yields.

    An extension that is being loaded may turn the KeyboardInterrupt into an ImportError.
    """
    came: list[bool] = []

    def notice(number: int, frame: FrameType | None) -> None:
        came.append(True)
        signal.default_int_handler(number, frame)

    earlier = signal.getsignal(signal.SIGINT)
    set_here = handle(notice)
    try:
        yield came
    finally:
        if set_here:
            signal.signal(signal.SIGINT, earlier)
