"""JAX as the commands use it: compiled programs are kept between runs, and Ctrl-C ends a run."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def set_up_jax() -> None:
    """Keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.

    In the main thread it also replaces Python's own handler of Ctrl-C (`_interrupt`).
    """
    with _uninterrupted():
        import jax

    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "clip-adapter" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Without a GPU build of JAX on a machine with a GPU, JAX says so in a warning of its own; a
    # cache folder that cannot be written is no reason to warn at every compilation.
    logging.getLogger("jax._src.compiler").setLevel(logging.ERROR)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: within the loading of JAX's libraries it would be lost, or end in a crash."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but a little later where JAX's callback of the collector runs.

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
    signal.default_int_handler(number, frame)
