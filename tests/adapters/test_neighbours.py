"""Near-equal images, their groups, and the order of what to label, against loops in float64."""

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from clip_adapter.adapters.neighbours import (
    alike,
    grouped,
    most_telling,
    near_equal,
    nearest,
    unsure,
    usual_reach,
)


def directions(count: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)) + 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def moved(rows: np.ndarray, distance: float, seed: int = 1) -> np.ndarray:
    """Each row turned until its cosine with itself is 1 − distance."""
    away = np.random.default_rng(seed).normal(size=rows.shape)
    away -= np.sum(away * rows, axis=1, keepdims=True) * rows
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    cosine = 1 - distance
    return cosine * rows + np.sqrt(1 - cosine**2) * away


def by_the_definition(rows: np.ndarray) -> list[tuple[int, int]]:
    distances = 1 - rows @ rows.T
    np.fill_diagonal(distances, np.inf)
    radius = np.sort(distances, axis=1)[:, min(10, len(rows) - 1) - 1]
    return [
        (i, j)
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if distances[i, j] <= max(0.15 * min(radius[i], radius[j]), 1e-6)
    ]


def test_near_equal_images_are_those_of_the_definition():
    rows = directions(60)
    usual = np.sort(1 - rows @ rows.T, axis=1)[:, 10]
    rows = np.concatenate([rows, moved(rows[:8], 0.1 * usual.min()), moved(rows[8:20], 0.3)])
    wanted = by_the_definition(rows)
    assert {(row, 60 + row) for row in range(8)} <= set(wanted) and len(wanted) < 20
    lengths = np.random.default_rng(2).uniform(0.1, 9, size=(len(rows), 1))
    found = near_equal((lengths * rows).astype(np.float32))
    assert [tuple(pair) for pair in found.tolist()] == wanted


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_and_copies(count: int):
    rows = directions(count)
    assert near_equal(rows).tolist() == [list(pair) for pair in by_the_definition(rows)]
    copies = near_equal(np.repeat(rows, 30, axis=0))  # of which no neighbour is another image
    groups = grouped(copies, 30 * count)
    assert all(len(np.unique(groups[n * 30 : n * 30 + 30])) == 1 for n in range(count))
    assert groups.max() + 1 == count


def test_groups_join_what_a_third_joins():
    pairs = np.array([[2, 7], [7, 4], [1, 3]])
    assert grouped(pairs, 9).tolist() == [-1, 0, 1, 0, 1, -1, -1, 1, -1]
    assert grouped(np.zeros((0, 2), np.int64), 3).tolist() == [-1, -1, -1]


def test_neighbours_are_the_nearest_ones():
    rows = directions(40).astype(np.float32)
    found, cosines = nearest(3 * rows, 4)
    products = rows @ rows.T
    np.fill_diagonal(products, -1)
    np.testing.assert_array_equal(found, np.argsort(-products, axis=1)[:, :4])
    np.testing.assert_allclose(cosines, -np.sort(-products, axis=1)[:, :4], rtol=1e-5)


def test_the_usual_reach_is_that_of_the_tenth_neighbour():
    rows = directions(50)
    ordered = np.sort(1 - rows @ rows.T, axis=1)
    assert usual_reach(rows[::2] @ rows.T) == pytest.approx(0.15 * np.median(ordered[::2, 10]))
    assert usual_reach(rows[:1] @ rows[:1].T) == pytest.approx(1e-6)


def test_alike_are_joined_by_a_third():
    """By angles: a chain whose ends are far apart, a pair between others, and one alone."""
    angles = np.deg2rad([0, 10, 20, 90, 30, 97, 150])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert alike(rows, 0.95) == [[0, 1, 2, 4], [3, 5]]
    near = np.deg2rad([60, 0, 12, -12])  # 2 and 3 are near 1 alone
    assert alike(np.stack([np.cos(near), np.sin(near)], axis=1), 0.95) == [[1, 2, 3]]
    many = np.random.default_rng(0).normal(size=(700, 3))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    wanted = connected_components(many @ many.T > 0.999)[1]
    found = alike(many, 0.999)
    assert {frozenset(group) for group in found} == {
        frozenset(np.flatnonzero(wanted == n)) for n in wanted if (wanted == n).sum() > 1
    }


def test_equal_rows_are_alike():
    rows = directions(6)
    rows[[2, 5]] = rows[0]
    rows[4] = rows[1]
    assert alike(rows, 1 - 1e-9) == [[0, 2, 5], [1, 4]]
    assert alike(rows[[0, 1, 3]], 1 - 1e-9) == []


def greedy(
    doubts: np.ndarray, rows: np.ndarray, labelled: np.ndarray, count: int, least: float
) -> list[int]:
    """Everything is computed anew for each that is chosen."""
    chosen: list[int] = []
    while len(chosen) < count:
        known = np.concatenate([labelled, rows[chosen]])
        distances = 1 - (rows @ known.T).max(axis=1) if len(known) else np.ones(len(rows))
        products = np.where(distances > least, doubts * distances, -1)
        products[chosen] = -1
        if products.max() < 0:
            break
        chosen.append(int(products.argmax()))
    return chosen


@pytest.mark.parametrize("labelled", [0, 5])
@pytest.mark.parametrize(("count", "least"), [(25, 0.0), (200, 0.02), (500, 0.3)])
def test_the_heap_gives_the_order_of_the_product(labelled: int, count: int, least: float):
    rows = directions(300, dim=6)
    rows = np.concatenate([rows, moved(rows[:80], 0.01)])
    known = directions(labelled, dim=6, seed=3)
    doubts = np.random.default_rng(4).uniform(size=len(rows))
    distances = 1 - (rows @ known.T).max(axis=1) if labelled else np.ones(len(rows))
    asked: list[int] = []

    def rows_of(wanted: np.ndarray) -> np.ndarray:
        asked.extend(wanted.tolist())
        return rows[wanted]

    found = most_telling(doubts, distances, rows_of, count, least)
    assert found == greedy(doubts, rows, known, count, least)
    if least == 0:
        assert len(asked) < count * len(rows) / 4  # lazily: far fewer than all for each
    else:
        near = 1 - rows[found] @ rows[found].T
        np.fill_diagonal(near, 1)
        assert near.min() > least  # near-equal ones count as one


def test_doubt_is_the_margin():
    shares = np.array([[0.7, 0.1, 0.2], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(unsure(shares), [0.5, 1.0, 0.0])
