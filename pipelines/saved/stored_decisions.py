"""An adapter's decisions in its two files: numbers in the JSON, arrays beside the fitted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.decisions import COLDEST, HOTTEST, Decisions
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.records import between, from_document

# The name of the object in the document, and before those of the arrays.
DECISIONS = "decisions"
PLACE = f"{DECISIONS}/"
MOST = 2**31


@dataclass(frozen=True)
class Stated:
    """What adapter.json says of them."""

    temperature: Annotated[float, between(COLDEST, HOTTEST)]
    images: Annotated[int, between(0, MOST)]
    folds: Annotated[int, between(0, MOST)]
    chose: Annotated[int, between(0, MOST)]


def stated(decisions: Decisions) -> dict[str, Any]:
    return {name: getattr(decisions, name) for name in Stated.__dataclass_fields__}


def arrays_of(decisions: Decisions) -> dict[str, npt.NDArray[Any]]:
    names = ("scores", "labels", "known", "prototypes")
    return {PLACE + name: getattr(decisions, name) for name in names}


def checked_decisions(
    path: Path,
    document: Mapping[str, Any],
    arrays: Mapping[str, npt.NDArray[Any]],
    weights: npt.NDArray[np.float32],
) -> Decisions:
    """path: of the arrays' file, for sentences. arrays: those in PLACE.

    Raises UserError for others than there are of so many images, and for values out of range.
    """
    try:
        numbers = from_document(Stated, document[DECISIONS], DECISIONS)
        named = {name.removeprefix(PLACE): array for name, array in arrays.items()}
        _check_arrays(numbers.images, named, weights)
    except Contradiction as error:
        raise UserError(f"{path}: {error}; fit the adapter again.") from None
    return Decisions(numbers.temperature, numbers.folds, numbers.chose, **named)


def _check_arrays(
    images: int, arrays: Mapping[str, npt.NDArray[Any]], weights: npt.NDArray[np.float32]
) -> None:
    ranges = {
        "scores": ((images,), np.float32, 0, 1),
        "labels": ((images,), np.int32, 0, len(weights) - 1),
        "known": ((images, 3), np.float32, -1.001, 1.001),
        "prototypes": (weights.shape, np.float32, -1.001, 1.001),
    }
    if arrays.keys() != ranges.keys():
        raise Contradiction(f"{DECISIONS} has the arrays {', '.join(arrays) or 'none'}")
    for name, (shape, dtype, low, high) in ranges.items():
        own = arrays[name]
        inside = own.shape == shape and own.dtype == dtype and ((own >= low) & (own <= high)).all()
        if not inside:  # nor is NaN
            raise Contradiction(
                f"{PLACE}{name} is not {np.dtype(dtype)} of the shape {shape} from {low} to {high}"
            )
