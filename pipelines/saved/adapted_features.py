"""What an adapter makes of image features, as a file for one's own plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter import files
from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS, find_method
from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter

Features = npt.NDArray[np.float32]


def make_adapt(adapter: SavedAdapter) -> Callable[[Features], Features]:
    """Features as the adapter takes them (N, F) → image features that it compares with the classes,
    (N, D) float32, un-normalised.

    Raises UserError for a method that moves no image features.
    """
    info = adapter.info
    adapt = find_method(info.method).adapt
    if adapt is None:
        names = ", ".join(name for name, method in METHODS.items() if method.adapt)
        raise UserError(
            f"{info.method} moves no image features, so there are none for --features; these do: "
            f"{names}."
        )
    head = Head(adapter.weights, np.float32(info.logit_scale), np.float32(info.logit_bias))

    def adapted(features: Features) -> Features:
        found = adapt(np, adapter.arrays, info.setting, features, head)
        return np.asarray(found, np.float32)

    return adapted


def write_features(
    path: Path,
    ids: Sequence[str],
    labels: npt.NDArray[np.int32],
    features: Features,
    class_names: Sequence[str],
) -> None:
    """Write an .npz file whose arrays numpy.load reads without pickle: ids (N,) text, labels (N,)
    int32 in class_names (C,) text, features (N, D) float32. It is whole or absent."""
    content = BytesIO()
    np.savez(
        content,
        ids=np.array(ids, np.str_),
        labels=labels,
        features=features,
        class_names=np.array(class_names, np.str_),
    )
    files.write_bytes(path, content.getvalue())
