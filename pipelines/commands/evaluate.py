"""`clip-adapter evaluate`: score a saved adapter, and zero-shot beside it, on labelled images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from clip_adapter import files
from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.cores import available_cores, limit_openmp
from clip_adapter.errors import UserError
from clip_adapter.extract.config import check_work
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import EXIT_PARTIAL, run_command
from clip_adapter.pipelines.deciding.answers import Answers, answers_of
from clip_adapter.pipelines.deciding.hidden import hide_each_class
from clip_adapter.pipelines.deciding.trust import Trust, joined, trust_lines, trust_of
from clip_adapter.pipelines.saved.adapter_file import (
    AdapterInfo,
    SavedAdapter,
    image_hashes,
    load_adapter,
)
from clip_adapter.pipelines.scoring.cached import Labelled, cached_images, warn_of_unproven
from clip_adapter.pipelines.scoring.images import (
    Classes,
    images_of_folder,
    is_folder,
    match_classes,
    refuse_encoding,
)
from clip_adapter.pipelines.scoring.prediction_formats import (
    adapt_of,
    check_place,
    predictions_file,
    write_features,
)
from clip_adapter.pipelines.scoring.score_table import print_table
from clip_adapter.pipelines.scoring.scores import Scores
from clip_adapter.words import counted

USUAL_REJECT = 0.05


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a saved adapter, and its zero-shot classifier beside it, on labelled images.

    Every class of the images has to be one of the adapter's, by its name or by --classes. Both
    choose between all classes of the adapter, unless --only-present restricts them to those that
    the images show, as the protocols of ImageNet-A and ImageNet-R have it.

    Images that the adapter was fitted or chosen on are counted and left out: what it gets right of
    them is no accuracy.

    Attributes:
        data: Feature cache of the adapter's backbone, or a folder of images with one folder per
            class (or with such folders in a folder per split), which are encoded on the way.
        adapter: Run folder that `fit` wrote, or one of the adapter's two files.
        split: Split of the cache or the folder.
        classes: JSON file {class of the images: class of the adapter}, for names that differ; null
            leaves the images of a class out.
        coverage: Answer with sets of classes, as `predict` does, and say how often they hold the
            right one.
        reject: Answer "none of these", as `predict` does, and say how often that is wrong.
        unknown: Hide each class in turn: fit the adapter without it, and say how many of its images
            are called "none of these" (at --reject 0.05, or as given). Takes the cache that it was
            fitted on.
        only_present: Choose between the classes that have images.
        confusion: CSV file for the confusion matrix: a row per class, a column per prediction.
        predictions: CSV file for what is predicted for each image, those it was fitted on as well.
        features: NPZ file for the image features after the adapter, with ids, labels and class
            names; for the methods that move image features.
        method: MODULE:NAME of the adapter's method, where that is one of your own.
        backbone: Backbone for images of a folder, as `predict` takes it.
        pretrained: Where its weights lie, as `predict` takes it.
        also: Second encoder of an adapter that takes one, where the adapter does not name one that
            is published.
        also_pretrained: Where its weights lie now, if they were given as a local file.
        on_error: What to do about an image that cannot be decoded: stop, or leave it out.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        device: PyTorch device for images of a folder; auto takes a GPU where there is one.
        force: Overwrite existing files.
    """

    data: Positional[Path]
    adapter: Path
    split: Literal["train", "val", "test"] = "test"
    classes: Path | None = None
    coverage: float | None = None
    reject: float | None = None
    unknown: bool = False
    only_present: bool = False
    confusion: Path | None = None
    predictions: Path | None = None
    features: Path | None = None
    method: str | None = None
    backbone: str | None = None
    pretrained: str | None = None
    also: str | None = None
    also_pretrained: str | None = None
    on_error: Literal["fail", "skip"] = "fail"
    batch_size: int = 64
    workers: int = available_cores()
    device: str = "auto"
    force: bool = False


def evaluate(config: EvaluateConfig, listener: Listener | None = None) -> Scores:
    """Run `evaluate`: the scores, and the files that were asked for.

    Raises UserError for data of another backbone or width, for what `answers_of` and
    `hide_each_class` refuse, for classes that the adapter does not
    know, for files that cannot be read or written, and for those that exist.
    """
    check_work(config.batch_size, config.workers)
    for path in (config.confusion, config.predictions):
        check_place(path, ".csv", force=config.force)
    check_place(config.features, ".npz", force=config.force)
    tables = [os.path.realpath(path) for path in (config.confusion, config.predictions) if path]
    if len(set(tables)) < len(tables):
        raise UserError(
            f"--confusion and --predictions both name {config.confusion}; give each its own."
        )
    adapter = load_adapter(config.adapter, config.method)
    if config.unknown and config.reject is None:
        config = replace(config, reject=USUAL_REJECT)
    answers = answers_of(adapter, config.coverage, config.reject)
    if answers and config.only_present:
        raise UserError(
            "--coverage, --reject and --unknown speak of all the adapter's classes; leave them or "
            "--only-present out."
        )
    if config.unknown and is_folder(config.data):
        raise UserError("--unknown fits the adapter again; name the cache that it was fitted on.")
    listener = listener or Listener()
    with _images(config, adapter, listener) as images:
        known = match_classes(images, adapter.info, config.classes)
        scores = _score(config, adapter, answers, images, known, listener)
    if answers and config.unknown:
        from clip_adapter.cache.reader import FeatureCache

        with FeatureCache(config.data) as cache:
            hidden = hide_each_class(answers, cache, config.split, listener)
        scores = replace(scores, hidden=hidden)
    return scores


