"""What a run folder holds, as the tests compare it."""

import csv
import json
from pathlib import Path
from typing import Any

SECONDS = "seconds"


def results(run: Path) -> list[dict[str, str]]:
    """The rows of results.csv without their times."""
    with (run / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != SECONDS} for row in csv.DictReader(file)]


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def selected(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "selected.jsonl").read_text().splitlines()]


def choices(run: Path) -> list[dict[str, Any]]:
    """selected.jsonl without what is computed on the test split."""
    tested = ("test_accuracy", "new_accuracy", "harmonic_mean")
    return [{k: v for k, v in row.items() if k not in tested} for row in selected(run)]


def adapters(run: Path) -> dict[str, bytes]:
    """The bytes of every fitted adapter by its path in the run."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("adapter.safetensors"))
    }
