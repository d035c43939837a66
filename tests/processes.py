"""Commands as processes of their own that find the slow imports done.

Importing torch, open_clip, scikit-learn, JAX and Matplotlib is most of what a short command does. A
server that has imported them, and done nothing else, is forked for each command (multiprocessing's
"forkserver"). What has to show which modules a command loads, how it starts or how much memory all
of it takes needs a fresh interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

SLOW = ["torch", "open_clip", "sklearn.datasets", "jax", "flax.nnx", "optax", "scipy.stats", "h5py"]
SLOW += ["matplotlib.pyplot", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"]
SCRIPTS = ("extract", "fit", "clip-adapter")


def start(
    command: Sequence[object],
    folder: Path,
    *,
    out: Path = Path(os.devnull),
    err: Path = Path(os.devnull),
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """The command under way in `folder`: one of this package's scripts, or `python -c TEXT`.

    out, err: files for what it prints.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SLOW)
    words = [str(word) for word in command]
    process = server.Process(
        target=_become, args=(words, folder, out, err, dict(environment or os.environ))
    )
    process.start()
    return process


def run(
    command: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command's exit code and what it printed."""
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept, "out"), Path(kept, "err")
        process = start(command, folder, out=out, err=err, environment=environment)
        try:
            process.join(300)
            if process.exitcode is None:
                pytest.fail(f"{command} took more than 300 s")
        finally:
            process.kill()
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(list(command), process.exitcode, *texts)


def _become(
    words: list[str], folder: Path, out: Path, err: Path, environment: dict[str, str]
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    program, *arguments = words
    if (name := Path(program).name) in SCRIPTS:
        sys.argv = [program, *arguments]
        (script,) = entry_points(group="console_scripts", name=name)
        script.load()()
    else:
        assert arguments[0] == "-c"
        sys.argv = arguments[:1] + arguments[2:]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
