"""The table of accuracies, those of ablations and of pairs, as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import StringIO
from itertools import product
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.results import MethodSummary, Spread
from clip_adapter.pipelines.fitting.tables import accuracy
from clip_adapter.pipelines.reporting.ablations import Ablation
from clip_adapter.pipelines.reporting.accuracies import Accuracies, Column
from clip_adapter.pipelines.reporting.figures import Numbers
from clip_adapter.pipelines.reporting.pairs import Pairs
from clip_adapter.pipelines.scoring.prediction_formats import cell as as_cell
from clip_adapter.words import printable

NOTHING = "–"
LONGEST_LINE, SHORT_LINE = 24, 16  # of a heading, and where names head rows as well
# What Markdown, or HTML in it, and LaTeX would not print as it is.
MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$])")
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{char: f"\\{char}" for char in "{}$&#%_"},
}


def cell(column: Column, shots: Shots) -> str:
    """`92.96 ± 0.50`, or a dash where there is no number."""
    row = column.cells.get(shots)
    return accuracy(row, column.measure) if row else NOTHING


def as_text(
    table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs], width: int
) -> str:
    """Lines of at most `width` characters where that can be: columns that do not fit beside each
    other stand in tables below each other."""
    about = (
        "\n".join(wrap(printable(line), width, subsequent_indent="  ")) for line in table.about
    )
    headings = [_folded(column.heading) for column in table.columns]
    drawn = [_text(_by_shots(table, headings), width)]
    drawn += [_text(ablation.numbers, width) for ablation in ablations]
    for numbers in (one.numbers for one in pairs):
        head = [_folded(name, SHORT_LINE) for name in numbers.head]
        rows = [[name, *row[1:]] for name, row in zip(head[1:], numbers.rows, strict=True)]
        drawn.append(_text(replace(numbers, head=head, rows=rows), width))
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
        max(cell_len(line) for cell in column for line in cell.split("\n")) + 3
        for column in zip(numbers.head, *numbers.rows, strict=True)
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


def _folded(name: str, longest: int = LONGEST_LINE) -> str:
    """Of an entry, on several lines."""
    method, _, rest = printable(name).partition(" ")
    return "\n".join([method, *wrap(rest, longest)])


def as_markdown(
    table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs], width: int
) -> str:
    """Tables, each with its caption above it."""
    accuracies = _by_shots(table, [column.heading for column in table.columns])
    about = "".join(f"{markdown(line)}  \n" for line in table.about)
    further = [*(one.numbers for one in ablations), *(one.numbers for one in pairs)]
    drawn = map(_markdown_table, (accuracies, *further))
    return about + "\n".join(drawn)


def _markdown_table(numbers: Numbers) -> str:
    drawn = [f"| {' | '.join(map(markdown, row))} |" for row in (numbers.head, *numbers.rows)]
    drawn.insert(1, f"|{' ---: |' * len(numbers.head)}")
    return "\n".join([f"{markdown(numbers.caption)}  ", "", *drawn]) + "\n"


def markdown(text: str) -> str:
    """`text` as Markdown, and HTML made of it, show it."""
    escaped = MARKDOWN.sub(r"\\\1", printable(text))
    return "".join(HTML.get(char, char) for char in escaped)


def as_latex(
    table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs], width: int
) -> str:
    """Tables for the package booktabs, with the best of each column in bold: a row for each column
    of the printed table of accuracies, and for each value of an ablation."""
    rows = [[c.heading, *(cell(c, n) for n in table.shots)] for c in table.columns]
    caption = "; ".join([table.title, "columns are shots per class", *table.about])
    accuracies = Numbers(["", *map(str, table.shots)], rows, caption)
    drawn = [_latex_table(accuracies, (table.dataset, "accuracy"), [c.kind for c in table.columns])]
    for ablation in ablations:
        alike = [""] * len(ablation.series)
        drawn.append(_latex_table(ablation.numbers, (table.dataset, ablation.name), alike))
    drawn += [_latex_table(one.numbers, (table.dataset, "pairs")) for one in pairs]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(drawn)


def _latex_table(numbers: Numbers, name: Sequence[str], kinds: Sequence[str] = ()) -> str:
    """name: its parts, for the label. kinds: of each row what it measures; the best of a kind in
    each column is marked, as printed: several where they are equal."""
    rows = [list(map(latex, row)) for row in numbers.rows]
    for row, column in _best(numbers, kinds):
        rows[row][column] = rf"\textbf{{{rows[row][column]}}}"
    drawn = [" & ".join(row) + r" \\" for row in (map(latex, numbers.head), *rows)]
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
            rf"\label{{tab:{'-'.join(filter(None, map(_slug, name)))}}}",
            r"\end{table}",
            "",
        ]
    )


def _best(numbers: Numbers, kinds: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The places of the highest mean of each kind in each column, where there are several."""
    for column, kind in product(range(1, len(numbers.head)), dict.fromkeys(kinds)):
        means = {
            row: float(cells[column].split(" ")[0])
            for row, cells in enumerate(numbers.rows)
            if kinds[row] == kind and cells[column] != NOTHING
        }
        if len(means) > 1:
            yield from ((row, column) for row in means if means[row] == max(means.values()))


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def latex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return "".join(LATEX.get(char, char) for char in printable(text))


def as_csv(
    table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs], width: int
) -> str:
    """A row for each entry, kind and number of shots, with accuracies in [0, 1]; `factor` and
    `value` are those of an ablation, and empty in the rows of the table of accuracies. In rows of
    the factor `against` the value is another entry, and the mean is the difference from it."""
    out = StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    heads = ("entry", "kind", "shots", "seeds", "diverged", "mean", "std", "test_images")
    writer.writerow((*heads, "factor", "value", "p", "p_holm"))
    for column in table.columns:
        for shots, row in column.cells.items():
            numbers = _numbers(column.seeds[shots], row, column.spread(shots))
            writer.writerow((as_cell(column.label), column.kind or "all", *numbers, *[""] * 4))
    for ablation in ablations:
        for one in ablation.series:
            label = f"{one.method} ({ablation.folder})" if ablation.folder else one.method
            for shots, row in one.cells.items():
                numbers = _numbers(one.seeds[shots], row, row.test_accuracy)
                start = (as_cell(label), ablation.kind or "all")
                writer.writerow((*start, *numbers, ablation.factor, printable(one.value), "", ""))
    for at in pairs:
        for a in at.found:
            numbers = (at.shots, " ".join(map(str, a.seeds)), "", a.difference, "", a.images)
            start, end = (as_cell(a.one), a.classes), (a.p, a.corrected)
            writer.writerow((*start, *numbers, "against", as_cell(a.other), *end))
    return out.getvalue()


def _numbers(seeds: Sequence[int], row: MethodSummary, spread: Spread | None) -> tuple:
    means = (spread.mean, spread.std) if spread else (None, None)
    return (row.shots, " ".join(map(str, seeds)), row.diverged, *means, row.test_images)


Writer = Callable[[Accuracies, Sequence[Ablation], Sequence[Pairs], int], str]
FORMATS: dict[str, Writer] = {
    "text": as_text,
    "md": as_markdown,
    "tex": as_latex,
    "csv": as_csv,
}
