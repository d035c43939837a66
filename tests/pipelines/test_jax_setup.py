"""JAX as the commands use it."""

import os
import subprocess
import sys
from pathlib import Path

from clip_adapter.pipelines.jax_setup import remove_oldest

SCRIPT = """
import gc, signal, time
from clip_adapter.pipelines.jax_setup import set_up_jax

def _xla_gc_callback(phase, info):
    gc.callbacks.remove(_xla_gc_callback)
    signal.raise_signal(signal.SIGINT)

set_up_jax()
gc.callbacks.append(_xla_gc_callback)
try:
    gc.collect()
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_during_garbage_collection_is_not_lost():
    """Python swallows what is raised there, and JAX has a callback there."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_the_oldest_programs_go_first(tmp_path: Path) -> None:
    for age, size in (("a", 100), ("b", 50), ("c", 70), ("d", 10)):
        (tmp_path / age).write_bytes(bytes(size))
        time = 1_000_000 + ord(age)
        os.utime(tmp_path / age, (time, time))
    os.utime(tmp_path / "a", (2_000_000, 1_000_000))  # read again since
    remove_oldest(tmp_path, 230)
    assert len(list(tmp_path.iterdir())) == 4
    remove_oldest(tmp_path, 120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    remove_oldest(tmp_path / "missing", 0)


def test_nobody_without_a_home_gets_a_traceback(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "def no_home(): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = no_home\n"
        "from clip_adapter.pipelines.jax_setup import set_up_jax\n"
        "set_up_jax()\n"
        "import jax\n"
        "print(jax.config.jax_compilation_cache_dir)\n"
    )
    hidden = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)
