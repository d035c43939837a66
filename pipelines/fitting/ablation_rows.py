"""The rows of an ablation: test accuracy at every value of one hyper-parameter.

An analysis: nothing is chosen by it. Each value is run with everything else selected on validation,
as the paper's tables are read (arXiv 2110.04544, section 4.4).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from clip_adapter import files
from clip_adapter.adapters.hyper import Value
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.plan import METHOD, Plan, PlannedMethod
from clip_adapter.pipelines.fitting.results import TaskResult

FILE = "ablation.jsonl"


@dataclass(frozen=True)
class AblationRow:
    """How a method did on a task with one hyper-parameter held at a value; or, of the factor
    `method`, how the method of that name did."""

    factor: str
    value: Value
    result: TaskResult

    @property
    def key(self) -> tuple[str, str, str, Shots, int]:
        return self.factor, str(self.value), *self.result.key


def ablated(plan: Plan) -> list[tuple[str, Value, PlannedMethod]]:
    """(factor, value, method with that factor held at it) for every row of a task."""
    hyper = [
        (factor, value, replace(planned, values={**planned.values, factor: (value,)}))
        for factor in plan.ablate
        for planned in plan.fitted
        if factor in planned.method.hyper
        for value in planned.ablation[factor]
    ]
    return hyper + [(METHOD, planned.method.name, planned) for planned in plan.compared]


def read_ablations(run: Path) -> list[AblationRow]:
    """The rows of a run, [] where it has none.

    Raises UserError where they cannot be read.
    """
    path = run / FILE
    try:
        lines = files.read_text(path).splitlines()
        documents = [json.loads(line) for line in lines]
        return [
            AblationRow(d["factor"], d["value"], TaskResult.of_document(d["result"]))
            for d in documents
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read; fit it again.") from error
