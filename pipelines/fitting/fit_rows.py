"""A row of results.csv: a fit, with what is known of each validation image."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from clip_adapter.adapters.engine.evaluation import Images

TASK_COLUMNS = ("method", "shots", "seed")
Row = dict[str, Any]


def packed(images: Images | None) -> str:
    """`40:f0ff…:AACA…`: the number of images, a bit for each that is right, in hexadecimal, and
    their losses, little-endian float32 in base64."""
    if images is None:
        return ""
    losses = base64.b64encode(images.losses.astype("<f4").tobytes()).decode()
    return f"{len(images.right)}:{np.packbits(images.right).tobytes().hex()}:{losses}"


def unpacked(text: str) -> Images | None:
    """Raises ValueError where there are not as many bits and losses as it says."""
    if not text:
        return None
    length, digits, losses = text.split(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    numbers = np.frombuffer(base64.b64decode(losses, validate=True), "<f4")
    if not 0 <= len(bits) - int(length) < 8 or len(numbers) != int(length):
        raise ValueError("another number of images")
    return Images(bits[: int(length)].astype(bool), numbers)


def is_sound(row: Row, *, images_alike: bool) -> bool:
    """Whether a row of results.csv can be used, and agrees with itself.

    images_alike: whether all count alike in its accuracy.
    """
    try:
        float(row["seconds"])
        accuracy, failed = float(row["val_accuracy"]), not np.isfinite(float(row["val_nll"]))
        images = unpacked(row["images"])
        return (
            0 <= int(row["best_epoch"]) <= int(row["epochs_run"])
            and (images is not None or int(row["epochs_run"]) == 0)
            and row["status"] == ("failed" if failed else "ok")
            and (failed or 0 <= accuracy <= 1)
            and (failed or images is None or _agree(images, accuracy, row, images_alike))
        )
    except (TypeError, ValueError, AttributeError):  # a cell that is not there is None
        return False


def _agree(images: Images, accuracy: float, row: Row, images_alike: bool) -> bool:
    """Whether what is said of each image gives the row's means."""
    if not images_alike:
        return bool(np.isfinite(images.losses).all())
    nll = float(row["val_nll"])
    return abs(accuracy - images.right.mean()) < 1e-5 and abs(
        nll - images.losses.mean(dtype=np.float64)
    ) <= 1e-4 * max(1.0, abs(nll))
