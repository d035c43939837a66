"""The table of accuracies as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from io import StringIO
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from clip_adapter.cache.words import printable
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.tables import accuracy
from clip_adapter.pipelines.reporting.accuracies import Accuracies, Column

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


def as_text(table: Accuracies, width: int) -> str:
    """Lines of at most `width` characters where that can be: columns that do not fit beside each
    other stand in tables below each other."""
    out = StringIO()
    # A column that alone is wider than the terminal is left whole.
    console = Console(file=out, width=max(width, 10_000), highlight=False, markup=False)
    for line in table.about:
        out.write("\n".join(wrap(printable(line), width, subsequent_indent="  ")) + "\n")
    for number, columns in enumerate(_beside_each_other(table, width)):
        title = printable(table.title) if number == 0 else None
        drawn = Table(box=SIMPLE_HEAD)
        drawn.add_column("shots", justify="right")
        for column in columns:
            drawn.add_column("\n".join(_heading(column)), justify="right")
        for shots in table.shots:
            drawn.add_row(str(shots), *(cell(column, shots) for column in columns))
        if title:
            out.write("\n".join(wrap(title, width)))
        console.print(drawn)
    return re.sub(r" +$|(?<=\n)\n(?=\n)", "", out.getvalue(), flags=re.MULTILINE)


def _beside_each_other(table: Accuracies, width: int) -> list[list[Column]]:
    groups: list[list[Column]] = []
    used = width
    for column in table.columns:
        texts = [*_heading(column), *(cell(column, shots) for shots in table.shots)]
        needed = max(map(cell_len, texts)) + 3
        if used + needed > width:
            groups.append([])
            used = len("shots") + 5
        groups[-1].append(column)
        used += needed
    return groups


def _heading(column: Column) -> list[str]:
    method, _, rest = printable(column.heading).partition(" ")
    return [method, *wrap(rest, LONGEST_LINE)]


def as_markdown(table: Accuracies, width: int) -> str:
    """A table with its caption above it."""
    lines = [f"{_markdown(line)}  " for line in (*table.about, table.title)]
    rows = [["shots", *(column.heading for column in table.columns)]]
    rows += [[str(n), *(cell(column, n) for column in table.columns)] for n in table.shots]
    drawn = [f"| {' | '.join(map(_markdown, row))} |" for row in rows]
    drawn.insert(1, f"|{' ---: |' * len(rows[0])}")
    return "\n".join([*lines, "", *drawn]) + "\n"


def _markdown(text: str) -> str:
    escaped = MARKDOWN.sub(r"\\\1", printable(text))
    return "".join(HTML.get(char, char) for char in escaped)


def as_latex(table: Accuracies, width: int) -> str:
    """A table for the package booktabs, a row for each column of the printed one."""
    rows = [["", *(str(n) for n in table.shots)]]
    rows += [[c.heading, *(cell(c, n) for n in table.shots)] for c in table.columns]
    drawn = [" & ".join(map(latex, row)) + r" \\" for row in rows]
    caption = "; ".join([table.title, "columns are shots per class", *table.about])
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * len(table.shots)}}}",
            r"\toprule",
            drawn[0],
            r"\midrule",
            *drawn[1:],
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{latex(caption)}}}",
            r"\end{table}",
            "",
        ]
    )


def latex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return "".join(LATEX.get(char, char) for char in printable(text))


def as_csv(table: Accuracies, width: int) -> str:
    """A row for each entry, kind and number of shots, with accuracies in [0, 1]."""
    out = StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("entry", "kind", "shots", "seeds", "diverged", "mean", "std", "test_images"))
    for column in table.columns:
        for shots, row in column.cells.items():
            spread = column.spread(shots)
            numbers = (spread.mean, spread.std) if spread else (None, None)
            seeds = " ".join(map(str, column.seeds[shots]))
            kind = column.kind or "all"
            start = (printable(column.label), kind, shots, seeds, row.diverged)
            writer.writerow((*start, *numbers, row.test_images))
    return out.getvalue()


Writer = Callable[[Accuracies, int], str]
FORMATS: dict[str, Writer] = {
    "text": as_text,
    "md": as_markdown,
    "tex": as_latex,
    "csv": as_csv,
}
