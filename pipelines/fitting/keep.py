"""The adapter at the top of a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from clip_adapter.adapters.engine.search import fit
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.choice import is_finite
from clip_adapter.pipelines.fitting.one_task import TaskRunner, fitted_on
from clip_adapter.pipelines.fitting.remarks import candidates, is_judged, rank
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.run_folder import RunFolder, adapter_folder, writing
from clip_adapter.pipelines.fitting.tasks import TaskRows, kept_task
from clip_adapter.pipelines.saved.adapter_file import load_adapter, save_adapter


def keep_one(
    runner: TaskRunner,
    tasks: Sequence[TaskRows],
    folder: RunFolder,
    results: Sequence[TaskResult],
) -> TaskResult | None:
    """Put one adapter at the top of the folder and return its row: at the most shots and the first
    seed, of the methods that were asked for the one that validation prefers. None where nothing
    chose between several, or every setting of all of them diverged.

    Raises UserError where the chosen setting diverges on all labelled images.
    """
    sound = candidates(runner.plan, tasks, results)
    if not sound or (len(sound) > 1 and not any(map(is_judged, sound))):
        return None
    best, rows = max(sound, key=rank), kept_task(tasks)
    if runner.plan.refit:
        _refit(runner, rows, best, folder)
        return best
    source = folder.path / adapter_folder(*best.key)
    load_adapter(source)  # of an earlier process: whether it is there, and as it was written
    for name in ("adapter.safetensors", "adapter.json"):  # without the JSON it is no adapter
        folder.write(name, (source / name).read_bytes())
    return best


def _refit(runner: TaskRunner, rows: TaskRows, best: TaskResult, folder: RunFolder) -> None:
    """Fit the chosen setting once more on every labelled image of the cache."""
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
    saved = runner.saved(method, setting, arrays, fitted_on(best) | images, seen)
    with writing(folder.path):
        save_adapter(folder.path, saved)
