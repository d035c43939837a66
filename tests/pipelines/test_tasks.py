"""From a cache to tasks: rows by rule, cross-validation, base and new classes, arrays."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.data import open_data
from clip_adapter.pipelines.fitting.tasks import (
    TaskRows,
    base_classes,
    cross_validation,
    draw_tasks,
    kept_task,
    needed_rows,
    only_classes,
    rounds,
)
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

DATA = tiny_data(train=(9, 7, 8, 9, 7), val=5)
TRAIN, VAL = (DATA.splits[name][1].astype(np.int32) for name in ("train", "val"))
PROBE = METHODS["linear-probe"]


def draw(data: TinyData, shots: int | str, seed: int, rule: str, **how: bool) -> TaskRows:
    labels = {name: labels.astype(np.int32) for name, (_, labels) in data.splits.items()}
    (rows,) = draw_tasks(
        labels["train"],
        labels.get("val"),
        data.classes,
        (shots,),  # type: ignore[arg-type]
        (seed,),
        rule,  # type: ignore[arg-type]
        **{"repeat": False, **how},
    )
    return rows


def test_rows_of_each_rule():
    published = draw_few_shot(TRAIN, VAL, shots=6, seed=3)
    expected = {"few-shot-val": published.validation.tolist(), "full-val": list(range(len(VAL)))}
    for rule in ("few-shot-val", "full-val", "cv", "none"):
        drawn = draw(DATA, 6, 3, rule)
        assert drawn.support.tolist() == published.support.tolist()
        assert drawn.validation.tolist() == expected.get(rule, [])
    assert Counter(VAL[published.validation].tolist()) == dict.fromkeys(range(5), 4)


def test_all_takes_every_training_image():
    drawn = draw(DATA, "all", 1, "few-shot-val")
    assert drawn.support.tolist() == list(range(len(TRAIN)))
    assert drawn.validation.tolist() == list(range(len(VAL)))
    assert draw(DATA, "all", 1, "cv").validation.tolist() == []


def test_a_rule_that_needs_a_validation_split_says_so():
    without = DATA.with_split("val", None)
    for rule in ("few-shot-val", "full-val"):
        with pytest.raises(UserError, match=f"--select {rule} needs a validation split"):
            draw(without, 2, 1, rule)
    assert len(draw(without, 2, 1, "cv").support) == 10


def test_tasks_come_by_shots_and_then_by_seed():
    drawn = draw_tasks(TRAIN, VAL, 5, (1, 2), (5, 3), "cv", repeat=False)
    assert [(d.shots, d.seed) for d in drawn] == [(1, 5), (1, 3), (2, 5), (2, 3)]
    assert (kept_task(drawn).shots, kept_task(drawn).seed) == (2, 5)
    support, validation = needed_rows(drawn)
    assert support.tolist() == list(dict.fromkeys(r for d in drawn for r in d.support.tolist()))
    assert validation.tolist() == []


@pytest.mark.parametrize(("shots", "count"), [(2, 2), (3, 3), (4, 4), (7, 4)])
def test_folds_divide_the_support_set_class_by_class(shots: int, count: int):
    drawn = draw(DATA, shots, 2, "cv")
    parts = cross_validation(drawn, TRAIN)
    assert len(parts) == count
    judged: list[int] = []
    for part in parts:
        trained, held_out = part.support.tolist(), part.validation.tolist()
        assert part.judged_on == "train"
        assert not set(trained) & set(held_out)
        assert sorted(trained + held_out) == sorted(drawn.support.tolist())
        assert set(TRAIN[trained].tolist()) == set(range(5)), "a class is not trained"
        sizes = Counter(TRAIN[held_out].tolist())
        assert set(sizes.values()) <= {shots // count, -(-shots // count)}
        assert set(sizes) == set(range(5))
        judged += held_out
    assert sorted(judged) == sorted(drawn.support.tolist())


@pytest.mark.parametrize("repeat", [False, True])
def test_an_image_of_a_small_class_is_never_trained_on_and_judged(repeat: bool):
    data = tiny_data(train=(8, 2, 3, 8), noise=3.0)
    labels = data.splits["train"][1].astype(np.int32)
    for seed in range(6):
        drawn = draw(data, 8, seed, "cv", repeat=repeat)
        assert drawn.small_classes == (1, 2)
        parts = cross_validation(drawn, labels)
        distinct = [len(set(drawn.support[labels[drawn.support] == c].tolist())) for c in range(4)]
        assert len(parts) == (min(*distinct, 4) if min(distinct) > 1 else 0)
        if not repeat:
            assert (distinct, len(parts)) == ([8, 2, 3, 8], 2)
        for part in parts:
            assert not set(part.support.tolist()) & set(part.validation.tolist())
            assert set(labels[part.support].tolist()) == set(range(4))


def test_one_image_of_a_class_cannot_be_cross_validated():
    assert cross_validation(draw(DATA, 1, 1, "cv"), TRAIN) == []
    single = tiny_data(train=(8, 1, 8, 8))
    drawn = draw(single, 4, 1, "cv")
    assert cross_validation(drawn, single.splits["train"][1].astype(np.int32)) == []


def test_a_round_leaves_out_one_image_of_every_class_that_has_two():
    data = tiny_data(train=(4, 1, 3, 2))
    labels = data.splits["train"][1].astype(np.int32)
    drawn = draw(data, 4, 1, "loo")
    counts = [Counter(labels[fold.validation].tolist()) for fold in rounds(drawn, labels)]
    assert counts == [{0: 1, 2: 1, 3: 1}, {0: 1, 2: 1, 3: 1}, {0: 1, 2: 1}, {0: 1}]
    for fold in rounds(drawn, labels):
        assert fold.judged_on == "train"
        both = [*fold.support.tolist(), *fold.validation.tolist()]
        assert sorted(both) == sorted(drawn.support.tolist())
        assert set(labels[fold.support].tolist()) == {0, 1, 2, 3}
    # In drawing order; an image that was drawn again leaves with itself.
    again = draw(data, 4, 1, "loo", repeat=True)
    first = rounds(again, labels)[0]
    assert not set(first.support.tolist()) & set(first.validation.tolist())
    assert rounds(draw(data, 1, 1, "loo"), labels) == []


def test_validation_images_join_the_support_set(cache: Path):
    """Those that few-shot validation would draw, behind the training images."""
    beside, joined = draw(DATA, 3, 2, "few-shot-val"), draw(DATA, 3, 2, "loo", join=True)
    expected = [*beside.support, *(len(TRAIN) + beside.validation)]
    assert (joined.support.tolist(), len(joined.validation)) == (expected, 0)
    train, val = DATA.splits["train"], DATA.splits["val"]
    with FeatureCache(cache) as opened:
        data = open_data(opened, [joined], augment=False)
        task = data.task(PROBE, joined)
        features = [train[0][:, beside.support], val[0][:, beside.validation]]
        np.testing.assert_array_equal(task.features, np.concatenate(features, axis=1))
        labels = [TRAIN[beside.support], VAL[beside.validation]]
        np.testing.assert_array_equal(task.labels, np.concatenate(labels))
        fold = rounds(joined, data.support_labels)[4]  # which holds images of both splits
        part = data.task(PROBE, joined, fold)
        every = np.concatenate([train[0], val[0]], axis=1)
        np.testing.assert_array_equal(part.validation_features, every[0, fold.validation])
    everything = draw(DATA, "all", 1, "none", join=True)
    assert len(everything.support) == len(TRAIN) + len(VAL)
    with pytest.raises(UserError, match="and --select few-shot-val judges by them"):
        draw(DATA, 3, 1, "few-shot-val", join=True)
    with pytest.raises(UserError, match="and the cache has no validation split"):
        draw(TinyData({"train": train}, DATA.text), 3, 1, "loo", join=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


def test_a_task_holds_the_images_of_its_rows(cache: Path):
    """The whole of it and each fold, for classes counted from the first."""
    tasks = [draw(DATA, 3, seed, "few-shot-val") for seed in (1, 2)]
    train, val = DATA.splits["train"], DATA.splits["val"]
    with FeatureCache(cache) as opened:
        data = open_data(opened, tasks, augment=False)
        for rows in tasks:
            task = data.task(PROBE, rows)
            np.testing.assert_array_equal(task.features, train[0][:, rows.support])
            np.testing.assert_array_equal(task.labels, TRAIN[rows.support])
            np.testing.assert_array_equal(task.validation_features, val[0][0, rows.validation])
            np.testing.assert_array_equal(task.validation_labels, VAL[rows.validation])
            assert (int(task.seed), task.head.text) == (rows.seed, None)
            for fold in cross_validation(rows, TRAIN):
                part = data.task(PROBE, rows, fold)
                np.testing.assert_array_equal(part.features, train[0][:, fold.support])
                np.testing.assert_array_equal(
                    part.validation_features, train[0][0, fold.validation]
                )
                np.testing.assert_array_equal(part.validation_labels, TRAIN[fold.validation])
        head = data.head(METHODS["cross-modal"])
        assert (float(head.logit_scale), float(head.logit_bias)) == (20.0, 0.5)
        np.testing.assert_array_equal(head.text, DATA.text)
        blocks = list(data.test_blocks(PROBE))
    features, labels = DATA.splits["test"]
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), features[0])
    np.testing.assert_array_equal(np.concatenate([own for _, own in blocks]), labels)


def test_only_rows_that_a_task_takes_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """And each once, whatever the number of tasks and methods."""
    read: list[tuple[str, list[int]]] = []
    features = FeatureCache.features

    def listening(self, split, rows, views=None):  # type: ignore[no-untyped-def]
        read.append((split, np.asarray(rows).tolist()))
        return features(self, split, rows, views)

    monkeypatch.setattr(FeatureCache, "features", listening)
    tasks = [draw(DATA, 2, seed, "few-shot-val") for seed in (1, 2, 3)]
    with FeatureCache(cache) as opened:
        data = open_data(opened, tasks, augment=False)
        for rows in tasks:
            for name in ("linear-probe", "clip-adapter"):
                data.task(METHODS[name], rows)
    support, validation = needed_rows(tasks)
    assert sorted(read) == [("train", support.tolist()), ("val", validation.tolist())]
    assert len(support) < len(TRAIN)


@pytest.mark.parametrize("classes", [4, 5])
def test_base_classes_are_the_first_half_drawn_before_they_are_filtered(
    tmp_path: Path, classes: int
):
    data = tiny_data(train=(9,) * classes)
    base = (classes + 1) // 2
    assert base_classes(classes) == base
    train, val = (data.splits[name][1].astype(np.int32) for name in ("train", "val"))
    drawn = draw(data, 3, 2, "few-shot-val")
    kept = only_classes(drawn, base, train, val)
    assert kept.support.tolist() == [r for r in drawn.support if train[r] < base]
    assert kept.validation.tolist() == [r for r in drawn.validation if val[r] < base]
    assert len(kept.support) == 3 * base
    with FeatureCache(write_cache(tmp_path / "features.h5", data)) as opened:
        whole = open_data(opened, [kept], augment=False)
        old, new = whole.of_classes(slice(0, base)), whole.of_classes(slice(base, classes))
        weights = whole.head(PROBE).weights
        assert old.head(PROBE).weights.tolist() == weights[:base].tolist()
        assert new.head(PROBE).weights.tolist() == weights[base:].tolist()
        features, labels = data.splits["test"]
        total = 0
        for part, rows, first in ((old, labels < base, 0), (new, labels >= base, base)):
            (block,) = part.test_blocks(PROBE)
            np.testing.assert_array_equal(block[0], features[0, rows])
            np.testing.assert_array_equal(block[1], labels[rows] - first)
            total += len(block[1])
        assert total == len(labels)
        assert set(np.asarray(old.task(PROBE, kept).labels).tolist()) == set(range(base))
