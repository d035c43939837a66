"""JAX as the commands use it: compiled programs are kept between runs, and Ctrl-C ends a run."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType

from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.interruption import Handler

# On a CPU 945 programs took 15 MB.
LARGEST_CACHE = 2**28


def set_up_jax() -> None:
    """Keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.

    For commands, which have a process of their own: it changes JAX's flags and loggers, and in the
    main thread it puts `_interrupt` before the handler of Ctrl-C. A function that others
    call must not call it.
    """
    with _uninterrupted():
        try:
            import jax
        except (ValueError, RuntimeError) as error:  # it reads its variables at once
            raise UserError(
                f"JAX cannot begin: {error}; see the variables whose names begin with JAX_."
            ) from error

    in_main = threading.current_thread() is threading.main_thread()
    earlier = signal.getsignal(signal.SIGINT)
    if in_main and isinstance(earlier, FunctionType | BuiltinFunctionType):
        signal.signal(signal.SIGINT, partial(_interrupt, earlier))

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RuntimeError):  # somebody without a home has nothing kept
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = home / "clip-adapter" / "jax"
            remove_oldest(folder, LARGEST_CACHE)
            jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Without a GPU build of JAX on a machine with a GPU, JAX says so in a warning of its own; a
    # cache folder that cannot be written is no reason to warn at every compilation.
    logging.getLogger("jax._src.compiler").setLevel(logging.ERROR)


@contextmanager
def usable_jax() -> Iterator[None]:
    """`own_jax`, which raises UserError where JAX cannot be used."""
    from clip_adapter.adapters.jax_process import own_jax

    with ExitStack() as stack:
        try:
            stack.enter_context(own_jax())
        except ValueError as error:
            raise UserError(str(error)) from error
        yield


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files that were not read for longest until the rest has at most `limit` bytes.

    JAX's own limit (jax_compilation_cache_max_size) is not used: it takes a lock for every program
    read, and an entry that was written without it, or by a process killed in between, makes it
    refuse to store anything any more.
    """
    with suppress(OSError):  # not there, not ours to write, or another process removes them too
        with os.scandir(folder) as found:  # there may be thousands, at every start
            entries = [(entry.path, entry.stat()) for entry in found]
        entries.sort(key=lambda item: max(item[1].st_atime, item[1].st_mtime))
        excess = sum(status.st_size for _, status in entries) - limit
        for path, status in entries:
            if excess <= 0:
                break
            Path(path).unlink(missing_ok=True)
            excess -= status.st_size


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: within the loading of JAX's libraries it would be lost, or end in a crash."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _interrupt(handler: Handler, number: int, frame: FrameType | None) -> None:
    """Call the handler, but a little later where JAX's callback of the collector runs.

    Python only prints an exception that is raised while it collects garbage, and goes on.
    """
    running = frame
    while running is not None:
        if running.f_code.co_name == "_xla_gc_callback":
            again = threading.Timer(0.01, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        running = running.f_back
    handler(number, frame)
