"""What a run leaves behind: results.csv, selected.csv, summary.csv, tasks.json and adapters."""

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from clip_adapter.cache import atomic
from clip_adapter.cache.errors import UserError

SETTING_COLUMNS = (
    "branch",
    "alpha",
    "beta",
    "alpha_init",
    "beta_init",
    "reduction",
    "learning_rate",
    "weight_decay",
    "optimizer",
    "warmup",
    "epochs",
    "batch_size",
    "evaluate_every",
    "C",
)
RESULT_COLUMNS = (
    "method",
    "shots",
    "seed",
    *SETTING_COLUMNS,
    "best_epoch",
    "val_accuracy",
    "val_nll",
    "status",
    "seconds",
)

Row = Mapping[str, Any]


class RunFolder:
    """A new folder for one run.

    Raises UserError where it cannot be made or already holds a run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path or _new_name(Path("runs"))
        if (self.path / "results.csv").exists():
            raise UserError(f"{self.path} already holds a run; choose another --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._results: TextIO = (self.path / "results.csv").open("w", newline="")
        except OSError as error:
            raise UserError(f"Cannot write to {self.path}: {error.strerror}.") from error
        self._writer = csv.DictWriter(self._results, RESULT_COLUMNS, restval="")
        self._writer.writeheader()

    def add_result(self, row: Row) -> None:
        """Append a fit to results.csv; it is on disk when this returns."""
        self._writer.writerow(row)
        self._results.flush()

    def write_table(self, name: str, rows: Sequence[Row]) -> None:
        """Write `name` with all columns that occur, in order of appearance."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        atomic.write_text(self.path / name, text.getvalue())

    def write_json(self, name: str, document: Any) -> None:
        atomic.write_text(self.path / name, json.dumps(document, indent=1))

    def close(self) -> None:
        self._results.close()


def _new_name(parent: Path) -> Path:
    """runs/<UTC time>, with a number behind it where that is taken."""
    stem = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    candidates = (parent / (stem if n == 0 else f"{stem}-{n}") for n in range(1000))
    return next(path for path in candidates if not path.exists())
