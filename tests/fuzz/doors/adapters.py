"""Saved adapters of both format versions: damaged, or forged with hashes that agree; then loaded,
used on features, and by `inspect` and `predict`."""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from clip_adapter.pipelines.commands.fit import FitConfig, fit
from clip_adapter.pipelines.saved.adapter_file import (
    ARRAYS_FILE,
    INFO_FILE,
    SavedAdapter,
    document_sha256,
    load_adapter,
)
from clip_adapter.pipelines.saved.pytorch import FittedHead
from tests.extract.image_folders import make_folder, photograph
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import run_command
from tests.fuzz.damage import NESTED, change_json, damage

METHODS = ("zero-shot", "tip-adapter", "taskres", "clip-adapter")
SHORT = {"epochs": (2,)}
BOTH = {"branch": "both", "alpha": "learned", "beta": "hypernet"}
FITS: tuple[tuple[Sequence[str], dict[str, Any]], ...] = (
    (METHODS, {f"clip-adapter.{n}": (v,) for n, v in BOTH.items()}),
    (("clip-adapter",), {"alpha": (0.2,)}),
)
CLASSES = ("cat", "dog", "eel")


def prepare(folder: Path) -> None:
    source, cache = folder / "source", folder / "features.h5"
    make_folder(source, {"train": 2, "test": 1}, CLASSES)
    told = ["--dataset", f"folder:{source}", "--val", "0", "--out", str(cache)]
    said = run_command("extract", told)
    assert said.code == 0, said.err
    for number, (methods, hyper) in enumerate(FITS):
        result = fit(
            FitConfig(
                cache=cache,
                out=folder / f"run-{number}",
                method=tuple(methods),
                baselines=(),
                shots=(1,),
                select="none",
                hyper=hyper | SHORT,
            )
        )
        for place in (result.run / "adapters").glob("*/*"):
            shutil.copytree(place, folder / "adapters" / f"{number}-{place.parent.name}")
    photograph(0).save(folder / "image.png")


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    original = rng.choice(sorted((prepared / "adapters").iterdir()))
    run = folder / "run"
    shutil.copytree(original, run)
    wanted = _content(load_adapter(run))
    if rng.random() < 0.5:
        found = Attempt(damage(rng, run / rng.choice((INFO_FILE, ARRAYS_FILE))))
        adapter = found.read(lambda: load_adapter(run))
        found.same(adapter and _content(adapter), wanted)
    else:
        found = Attempt(_forge_info(rng, run) if rng.random() < 0.6 else _forge_arrays(rng, run))
        adapter = found.read(lambda: load_adapter(run))
    if adapter:
        found.read(lambda: _use(adapter))
    if rng.random() < 0.7:
        found.command(run_command("inspect", [rng.choice(("run", f"run/{INFO_FILE}"))]))
    else:
        image = str(prepared / "image.png")
        kind = rng.choice(("table", "csv", "json"))
        found.command(run_command("predict", ["--adapter", "run", image, "--format", kind]))
    return found


def _content(adapter: SavedAdapter) -> Any:
    arrays = {name: array.tobytes() for name, array in adapter.arrays.items()}
    return adapter.info, arrays, adapter.weights.tobytes()


def _use(adapter: SavedAdapter) -> None:
    """What is loaded has to work on any features."""
    width = adapter.weights.shape[1]
    with torch.inference_mode():
        logits = FittedHead(adapter)(torch.randn(2, width, generator=torch.manual_seed(0)))
    assert logits.shape == (2, len(adapter.info.class_names))
    assert bool(logits.isfinite().all())


def _stated(run: Path) -> dict[str, Any]:
    return json.loads((run / INFO_FILE).read_text())


def _state(run: Path, document: dict[str, Any]) -> None:
    """Write a document as somebody who knows of its hash."""
    document["sha256"] = document_sha256(document)
    (run / INFO_FILE).write_text(json.dumps(document))


def _replace_arrays(run: Path, content: bytes, **stated: Any) -> None:
    (run / ARRAYS_FILE).write_bytes(content)
    _state(run, _stated(run) | stated | {"safetensors_sha256": hashlib.sha256(content).hexdigest()})


def _forge_info(rng: random.Random, run: Path) -> str:
    if rng.random() < 0.1:
        text = rng.choice(NESTED)
        (run / INFO_FILE).write_text(text)
        return f"adapter.json is {text[:20]!r}"
    document, what = change_json(rng, _stated(run))
    _state(run, document)
    return what


def _forge_arrays(rng: random.Random, run: Path) -> str:
    arrays: dict[str, Any] = dict(load((run / ARRAYS_FILE).read_bytes()))
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    how = rng.choice(("gone", "renamed", "more", "type", "shape", "scale", "value", "header"))
    if how == "gone":
        del arrays[name]
    elif how == "renamed":
        arrays[rng.choice(("x", "\x1b[2J", "", "x" * 5000, "text/ratio/value"))] = arrays.pop(name)
    elif how == "more":
        arrays[rng.choice(("x", "image/ratio/value", "image/down/kernel"))] = array
    elif how == "type":
        arrays[name] = array.astype(rng.choice((np.float64, np.float16, np.int64, np.bool_)))
    elif how == "shape":
        some = () if array.ndim == 0 else (array[:0], array[:1])
        shapes = (array[None], array[..., None], array.T, array.reshape(-1), *some)
        arrays[name] = np.ascontiguousarray(rng.choice(shapes))
    elif how == "scale":
        arrays[name] = np.asarray(array * np.float32(rng.choice((0, -1, 1e20, 1e38, 1e-30))))
    elif how == "value":
        arrays[name] = array.copy()
        arrays[name][(0,) * array.ndim] = rng.choice((np.nan, np.inf, 3e38, -1e30))
    content = save(arrays)
    if how == "header":
        text = rng.choice(('{"x":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}', *NESTED))
        header = text.encode("utf-8", "surrogatepass")
        content = len(header).to_bytes(8, "little") + header + b"\0"
    _replace_arrays(run, content)
    return f"{name}: {how}"
