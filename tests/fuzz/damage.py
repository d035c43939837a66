"""Damage that needs to know nothing of a file, and values that nobody expects."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.cache_mutations import (
    ODD_VALUES,
    append,
    copy_bytes,
    flip_bytes,
    replace_file,
    truncate,
    zero_sectors,
)

BYTES: tuple[Callable[[random.Random, Path], str], ...] = (
    *(flip_bytes, flip_bytes, zero_sectors, copy_bytes, truncate, append, replace_file),
)
NESTED = ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", '"\\ud800"', "", "\0", "[]", "{}")


def damage(rng: random.Random, path: Path) -> str:
    """A disk, a network or an editor at work on a file; an empty one gets some bytes."""
    chosen = rng.choice(BYTES) if path.stat().st_size else append
    return f"{path.name}: {chosen.__name__}: {chosen(rng, path)}"


def change_json(rng: random.Random, document: Any) -> tuple[Any, str]:
    """The document with another value somewhere, or without one."""
    document = json.loads(json.dumps(document))
    room, names = document, []
    while True:
        keys = sorted(room) if isinstance(room, dict) else range(len(room))
        name = rng.choice(list(keys))
        names.append(str(name))
        found = room[name]
        if not isinstance(found, dict | list) or not found or rng.random() < 0.25:
            break
        room = found
    choice = rng.random()
    if choice < 0.2:
        del room[name]
        what = "gone"
    elif choice < 0.3 and isinstance(room, dict):
        room[rng.choice(("x", "", "\x1b[2J", "\ud800", "x" * 10_000))] = room.pop(name)
        what = "renamed"
    else:
        room[name] = odd_value(rng, found)
        what = f"is {room[name]!r:.40}"
    return document, f"{'.'.join(names):.80} {what}"


def odd_value(rng: random.Random, usual: Any) -> Any:
    """Something else: of the same type often, and then of an odd size."""
    if isinstance(usual, bool | str) or rng.random() < 0.4:
        return rng.choice(ODD_VALUES)
    if isinstance(usual, int | float):
        huge = (usual + 1, usual - 1, -usual, usual * 1000, float("inf"), float("nan"), 2**31)
        return rng.choice(huge)
    if isinstance(usual, list):
        return rng.choice((usual * 2, usual[1:], [*usual, rng.choice(ODD_VALUES)], usual[::-1]))
    return rng.choice(ODD_VALUES)
