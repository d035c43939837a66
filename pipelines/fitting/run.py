"""The run behind `fit`: every method on every task, results on disk as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError
from clip_adapter.frames import frame_of_rows, html_table
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.jax_setup import usable_jax
from clip_adapter.pipelines.fitting.config import (
    DEFAULT_CACHE,
    FitConfig,
    shots_words,
)
from clip_adapter.pipelines.fitting.data import Data
from clip_adapter.pipelines.fitting.groups import identity_of, numbers_of, tested_twins
from clip_adapter.pipelines.fitting.kept import candidates, keep_one
from clip_adapter.pipelines.fitting.make_plan import check_feasible
from clip_adapter.pipelines.fitting.one_task import TaskRunner
from clip_adapter.pipelines.fitting.plan import METHOD, TASKS, Plan
from clip_adapter.pipelines.fitting.preparation import (
    check_labelled,
    drawn_tasks,
    new_plan,
    stated_tasks,
    task_documents,
)
from clip_adapter.pipelines.fitting.provenance import PROVENANCE, Provenance
from clip_adapter.pipelines.fitting.results import (
    MEASURES,
    MethodSummary,
    TaskResult,
    summarise,
)
from clip_adapter.pipelines.fitting.run_folder import (
    PLAN,
    RunFolder,
    new_folder,
    read_plan,
)
from clip_adapter.pipelines.fitting.taken import Taken, taken_of
from clip_adapter.pipelines.fitting.tasks import TaskRows
from clip_adapter.pipelines.fitting.unlabelled import Unlabelled, unlabelled_of
from clip_adapter.pipelines.saved.adapter_file import know_method
from clip_adapter.words import same_text

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
    if config.resume and (others := config.beside_resume):
        raise UserError(
            f"--resume takes no --{others[0]}: a run goes on as it was begun. Beside it stand "
            "--cache and --unlabelled, where those lie elsewhere now, and --method MODULE:NAME of "
            "your own."
        )
    begun = config.out if may_go_on and config.out and (config.out / PLAN).exists() else None
    begun = config.resume or begun
    for name in config.method if config.resume else ():
        if ":" in name:
            know_method(name)
    stored = read_plan(begun) if begun else None
    path = config.cache or (Path(stored.cache) if stored else DEFAULT_CACHE)
    with usable_jax(), FeatureCache(path) as cache:
        if stored and stored.cache_sha256 != cache.content_sha256:
            raise UserError(
                f"{cache.path} is not the cache that {begun} was started on; start a new run, or "
                "name with --cache where it lies now."
            )
        check_labelled(cache)
        stated = stated_tasks(config, stored)
        groups = numbers_of(cache)
        if stored and stored.groups != identity_of(groups):
            raise UserError(
                f"{cache.path} has other groups than when {begun} was started; start a new run."
            )
        unlabelled = unlabelled_of(config, stored, cache, listener)
        taken = taken_of(config, stored, cache, listener)
        plan = stored if stored and config.resume else None
        plan = plan or new_plan(config, cache, stated, groups, unlabelled, taken, listener)
        if stored and (differing := stored.differing(plan)):
            raise UserError(
                f"{begun} was started with other arguments ({', '.join(differing)}); give those "
                "again, or another --out."
            )
        plan = stored or plan
        data, new, tasks = drawn_tasks(plan, cache, stated, groups)
        if alike := data.classes_with_one_text():
            listener.note(same_text(alike))
        if plan.class_weight != "none" and all(map(data.is_even, data.tasks)):
            listener.note(
                f"--class-weight {plan.class_weight} has no effect: in every task all classes have "
                "equally many training images."
            )
        if sentence := tested_twins(cache, join=plan.validation == "join"):
            listener.note(sentence)
        check_feasible(plan, data, data.tasks[0])
        place = begun or config.out or new_folder()
        with closing(RunFolder(place, plan, resume=begun is not None)) as folder:
            documents = [asdict(task) for task in stated]
            documents = documents or task_documents(data, tasks)
            folder.write_json(TASKS, documents)
            return _execute(plan, data, new, tasks, unlabelled, taken, folder, listener)


def _execute(
    plan: Plan,
    data: Data,
    new: Data | None,
    tasks: Sequence[TaskRows],
    unlabelled: Unlabelled | None,
    taken: Taken | None,
    folder: RunFolder,
    listener: Listener,
) -> FitResult:
    provenance = Provenance.of(data.cache)
    folder.write_json(PROVENANCE, provenance.document())
    engine = Engine(plan.placement, cores=available_cores())
    said: set[str] = set()

    def tell(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            listener.note(sentence)

    if unlabelled:
        unlabelled = unlabelled.without(data.hashes(data.taking_part()))
    runner = TaskRunner(plan, data, new, provenance, engine, tell, unlabelled, taken)
    problem = ""
    try:
        _run_tasks(runner, folder, listener)
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
            _write_picture(folder, plan, provenance)
    except UserError as error:
        problem = str(error)
    if not problem and not candidates(plan, tasks, results):
        names = ", ".join(planned.method.name for planned in plan.fitted)
        problem = f"Every setting of {names} diverged at the most shots; see the notes above."
    return FitResult(
        run=folder.path,
        plan=plan,
        provenance=provenance,
        tasks=tasks,
        results=results,
        summary=summary,
        ablations=folder.results(held=True),
        kept=kept,
        compilations=engine.compilations,
        problem=problem,
    )


def _run_tasks(runner: TaskRunner, folder: RunFolder, listener: Listener) -> None:
    """Run every method on every task that the folder has no result of yet, then the ablations."""
    known = {row.identity: row for held in (False, True) for row in folder.results(held=held)}
    tasks, parts = runner.data.tasks, runner.plan.parts
    steps = [(rows, held, planned) for rows in tasks for held, planned in parts if not held]
    steps += [(rows, held, planned) for held, planned in parts if held for rows in tasks]
    waiting = [
        (rows, held, planned)
        for rows, held, planned in steps
        if ((planned.method.name, rows.shots, rows.seed), str(held)) not in known
    ]
    done = len(steps) - len(waiting)
    with listener.progress("fit", len(steps), done) as advance:
        for place, (rows, held, planned) in enumerate(waiting):
            notes = [planned.method.name, *(f"{name} {value}" for name, value in held.items())]
            part = _Part(advance, ", ".join([*notes, shots_words(rows.shots)]))
            runner.engine.progress = part.settings_done
            key = (planned.method.name, rows.shots, rows.seed), str({})
            if METHOD in held and key in known:  # fitted already, as a method that counts
                result = replace(known[key], held=held)
            else:
                later = ((other, one) for other, _, one in waiting[place + 1 :] if one is planned)
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
