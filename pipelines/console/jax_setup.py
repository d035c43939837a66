"""JAX as the commands use it: compiled programs are kept between runs, and Ctrl-C ends a run."""

import atexit
import json
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType

from clip_adapter import files
from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.interruption import Handler
from clip_adapter.words import readable, size

# On a CPU 945 programs took 15 MB.
LARGEST_CACHE = 2**28
# On 2 cores 1.7 GiB are enough and 1.4 are not; each further one has threads, and memory of theirs.
ADDRESS_SPACE, ADDRESS_SPACE_PER_CORE = 3 * 2**29, 2**27
SUFFIX = "-cache"  # of JAX's programs
NOTED = "clip-adapter-programs.json"


def set_up_jax() -> None:
    """Keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.

    For commands, which have a process of their own: it changes JAX's flags and loggers, and in the
    main thread it puts `_interrupt` before the handler of Ctrl-C. A function that others
    call must not call it.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = ADDRESS_SPACE + available_cores() * ADDRESS_SPACE_PER_CORE
    if limit != resource.RLIM_INFINITY and limit < needed:  # JAX would end the process
        raise UserError(
            f"The address space is limited to {size(limit)} (ulimit -v), which JAX cannot begin "
            f"in; allow at least {size(needed)}."
        )
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

    folder = _folder()
    if folder is not None:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            remove_oldest(folder, LARGEST_CACHE)
        remove_changed(folder)
        atexit.register(note_programs, folder)
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Without a GPU build of JAX on a machine with a GPU, JAX says so in a warning of its own; a
    # cache folder that cannot be written, or an entry that is damaged, is no reason to warn at
    # every compilation.
    logging.getLogger("jax._src.compiler").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache")


def _folder() -> Path | None:
    """Where programs are kept; None where that cannot be a folder, or for somebody without a home.

    What the user has named is named where it is of no use."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(named) if named else home / "clip-adapter" / "jax"
        if "://" not in str(folder):  # which JAX opens by other means
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError) as error:
        if named:
            reason = getattr(error, "strerror", None) or error
            sentence = (
                f"warning: JAX_COMPILATION_CACHE_DIR={named} is no folder to keep programs in"
            )
            print(readable(f"{sentence} ({reason})."), file=sys.stderr)
        return None


def remove_changed(folder: Path) -> None:
    """Remove programs that are not what they were when `note_programs` noted them: one in the place
    of another would be run as if it were that one."""
    with suppress(OSError, ValueError, AttributeError):
        noted = files.parse_json(files.read_text(folder / NOTED))
        for name, stamp in _programs(folder).items():
            if noted.get(name, stamp) != stamp:
                (folder / name).unlink(missing_ok=True)


def note_programs(folder: Path) -> None:
    """Note which programs lie in the folder."""
    with suppress(OSError):  # a folder that cannot be written
        files.write_bytes(folder / NOTED, json.dumps(_programs(folder)).encode(), sync=False)


def _programs(folder: Path) -> dict[str, list[int]]:
    """What a file cannot get by being written, copied or renamed: size, time and inode."""
    with os.scandir(folder) as found:
        stats = {each.name: each.stat() for each in found if each.name.endswith(SUFFIX)}
    return {name: [s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats.items()}


@contextmanager
def usable_jax() -> Iterator[None]:
    """`own_jax`, which raises UserError where JAX cannot be used."""
    from clip_adapter.adapters.engine.process import own_jax

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
