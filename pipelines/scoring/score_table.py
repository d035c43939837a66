"""What `evaluate` prints of accuracies."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_adapter.pipelines.scoring.scores import Scores
from clip_adapter.words import counted, printable


def print_table(scores: Scores) -> None:
    """A row for each class that has images, and the accuracies below them."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("class", "images", "adapter %", "zero-shot %"):
        table.add_column(column, justify="left" if column == "class" else "right")
    counts, right, before = scores.by_class()
    for label, *row in zip(scores.present.tolist(), counts, right, before, strict=True):
        name = printable(scores.class_names[label])
        table.add_row(name, str(row[0]), *(f"{100 * share:.1f}" for share in row[1:]))
    width = max(80, 40 + max(len(printable(name)) for name in scores.class_names))
    Console(width=min(width, 200), highlight=False, markup=False).print(table)
    ours, theirs, paired = scores.standard_errors()
    gained = scores.accuracy - scores.zero_shot_accuracy
    shown = counted(len(scores.labels), "image")
    groups = scores.by_group()
    over = f" over {counted(groups.count, 'group')}" if groups else ""
    print(f"{shown}, {len(scores.candidates)} classes to choose from; ± is a standard error{over}")
    print(f"adapter    {100 * scores.accuracy:6.2f} ± {100 * ours:.2f} %")
    print(f"zero-shot  {100 * scores.zero_shot_accuracy:6.2f} ± {100 * theirs:.2f} %")
    print(f"difference {100 * gained:+6.2f} ± {100 * paired:.2f} points")
    means = 100 * right.mean(), 100 * before.mean()
    print(f"mean over classes: adapter {means[0]:.2f} %, zero-shot {means[1]:.2f} %")
    if groups:
        spread = "" if groups.std is None else f" (± {100 * groups.std:.2f} between groups)"
        print(f"mean over groups: adapter {100 * groups.mean:.2f} %{spread}")
        if groups.worst:
            name, share, count = groups.worst
            worst = f"{printable(name)}: {100 * share:.2f} % of {counted(count, 'image')}"
            print(f"worst group of five images or more: {worst}")
