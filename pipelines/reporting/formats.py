"""The table of accuracies, and those of ablations, as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from io import StringIO
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from clip_adapter.cache.words import printable
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.results import MethodSummary, Spread
from clip_adapter.pipelines.fitting.tables import accuracy
from clip_adapter.pipelines.prediction_formats import cell as as_cell
from clip_adapter.pipelines.reporting.ablations import Ablation
from clip_adapter.pipelines.reporting.accuracies import Accuracies, Column
from clip_adapter.pipelines.reporting.figures import Numbers

NOTHING = "–"
LONGEST_LINE = 24  # of a heading
# What Markdown, or HTML in it, and LaTeX would not print as it is.
MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$])")
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{char: f"\\{char}" for char in "{}$&#%_"},
}


def cell(column: Column, shots: Shots) -> str:
    """`92.96 ± 0.50`, or a dash where there is no number."""
    row = column.cells.get(shots)
    return accuracy(row, column.measure) if row else NOTHING


def as_text(table: Accuracies, ablations: Sequence[Ablation], width: int) -> str:
    """Lines of at most `width` characters where that can be: columns that do not fit beside each
    other stand in tables below each other."""
    about = (
        "\n".join(wrap(printable(line), width, subsequent_indent="  ")) for line in table.about
    )
    headings = ["\n".join(_heading(column)) for column in table.columns]
    drawn = [_text(_by_shots(table, headings), width)]
    drawn += [_text(ablation.numbers, width) for ablation in ablations]
    text = "".join(f"{line}\n" for line in about) + "".join(drawn)
    return re.sub(r" +$|(?<=\n)\n(?=\n)", "", text, flags=re.MULTILINE)


def _by_shots(table: Accuracies, headings: Sequence[str]) -> Numbers:
    rows = [[str(n), *(cell(column, n) for column in table.columns)] for n in table.shots]
    return Numbers(["shots", *headings], rows, table.title)


def _text(numbers: Numbers, width: int) -> str:
    out = StringIO()
    # A column that alone is wider than the terminal is left whole.
    console = Console(file=out, width=max(width, 10_000), highlight=False, markup=False)
    out.write("\n".join(wrap(printable(numbers.caption), width)))
    for places in _beside_each_other(numbers, width):
        drawn = Table(box=SIMPLE_HEAD)
        for place in (0, *places):
            drawn.add_column(numbers.head[place], justify="right")
        for row in numbers.rows:
            drawn.add_row(*(row[place] for place in (0, *places)))
        console.print(drawn)
    return out.getvalue()


def _beside_each_other(numbers: Numbers, width: int) -> list[list[int]]:
    """The columns after the first, which stands before each group."""
    needed = [
        max(map(cell_len, [*head.split("\n"), *(row[place] for row in numbers.rows)])) + 3
        for place, head in enumerate(numbers.head)
    ]
    groups: list[list[int]] = []
    used = width
    for place, own in list(enumerate(needed))[1:]:
        if used + own > width:
            groups.append([])
            used = needed[0] + 2
        groups[-1].append(place)
        used += own
    return groups


def _heading(column: Column) -> list[str]:
    method, _, rest = printable(column.heading).partition(" ")
    return [method, *wrap(rest, LONGEST_LINE)]


def as_markdown(table: Accuracies, ablations: Sequence[Ablation], width: int) -> str:
    """Tables, each with its caption above it."""
    accuracies = _by_shots(table, [column.heading for column in table.columns])
    about = "".join(f"{markdown(line)}  \n" for line in table.about)
    drawn = map(_markdown_table, (accuracies, *(ablation.numbers for ablation in ablations)))
    return about + "\n".join(drawn)


def _markdown_table(numbers: Numbers) -> str:
    drawn = [f"| {' | '.join(map(markdown, row))} |" for row in (numbers.head, *numbers.rows)]
    drawn.insert(1, f"|{' ---: |' * len(numbers.head)}")
    return "\n".join([f"{markdown(numbers.caption)}  ", "", *drawn]) + "\n"


def markdown(text: str) -> str:
    """`text` as Markdown, and HTML made of it, show it."""
    escaped = MARKDOWN.sub(r"\\\1", printable(text))
    return "".join(HTML.get(char, char) for char in escaped)


def as_latex(table: Accuracies, ablations: Sequence[Ablation], width: int) -> str:
    """Tables for the package booktabs: a row for each column of the printed table of accuracies,
    and for each value of an ablation."""
    rows = [[c.heading, *(cell(c, n) for n in table.shots)] for c in table.columns]
    caption = "; ".join([table.title, "columns are shots per class", *table.about])
    accuracies = Numbers(["", *map(str, table.shots)], rows, caption)
    drawn = map(_latex_table, (accuracies, *(ablation.numbers for ablation in ablations)))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(drawn)


def _latex_table(numbers: Numbers) -> str:
    drawn = [" & ".join(map(latex, row)) + r" \\" for row in (numbers.head, *numbers.rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(numbers.head) - 1)}}}",
            r"\toprule",
            drawn[0],
            r"\midrule",
            *drawn[1:],
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{latex(numbers.caption)}}}",
            r"\end{table}",
            "",
        ]
    )


def latex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return "".join(LATEX.get(char, char) for char in printable(text))


def as_csv(table: Accuracies, ablations: Sequence[Ablation], width: int) -> str:
    """A row for each entry, kind and number of shots, with accuracies in [0, 1]; `factor` and
    `value` are those of an ablation, and empty in the rows of the table of accuracies."""
    out = StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    heads = ("entry", "kind", "shots", "seeds", "diverged", "mean", "std", "test_images")
    writer.writerow((*heads, "factor", "value"))
    for column in table.columns:
        for shots, row in column.cells.items():
            numbers = _numbers(column.seeds[shots], row, column.spread(shots))
            writer.writerow((as_cell(column.label), column.kind or "all", *numbers, "", ""))
    for ablation in ablations:
        for one in ablation.series:
            label = f"{one.method} ({ablation.folder})" if ablation.folder else one.method
            for shots, row in one.cells.items():
                numbers = _numbers(one.seeds[shots], row, row.test_accuracy)
                start = (as_cell(label), ablation.kind or "all")
                writer.writerow((*start, *numbers, ablation.factor, printable(one.value)))
    return out.getvalue()


def _numbers(seeds: Sequence[int], row: MethodSummary, spread: Spread | None) -> tuple:
    means = (spread.mean, spread.std) if spread else (None, None)
    return (row.shots, " ".join(map(str, seeds)), row.diverged, *means, row.test_images)


Writer = Callable[[Accuracies, Sequence[Ablation], int], str]
FORMATS: dict[str, Writer] = {
    "text": as_text,
    "md": as_markdown,
    "tex": as_latex,
    "csv": as_csv,
}
