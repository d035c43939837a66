"""Kill `fit` at random points, and go on with --resume: nothing is lost, and it ends the same.

    python -m tests.fuzz.kill_fit --kills 200 [--story halving]

Runs follow one another in one folder, each killed after a random time, until one comes to its end;
its tables, adapters and predictions must be, byte for byte, those of a run that nobody killed. Then
the next begins. They are forked from one process that has imported everything and not yet used
JAX, so that little of their time goes to that.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib.backends.backend_agg  # noqa: F401 - imported before the forks
from jax._src import xla_bridge

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import FitConfig, fit
from clip_adapter.pipelines.console.jax_setup import set_up_jax
from clip_adapter.pipelines.fitting import run as _run  # noqa: F401 - imported before the forks
from tests.pipelines.tiny_cache import tiny_data, write_cache

SOME: dict[str, Any] = {"baselines": ("gda",), "shots": (1, 2), "seeds": (1,)}
HYPER = {"alpha": (0.2, 0.6), "learning_rate": (0.001, 0.01), "epochs": (40,)}
STORIES: Mapping[str, dict[str, Any]] = {
    "halving": {**SOME, "hyper": HYPER, "search": "halving"},
    "cv": {**SOME, "hyper": HYPER, "shots": (2, 3), "select": "cv"},
}
COMPARED = ("summary.csv", "selected.jsonl", "tasks.json", "run.json")
TREES = ("adapters", "predictions", "grids", "halving")


def run(config: FitConfig, kill_after: float | None = None) -> tuple[int, float]:
    """The exit status of a forked run (negative: the signal) and its seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            set_up_jax()
            fit(config)
        except UserError as error:
            print(f"refused: {error}", file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - started


def content(folder: Path) -> dict[str, bytes]:
    """What must be equal: all but the times that fits took."""
    trees = [path for tree in TREES for path in (folder / tree).rglob("*") if path.is_file()]
    found = [*(folder / name for name in COMPARED), *trees, *folder.glob("adapter.*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def tell(name: str, kills: int, rng: random.Random, folder: Path) -> int:
    """Kill so many runs of a story; returns how often it came to its end.

    Raises AssertionError where something is lost or refused.
    """
    cache = folder / "features.h5"

    def config(out: Path) -> FitConfig:
        if (out / "run.json").exists():
            return FitConfig(resume=out)
        return FitConfig(cache=cache, out=out, **STORIES[name])

    for place in ("first", "whole"):  # the first fills the cache of compiled programs
        status, seconds = run(config(folder / place))
        assert status == 0, f"{name} does not run"
    wanted, out = content(folder / "whole"), folder / "run"
    assert content(folder / "first").keys() == wanted.keys()
    ends = killed = 0
    while True:
        last, anew = killed >= kills, not (out / "run.json").exists()
        status, took = run(config(out), None if last else rng.uniform(0, 1.5 * seconds))
        assert status in (0, -signal.SIGKILL), f"{name} ended with {status}"
        killed += status == -signal.SIGKILL
        if status == 0:
            seconds = took if anew else seconds  # a busy machine may have become a quick one
            found = content(out)
            differing = [k for k in found.keys() | wanted if found.get(k) != wanted.get(k)]
            assert not differing, f"{name} ended with another {', '.join(differing)}"
            ends += 1
            shutil.rmtree(out)
        if last:
            return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of each story")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--story", choices=list(STORIES), action="append")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    for name in given.story or STORIES:
        with tempfile.TemporaryDirectory() as folder:
            # The variable keeps `set_up_jax` from naming another folder; JAX has read it before.
            os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
            jax.config.update("jax_compilation_cache_dir", f"{folder}/jax")
            data = tiny_data(train=(3, 3, 3), val=2, test=4, dim=4)
            write_cache(Path(folder) / "features.h5", data)
            assert not xla_bridge._backends, "JAX and forks do not mix"
            ends = tell(name, given.kills, rng, Path(folder))
        print(f"fit, {name}: {given.kills} runs killed, {ends} ended, all the same", flush=True)


if __name__ == "__main__":
    main()
