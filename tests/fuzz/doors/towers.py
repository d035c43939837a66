"""Text towers: with the cache's hash over them, and without, changed by somebody who means it."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from clip_adapter.cache.text_tower import FORMAT, encode_text_tower, read_text_tower
from tests.cache.test_text_tower import tower
from tests.fuzz.attempt import Attempt
from tests.fuzz.damage import NESTED, change_json, damage

NAME = "features.text_tower.safetensors"


def prepare(folder: Path) -> None:
    (folder / NAME).write_bytes(encode_text_tower(tower()))


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    original, path = (prepared / NAME).read_bytes(), folder / NAME
    path.write_bytes(original)
    if rng.random() < 0.5:
        found = Attempt(damage(rng, path))
        sha256 = hashlib.sha256(original).hexdigest()
        found.same(found.read(lambda: content(path, sha256)), content(prepared / NAME, sha256))
    else:
        found = Attempt(change(rng, path, original))
    found.read(lambda: content(path, None))
    return found


def change(rng: random.Random, path: Path, original: bytes) -> str:
    """Another configuration, or other arrays."""
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])["__metadata__"]
    arrays: dict[str, Any] = load(original)
    if rng.random() < 0.6:
        stated, what = change_json(rng, json.loads(header[FORMAT]))
        header[FORMAT] = json.dumps(stated) if rng.random() < 0.9 else rng.choice(NESTED)
    else:
        name = rng.choice(sorted(arrays))
        kind = rng.choice((np.float64, np.float16, np.int32, np.bool_, np.float32, np.float32))
        arrays[name] = arrays[name].astype(kind)
        if rng.random() < 0.5:
            arrays[name] = arrays[name][..., : rng.randrange(3)]
        elif rng.random() < 0.5:
            arrays[rng.choice(("x", "", "\x1b[2J", "x" * 5000))] = arrays.pop(name)
        else:
            arrays[name].flat[0] = rng.choice((np.nan, np.inf, 1e30)) if kind != np.int32 else 7
        what = f"{name} changed"
    path.write_bytes(save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, header))
    return what


def content(path: Path, sha256: str | None) -> Any:
    config, arrays = read_text_tower(path, sha256)
    return replace(config), {name: array.tobytes() for name, array in arrays.items()}
