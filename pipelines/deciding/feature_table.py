"""The features of a cache as a Parquet table, a row per image."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter import files
from clip_adapter.cache.reader import BLOCK_ROWS, FeatureCache
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError

STATED = b"clip_adapter"  # in the table's own metadata


def require_pyarrow(path: Path) -> None:
    """Raises UserError where Parquet can be neither read nor written."""
    if find_spec("pyarrow") is None:
        raise UserError(
            f"{path} is Parquet, which needs the package pyarrow: pip install "
            "'clip-adapter[parquet]'."
        )


def write_table(cache: FeatureCache, out: Path) -> int:
    """Write the columns id, label (null where there is none), split, group where the cache knows
    groups, and features, a fixed-size list of float32, of each image's first view. Returns the
    number of rows.

    Some thousands of rows are in memory at a time; nothing stands at `out` until all are written.
    Class names, backbone, preprocessing and logit scale stand in the schema's metadata as JSON.
    """
    import pyarrow as pa
    from pyarrow import parquet

    stated = {
        "class_names": cache.class_names,
        "backbone": cache.backbone,
        "preprocess": cache.preprocess,
        "logit_scale": cache.logit_scale,
        "logit_bias": cache.logit_bias,
    }
    dim = cache.shape(cache.all_splits[0])[2]
    groups = {split: cache.groups(split) for split in cache.all_splits}
    grouped = any(own is not None for own in groups.values())
    texts = [(n, pa.string()) for n in ("id", "label", "split", "group") if n != "group" or grouped]
    schema = pa.schema(
        [*texts, ("features", pa.list_(pa.float32(), dim))], {STATED: json.dumps(stated)}
    )
    names = np.array(cache.class_names, object)
    total = 0
    with files.written(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for split in cache.all_splits:
            count = cache.shape(split)[1]
            labels = np.full(count, None)
            if split != UNLABELLED:
                labels = names[cache.labels(split)]
            own = np.full(count, None) if groups[split] is None else np.array(groups[split], object)
            for start in range(0, count, BLOCK_ROWS):
                rows = np.arange(start, min(start + BLOCK_ROWS, count))
                flat = pa.array(cache.features(split, rows, views=1)[0].ravel())
                features = pa.FixedSizeListArray.from_arrays(flat, dim)
                columns = [cache.ids(split, rows), labels[rows], [split] * len(rows)]
                columns += [own[rows]] if grouped else []
                writer.write_table(pa.table([*columns, features], schema=schema))
            total += count
    return total


def stated_classes(schema: Any) -> list[str]:
    """The class names that `write_table` has put into a table's schema; none of other tables."""
    try:
        names = files.parse_json((schema.metadata or {})[STATED])["class_names"]
    except (KeyError, TypeError, ValueError):
        return []
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if sound else []
