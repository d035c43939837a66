"""From a cache to tasks: rows by rule, cross-validation, base and new classes."""

from collections import Counter

import numpy as np
import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import Images
from clip_adapter.pipelines.tasks import (
    CachedData,
    base_half,
    draw,
    draws,
    folds,
    new_half,
    whole_task,
)
from tests.pipelines.tiny_cache import TinyData, tiny_data


def loaded(data: TinyData) -> CachedData:
    def images(name: str) -> Images | None:
        if name not in data.splits:
            return None
        features, labels = data.splits[name]
        ids = [f"{name}/{row}" for row in range(len(labels))]
        return Images(features, labels.astype(np.int32), ids)

    train = images("train")
    assert train
    return CachedData(train, images("val"), images("test"), data.text[:, 0], 20.0, 0.5)


DATA = loaded(tiny_data(train=(9, 7, 8, 9, 7), val=5))


def test_rows_of_each_rule():
    published = draw_few_shot(DATA.train.labels, DATA.val.labels, shots=6, seed=3)
    every = list(range(len(DATA.val.labels)))
    expected = {"few-shot-val": published.validation.tolist(), "full-val": every}
    for rule in ("few-shot-val", "full-val", "cv", "none"):
        drawn = draw(DATA, 6, 3, rule)
        assert drawn.support.tolist() == published.support.tolist()
        assert drawn.validation.tolist() == expected.get(rule, [])
    assert Counter(DATA.val.labels[published.validation].tolist()) == dict.fromkeys(range(5), 4)


def test_all_takes_every_training_image():
    drawn = draw(DATA, "all", 1, "few-shot-val")
    assert drawn.support.tolist() == list(range(len(DATA.train.labels)))
    assert drawn.validation.tolist() == list(range(len(DATA.val.labels)))


def test_a_task_holds_the_images_of_its_rows():
    drawn = draw(DATA, 3, 1, "few-shot-val")
    task = whole_task(DATA, drawn)
    np.testing.assert_array_equal(task.features, DATA.train.features[:, drawn.support])
    np.testing.assert_array_equal(task.labels, DATA.train.labels[drawn.support])
    np.testing.assert_array_equal(task.validation_features, DATA.val.features[0, drawn.validation])
    np.testing.assert_array_equal(task.validation_labels, DATA.val.labels[drawn.validation])


def test_a_rule_that_needs_a_validation_split_says_so():
    without = loaded(tiny_data().with_split("val", None))
    for rule in ("few-shot-val", "full-val"):
        with pytest.raises(UserError, match=f"--select {rule} needs a validation split"):
            draw(without, 2, 1, rule)
    assert len(draw(without, 2, 1, "cv").support) == 8


def test_tasks_come_by_shots_and_then_by_seed():
    drawn = list(draws(DATA, (1, 2), (5, 3), "cv"))
    assert [(d.shots, d.seed) for d in drawn] == [(1, 5), (1, 3), (2, 5), (2, 3)]


@pytest.mark.parametrize(("shots", "count"), [(2, 2), (3, 3), (4, 4), (7, 4)])
def test_folds_divide_the_support_set_class_by_class(shots: int, count: int):
    drawn = draw(DATA, shots, 2, "cv")
    parts = folds(DATA, drawn)
    assert len(parts) == count
    row_of = {f.tobytes(): row for row, f in enumerate(np.asarray(DATA.train.features[0]))}
    support = drawn.support.tolist()
    judged = []
    for part in parts:
        trained = [row_of[f.tobytes()] for f in np.asarray(part.features[0])]
        held_out = [row_of[f.tobytes()] for f in np.asarray(part.validation_features)]
        assert not set(trained) & set(held_out)
        assert sorted(trained + held_out) == sorted(support)
        assert DATA.train.labels[trained].tolist() == np.asarray(part.labels).tolist()
        assert DATA.train.labels[held_out].tolist() == np.asarray(part.validation_labels).tolist()
        assert set(np.asarray(part.labels).tolist()) == set(range(5)), "a class is not trained"
        sizes = Counter(DATA.train.labels[held_out].tolist())
        assert set(sizes.values()) <= {shots // count, -(-shots // count)}
        assert set(sizes) == set(range(5))
        judged += held_out
    assert sorted(judged) == sorted(support)


def test_an_image_of_a_small_class_is_never_trained_on_and_judged():
    data = loaded(tiny_data(train=(8, 2, 3, 8), noise=3.0))
    for seed in range(6):
        drawn = draw(data, 8, seed, "cv")
        assert drawn.small_classes == (1, 2)
        parts = folds(data, drawn)
        distinct = [
            len(set(drawn.support[data.train.labels[drawn.support] == c])) for c in range(4)
        ]
        assert len(parts) == (min(*distinct, 4) if min(distinct) > 1 else 0)
        for part in parts:
            trained = {f.tobytes() for f in np.asarray(part.features[0])}
            held_out = {f.tobytes() for f in np.asarray(part.validation_features)}
            assert not trained & held_out
            assert set(np.asarray(part.labels).tolist()) == set(range(4))


def test_one_image_of_a_class_cannot_be_cross_validated():
    assert folds(DATA, draw(DATA, 1, 1, "cv")) == []
    single = loaded(tiny_data(train=(8, 1, 8, 8)))
    assert folds(single, draw(single, 4, 1, "cv")) == []


@pytest.mark.parametrize("classes", [4, 5])
def test_base_classes_are_the_first_half_drawn_before_they_are_filtered(classes: int):
    data = loaded(tiny_data(train=(9,) * classes))
    base = (classes + 1) // 2
    drawn = draw(data, 3, 2, "few-shot-val")
    reduced, kept = base_half(data, drawn)
    assert kept.support.tolist() == [r for r in drawn.support if data.train.labels[r] < base]
    assert kept.validation.tolist() == [r for r in drawn.validation if data.val.labels[r] < base]
    assert len(kept.support) == 3 * base
    assert reduced.weights.tolist() == data.weights[:base].tolist()
    new = new_half(data)
    assert new.weights.tolist() == data.weights[base:].tolist()
    labels = data.test.labels
    for part, rows, first in ((reduced, labels < base, 0), (new, labels >= base, base)):
        np.testing.assert_array_equal(part.test.labels, labels[rows] - first)
        np.testing.assert_array_equal(part.test.features, data.test.features[:, rows])
    assert len(reduced.test.labels) + len(new.test.labels) == len(labels)
