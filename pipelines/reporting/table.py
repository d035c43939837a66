"""A table, printed as text, Markdown, LaTeX and CSV; the page prints it as HTML."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import product
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

from rich.cells import cell_len

from clip_adapter.pipelines.scoring.prediction_formats import cell as csv_cell
from clip_adapter.words import printable

NOTHING = "–"
NARROWEST = 20
LONGEST_LINE, SHORTEST_LINE = 24, 16  # of a name, whose rest goes on below
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


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first columns, as many as `names` says, name the rows.

    rows: of words, but for CSV, which takes numbers as they are and None for nothing. label: for
    LaTeX. kinds: of each row what it measures; LaTeX prints the best of a kind in each column bold.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    names: int = 1
    label: str = ""
    kinds: Sequence[str] = ()

    def text(self, width: int) -> str:
        """Lines of at most `width` characters where that can be: columns that do not fit beside
        each other stand below each other, each time behind the names."""
        longest = max(SHORTEST_LINE, min(LONGEST_LINE, width // 3))
        every = (self.head, *self.rows)
        cells = [[_folded(printable(cell), longest) for cell in row] for row in every]
        columns = zip(*cells, strict=True)
        widths = [max(cell_len(line) for cell in column for line in cell) for column in columns]
        parts = []
        for places in self._beside_each_other(widths, width):
            head, *rows = (self._lines(row, widths, places) for row in cells)
            rule = " " + "─" * (sum(widths[place] + 3 for place in places) - 1)
            parts.append("\n".join([*head, rule, *(line for row in rows for line in row)]) + "\n")
        caption = "".join(f"{line}\n" for line in wrap(printable(self.caption), width))
        return caption + "\n".join(parts)

    def _beside_each_other(self, widths: Sequence[int], width: int) -> list[list[int]]:
        names = list(range(self.names))
        groups: list[list[int]] = []
        used = width
        for place in range(self.names, len(widths)):
            if used + widths[place] + 3 > width:
                groups.append([*names])
                used = sum(widths[name] + 3 for name in names) - 1
            groups[-1].append(place)
            used += widths[place] + 3
        return groups or [names]

    def _lines(
        self, row: Sequence[Sequence[str]], widths: Sequence[int], places: Sequence[int]
    ) -> Iterator[str]:
        for number in range(max(len(row[place]) for place in places)):
            words = []
            for place in places:
                line = row[place][number] if number < len(row[place]) else ""
                blank = " " * (widths[place] - cell_len(line))
                words.append(line + blank if place < self.names else blank + line)
            yield "  " + "   ".join(words).rstrip()

    def markdown(self) -> str:
        """With its caption above it."""
        drawn = [f"| {' | '.join(map(markdown, row))} |" for row in (self.head, *self.rows)]
        numbers = len(self.head) - self.names
        drawn.insert(1, f"|{' --- |' * self.names}{' ---: |' * numbers}")
        caption = [markdown(self.caption), ""] if self.caption else []
        return "\n".join([*caption, *drawn, ""])

    def latex(self) -> str:
        """For the package booktabs."""
        rows = [list(map(latex, row)) for row in self.rows]
        for row, column in self._best():
            rows[row][column] = rf"\textbf{{{rows[row][column]}}}"
        head, *drawn = (" & ".join(row) + r" \\" for row in (map(latex, self.head), *rows))
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\begin{{tabular}}{{{'l' * self.names}{'r' * (len(self.head) - self.names)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *drawn,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{latex(self.caption)}}}",
                rf"\label{{tab:{re.sub('[^a-z0-9]+', '-', self.label.lower()).strip('-')}}}",
                r"\end{table}",
                "",
            ]
        )

    def _best(self) -> Iterator[tuple[int, int]]:
        """The places of the highest mean of each kind in each column, as printed, where there are
        several; where they are equal all of them."""
        for column, kind in product(range(self.names, len(self.head)), dict.fromkeys(self.kinds)):
            means = {
                number: float(row[column].split(" ")[0])
                for number, row in enumerate(self.rows)
                if self.kinds[number] == kind and row[column] != NOTHING
            }
            if len(means) > 1:
                yield from ((row, column) for row in means if means[row] == max(means.values()))

    def csv(self) -> str:
        """Words as no program takes them for a formula."""
        text = StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.head)
        for row in self.rows:
            writer.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in row])
        return text.getvalue()


def _folded(name: str, longest: int) -> list[str]:
    """On several lines, the first word alone, where it is longer than one should be."""
    if len(name) <= longest:
        return [name]
    first, _, rest = name.partition(" ")
    return [first, *wrap(rest, longest)]


def markdown(text: str) -> str:
    """`text` as Markdown, and HTML made of it, show it."""
    escaped = MARKDOWN.sub(r"\\\1", printable(text))
    return "".join(HTML.get(char, char) for char in escaped)


def latex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return "".join(LATEX.get(char, char) for char in printable(text))


def terminal_width() -> int:
    """Columns of the terminal; a terminal of none (COLUMNS=0) is none."""
    return max(get_terminal_size((110, 24)).columns, NARROWEST)
