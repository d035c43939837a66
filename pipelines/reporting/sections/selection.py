"""What validation saw: accuracy over a grid's axes, and what it chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

import numpy as np

from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.record import Fit
from clip_adapter.pipelines.reporting.entries import Entry, in_order
from clip_adapter.pipelines.reporting.figures import (
    INK,
    Picture,
    Section,
    drawing,
    percent,
    series,
)
from clip_adapter.pipelines.reporting.searches import best_by, of_every_seed, ordered, read_fits
from clip_adapter.pipelines.reporting.table import Table

MOST_PANELS = 3
MOST_TICKS = 7
TICK_DIGITS = 3
MOST_CELLS = 60  # with a number in each
MOST_ROWS = 60
BEST_ROWS = 20


def selection_section(entries: Sequence[Entry]) -> Section | None:
    """Of the methods that were asked for and had something to choose; None where none had."""
    pictures: list[Picture] = []
    for number, (entry, fits, axes) in enumerate(_searched(entries)):
        if not axes:
            continue
        pictures.append(_curve(f"selection-{number}", entry, entries, fits, axes[0]))
        if len(axes) > 1:
            for shots in _judged(fits)[-MOST_PANELS:]:
                name = f"selection-{number}-{shots}"
                pictures.append(_surface(name, entry, fits, axes[:2], shots))
    if not pictures:
        return None
    text = [
        "Validation accuracy of everything that was tried; the best one is chosen, task by task. "
        "No test image is counted here. A point is the best over all other hyper-parameters. "
        "Values stand evenly spaced. Curves leave out values that only some seeds tried, or that "
        "diverged in some: a mean over other seeds at each value would draw the seeds' "
        "differences. A choice that is left out so has no ring."
    ]
    if any(entry.first.plan.search == "halving" for entry in entries):
        text.append("Settings that successive halving stopped count as far as they were trained.")
    return Section("What validation chose", text, pictures)


def drawn_at_most_shots(entries: Sequence[Entry]) -> bytes | None:
    """A PNG of the first entry that had something to choose, over two hyper-parameters or one."""
    for entry, fits, axes in _searched(entries):
        if len(axes) > 1:
            return _surface("validation", entry, fits, axes[:2], _judged(fits)[-1]).png
        if axes:
            return _curve("validation", entry, entries, fits, axes[0]).png
    return None


def _searched(entries: Sequence[Entry]) -> Iterator[tuple[Entry, list[Fit], list[str]]]:
    """Each entry that was asked for, its fits, and the hyper-parameters to draw them over, none
    where there is nothing to see."""
    for entry in entries:
        if entry.asked and not entry.held:
            fits = read_fits(entry)
            yield entry, fits, _varied(entry, fits) if _judged(fits) else []


def _judged(fits: Sequence[Fit]) -> list[Shots]:
    """The numbers of shots at which some setting did not diverge."""
    return in_order({fit.shots for fit in fits if fit.accuracy is not None})


def _varied(entry: Entry, fits: Sequence[Fit]) -> list[str]:
    """The hyper-parameters that took several values, in the method's order: first those some
    values of which have a meaning, then numbers, then words."""
    hyper = entry.method.hyper
    seen = {name: {fit.values[name] for fit in fits if name in fit.values} for name in hyper}
    varied = [name for name, values in seen.items() if len(values) > 1]
    return sorted(varied, key=lambda name: (not hyper[name].meaning, not hyper[name].is_numeric))


def _words(method: Method, name: str) -> str:
    return method.flag(name).replace("_", " ")


def _short(value: str, digits: int = 6) -> str:
    try:
        return f"{float(value):.{digits}g}"
    except ValueError:
        return value


def _meaning(entry: Entry, name: str, fits: Sequence[Fit]) -> dict[str, str]:
    """What some values amount to, in words, where they mean it: of two such hyper-parameters that
    have an effect together neither does."""
    hyper: Hyper = entry.method.hyper[name]
    others = [n for n, h in entry.method.hyper.items() if h.meaning and n != name]
    if any(other in fit.values for fit in fits for other in others):
        return {}
    return {f"{value:g}": words for value, words in hyper.meaning.items()}


def _curve(
    name: str, entry: Entry, entries: Sequence[Entry], fits: Sequence[Fit], axis: str
) -> Picture:
    """Validation accuracy against one hyper-parameter, a line for each number of shots."""
    meaning = _meaning(entry, axis, fits)
    by_shots = {
        shots: {
            key[0]: seeds
            for key, seeds in of_every_seed(
                best_by([f for f in fits if f.shots == shots], [axis])
            ).items()
        }
        for shots in in_order({fit.shots for fit in fits})
    }
    known = {_short(value) for own in by_shots.values() for value in own}
    for value, words in meaning.items():
        same = next((e for e in entries if e.method.name == words), None)
        if value in known or same is None:
            continue
        # What the value amounts to was run by itself, and judged on the same images.
        for shots, own in by_shots.items():
            alike = [r for r in same.results(shots) if r.seed in {f.seed for f in fits}]
            accuracies = {r.seed: r.val_accuracy for r in alike if r.val_accuracy is not None}
            if accuracies:
                own[value] = accuracies
    values = ordered({value for own in by_shots.values() for value in own})
    chosen = {shots: _chosen(entry, shots, (axis,)) for shots in by_shots}
    rows = []
    with drawing() as (figure, axes):
        for number, (shots, own) in enumerate(by_shots.items()):
            there = [value for value in values if own.get(value)]
            means = [100 * fmean(own[value].values()) for value in there]
            look = series(number)
            dense = len(values) > MOST_TICKS * 2
            axes.plot(
                [values.index(value) for value in there],
                means,
                label=shots_words(shots),
                color=look["color"],
                linestyle=look["linestyle"],
                marker="" if dense else look["marker"],
                markersize=4,
            )
            for value, mean in zip(there, means, strict=True):
                times = chosen[shots][(_short(value),)]
                if times:
                    place = values.index(value)
                    axes.plot(
                        place, mean, "o", ms=7 + 2 * times, mfc="none", mec=look["color"], mew=1.3
                    )
                several = list(own[value].values())
                spread = f" ± {100 * stdev(several):.2f}" if len(several) > 1 else ""
                note = f" ({meaning[_short(value)]})" if _short(value) in meaning else ""
                count = str(times) if times else "–"
                rows.append([str(shots), _short(value) + note, f"{mean:.2f}{spread}", count])
        ticks = _thinned(len(values))
        named = [(_short(values[tick]), _short(values[tick], TICK_DIGITS)) for tick in ticks]
        axes.set_xticks(ticks, [f"{s}\n{meaning[v]}" if v in meaning else s for v, s in named])
        axes.set_xlabel(_words(entry.method, axis))
        axes.set_ylabel("validation accuracy (%)")
        axes.set_title(entry.label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        return Picture(
            name,
            f"{entry.label}: validation accuracy against {_words(entry.method, axis)}, mean over "
            "seeds. Rings mark what was chosen, larger ones by more seeds.",
            f"Line chart of validation accuracy against {_words(entry.method, axis)} for "
            f"{entry.label}; chosen: {_chosen_words(chosen)}.",
            figure,
            _cut(
                Table(
                    ["shots", _words(entry.method, axis), "validation %", "chosen by seeds"], rows
                )
            ),
        )


def _surface(
    name: str, entry: Entry, fits: Sequence[Fit], pair: Sequence[str], shots: Shots
) -> Picture:
    """Validation accuracy over two hyper-parameters."""
    cells: dict[tuple[str, ...], dict[int, float]]
    cells = best_by([fit for fit in fits if fit.shots == shots], pair)
    across, upwards = (ordered({key[place] for key in cells}) for place in (0, 1))
    if len(upwards) > len(across):
        pair, across, upwards = pair[::-1], upwards, across
        cells = {key[::-1]: seeds for key, seeds in cells.items()}
    grid = np.full((len(upwards), len(across)), np.nan)
    for (x, y), seeds in cells.items():
        if seeds:
            grid[upwards.index(y), across.index(x)] = 100 * fmean(seeds.values())
    chosen = _chosen(entry, shots, pair)
    names = [_words(entry.method, each) for each in pair]
    ranked = sorted(((m, key) for key, s in cells.items() if s and (m := fmean(s.values()))))[::-1]
    rows = [
        [*map(_short, key), percent(mean), str(chosen[tuple(map(_short, key))] or "–")]
        for mean, key in ranked
    ]
    plural = "s" * (shots != 1)
    with drawing() as (figure, axes):
        image = axes.imshow(
            grid, origin="lower", aspect="auto", cmap="cividis", interpolation="none"
        )
        axes.grid(False)
        bar = figure.colorbar(image, label="validation accuracy (%)")
        bar.outline.set_visible(False)
        if grid.size <= MOST_CELLS:
            middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
            for (y, x), value in np.ndenumerate(grid):
                words = "–" if np.isnan(value) else f"{value:.1f}"
                color = INK if np.isnan(value) else "#ffffff" if value <= middle else "#000000"
                axes.text(x, y, words, ha="center", va="center", color=color, fontsize=7)
        for (across_value, upwards_value), times in chosen.items():
            column, row = _index(across, across_value), _index(upwards, upwards_value)
            if column is not None and row is not None:
                for edge, width in (("#000000", 3.0), ("#ffffff", 1.4)):
                    axes.plot(column, row, "o", mfc="none", ms=8 + 2 * times, mec=edge, mew=width)
        for ticks, values, put in (
            (_thinned(len(across)), across, axes.set_xticks),
            (_thinned(len(upwards)), upwards, axes.set_yticks),
        ):
            put(ticks, [_short(values[tick], TICK_DIGITS) for tick in ticks])
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(f"{entry.label}, {shots} shot{plural}")
        return Picture(
            name,
            f"{entry.label} at {shots} shot{plural}: validation accuracy over {names[0]} and "
            f"{names[1]}, mean over seeds. Rings mark what was chosen, larger ones by more seeds.",
            f"Heat map of validation accuracy over {names[0]} and {names[1]} for {entry.label} at "
            f"{shots} shot{plural}; chosen: {_chosen_words({shots: chosen})}.",
            figure,
            _cut(Table([*names, "validation %", "chosen by seeds"], rows), best_first=True),
        )


def _chosen(entry: Entry, shots: Shots, names: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Values → how many seeds chose them."""
    settings = [row.setting for row in entry.results(shots) if row.setting]
    return Counter(
        tuple(_short(str(setting[name])) for name in names)
        for setting in settings
        if all(name in setting for name in names)
    )


def _chosen_words(chosen: dict[Shots, Counter[tuple[str, ...]]]) -> str:
    return "; ".join(
        f"at {shots_words(shots)} {', '.join(' and '.join(values) for values in counts)}"
        for shots, counts in chosen.items()
    )


def _cut(numbers: Table, *, best_first: bool = False) -> Table:
    """A table that a page can hold; results.csv has everything."""
    if len(numbers.rows) <= MOST_ROWS:
        return numbers
    rows = numbers.rows if best_first else sorted(numbers.rows, key=lambda r: r[-1] == "–")
    count = f"{BEST_ROWS} of {len(rows):,} rows"
    kept = "the best" if best_first else "what was chosen first"
    return Table(numbers.head, rows[:BEST_ROWS], f"{count}, {kept}; results.csv has all")


def _thinned(count: int) -> list[int]:
    step = -(-count // MOST_TICKS)
    return list(range(0, count, step))


def _index(values: Sequence[str], wanted: str) -> int | None:
    return next((n for n, value in enumerate(values) if _short(value) == wanted), None)
