"""What a search on one task has found: its rows of results.csv, and the states of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clip_adapter.adapters.evaluation import Evaluation
from clip_adapter.adapters.method import Method, Setting
from clip_adapter.pipelines.fitting.states import StateFolder
from clip_adapter.pipelines.fitting.tasks import TaskRows

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.run_folder import RunFolder

TASK_COLUMNS = ("method", "shots", "seed")
Row = dict[str, Any]


class TaskRecord:
    """What a search on one task has found (a choice.Record)."""

    def __init__(self, folder: RunFolder, method: Method, rows: TaskRows, judged: int) -> None:
        self._folder, self._judged = folder, judged
        self._task = {"method": method.name, "shots": rows.shots, "seed": rows.seed}
        # A closed form is not looked up: what takes no time to find again need not be kept.
        self._looked_up = method.is_trained or method.solver is not None
        name = "-".join(str(value) for value in self._task.values())
        self.states = StateFolder(folder.path / "halving" / name)

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        row = self._folder.known(self._task | dict(setting) | {"epochs_run": epochs_run})
        if row is None:
            return None
        right = _unpacked(row["right"])
        if self._looked_up and (right is None or len(right) != self._judged):
            return None  # of something else: it is found again
        return Evaluation(
            setting,
            epochs_run,
            int(row["best_epoch"]),
            float(row["val_accuracy"]),
            float(row["val_nll"]),
            float(row["seconds"]),
            right,
        )

    def add(self, evaluation: Evaluation) -> None:
        if self.known(evaluation.setting, evaluation.epochs_run):
            return
        self._folder.add_fit(
            self._task
            | dict(evaluation.setting)
            | {
                "epochs_run": evaluation.epochs_run,
                "best_epoch": evaluation.epoch,
                "val_accuracy": evaluation.accuracy,
                "val_nll": evaluation.nll,
                "status": "failed" if evaluation.failed else "ok",
                "seconds": round(evaluation.seconds, 4),
                "right": _packed(evaluation.right) if self._looked_up else "",
            }
        )


def _packed(right: np.ndarray | None) -> str:
    """`40:f0ff…`: the number of images and a bit for each of them, in hexadecimal."""
    return "" if right is None else f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def _unpacked(text: str) -> np.ndarray | None:
    """Raises ValueError where there are not as many bits as it says."""
    length, _, digits = text.partition(":")
    if not length:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    if not 0 <= len(bits) - int(length) < 8:
        raise ValueError("another number of bits")
    return bits[: int(length)].astype(bool)


def is_sound(row: Row) -> bool:
    """Whether a row of results.csv can be used, and agrees with itself."""
    try:
        float(row["seconds"])
        accuracy, failed = float(row["val_accuracy"]), not np.isfinite(float(row["val_nll"]))
        right = _unpacked(row["right"])
        return (
            0 <= int(row["best_epoch"]) <= int(row["epochs_run"])
            and (right is not None or int(row["epochs_run"]) == 0)
            and row["status"] == ("failed" if failed else "ok")
            and (failed or 0 <= accuracy <= 1)
            and (failed or right is None or abs(accuracy - right.mean()) < 1e-6)
        )
    except (TypeError, ValueError):
        return False
