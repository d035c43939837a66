"""`clip-adapter audit`: look through the labelled images of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from clip_adapter.cores import limit_openmp
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.deciding.audit import FEW, Audit, AuditConfig, audit
from clip_adapter.words import counted, printable, same_text, shortened, some

SHOWN = 10  # images, and groups of twins, that stand on the terminal; the table has all


def print_audit(config: AuditConfig) -> None:
    """Run `audit` and print what it finds."""
    found = audit(config)
    count = counted(len(found.ids), "labelled image")
    print(f"{count} of {counted(len(found.class_names), 'class', 'classes')}")
    for part in (_labels, _twins, _classes):
        print("\n".join(["", *part(found)]))
    if config.out:
        print(f"\n{config.out}: all images, what to look at first")
    if config.html:
        print(f"\n{config.html}: what is listed, with the pictures that were found")


def _labels(found: Audit) -> Iterator[str]:
    """Those that are listed, with what the other images say of them."""
    listed = np.flatnonzero(found.listed)
    number = len(listed)
    if not number:
        judged = np.count_nonzero(~np.isnan(found.probabilities))
        yield (
            "labels: every label has 5 % or more by all other images"
            if judged
            else "labels: every image is the only one of its class, so that no other speaks of it"
        )
        return
    yield f"labels: look at {counted(number, 'image')}; behind each the likeliest other class"
    columns = found.columns()
    for row in listed[:SHOWN].tolist():
        image, _, label, p, other, q, *_ = (column[row] for column in columns.values())
        shown = f"{_name(image)}  {_name(label)} {100 * p:.1f} %"
        yield f"  {shown}  {'rather' if q > p else 'next'} {_name(other)} {100 * q:.1f} %"
    if number > SHOWN:
        yield f"  … and {number - SHOWN:,} more; --out lists them"


def _twins(found: Audit) -> Iterator[str]:
    """Groups of images that are equal or near-equal."""
    twins = found.twins
    if not twins.count:
        yield "twins: no two images are equal or near-equal"
        return
    images = int(np.count_nonzero(twins.groups >= 0))
    equal = len(np.unique(twins.equal))
    yield (
        f"twins: {counted(images, 'image')} in {counted(twins.count, 'group')} of near-equal ones, "
        f"{equal:,} of them equal; look whether they are the same thing"
    )
    for number in range(min(twins.count, SHOWN)):
        rows = np.flatnonzero(twins.groups == number)
        yield (
            "  "
            + ", ".join(
                f"{found.splits[row]}: {_name(found.ids[row])}" for row in rows[:4].tolist()
            )
            + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        )
    if twins.count > SHOWN:
        yield f"  … and {twins.count - SHOWN:,} more groups; --out lists them"
    if disagreeing := int(np.count_nonzero(twins.disagree(found.labels))):
        yield f"  {counted(disagreeing, 'image has', 'images have')} a twin with another label"
    for each in found.accuracies:
        left = "no image is left without"
        if each.twins < each.images:
            left = f"{100 * each.without_twins:.2f} % without"
        yield (
            f"  {each.twins:,} of {each.images:,} {each.split} images have a twin in another "
            f"split: gda on train gets {100 * each.with_twins:.2f} % right with these, {left}"
        )


def _classes(found: Audit) -> Iterator[str]:
    """Classes whose texts are alike, and small ones."""
    lines = []
    if found.one_text:
        lines.append(same_text(found.one_text))
    if found.near_text:
        groups = "; ".join(map(some, found.near_text[:SHOWN]))
        rest = len(found.near_text) - SHOWN
        more = f" and {counted(rest, 'more group')}" if rest > 0 else ""
        lines.append(
            f"these have nearly the same text, so that zero-shot mixes them up: {groups}{more}"
        )
    if found.few:
        named = some([f"{name} ({count})" for name, count in found.few.items()])
        lines.append(f"fewer than {FEW} training images: {named}")
    yield (
        "classes:" if lines else "classes: each has a text of its own, and images enough for folds"
    )
    yield from (f"  {printable(line)}" for line in lines)


def _name(text: str) -> str:
    return shortened(printable(text), 60)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter audit`."""
    limit_openmp()
    run_command(AuditConfig, print_audit, "clip-adapter audit", arguments)
