"""A row of results.csv: a fit, with a bit for each validation image that it gets right."""

from __future__ import annotations

from typing import Any

import numpy as np

TASK_COLUMNS = ("method", "shots", "seed")
Row = dict[str, Any]


def packed(right: np.ndarray | None) -> str:
    """`40:f0ff…`: the number of images and a bit for each of them, in hexadecimal."""
    return "" if right is None else f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpacked(text: str) -> np.ndarray | None:
    """Raises ValueError where there are not as many bits as it says."""
    length, _, digits = text.partition(":")
    if not length:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    if not 0 <= len(bits) - int(length) < 8:
        raise ValueError("another number of bits")
    return bits[: int(length)].astype(bool)


def is_sound(row: Row) -> bool:
    """Whether a row of results.csv can be used, and agrees with itself."""
    try:
        float(row["seconds"])
        accuracy, failed = float(row["val_accuracy"]), not np.isfinite(float(row["val_nll"]))
        right = unpacked(row["right"])
        return (
            0 <= int(row["best_epoch"]) <= int(row["epochs_run"])
            and (right is not None or int(row["epochs_run"]) == 0)
            and row["status"] == ("failed" if failed else "ok")
            and (failed or 0 <= accuracy <= 1)
            and (failed or right is None or abs(accuracy - right.mean()) < 1e-6)
        )
    except (TypeError, ValueError, AttributeError):  # a cell that is not there is None
        return False
