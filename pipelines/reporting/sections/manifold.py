"""The test images before and after adapting, in two dimensions and in a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import REFERENCE
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.figures import (
    DPI,
    GROUND,
    INK,
    MARKERS,
    SERIES,
    Picture,
    Section,
    drawing,
    label,
    percent,
)
from clip_adapter.pipelines.reporting.sections.classes import MOST_CLASSES, Pair, changed_most
from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.words import counted, printable

MOST_IMAGES = 1500
MOST_LABELS = 12  # that leave the marks to be seen
NEIGHBOURS = 10
SEED = 0
# Twice as many take twice as long, and keep as many neighbours (the digits: trustworthiness 0.993).
STEPS = 500
COLORS = SERIES[:-1]  # marks are one raster image, in which black is lost in the dark theme
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Space:
    """before, after: (N, K) of the same N images. labels: (N,). what: they are, in words."""

    before: Rows
    after: Rows
    labels: npt.NDArray[np.int32]
    what: str


def space_of(cache: FeatureCache, entry: Entry, adapter: SavedAdapter, pair: Pair) -> Space:
    """Up to 1,500 test images of the classes that changed most, at most 20 of them.

    Image features where the method moves those; else logits, before of zero-shot CLIP.
    """
    method, info = entry.method, adapter.info
    classes = changed_most(pair, MOST_CLASSES)
    labels = cache.labels("test")
    rows = np.flatnonzero(np.isin(labels, classes))
    if len(rows) > MOST_IMAGES:
        rows = np.sort(np.random.default_rng(SEED).choice(rows, MOST_IMAGES, replace=False))
    features = cache.features("test", rows, views=1)[0]
    source = features
    if "projection" in method.needs:
        source = cache.pre_projection("test", rows, views=1)[0]
    head = Head(adapter.weights, np.float32(info.logit_scale), np.float32(info.logit_bias))
    if method.adapt:
        after = method.adapt(np, adapter.arrays, info.setting, source, head)
        return Space(features, after, labels[rows], "image features")
    before = REFERENCE.logits(np, {}, {}, features, head)
    return Space(before, adapter.logits(source), labels[rows], "logits")


def manifold_section(space: Space, pair: Pair, name: str) -> Section:
    """t-SNE and k-nearest-neighbour accuracy, by the cosine distance.

    name: of the adapter whose features these are.
    """
    sides = {
        "before": (space.before, pair.before_name),
        "after": (space.after, name),
    }
    right = {when: neighbour_agreement(rows, space.labels) for when, (rows, _) in sides.items()}
    spread = {when: silhouette(rows, space.labels) for when, (rows, _) in sides.items()}
    numbers = _by_class(space, pair, right)
    pictures = [
        _drawn(when, title, rows, space, pair, numbers, float(right[when].mean()))
        for when, (rows, title) in sides.items()
    ]
    kinds = (
        "the image features that are compared with the classes"
        if space.what == "image features"
        else "logits, as this method moves the classifier and no image feature; before are those "
        "of zero-shot CLIP"
    )
    classes = len(np.unique(space.labels))
    text = [
        f"{counted(len(space.labels), 'test image')} of {counted(classes, 'class', 'classes')}"
        + ("" if classes == len(pair.class_names) else " (those that changed most)")
        + f", of one adapter ({name}): {kinds}. The same images before and after, by t-SNE with a "
        "fixed seed. Distances between far groups mean nothing in such a picture; the numbers "
        "below are computed on the features themselves.",
        f"The {NEIGHBOURS} nearest other images agree with an image's class for "
        f"{percent(float(right['before'].mean()), 1)} % before and "
        f"{percent(float(right['after'].mean()), 1)} % after; the silhouette is "
        f"{spread['before']:.3f} before and {spread['after']:.3f} after.",
    ]
    return Section("Test images before and after", text, pictures)


def neighbour_agreement(rows: Rows, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """(N,) whether most of each image's 10 nearest others, by cosine, have its class (of classes
    with equally many the lowest label counts)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    count = min(NEIGHBOURS, len(rows) - 1)
    nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
    votes = np.stack([np.sum(labels[nearest] == c, axis=1) for c in np.unique(labels)], axis=1)
    return np.unique(labels)[votes.argmax(axis=1)] == labels


def silhouette(rows: Rows, labels: npt.NDArray[np.int32]) -> float:
    """Mean silhouette by the cosine distance (Rousseeuw 1987); NaN where one class is left."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(rows, labels, metric="cosine"))


def embedded(rows: Rows) -> npt.NDArray[np.float32]:
    """(N, 2): t-SNE by the cosine distance, with a fixed seed."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(
        metric="cosine", init="pca", perplexity=perplexity, max_iter=STEPS, random_state=SEED
    )
    # In one thread sums have a fixed order; two that share a busy processor took nine times as
    # long, as they wait for each other in every step.
    with threadpool_limits(1):
        return tsne.fit_transform(rows)


def _by_class(space: Space, pair: Pair, right: dict[str, npt.NDArray[np.bool_]]) -> Table:
    rows = []
    for c in np.unique(space.labels).tolist():
        own = space.labels == c
        shares = [percent(float(some[own].mean()), 1) for some in right.values()]
        rows.append([printable(pair.class_names[c]), str(int(own.sum())), *shares])
    caption = f"images whose {NEIGHBOURS} nearest others agree with their class"
    return Table(["class", "images", "before %", "after %"], rows, caption)


def _drawn(
    when: str,
    name: str,
    rows: Rows,
    space: Space,
    pair: Pair,
    numbers: Table,
    agreement: float,
) -> Picture:
    places = embedded(rows)
    classes = np.unique(space.labels).tolist()
    listed = len(classes) > MOST_LABELS
    with drawing((3.9, 5.2 if listed else 3.9)) as (figure, axes):
        for number, c in enumerate(classes):
            own = places[space.labels == c]
            color = COLORS[number % len(COLORS)]
            marker = MARKERS[number // len(COLORS) % len(MARKERS)]
            # As one raster image: thousands of marks would weigh more than the rest of the page.
            look: dict[str, Any] = {"marker": marker, "alpha": 0.75, "linewidths": 0}
            name_of = label(pair.class_names[c])
            axes.scatter(
                own[:, 0], own[:, 1], 9, color=color, rasterized=True, label=name_of, **look
            )
            if listed:
                continue
            x, y = np.median(own, axis=0)
            axes.text(
                x,
                y,
                name_of,
                color=INK,
                fontsize=7,
                ha="center",
                va="center",
                bbox={"facecolor": GROUND, "alpha": 0.55, "pad": 0.6, "edgecolor": "none"},
            )
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(name)
        if listed:
            figure.legend(loc="outside lower center", ncols=2, fontsize=7, markerscale=1.5)
        where = "the legend names classes" if listed else "labels stand at their class's median"
        figure.set_dpi(DPI)
        return Picture(
            f"features-{when}",
            f"{space.what.capitalize()} {when} adapting ({name}); {where}.",
            f"Scatter plot of test images {when} adapting; the nearest neighbours agree with the "
            f"class of {percent(agreement, 1)} % of them.",
            figure,
            numbers,
        )
