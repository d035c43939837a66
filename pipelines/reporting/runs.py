"""Finished runs, read back from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.provenance import PROVENANCE, Provenance
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.run_folder import (
    OWN_FOLDERS,
    SELECTED,
    read_plan,
    read_selected,
)
from clip_adapter.pipelines.fitting.tasks import base_classes
from clip_adapter.words import counted


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    versions: of the program and of the libraries that computed it. results: those of its ablations
        too.
    """

    path: Path
    plan: Plan
    provenance: Provenance
    versions: dict[str, str]
    results: Sequence[TaskResult]

    @property
    def class_names(self) -> list[str]:
        """Of the classes that were fitted, in label order."""
        names = self.provenance.class_names
        return names if self.plan.train_classes == "all" else names[: base_classes(len(names))]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read finished runs on one cache.

    Raises UserError where there is none, for a folder without a finished run, for one that is
    damaged, and for runs on different caches.
    """
    if not paths:
        raise UserError("Name at least one run folder.")
    runs = [_load(path) for path in dict.fromkeys(paths)]
    first = runs[0]
    for run in runs[1:]:
        if run.plan.cache_sha256 != first.plan.cache_sha256:
            raise UserError(
                f"{first.path} and {run.path} were made on different caches; compare runs on one."
            )
    return runs


def _load(path: Path) -> Run:
    plan = read_plan(path)
    files.refuse_links(path, OWN_FOLDERS)
    results = read_selected(path)
    methods = {planned.method.name: planned.method for planned in plan.all_methods}
    wanted = plan.identities
    try:
        for index, result in enumerate(results):
            if result.setting is not None:
                setting = methods[result.method].checked(result.setting, partial=True)
                results[index] = replace(result, setting=setting)
        if len({result.identity for result in results} & wanted) < len(results):
            raise ValueError("rows twice, or of no task of the plan")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / SELECTED} is damaged; fit it again.") from error
    if missing := len(wanted) - len(results):
        raise UserError(
            f"{path} holds a run that has not finished: {counted(missing, 'fit')} of {len(wanted)} "
            f"to go; go on with: fit --resume {path}"
        )
    try:
        document = files.parse_json(files.read_text(path / PROVENANCE))
        provenance = Provenance.of_document(document)
        versions = {str(name): str(number) for name, number in document["versions"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path / PROVENANCE} cannot be read; fit it again.") from error
    if provenance.cache_sha256 != plan.cache_sha256:
        raise UserError(f"{path / PROVENANCE} is of another cache than run.json; fit it again.")
    return Run(path, plan, provenance, versions, results)
