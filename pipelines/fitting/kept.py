"""The adapter at the top of a run folder: which one it is, and how to have another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_adapter.adapters.engine.evaluation import DIVERGED, Score
from clip_adapter.adapters.engine.search import fit
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.deciding.answers import calibrated_by
from clip_adapter.pipelines.deciding.held_out import with_decisions
from clip_adapter.pipelines.fitting.choice import is_finite
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.one_task import TaskRunner, fitted_on
from clip_adapter.pipelines.fitting.options import command_that_keeps
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.run_folder import RunFolder, adapter_folder, writing
from clip_adapter.pipelines.fitting.tasks import MAX_FOLDS, TaskRows, kept_task
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.run import FitResult


def keep_one(
    runner: TaskRunner,
    tasks: Sequence[TaskRows],
    folder: RunFolder,
    results: Sequence[TaskResult],
    listener: Listener,
) -> TaskResult | None:
    """Put one adapter at the top of the folder, with its decisions, and return its row: at the most
    shots and the first seed, of the methods that were asked for the one that validation prefers.
    None where nothing chose between several, or every setting of all of them diverged.

    Raises UserError where the chosen setting diverges on all labelled images.
    """
    sound = candidates(runner.plan, tasks, results)
    if not sound or (len(sound) > 1 and not any(map(is_judged, sound))):
        return None
    best, rows = max(sound, key=rank), kept_task(runner.data.tasks)
    if runner.plan.refit:
        adapter = _refitted(runner, rows, best, folder)
    else:  # that of an earlier process has to be there, and as it was written
        adapter = load_adapter(folder.path / adapter_folder(*best.key))
    with listener.progress("calibrate", MAX_FOLDS) as advance:
        adapter = with_decisions(runner, rows, best, adapter, advance)
    if sentence := calibrated_by(adapter.decisions):
        runner.tell(sentence)
    with writing(folder.path):
        save_adapter(folder.path, adapter)
    return best


def _refitted(
    runner: TaskRunner, rows: TaskRows, best: TaskResult, folder: RunFolder
) -> SavedAdapter:
    """The chosen setting, fitted once more on every labelled image of the cache."""
    (method,) = (p.method for p in runner.plan.fitted if p.method.name == best.method)
    task = runner.data.everything(method, rows.seed)
    setting = dict(best.setting or {})
    arrays = fit(method, setting, best.epoch, task, runner.engine)
    if not is_finite(arrays):
        raise UserError(
            f"{best.method} diverged on all labelled images; the adapters of the tasks are under "
            f"{folder.path / 'adapters'}."
        )
    images = {"refitted_on": task.features.shape[1]}
    seen = runner.data.hashes(runner.data.labelled_rows())
    return runner.saved(method, setting, arrays, fitted_on(best) | images, seen)


def candidates(
    plan: Plan, tasks: Sequence[TaskRows], results: Sequence[TaskResult], *, baseline: bool = False
) -> list[TaskResult]:
    """The rows of the methods that were asked for, or of the baselines, on the task whose adapter
    is kept; without those of which every setting diverged."""
    rows = kept_task(tasks)
    by_key = {result.key: result for result in results}
    names = [p.method.name for p in plan.methods if p.baseline == baseline]
    chosen = [by_key.get((name, rows.shots, rows.seed)) for name in names]
    return [result for result in chosen if result and result.setting is not None]


def what_is_kept(result: FitResult) -> list[str]:
    """Sentences: whose adapter stands at the top of the run folder, and the command that keeps
    another where nothing chose or a baseline did better on validation."""
    plan, kept = result.plan, result.kept
    if kept is None:
        return _unchosen(plan, result.run, candidates(plan, result.tasks, result.results))
    which = f"{kept.method} at {shots_words(kept.shots)}, seed {kept.seed}"
    if plan.refit:
        which += ", fitted once more on every labelled image (the accuracies are those of before)"
    lines = [f"{result.run}: adapter of {which}"]
    rivals = candidates(plan, result.tasks, result.results, baseline=True)
    best = max(filter(is_judged, rivals), key=rank, default=None)
    if best and is_judged(kept) and (best.val_accuracy or 0) > (kept.val_accuracy or 0):
        ours, theirs = (f"{100 * (row.val_accuracy or 0):.2f} %" for row in (kept, best))
        lines += [
            f"the baseline {best.method} did better on validation ({theirs} against {ours}); the "
            "command that keeps it:",
            f"  {command_that_keeps(plan, result.run, *best.key)}",
        ]
    return lines


def _unchosen(plan: Plan, run: Path, sound: Sequence[TaskResult]) -> list[str]:
    if not sound:
        return []
    first = next((row for row in sound if row.setting), sound[0])  # rather than zero-shot
    return [
        f"{run}: no adapter is kept at the top, as nothing chose between "
        f"{', '.join(row.method for row in sound)}; each lies in {run / 'adapters'}",
        f"the command that keeps {first.method}, or another by its name (validation chooses "
        "between several where --select is not none):",
        f"  {command_that_keeps(plan, run, *first.key)}",
    ]


def is_judged(result: TaskResult) -> bool:
    return result.val_accuracy is not None and result.val_nll is not None


def rank(result: TaskResult) -> Score:
    if result.val_accuracy is None or result.val_nll is None:
        return DIVERGED
    return Score(result.val_accuracy, -result.val_nll)
