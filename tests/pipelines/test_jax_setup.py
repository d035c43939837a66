"""JAX as the commands use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_adapter.pipelines.console.jax_setup import note_programs, remove_changed, remove_oldest

SCRIPT = """
import gc, signal, time
from clip_adapter.pipelines.console.jax_setup import set_up_jax

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


def test_a_program_in_the_place_of_another_is_not_run(tmp_path: Path) -> None:
    """Of equal size and time; what came since it was noted stays."""
    for name in "abcd":
        (tmp_path / f"{name}-cache").write_bytes(name.encode())
        os.utime(tmp_path / f"{name}-cache", (1_000_000, 1_000_000))
    (tmp_path / "d-cache").rename(tmp_path / "d")
    note_programs(tmp_path)
    (tmp_path / "a-cache").rename(tmp_path / "x")
    (tmp_path / "b-cache").rename(tmp_path / "a-cache")
    (tmp_path / "x").rename(tmp_path / "b-cache")
    (tmp_path / "d").rename(tmp_path / "d-cache")
    remove_changed(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["c-cache", "d-cache"]
    (tmp_path / "clip-adapter-programs.json").write_bytes(b"damaged")
    remove_changed(tmp_path)
    remove_changed(tmp_path / "missing")
    note_programs(tmp_path / "missing")


def test_a_folder_for_programs_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program = (
        "from clip_adapter.pipelines.console.jax_setup import set_up_jax\nset_up_jax()\n"
        "import jax\nprint(jax.jit(lambda x: x + 1)(1))\n"
    )
    others = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"}
    for name, said in (("JAX_COMPILATION_CACHE_DIR", 1), ("XDG_CACHE_HOME", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=others | {name: str(tmp_path / "file")},
        )
        assert (done.stdout, done.returncode) == ("2\n", 0)
        assert done.stderr.count("\n") == said == done.stderr.count("is no folder to keep")


@pytest.mark.parametrize("work", ["set_up_jax()", "import torch"])
def test_too_little_address_space_is_a_sentence(work: str) -> None:
    program = (
        "import resource\nfrom clip_adapter.pipelines.console.running import run\n"
        "from clip_adapter.pipelines.console.jax_setup import set_up_jax\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        f"def work(): {work}\n"
        "run('fit', work)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "address space" in done.stderr and "ulimit -v" in done.stderr


def test_nobody_without_a_home_gets_a_traceback(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "def no_home(): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = no_home\n"
        "from clip_adapter.pipelines.console.jax_setup import set_up_jax\n"
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
