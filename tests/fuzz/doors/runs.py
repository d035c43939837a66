"""Run folders, finished and stopped at several points: any of their files damaged or changed, then
gone on with, and read by `report`, `inspect` and `predict`."""

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from clip_adapter.pipelines.commands.fit import FitConfig, fit
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import run_command
from tests.fuzz.damage import NESTED, change_json, damage
from tests.pipelines.run_files import killed_after
from tests.pipelines.tiny_cache import tiny_data, write_cache

CACHE = "features.h5"
STOPPED_AFTER = {f"stopped-{fits}": fits for fits in (0, 2, 5)}  # of the seven that halving makes
RUNS = ("finished", *STOPPED_AFTER)
SAME = ("summary.csv", "selected.jsonl")
# The clock stands still, so that the files have the same bytes whenever they are made.
CLOCK = patch("time.perf_counter", return_value=0.0), patch("time.monotonic", return_value=0.0)


def prepare(folder: Path) -> None:
    cache = write_cache(folder / CACHE, tiny_data(train=(3, 3, 3), val=2, test=4, dim=4))
    for run in RUNS:
        place = folder / run
        place.mkdir()
        shutil.copyfile(cache, place / CACHE)
        _make(place / "run", place / CACHE, STOPPED_AFTER.get(run))


def _make(out: Path, cache: Path, fits: int | None) -> None:
    hyper = {"alpha": (0.2, 0.6), "learning_rate": (0.001, 0.01), "epochs": (10,)}
    config = FitConfig(
        cache=cache, out=out, baselines=("gda",), shots=(2,), search="halving", hyper=hyper
    )
    with killed_after(fits) if fits is not None else nullcontext():
        fit(config)


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    name = rng.choice(RUNS)
    shutil.copytree(prepared / name, folder, dirs_exist_ok=True)
    run = folder / "run"
    victim = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    spoilt = rng.random() < 0.6 or victim.suffix not in (".json", ".jsonl", ".csv")
    what = damage(rng, victim) if spoilt else _change(rng, victim)
    found = Attempt(f"{name}, {victim.relative_to(run)}: {what}")
    choice = rng.random()
    if choice < 0.6:
        said = found.command(run_command("fit", ["--resume", "run", "--cache", CACHE]))
        if said.code == 0 and spoilt:
            found.same(*(_outcome(place) for place in (run, prepared / "finished" / "run")))
    elif choice < 0.8:
        found.command(run_command("report", ["run"]))
    elif choice < 0.9:
        found.command(run_command("inspect", ["run"]))
    else:
        found.command(run_command("predict", ["--adapter", "run", CACHE]))
    return found


def _outcome(run: Path) -> dict[str, bytes | None]:
    """The numbers that a run ends with."""
    paths = [*(run / name for name in SAME), *sorted((run / "adapters").rglob("*.safetensors"))]
    return {str(p.relative_to(run)): p.read_bytes() if p.is_file() else None for p in paths}


def _change(rng: random.Random, path: Path) -> str:
    """What an editor, or somebody who means it, makes of JSON or of a table."""
    text = path.read_text()
    if path.suffix == ".json":
        document, what = change_json(rng, json.loads(text))
        path.write_text(json.dumps(document) if rng.random() < 0.9 else rng.choice(NESTED[:4]))
        return what
    lines = text.splitlines(keepends=True)
    row = rng.randrange(len(lines)) if lines else 0
    if not lines or rng.random() < 0.2:
        lines[row:row] = [rng.choice((*NESTED[:4], '"', ",,,\n", "x" * 200_000, "\0\n", "\n"))]
        what = "a line more"
    elif rng.random() < 0.3:
        del lines[row]
        what = "a line less"
    elif path.suffix == ".jsonl":
        document, what = change_json(rng, json.loads(lines[row]))
        lines[row] = json.dumps(document) + "\n"
    else:
        cells = lines[row].rstrip("\n").split(",")
        column = rng.randrange(len(cells))
        cells[column] = rng.choice(("", "x", "-1", "nan", "1e400", "9" * 5000, '"', "\x1b[2J"))
        lines[row] = ",".join(cells) + "\n"
        what = f"cell {column} is {cells[column]!r:.40}"
    path.write_text("".join(lines))
    return f"line {row}: {what}"
