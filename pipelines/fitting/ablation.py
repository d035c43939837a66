"""Run an ablation (see ablation_rows)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from clip_adapter.pipelines.fitting.ablation_rows import (
    FILE,
    AblationRow,
    ablated,
    read_ablations,
)
from clip_adapter.pipelines.fitting.classify import predict_test
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.one_task import TaskRunner
from clip_adapter.pipelines.fitting.plan import METHOD, PlannedMethod
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.run_folder import RunFolder
from clip_adapter.pipelines.fitting.tasks import TaskRows


def run_ablations(
    runner: TaskRunner,
    folder: RunFolder,
    begin: Callable[[str], Callable[[float], None]],
    end: Callable[[], None],
) -> None:
    """Run what the folder has no row of yet.

    begin: called with a note before each, gives what is told how much there is to do. end: called
        after each.
    """
    rows = read_ablations(folder.path)
    finished = {row.key for row in rows}
    own = {result.key: result for result in folder.results()}
    for factor, value, planned in ablated(runner.plan):
        for task in runner.data.tasks:
            task_key = (planned.method.name, task.shots, task.seed)
            if (factor, str(value), *task_key) in finished:
                continue
            expect = begin(f"{planned.method.name}, {factor} {value}, {shots_words(task.shots)}")
            known = own.get(task_key) if factor == METHOD else None
            result = known or _result(runner, planned, task, folder, expect)
            rows.append(AblationRow(factor, value, result))
            lines = [json.dumps(asdict(row)) + "\n" for row in rows]
            folder.write(FILE, "".join(lines).encode())
            end()


def _result(
    runner: TaskRunner,
    planned: PlannedMethod,
    rows: TaskRows,
    folder: RunFolder,
    expect: Callable[[float], None],
) -> TaskResult:
    method = planned.method
    chosen = runner.choose(planned, rows, folder, expect)
    if chosen is None:
        return runner.diverged(planned, rows)
    predictions = predict_test(method, chosen.setting, chosen.arrays, runner.data)
    return runner.result(method, rows, chosen, predictions)
