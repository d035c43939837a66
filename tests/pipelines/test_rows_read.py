"""What is read of a cache: each row that fits, chooses or is to be known again, once for all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from clip_adapter.cache.hdf5 import row_hashes
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.tiny_cache import tiny_data, write_cache

METHODS = ("gda", "tip-adapter")


@pytest.mark.parametrize(
    "asked", [{}, {"select": "cv"}, {"select": "cv", "validation": "join"}], ids=str
)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_every_row_is_read_once_for_all_tasks_and_methods(
    tmp_path: Path, asked: dict, kind: type
) -> None:
    data, read = tiny_data(views=2), []
    stored = {name: (rows.astype(kind), own) for name, (rows, own) in data.splits.items()}
    data = replace(data, splits=stored)
    reading = FeatureCache.features

    def noted(cache: FeatureCache, split: str, rows: Any, views: int | None = None) -> np.ndarray:
        read.extend((split, row) for row in np.asarray(rows).tolist())
        return reading(cache, split, rows, views)

    cache = write_cache(tmp_path / "features.h5", data)
    with patch.object(FeatureCache, "features", noted):
        usual: dict[str, Any] = {"method": METHODS, "shots": (2, 4), "seeds": (1, 2)}
        result = fit(FitConfig(cache, tmp_path / "run", baselines=(), **usual | asked))
    fitted = [place for place in read if place[0] != "test"]
    assert len(fitted) == len(set(fitted)) or "validation" in asked
    for method in METHODS:
        for task in json.loads((result.run / "tasks.json").read_text()):
            place = result.run / "adapters" / method / f"shots-{task['shots']}-seed-{task['seed']}"
            names = [name.split("/") for name in [*task["support"], *task["validation"]]]
            own = np.float32([data.splits[split][0][0, int(row)] for split, row in names])
            assert np.array_equal(load_adapter(place).seen, np.unique(row_hashes(own)))
