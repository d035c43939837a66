"""JAX as the commands use it: compiled programs are kept between runs."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def set_up_jax() -> None:
    """Keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR."""
    with _uninterrupted():
        import jax

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
