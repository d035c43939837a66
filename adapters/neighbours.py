"""Which images are near-equal, and which are the most telling ones to label next.

    near-equal: d_ij ≤ 0.15 · min(r_i, r_j)          next: argmax_i u_i d_i

d_ij = 1 − cosine, and r_i is the distance to the tenth neighbour. u = 1 − (p₁ − p₂), of the two
largest probabilities of an image, and d_i its distance to the nearest image that is labelled or has
been chosen before. What 0.15 and the tenth neighbour list, and miss, and how many labels the
product spares: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clip_adapter.adapters.formulas import unit

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NEIGHBOURS = 10
NEAR = 0.15
ROUNDING = 1e-6  # of 1 − cosine in float32: distances between equal rows
# Rows of the classifier with a larger cosine are of one text, encoded in another batch, in 16 bits
# at worst (which leaves 1e-5); CLIP's texts of "cat" and "cats" are a hundred times farther apart.
ONE_TEXT = 1 - 5e-5
# Rows are compared with all others, and with classes, so that a block takes about so many numbers.
BLOCK_NUMBERS = 1 << 24
REFRESHED = 64  # candidates whose distances are brought up to date together


def blocks(count: int, width: int) -> Iterator[slice]:
    """Of rows of which each takes `width` numbers."""
    size = max(1, BLOCK_NUMBERS // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def nearest(
    features: Float[np.ndarray, "N D"], count: int
) -> tuple[Int[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
    """The K = min(count, N − 1) nearest other rows of each, nearest first, and their cosines."""
    rows = unit(np, features)
    count = min(count, len(rows) - 1)
    near = np.empty((len(rows), count), np.int64)
    cosines = np.empty((len(rows), count), rows.dtype)
    for block in blocks(len(rows), len(rows)):
        products = rows[block] @ rows.T
        each = np.arange(len(products))
        products[each, each + block.start] = -np.inf
        for place in range(count):  # so many times the largest: faster than to partition rows
            near[block, place] = products.argmax(axis=1)
            cosines[block, place] = products[each, near[block, place]]
            products[each, near[block, place]] = -np.inf
    return near, cosines


def near_equal(features: Float[np.ndarray, "N D"]) -> Int[np.ndarray, "P 2"]:
    """Pairs of rows, the smaller first, that are near-equal: of un-normalised features.

    Of more than ten that are all alike but not equal none is far enough away to tell them by.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter.adapters.neighbours import near_equal
        >>> rows = np.random.default_rng(0).normal(size=(40, 8))
        >>> near_equal(np.concatenate([rows, rows[3:4] + 0.01])).tolist()
        [[3, 40]]
    """
    near, cosines = nearest(features, NEIGHBOURS)
    distances = 1 - cosines
    if not distances.size:
        return np.zeros((0, 2), np.int64)
    radius = distances[:, -1]
    smaller = np.minimum(radius[:, None], radius[near])
    row, place = np.nonzero(distances <= np.maximum(NEAR * smaller, ROUNDING))
    pairs = np.sort(np.stack([row, near[row, place]], axis=1), axis=1)
    return np.unique(pairs, axis=0)


def usual_reach(cosines: Float[np.ndarray, "S N"]) -> float:
    """How far near-equal images are from each other where a sample stands for all: 0.15 · median r.

    cosines: of S rows with all N, themselves among them.
    """
    place = min(NEIGHBOURS + 1, cosines.shape[1])
    radius = 1 - np.partition(cosines, -place, axis=1)[:, -place]
    return max(NEAR * float(np.median(radius)), ROUNDING)


def grouped(pairs: Int[np.ndarray, "P 2"], count: int) -> Int[np.ndarray, " N"]:
    """For each of `count` rows the number of its group, from 0 in the order of their first rows;
    −1 for rows in no pair. Who is joined by pairs with a third is of one group."""
    ones = np.ones(len(pairs), np.int8)
    _, members = connected_components(coo_array((ones, tuple(pairs.T)), shape=(count, count)))
    alone = np.bincount(members)[members] == 1
    firsts = np.unique(members[~alone], return_index=True)[1]
    number = np.full(count, -1, np.int64)
    number[members[~alone][np.sort(firsts)]] = np.arange(len(firsts))
    return np.where(alone, -1, number[members])


def alike(rows: Float[np.ndarray, "N D"], least: float) -> list[list[int]]:
    """Groups of unit rows: `grouped` of the pairs whose cosine is above `least`."""
    pairs = [np.zeros((0, 2), np.int64)]
    for block in blocks(len(rows), len(rows)):
        first, second = np.nonzero(np.triu(rows[block] @ rows.T > least, block.start + 1))
        pairs.append(np.stack([first + block.start, second], axis=1))
    groups = grouped(np.concatenate(pairs), len(rows))
    return [np.flatnonzero(groups == number).tolist() for number in range(groups.max() + 1)]


def unsure(shares: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    """u of probabilities, in [0, 1]: 1 where two classes are equally probable."""
    highest = np.partition(shares, -2, axis=1)
    return 1 - (highest[:, -1] - highest[:, -2])


def most_telling(
    unsure: Float[np.ndarray, " N"],
    distances: Float[np.ndarray, " N"],
    rows_of: Callable[[Int[np.ndarray, " K"]], Float[np.ndarray, "K D"]],
    count: int,
    least: float = 0.0,
) -> list[int]:
    """Up to `count` of N candidates in the order in which argmax u·d takes them.

    distances: to the nearest labelled image. rows_of: the unit features of some candidates, which
    need not all be in memory. least: candidates as near as that to what is labelled or chosen are
    not taken. Equal products are taken in the candidates' order.

    Distances only shrink as more is chosen, so that an old product is an upper bound: whoever
    stands first in a heap of them, and is up to date, has the largest.
    """
    distances = distances.copy()
    far = np.flatnonzero(distances > least).tolist()
    heap = [(-float(unsure[row] * distances[row]), row) for row in far]
    heapify(heap)
    known = np.zeros(len(distances), np.int64)  # how many of the chosen a distance is to
    chosen: list[int] = []
    features: list[Any] = []
    while heap and len(chosen) < count:
        waiting = [row for _, row in (heappop(heap) for _ in range(min(REFRESHED, len(heap))))]
        first = waiting[0]
        if known[first] == len(chosen):
            chosen.append(first)
            features.append(rows_of(np.array([first]))[0])
            waiting = waiting[1:]
        stale = np.array([row for row in waiting if known[row] < len(chosen)], np.int64)
        if len(stale):
            cosines = rows_of(stale) @ np.stack(features[known[stale].min() :]).T
            distances[stale] = np.minimum(distances[stale], 1 - cosines.max(axis=1))
            known[stale] = len(chosen)
        for row in waiting:
            if distances[row] > least:
                heappush(heap, (-float(unsure[row] * distances[row]), row))
    return chosen
