"""What `fit` prints: results by number of shots, what was chosen, and how it was judged."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_adapter.cache.few_shot import VALIDATION_SHOTS

if TYPE_CHECKING:
    from clip_adapter.pipelines.fit import FitConfig
    from clip_adapter.pipelines.tasks import Draw, Shots

Row = dict[str, Any]

SELECTION_WORDS = {
    "few-shot-val": "min(shots, 4) validation images per class",
    "full-val": "the whole validation split",
    "cv": "cross-validation on the support set",
    "none": "nothing (one setting, its last epoch)",
}


# What there is to report of a method, by the classes it was fitted on.
KINDS = {
    "all": {"test_accuracy": ""},
    "base": {"test_accuracy": " base", "new_accuracy": " new", "harmonic_mean": " H"},
}


def print_run(
    config: "FitConfig",
    description: Sequence[str],
    tasks: Sequence["Draw"],
    selected: Sequence[Row],
    summary: Sequence[Row],
    compilations: int,
) -> None:
    """Print the whole report of a run on standard output."""
    console = Console(width=110, highlight=False, soft_wrap=True, markup=False)
    for line in description:
        console.print(line)
    judged = judged_by(config.select, config.shots, config.method, selected)
    console.print(f"selected on {judged}; test computed for the selected setting only")
    for line in _repetitions(tasks):
        console.print(line)
    console.print(_accuracy_table(config, summary))
    console.print(_choice_table(config, selected))
    console.print(f"{compilations} program{'s' * (compilations != 1)} compiled or loaded")


def judged_by(select: str, shots: "Sequence[Shots]", method: str, selected: Sequence[Row]) -> str:
    """What chose the settings and epochs of `method`, in words."""
    words = SELECTION_WORDS[select]
    if select == "few-shot-val" and "all" in shots:
        whole = SELECTION_WORDS["full-val"]
        words = f"{words} (at `all` shots: {whole})" if len(shots) > 1 else whole
    unjudged = [
        row["shots"]
        for row in selected
        if row["method"] == method and "tried" in row and "val_accuracy" not in row
    ]
    if select == "cv" and unjudged:
        numbers = ", ".join(map(str, dict.fromkeys(unjudged)))
        words += f" (at {numbers} shots a class has one image: nothing, the defaults)"
    return words


def _accuracy_table(config: "FitConfig", summary: Sequence[Row]) -> Table:
    """Test accuracy by number of shots and method."""
    seeds = ", ".join(map(str, config.seeds))
    several = len(config.seeds) > 1
    over = f"mean ± standard deviation over seeds {seeds}" if several else f"seed {seeds}"
    table = Table(title=f"test accuracy (%), {over}", box=SIMPLE_HEAD)
    methods = list(dict.fromkeys(row["method"] for row in summary))
    kinds = KINDS[config.train_classes]
    table.add_column("shots", justify="right")
    for method in methods:
        for words in kinds.values():
            table.add_column(method + words, justify="right")
    for shots in config.shots:
        rows = {row["method"]: row for row in summary if row["shots"] == shots}
        cells = [percent(rows[method], kind) for method in methods for kind in kinds]
        table.add_row(str(shots), *cells)
    return table


def _choice_table(config: "FitConfig", selected: Sequence[Row]) -> Table:
    """What validation chose, task by task, and how flat the optimum is.

    Ratios and epochs always, other hyper-parameters where several values were tried.
    """
    table = Table(title=f"chosen settings of {config.method}", box=SIMPLE_HEAD)
    rows = [row for row in selected if row["method"] == config.method]
    tried = {"reduction": config.reduction, "learning_rate": config.lr}
    tried |= {"weight_decay": config.weight_decay}
    names = [
        name
        for name in CHOICE_COLUMNS
        if any(row.get(name) is not None for row in rows) and len(tried.get(name, "ab")) > 1
    ]
    for heading in ("shots", "seed", *(CHOICE_COLUMNS[name] for name in names)):
        table.add_column(heading, justify="right")
    table.add_column("val %", justify="right")
    table.add_column("within one SE", justify="right")
    for row in rows:
        values = [_value(row, name) for name in names]
        accuracy = f"{100 * row['val_accuracy']:.2f}" if "val_accuracy" in row else "–"
        table.add_row(str(row["shots"]), str(row["seed"]), *values, accuracy, _flatness(row))
    return table


def _flatness(row: Row) -> str:
    """How many of the settings trained as long are within one standard error of the best."""
    if "within_one_standard_error" not in row:
        return row.get("note", "nothing to choose")
    diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{row['within_one_standard_error']} of {row['trained_as_long']}{diverged}"


CHOICE_COLUMNS = {
    "alpha": "alpha",
    "beta": "beta",
    "reduction": "reduction",
    "learning_rate": "lr",
    "weight_decay": "decay",
    "C": "C",
    "epoch": "epoch",
}


def _value(row: Row, name: str) -> str:
    """A chosen value; of a learned ratio its mean, and its deviation where it varies."""
    value = row.get(name)
    if value is None:
        return "–"
    if f"{name}_mean" in row:
        varies = f" ± {row[f'{name}_std']:.3f}" if value == "hypernet" else ""
        return f"{value} {row[f'{name}_mean']:.3f}{varies}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(row: Row, kind: str) -> str:
    """Mean and standard deviation of a summary row, in %."""
    mean, deviation = row.get(f"{kind}_mean"), row.get(f"{kind}_std")
    if mean is None:
        return "–"
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    lost = f" ({row['diverged']} of {row['seeds']} seeds diverged)" if row["diverged"] else ""
    return f"{100 * mean:.2f}{spread}{lost}"


def _repetitions(tasks: Sequence["Draw"]) -> list[str]:
    """A sentence per number of shots for classes that had too few images."""
    counts: dict[tuple[str, Shots], int] = {}
    for drawn in tasks:
        counts["training", drawn.shots] = len(drawn.small_classes)
        fewest = min(drawn.shots, VALIDATION_SHOTS) if isinstance(drawn.shots, int) else 0
        counts["validation", fewest] = len(drawn.small_validation_classes)
    return [
        f"{count} class{'es have' if count > 1 else ' has'} fewer than {shots} {split} images: "
        "each taken once"
        for (split, shots), count in counts.items()
        if count
    ]
