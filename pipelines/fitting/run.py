"""The run behind `fit`: every method on every task, results on disk as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError
from clip_adapter.frames import frame_of_rows, html_table
from clip_adapter.listener import Advance, Listener
from clip_adapter.pipelines.fitting.config import FitConfig, shots_words
from clip_adapter.pipelines.fitting.kept import candidates, keep_one
from clip_adapter.pipelines.fitting.one_task import TaskRunner
from clip_adapter.pipelines.fitting.plan import METHOD, Plan
from clip_adapter.pipelines.fitting.preparation import (
    OpenedRun,
    Step,
    identity_of_step,
    opened,
)
from clip_adapter.pipelines.fitting.provenance import Provenance
from clip_adapter.pipelines.fitting.results import (
    MEASURES,
    MethodSummary,
    TaskResult,
    summarise,
)
from clip_adapter.pipelines.fitting.run_folder import RunFolder
from clip_adapter.pipelines.fitting.tasks import TaskRows

if TYPE_CHECKING:
    import pandas

PLOT = "validation.png"


@dataclass(frozen=True)
class FitResult:
    """What a run found.

    run: its folder. provenance: where its numbers come from. results: a row per method and task.
    summary: a row per method and number of shots. ablations: a row per factor, value, method and
    task, [] where none were asked for. kept: the row whose adapter stands at the top of the folder,
    None where nothing chose or all diverged. compilations: programs compiled or loaded. problem: a
    sentence on what could not be done, or "".
    """

    run: Path
    plan: Plan
    provenance: Provenance
    tasks: Sequence[TaskRows]
    results: Sequence[TaskResult]
    summary: Sequence[MethodSummary]
    ablations: Sequence[TaskResult]
    kept: TaskResult | None
    compilations: int
    problem: str = ""

    def to_frame(self) -> pandas.DataFrame:
        """`results` as a frame of pandas: a row per method and task, each hyper-parameter of the
        chosen settings a column. Raises UserError without pandas."""
        told = ("method", "shots", "seed", "epoch", *MEASURES, "test_images", "note")
        return frame_of_rows(
            {name: getattr(row, name) for name in told} | dict(row.setting or {})
            for row in self.results
        )

    def _repr_html_(self) -> str:
        rows = (
            {"method": row.method, "shots": row.shots, "seeds": row.seeds}
            | {
                f"{name} %": 100 * accuracy.mean
                for name in MEASURES
                if (accuracy := getattr(row, name)) is not None
            }
            for row in self.summary
        )
        return html_table(rows, f"{self.run}: accuracies, mean over seeds")


def run_fit(config: FitConfig, listener: Listener, *, may_go_on: bool = False) -> FitResult:
    """Fit everything that `config` asks for; see `pipelines.commands.fit.fit`.

    may_go_on: where the folder holds a run that was asked for the same, go on with it.
    """
    with opened(config, listener, may_go_on=may_go_on) as run:
        run.folder.take_parts(run.plan, [*map(identity_of_step, run.steps)])
        return _execute(run, listener)


def runner_of(run: OpenedRun, listener: Listener) -> TaskRunner:
    """What fits a run's steps; it tells a sentence once."""
    engine = Engine(run.plan.placement, cores=available_cores())
    said: set[str] = set()

    def tell(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            listener.note(sentence)

    data, unlabelled = run.data, run.unlabelled
    if unlabelled:
        unlabelled = unlabelled.without(data.hashes(data.taking_part()))
    where = Provenance.of(data.cache)
    return TaskRunner(run.plan, data, run.new, where, engine, tell, unlabelled, run.taken)


def _execute(run: OpenedRun, listener: Listener) -> FitResult:
    plan, tasks, folder = run.plan, run.tasks, run.folder
    runner = runner_of(run, listener)
    problem = ""
    try:
        with listener.progress("fit", len(run.steps), len(run.steps) - len(run.waiting)) as advance:
            run_steps(runner, folder, run.waiting, advance)
    except KeyboardInterrupt:
        message = f"what is finished is kept; go on with: fit --resume {folder.path}"
        raise KeyboardInterrupt(message) from None
    except UserError as error:  # the numbers so far are there: whoever waits for them gets them
        if not folder.results():
            raise
        problem = str(error)
    results = folder.results()
    summary = summarise(results)
    kept = None
    try:
        if not problem:
            kept = keep_one(runner, tasks, folder, results, listener)
            folder.write_summary(summary)
            _write_picture(folder, plan, runner.provenance)
    except UserError as error:
        problem = str(error)
    if not problem and not candidates(plan, tasks, results):
        names = ", ".join(planned.method.name for planned in plan.fitted)
        problem = f"Every setting of {names} diverged at the most shots; see the notes above."
    return FitResult(
        run=folder.path,
        plan=plan,
        provenance=runner.provenance,
        tasks=tasks,
        results=results,
        summary=summary,
        ablations=folder.results(held=True),
        kept=kept,
        compilations=runner.engine.compilations,
        problem=problem,
    )


def run_steps(
    runner: TaskRunner, folder: RunFolder, steps: Sequence[Step], advance: Advance
) -> None:
    """Run these and keep their results in the folder."""
    known = {row.identity: row for row in folder.results()}
    for place, (rows, held, planned) in enumerate(steps):
        notes = [planned.method.name, *(f"{name} {value}" for name, value in held.items())]
        part = _Part(advance, ", ".join([*notes, shots_words(rows.shots)]))
        runner.engine.progress = part.settings_done
        key = identity_of_step((rows, {}, planned))
        if METHOD in held and key in known:  # fitted already, as a method that counts
            result = replace(known[key], held=held)
        else:
            later = ((other, one) for other, _, one in steps[place + 1 :] if one is planned)
            peers = [other for other, _ in later if other.shots == rows.shots and not held]
            result = runner.run(planned, rows, folder, part.expect, held, peers)
        folder.add_result(result)
        known[result.identity] = result
        part.end()


def _write_picture(folder: RunFolder, plan: Plan, provenance: Provenance) -> None:
    """`validation.png`: what validation saw of the first method with something to choose, as the
    report draws it at the most shots."""
    from clip_adapter.pipelines.reporting.entries import pool
    from clip_adapter.pipelines.reporting.runs import Run
    from clip_adapter.pipelines.reporting.sections.selection import drawn_at_most_shots

    run = Run(folder.path, plan, provenance, {}, folder.results())
    if content := drawn_at_most_shots(pool([run])):
        folder.write(PLOT, content)


class _Part:
    """The progress of one method on one task, which is one step of the whole.

    Settings are reported from several threads.
    """

    def __init__(self, advance: Callable[[float, str], None], note: str) -> None:
        self._advance, self._note = advance, note
        self._lock = threading.Lock()
        self._expected, self._share = 1.0, 0.0

    def expect(self, settings: float) -> None:
        """So many will be reported."""
        self._expected = max(settings, 1e-9)

    def settings_done(self, settings: float) -> None:
        with self._lock:
            step = min(settings / self._expected, 1 - self._share)
            self._share += step
            self._advance(step, self._note)

    def end(self) -> None:
        """A search may end early, or not be needed."""
        self._advance(1 - self._share, self._note)
