"""The sampler draws item for item what the literature drew."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.errors import UserError

PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "few_shot_subsets.json.gz").read_bytes())
)


def test_there_are_published_subsets_for_both_data_sets() -> None:
    tasks = {f"shots={shots},seed={seed}" for shots in (1, 2, 4, 8, 16) for seed in (1, 2)}
    assert {name: set(data["subsets"]) for name, data in PUBLISHED.items()} == {
        "oxford_pets": tasks,
        "dtd": tasks,
    }


@pytest.mark.parametrize(
    ("data_set", "task"),
    [(name, task) for name in PUBLISHED for task in PUBLISHED[name]["subsets"]],
)
def test_equals_the_published_subset(data_set: str, task: str) -> None:
    labels = PUBLISHED[data_set]["labels"]
    shots, seed = (int(part.split("=")[1]) for part in task.split(","))
    published = PUBLISHED[data_set]["subsets"][task]
    for repeat in (False, True):
        drawn = draw_few_shot(labels["train"], labels["val"], shots=shots, seed=seed, repeat=repeat)
        assert drawn.support.tolist() == published["train"]
        assert drawn.validation.tolist() == published["val"]
        assert drawn.small_classes == drawn.absent_classes == ()


def test_labels_are_taken_in_order_of_first_appearance() -> None:
    train, val = [2, 0, 2, 1, 0, 1, 2], [1, 2, 0, 0]
    drawn = draw_few_shot(train, val, shots=1, seed=7)
    rng = random.Random(7)
    assert drawn.support.tolist() == [
        *rng.sample([0, 2, 6], 1),
        *rng.sample([1, 4], 1),
        *rng.sample([3, 5], 1),
    ]
    assert drawn.validation.tolist() == [
        *rng.sample([0], 1),
        *rng.sample([1], 1),
        *rng.sample([2, 3], 1),
    ]


def test_a_small_class_gives_each_image_once_and_is_named() -> None:
    """In order, without a number of the generator: what is drawn after it depends on that."""
    drawn = draw_few_shot([1, 0, 0, 1, 0, 0, 2], [0, 1, 0, 1, 0, 2], shots=3, seed=1)
    rng = random.Random(1)
    assert drawn.support.tolist() == [0, 3, *rng.sample([1, 2, 4, 5], 3), 6]
    assert drawn.validation.tolist() == [*rng.sample([0, 2, 4], 3), 1, 3, 5]
    assert drawn.small_classes == drawn.small_validation_classes == (1, 2)


def test_with_repeat_a_small_class_is_drawn_with_repetition() -> None:
    drawn = draw_few_shot([0, 0, 0, 1], [0, 1, 0, 1, 0], shots=3, seed=1, repeat=True)
    rng = random.Random(1)
    assert drawn.support.tolist() == [*rng.sample([0, 1, 2], 3), *rng.choices([3], k=3)]
    assert drawn.validation.tolist() == [*rng.sample([0, 2, 4], 3), *rng.choices([1, 3], k=3)]
    assert drawn.small_classes == (1,)


def test_validation_takes_four_at_most() -> None:
    drawn = draw_few_shot([0] * 8, [0] * 3, shots=8, seed=5, repeat=True)
    rng = random.Random(5)
    rng.sample(range(8), 8)
    assert drawn.validation.tolist() == rng.choices([0, 1, 2], k=4)
    many = draw_few_shot([0] * 8, [0] * 30, shots=8, seed=5)
    assert len(set(many.validation.tolist())) == 4


def test_classes_without_a_training_image_are_named() -> None:
    drawn = draw_few_shot([0, 3], [1, 4], shots=1, seed=1, classes=7)
    assert drawn.absent_classes == (1, 2, 4, 5, 6)
    assert draw_few_shot([0, 3], [1, 4], shots=1, seed=1).absent_classes == (1, 2, 4)
    assert drawn.small_classes == ()


def test_without_a_val_split_there_is_no_validation() -> None:
    drawn = draw_few_shot([0, 1], [], shots=1, seed=1)
    assert drawn.validation.shape == (0,)
    assert drawn.validation.dtype == drawn.support.dtype == np.int64


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    labels = np.repeat([0, 1], 50).astype(np.int32)
    first, again, other = (
        draw_few_shot(labels, labels, shots=5, seed=seed).support.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("shots", [4, 0, -1])
def test_refuses_shots_that_no_class_has(shots: int) -> None:
    with pytest.raises(UserError, match=rf"--shots {shots} .*largest class has 3 training images"):
        draw_few_shot([0, 0, 0, 1], [], shots=shots, seed=1)
