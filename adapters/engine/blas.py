"""One BLAS thread for a while, whichever of the process's threads ask for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread(libraries: ThreadpoolController | None = None) -> Iterator[None]:
    """Within it BLAS and LAPACK take one thread each.

    Their number belongs to the process: who comes in first sets it, and who goes out last puts it
    back, so that threads whose times here overlap leave the number as it was before all of them.
    libraries: those that are loaded, where the caller knows; to look takes milliseconds.
    """
    global _inside
    with _LOCK:
        if not _inside:
            found = libraries or ThreadpoolController()
            _LIMIT.enter_context(found.limit(limits=1, user_api="blas"))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _LIMIT.close()


_LOCK = Lock()
_inside = 0
_LIMIT = ExitStack()