@contextmanager
def _images(
    config: EvaluateConfig, adapter: SavedAdapter, listener: Listener
) -> Iterator[Labelled]:
    if is_folder(config.data):
        skip = config.on_error == "skip"
        yield images_of_folder(config.data, config.split, adapter, config, listener, skip=skip)
        return
    refuse_encoding(config, "on_error")
    from clip_adapter.cache.reader import FeatureCache

    with FeatureCache(config.data) as cache:
        warn_of_unproven(cache, adapter, listener)
        yield cached_images(cache, config.split, adapter)


def _score(
    config: EvaluateConfig,
    adapter: SavedAdapter,
    answers: Answers | None,
    images: Labelled,
    known: Classes,
    listener: Listener,
) -> Scores:
    targets = known[images.labels]
    if config.only_present:
        candidates = np.unique(targets[targets >= 0])
    else:
        candidates = np.arange(len(adapter.weights))
    adapt = adapt_of(adapter) if config.features else None
    ids: list[str] = []
    adapted: list[npt.NDArray[np.float32]] = []
    found: list[tuple[npt.NDArray[Any], ...]] = []
    shown: list[npt.NDArray[np.int64]] = []
    trusted: list[Trust] = []
    scored = 0
    with ExitStack() as stack:
        advance = stack.enter_context(listener.progress("evaluate", len(targets)))
        names = adapter.info.class_names
        rows_written = stack.enter_context(predictions_file(config.predictions, names))
        for block in images.blocks():
            scored += len(block.rows)
            kept = targets[block.rows] >= 0
            rows = block.rows[kept]
            if len(rows):
                logits = adapter.logits(block.features[kept])[:, candidates].astype(np.float64)
                zero_shot = cosine_logits(np, block.encoded[kept], adapter.head)
                before = zero_shot[:, candidates].argmax(axis=1)
                best = logits.argmax(axis=1)
                shares = adapter.probabilities(logits)
                places = np.searchsorted(candidates, targets[rows])
                trusted.append(trust_of(shares, places, block.encoded[kept], answers))
                digests = None if block.digests is None else block.digests[kept]
                familiar = adapter.has_seen(image_hashes(block.encoded[kept], digests))
                found.append((targets[rows], candidates[best], candidates[before], familiar))
                shown.append(rows)
                if adapt:
                    ids += images.ids(rows)
                    adapted.append(adapt(block.features[kept]))
                if rows_written:
                    rows_written(images.ids(rows), *found[-1], trusted[-1].top)
            advance(len(block.rows), "")
        if not found:
            raise UserError(f"No image of {images.name} could be decoded.")
        labels, predicted, before, seen = (
            np.concatenate(parts).astype(np.int32) for parts in zip(*found, strict=True)
        )
        rest, groups = seen == 0, None
        if images.groups is not None:
            groups = np.array(images.groups, object)[np.concatenate(shown)][rest]
        others = config.predictions or config.features or config.unknown
        if not rest.any() and (config.confusion or not others):
            raise UserError(_all_seen(images.name, len(rest), adapter.info))
    scores = Scores(
        adapter.info.class_names,
        labels[rest],
        predicted[rest],
        before[rest],
        candidates.astype(np.int32),
        skipped=len(targets) - scored,
        seen=int(seen.sum()),
        groups=groups,
        trust=joined(trusted).of(rest),
    )
    if config.features:
        moved = np.concatenate(adapted)
        write_features(config.features, ids, labels, moved, adapter.info.class_names)
    if config.confusion:
        files.write_text(config.confusion, scores.confusion_csv())
    return scores


def _all_seen(name: str, count: int, info: AdapterInfo) -> str:
    refit = "; `fit` printed the one of before --refit" if "refitted_on" in info.fitted else ""
    return (
        f"The adapter was fitted or chosen on all of the {counted(count, 'image')} of {name}: "
        f"right answers there are no accuracy; score it on other images{refit}."
    )


def print_scores(config: EvaluateConfig) -> int:
    """Run `evaluate`, print the scores, and return the exit code."""
    from clip_adapter.pipelines.console.terminal import Terminal

    scores = evaluate(config, Terminal("clip-adapter evaluate"))
    if len(scores.labels):
        print_table(scores)
        decisions = load_adapter(config.adapter, config.method).decisions
        for line in trust_lines(scores, decisions, config.coverage):
            print(line)
    for line in scores.hidden.lines() if scores.hidden else ():
        print(line)
    if scores.seen:
        print(
            f"left out {counted(scores.seen, 'image')} on which the adapter was fitted or chosen: "
            "right answers there are no accuracy"
        )
    if scores.skipped:
        left_out = counted(scores.skipped, "image")
        Terminal("clip-adapter evaluate").note(f"{left_out} cannot be decoded and are left out")
    return EXIT_PARTIAL if scores.skipped else 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter evaluate`."""
    limit_openmp()
    run_command(EvaluateConfig, print_scores, "clip-adapter evaluate", arguments)
