"""The tables of protocol.py, in Markdown: means over tasks ± their standard error."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from protocol_runs import ALPHAS, RATIO_RATES, STARTS, Measured, Outcome

from clip_adapter.adapters.clip_adapter import CLIP_ADAPTER


def preferred(outcomes: Sequence[Outcome]) -> Outcome:
    """By validation accuracy, ties by the lower negative log-likelihood."""
    return max(outcomes, key=lambda found: (found.val, -found.nll))


def epoch_tables(measured: Sequence[Measured]) -> str:
    """The best epoch on few-shot validation against the last, α chosen on validation each time."""

    def columns(tasks: Sequence[Measured]) -> list[str]:
        last = [preferred([run.last for run in task.fixed]) for task in tasks]
        best = [preferred([run.best for run in task.fixed]) for task in tasks]
        fixed = [run for task in tasks for run in task.fixed]
        return [
            spread([b.test - a.test for a, b in zip(last, best, strict=True)]),
            # Per task first: its four runs are no four tasks.
            spread([np.mean([r.best.test - r.last.test for r in task.fixed]) for task in tasks]),
            spread([found.val - found.test for found in last]),
            spread([found.val - found.test for found in best]),
            f"{max(run.best.val - run.best.test for run in fixed):.1f}",
        ]

    heads = [
        "best − last epoch, α chosen",
        "best − last, mean over α",
        "val − test, last",
        "val − test, best",
        "most, best",
    ]
    return (
        "#### The epoch that is kept\n\n"
        + table("data set", heads, grouped(measured, lambda task: task.dataset), columns)
        + "\n"
        + table("shots", heads, grouped(measured, lambda task: task.shots), columns)
    )


def alpha_table(measured: Sequence[Measured]) -> str:
    """Test accuracy of each fixed α, last epoch, to the task's mean over α."""

    def columns(tasks: Sequence[Measured]) -> list[str]:
        tests = np.array([[run.last.test for run in task.fixed] for task in tasks])
        means = tests.mean(axis=1)
        chosen = [preferred([run.last for run in task.fixed]).test for task in tasks]
        return [
            f"{means.mean():.1f}",
            *(spread(tests[:, index] - means) for index in range(len(ALPHAS))),
            spread(chosen - means),
        ]

    heads = ["mean", *(f"α = {alpha}" for alpha in ALPHAS), "chosen on validation"]
    return "#### α\n\n" + table(
        "data set", heads, grouped(measured, lambda task: task.dataset), columns
    )


def learned_tables(measured: Sequence[Measured]) -> str:
    """A learned α against the fixed α that is best on a data set's test images, and against 0.4."""
    tasks = [task for task in measured if task.learned]
    if not tasks:
        return ""
    best = {}
    for name, own in grouped(tasks, lambda task: task.dataset).items():
        means = np.mean([[run.last.test for run in task.fixed] for task in own], axis=0)
        best[name] = int(means.argmax())

    def columns(tasks: Sequence[Measured], rate: float) -> list[str]:
        pairs = [[run for run in task.learned if run.rate == rate] for task in tasks]
        low, high = zip(*pairs, strict=True)
        fixed = np.array([[run.last.test for run in task.fixed] for task in tasks])
        hindsight = fixed[np.arange(len(tasks)), [best[task.dataset] for task in tasks]]
        reached = np.array([[run.last.test for run in pair] for pair in pairs])
        return [
            f"{np.mean([run.ratio for run in low]):.2f}",
            f"{np.mean([run.ratio for run in high]):.2f}",
            f"{np.mean([abs(a.ratio - b.ratio) for a, b in pairs]):.2f}",
            *(spread(reached[:, start] - hindsight) for start in range(len(STARTS))),
            spread(reached.mean(axis=1) - fixed[:, ALPHAS.index(0.4)]),
        ]

    heads = [
        *(f"from {start} ends at" for start in STARTS),
        "apart",
        *(f"from {start} − best fixed α" for start in STARTS),
        "both − α = 0.4",
    ]
    by_rate = {str(rate): [rate] for rate in RATIO_RATES}
    default = CLIP_ADAPTER.hyper["ratio_learning_rate"].default
    assert isinstance(default, float)
    by_set = {
        f"{name} (best {ALPHAS[best[name]]})": own
        for name, own in grouped(tasks, lambda task: task.dataset).items()
    }
    return (
        "#### A learned α\n\n"
        + table("ratio learning rate", heads, by_rate, lambda rate: columns(tasks, rate[0]), "")
        + f"\nAt {default}:\n\n"
        + table("data set", heads, by_set, lambda own: columns(own, default))
    )


def halving_table(measured: Sequence[Measured]) -> str:
    """A grid of 48 in full and by halving."""
    tasks = [task for task in measured if task.searched]
    if not tasks:
        return ""

    def columns(tasks: Sequence[Measured]) -> list[str]:
        pairs = [task.searched for task in tasks if task.searched]
        return [
            str(len(pairs)),
            str(sum(pair.same for pair in pairs)),
            spread([pair.halving.val - pair.full.val for pair in pairs]),
            spread([pair.halving.test - pair.full.test for pair in pairs]),
        ]

    heads = ["tasks", "same setting", "validation, halving − full", "test, halving − full"]
    return "#### Halving\n\n" + table(
        "data set", heads, grouped(tasks, lambda task: task.dataset), columns
    )


def grouped(
    measured: Sequence[Measured], key: Callable[[Measured], object]
) -> dict[str, list[Measured]]:
    groups: dict[str, list[Measured]] = defaultdict(list)
    for task in measured:
        groups[str(key(task))].append(task)
    return dict(groups)


def table(
    what: str,
    heads: Sequence[str],
    groups: dict[str, list[Any]],
    columns: Callable[[list[Any]], list[str]],
    whole: str = "all",
) -> str:
    """Markdown, a row for each group and, named `whole`, one for all together."""
    rows = [[name, *columns(members)] for name, members in groups.items()]
    if whole:
        rows.append([whole, *columns([one for members in groups.values() for one in members])])
    lines = [[what, *heads], ["---"] * (1 + len(heads)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Any) -> str:
    """Mean ± standard error of the mean; without the latter for a single value."""
    array = np.asarray(values, np.float64)
    mean = f"{array.mean():+.2f}".replace("-", "−")
    if len(array) < 2:
        return mean
    return f"{mean} ± {array.std(ddof=1) / np.sqrt(len(array)):.2f}"
