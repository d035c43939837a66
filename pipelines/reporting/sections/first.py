"""The first screen: did adapting help, by how much, with which setting, how sure?"""

from __future__ import annotations

from dataclasses import dataclass

from clip_adapter.adapters.registry import REFERENCE
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.reporting.beside_the_mean import chosen_settings, guess
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.figures import percent, points
from clip_adapter.pipelines.reporting.significance import DRAWS, Interval
from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.pipelines.reporting.verdict import Difference, Verdict


@dataclass(frozen=True)
class Fact:
    """A number in large print, what it is, and a line below it."""

    number: str
    what: str
    below: str = ""


@dataclass(frozen=True)
class First:
    """answer: a few words. sentence: what they rest on. how_sure: a paragraph each."""

    answer: str
    sentence: str
    facts: list[Fact]
    how_sure: list[str]
    settings: Table | None


def first_screen(verdict: Verdict | None) -> First:
    if verdict is None:
        words = "No method that was asked for has a test accuracy, so there is nothing to compare."
        return First("There is no test accuracy.", words, [], [], None)
    entry, shots = verdict.entry, verdict.shots
    row = entry.summary[shots]
    accuracy = row.test_accuracy
    assert accuracy is not None
    at = _at(shots)
    over = f", mean over {row.seeds} seeds" if row.seeds > 1 else ""
    sentence = (
        f"{entry.label} at {at} is right on {percent(accuracy.mean)} % of "
        f"{row.test_images:,} test images{_of(entry)}{over}."
    )
    if row.uneven and row.balanced_accuracy:
        balanced = percent(row.balanced_accuracy.mean)
        sentence += f" Its balanced accuracy, the mean recall over the classes, is {balanced} %."
    tested = next(iter(entry.predictions(shots).values()))
    guessed = guess(tested, entry.first.class_names)
    sentence += f" {guessed.words}."
    spread = "" if accuracy.std is None else f"± {100 * accuracy.std:.2f} over {row.seeds} seeds"
    facts = [Fact(f"{percent(accuracy.mean)} %", entry.label, spread or "one seed")]
    zero, best = verdict.zero_shot, verdict.next_best
    how_sure = []
    answer = "Zero-shot CLIP was not run, so whether adapting helped is not known."
    if entry.method is REFERENCE:
        answer = "Nothing was adapted: this is zero-shot CLIP."
    if zero:
        answer = {1: "Yes, adapting helped.", -1: "No, adapting hurt.", 0: "Not beyond noise."}[
            zero.sign
        ]
        facts.insert(0, Fact(f"{percent(zero.theirs)} %", zero.other.label, "the same images"))
        facts.append(
            Fact(points(zero.images.mean), f"points against {zero.other.label}", _noise(zero))
        )
        how_sure.append(_sure(zero))
    if best:
        facts.append(
            Fact(points(best.images.mean), f"points against {best.other.label}", _noise(best))
        )
        how_sure.append(_sure(best))
        sentence += _rival(best)
    if guessed.beats(accuracy.mean):
        answer = f"Worse than {guessed.short}. {answer}"
    chosen = f"{entry.label} is what validation prefers among the methods that were asked for"
    if all(result.val_accuracy is None for result in entry.results(shots)):
        chosen = (
            f"{entry.label} is the first of the methods that were asked for, without validation"
        )
    beside = f"; {best.other.label} is the best of the others on the test images" if best else ""
    how_sure.append(f"{chosen}, and no test image chose it{beside}.")
    return First(answer, sentence, facts, how_sure, chosen_settings(entry, shots))


def _rival(best: Difference) -> str:
    name, theirs = best.other.label, percent(best.theirs)
    words = {
        1: f"The next best, {name} ({theirs} %), is behind it beyond noise.",
        -1: f"A method that was run beside it, {name} ({theirs} %), did better beyond noise.",
        0: f"The best of the others, {name} ({theirs} %), is within noise of it.",
    }
    return " " + words[best.sign]


def _at(shots: Shots) -> str:
    return {1: "1 shot", "all": "all training images"}.get(shots, f"{shots} shots")


def _of(entry: Entry) -> str:
    return "" if entry.train_classes == "all" else " of the base classes, the ones it was fitted on"


def _noise(difference: Difference) -> str:
    return f"within noise of the {difference.noise}" if difference.noise else "beyond noise"


def _sure(difference: Difference) -> str:
    """The two intervals of a difference, in words."""
    name = difference.other.label
    images = (
        f"Against {name}: {points(difference.images.mean)} points, 95 % interval "
        f"{_ends(difference.images)} over the test images (paired bootstrap, {DRAWS:,} draws)"
    )
    count = len(difference.seeds)
    seeds = (
        f" and {_ends(difference.spread)} over {count} seeds (Student's t)."
        if difference.spread
        else "; one seed, so how it varies with the draw of the images is not known."
    )
    verdict = {1: " It is better beyond noise.", -1: " It is worse beyond noise."}
    within = f" That is within the noise of the {difference.noise}." if difference.noise else ""
    return images + seeds + verdict.get(difference.sign, within)


def _ends(interval: Interval) -> str:
    return f"{points(interval.low)} to {points(interval.high)}"
