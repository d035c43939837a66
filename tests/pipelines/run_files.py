"""What a run folder holds, as the tests compare it."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from safetensors.numpy import load_file

from clip_adapter.pipelines.fitting.record import unpacked
from clip_adapter.pipelines.fitting.run_folder import RunFolder

SECONDS = "seconds"


class Killed(BaseException):
    """As if the process had ended here."""


@contextmanager
def killed_after(steps: int, what: str = "add_fit") -> Iterator[None]:
    """`fit` within ends before it keeps more fits (or results) than these; an `AssertionError`
    where it came to its end."""
    keep, kept = getattr(RunFolder, what), 0

    def keep_some(folder: RunFolder, row: Any) -> None:
        nonlocal kept
        if kept == steps:
            raise Killed
        kept += 1
        keep(folder, row)

    with patch.object(RunFolder, what, keep_some), suppress(Killed):
        yield
        raise AssertionError("it was not killed")


def same_fit(run: Path, other: Path) -> bool:
    """Whether both hold the same adapter, but for its decisions."""

    def content(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
        document = json.loads((folder / "adapter.json").read_text())
        for name in ("format_version", "safetensors_sha256", "sha256", "decisions"):
            document.pop(name, None)
        arrays = load_file(folder / "adapter.safetensors")
        own = {n: a.tobytes() for n, a in arrays.items() if not n.startswith("decisions/")}
        return document, own

    return content(run) == content(other)


TESTED = ("test_accuracy", "balanced_accuracy", "new_accuracy", "harmonic_mean")


def results(run: Path) -> list[dict[str, str]]:
    """The rows of results.csv without their times."""
    with (run / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != SECONDS} for row in csv.DictReader(file)]


def grid_rows(run: Path) -> list[dict[str, str]]:
    """The settings of closed forms, as rows of results.csv would have them."""
    rows = []
    for path in sorted((run / "grids").rglob("*.safetensors")):
        stored = load_file(path)
        axes = json.loads(stored["axes"].tobytes())
        _, shots, _, seed = path.stem.split("-")
        task = {"method": path.parent.name, "shots": shots, "seed": seed}
        for place in np.ndindex(stored["val_nll"].shape):
            values = {name: str(axes[name][n]) for name, n in zip(axes, place, strict=True)}
            judged = {n: str(stored[n][place]) for n in ("val_accuracy", "val_nll")}
            rows.append(task | values | judged)
    return rows


def nearest_of(rows: Sequence[dict[str, str]], kept: Sequence[int] | None = None) -> dict[str, str]:
    """The row of the smallest rate, then α, of which the images' losses are within a standard error
    of the likeliest row's, in float64. kept: images that count, by default all."""
    some = slice(None) if kept is None else list(kept)
    losses = [unpacked(row["images"]).losses.astype(np.float64)[some] for row in rows]
    likeliest = losses[np.argmin([float(row["val_nll"]) for row in rows])]

    def within(own: np.ndarray) -> bool:
        worse = own - likeliest
        return bool(worse.mean() <= worse.std(ddof=1) / np.sqrt(len(worse)))

    near = [row for row, own in zip(rows, losses, strict=True) if within(own)]
    return min(
        near, key=lambda r: (float(r["learning_rate"]), float(r["alpha"]), float(r["val_nll"]))
    )


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def selected(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "selected.jsonl").read_text().splitlines()]


def choices(run: Path) -> list[dict[str, Any]]:
    """selected.jsonl without what is computed on the test split."""
    return [{k: v for k, v in row.items() if k not in TESTED} for row in selected(run)]


def files(run: Path) -> dict[str, bytes]:
    """The bytes of every file by its path in the run."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def adapters(run: Path) -> dict[str, bytes]:
    """The same of every fitted adapter's arrays."""
    return {
        name: content
        for name, content in files(run).items()
        if name.endswith("adapter.safetensors")
    }


def assert_same_end(run: Path, whole: Path) -> None:
    """All files are alike but the times in results.csv, the order of its rows, and run.json, which
    says where the cache lay."""
    timed = ("results.csv", "run.json")
    one, other = (
        {name: content for name, content in files(folder).items() if name not in timed}
        for folder in (run, whole)
    )
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert sorted(map(str, results(run))) == sorted(map(str, results(whole)))
    assert len({str(row) for row in results(run)}) == len(results(run)), "a fit was repeated"
