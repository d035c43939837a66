"""What a search on one task has found: its rows of results.csv, and the states of its runs."""

from __future__ import annotations

from clip_adapter.adapters.engine.evaluation import Evaluation
from clip_adapter.adapters.method import Method, Setting
from clip_adapter.pipelines.fitting.fit_rows import packed, unpacked
from clip_adapter.pipelines.fitting.run_folder import RunFolder
from clip_adapter.pipelines.fitting.states import StateFolder
from clip_adapter.pipelines.fitting.tasks import TaskRows


class TaskRecord:
    """What a search on one task has found (a choice.Record).

    judged: how many validation images there are, over all folds.
    """

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
        images = unpacked(row["images"])
        if self._looked_up and (images is None or len(images.right) != self._judged):
            return None  # of something else: it is found again
        return Evaluation(
            setting,
            epochs_run,
            int(row["best_epoch"]),
            float(row["val_accuracy"]),
            float(row["val_nll"]),
            float(row["seconds"]),
            images,
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
                "images": packed(evaluation.images) if self._looked_up else "",
            }
        )
