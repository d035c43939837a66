"""JAX and BLAS as the methods need them, whatever the process around has made of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock

import jax
from jax._src.xla_bridge import backends_are_initialized
from threadpoolctl import ThreadpoolController

_forked = False
_of_thread = threading.local()


def _note_fork() -> None:
    global _forked
    # Nothing public says whether JAX has begun; to ask for a device would begin it.
    _forked = backends_are_initialized()


os.register_at_fork(after_in_child=_note_fork)


def _settings() -> list[AbstractContextManager[object]]:
    """Numbers are float32, programs are compiled, a NaN says that a run has diverged, and a seed
    draws what it draws elsewhere: each is decided by a flag of JAX that a process may have set."""
    return [
        jax.enable_x64(False),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.default_matmul_precision(None),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.legacy_prng_key("allow"),
        jax.debug_key_reuse(False),
        jax.transfer_guard("allow"),
    ]


@contextmanager
def own_jax() -> Iterator[None]:
    """Within it JAX computes as above, in this thread, and afterwards as before.

    Raises ValueError, in a sentence, where the device that the process names is not to be had, and
    in a process that was forked from one in which JAX had begun: there it would wait for ever.
    """
    if _forked:
        raise ValueError(
            "This process was forked from one that uses JAX, which cannot go on in it; start "
            "processes by `spawn`, `forkserver` or joblib's `loky`, or use threads."
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = jax.config.jax_platforms  # type: ignore[attr-defined]
        asked = f" {named!r:.80} (JAX_PLATFORMS)" if named else ""
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "it is not there"
        raise ValueError(f"JAX cannot use its platform{asked}: {reason.rstrip('.')}.") from error
    with ExitStack() as stack:
        for setting in _settings():
            stack.enter_context(setting)
        yield


def own_jax_in_thread() -> None:
    """The same for the thread that calls this, to its end; JAX's settings are a thread's own."""
    _of_thread.settings = _settings()  # kept, as what nobody refers to is left again
    for setting in _of_thread.settings:
        setting.__enter__()


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
