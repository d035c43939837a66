"""Whether a saved adapter can be used: its method's formula is run on its arrays once, and features
have to come from the backbone and the preprocessing that it was fitted for."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.method import Head, Method, Setting
from clip_adapter.adapters.stata import FLOOR, Refinement
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener

if TYPE_CHECKING:
    from clip_adapter.pipelines.saved.adapter_file import AdapterInfo

INFO_FILE = "adapter.json"
WEIGHTS = "weights"  # the classifier weights before adaptation, unit rows
SHORTEST_WEIGHTS = 0.5
UNKNOWN_WEIGHTS = "0" * 64  # the hash that `import` states of an encoder that it has not seen
ROWS = 3


class Noted(Mapping[str, Any]):
    """Arrays that remember which of them were asked for."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays, self.asked = arrays, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def check_usable(
    method: Method, setting: Setting, arrays: Mapping[str, npt.NDArray[Any]], head: Head
) -> None:
    """Raises ValueError, in a sentence, unless the method's formula makes finite logits (N, C) of
    N feature rows with exactly these arrays, each of a shape as the method states it.

    Arrays that the formula does not ask for are those by which a method classifies other classes
    (`for_classes`), where it has that."""
    width = feature_width(method, arrays, head)
    noted = Noted(arrays)
    rows = np.random.default_rng(0).normal(size=(ROWS, width)).astype(np.float32)
    rows[0] = 0
    try:
        with np.errstate(all="ignore"):
            logits = np.asarray(method.logits(np, noted, setting, rows, head))
            alone = np.asarray(method.logits(np, noted, setting, rows[1:2], head))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"the arrays do not fit each other ({error!s:.100})") from None
    idle = sorted(arrays.keys() - noted.asked)
    if idle and method.for_classes is None:
        raise ValueError(f"{', '.join(idle)} takes no part in the logits")
    if logits.shape != (ROWS, len(head.weights)) or alone.shape != (1, len(head.weights)):
        raise ValueError(f"the logits of {ROWS} images come out as {logits.shape}")
    finite = np.isfinite(logits).all() and np.isfinite(alone).all()
    scale = 1e-3 * float(np.abs(alone).max())
    if not (finite and np.allclose(logits[1], alone[0], rtol=1e-3, atol=scale)):
        raise ValueError("the logits of an image are not finite, or depend on the other images")


def checked_refinement(
    method: Method, arrays: Mapping[str, npt.NDArray[Any]], weights: npt.NDArray[np.float32]
) -> Refinement | None:
    """What these arrays of a file say; None where there are none.

    Raises ValueError, in a sentence, for others than a refinement has.
    """
    if not arrays:
        return None
    shapes = {"means": weights.shape, "variances": weights.shape, "temperature": ()}
    if arrays.keys() != shapes.keys() or "projection" in method.needs:
        raise ValueError(f"a refinement of {method.name} by {', '.join(arrays)} cannot be used")
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(
                f"the refinement's {name} are not finite float32 numbers of its classes"
            )
    refinement = Refinement(**arrays)
    unit_rows = np.linalg.norm(refinement.means, axis=1) < 1 + 1e-3
    if not unit_rows.all() or min(refinement.variances.min(), refinement.temperature) < FLOOR / 2:
        raise ValueError("the refinement has means or variances that no unit features have")
    return refinement


def feature_width(method: Method, arrays: Mapping[str, npt.NDArray[Any]], head: Head) -> int:
    """How wide the features are that the formula takes: of a method that works on what comes before
    the backbone's projection F of its shapes, else D, and E more of a second encoder's.

    Raises ValueError, in a sentence, where an array has not the shape that the method states.
    """
    sizes = _sizes(method, arrays, head)
    width = sizes.get("F", 0) if "projection" in method.needs else sizes["D"]
    width += sizes.get("E", 0) if method.takes_second else 0
    if not width:
        raise ValueError("it takes features of no width")
    return width


def takes_both(method: Method, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether the formula takes features of a second encoder: something is as wide as they are."""
    return method.takes_second and any("E" in method.shapes[name].split() for name in arrays)


def _sizes(method: Method, arrays: Mapping[str, npt.NDArray[Any]], head: Head) -> dict[str, int]:
    """What each letter of the method's shapes stands for in these arrays."""
    classes, dim = head.weights.shape
    sizes = {"C": classes, "D": dim, "1": 1}
    for name, array in sorted(arrays.items()):
        if name not in method.shapes:
            raise ValueError(f"{name!r:.80} is no array of {method.name}")
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"{name} holds something else than finite float32 numbers")
        if name == "labels" and not np.isin(array, np.arange(classes)).all():
            raise ValueError(f"labels holds something else than numbers of {classes} classes")
        letters = method.shapes[name].split()
        fits = len(letters) == array.ndim and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, array.shape, strict=False)
        )
        if not fits:
            wanted = ", ".join(f"{letter} = {sizes.get(letter, '?')}" for letter in letters)
            raise ValueError(f"{name} has the shape {array.shape} and not ({wanted})")
    return sizes


def checked_arrays(
    path: Path,
    info: AdapterInfo,
    method: Method,
    weights: npt.NDArray[Any] | None,
    arrays: Mapping[str, npt.NDArray[Any]],
    refining: Mapping[str, npt.NDArray[Any]],
) -> tuple[npt.NDArray[np.float32], Refinement | None]:
    """The classifier weights, and what refines them.

    path: of the file, for sentences. refining: the arrays of a refinement, {} for none.
    Raises UserError where they or the arrays are not those that the document implies.
    """
    if weights is None or weights.ndim != 2 or len(weights) != len(info.class_names):
        raise UserError(f"{path} does not hold the classifier weights of its classes.")
    if weights.dtype != np.float32 or not weights.size or not np.isfinite(weights).all():
        raise UserError(f"{path}: {WEIGHTS} holds something else than finite float32 numbers.")
    if not (np.linalg.norm(weights, axis=1) > SHORTEST_WEIGHTS).all():
        raise UserError(f"{path}: {WEIGHTS} holds a class without a direction.")
    head = Head(weights, np.float32(info.logit_scale), np.float32(info.logit_bias))
    try:
        check_usable(method, info.setting, arrays, head)
        if takes_both(method, arrays) != (info.backbone2 is not None):
            raise ValueError("they are of another number of encoders")
        refinement = checked_refinement(method, refining, weights)
    except ValueError as error:
        raise UserError(
            f"{path} does not fit {INFO_FILE}: {error}; fit the adapter again."
        ) from error
    return weights, refinement


def check_same_backbone(
    identity: Mapping[str, Any], preprocess: Mapping[str, Any], info: AdapterInfo, remedy: str
) -> None:
    """Raises UserError where they do not.

    identity, preprocess: as a cache states them. remedy: what to do about other weights.
    """
    _check_same(identity, preprocess, info.backbone, info.preprocess, remedy)


def check_same_second(identity: Mapping[str, Any] | None, info: AdapterInfo, remedy: str) -> None:
    """The same of the second encoder, where the adapter takes one."""
    if info.backbone2 is None:
        return
    if identity is None:
        name = info.backbone2.get("name")
        raise UserError(f"The adapter takes features of {name} as well, which lack; {remedy}.")
    own = info.backbone2.get("preprocess", {})
    _check_same(identity, identity["preprocess"], info.backbone2, own, remedy)


def _check_same(
    identity: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    wanted: Mapping[str, Any],
    preprocessed: Mapping[str, Any],
    remedy: str,
) -> None:
    name = identity.get("name")
    found, sha256 = identity.get("weights_sha256"), wanted.get("weights_sha256")
    if found != sha256:
        raise UserError(
            f"The adapter was fitted for other weights of {wanted.get('name')} (SHA-256 "
            f"{reprlib.repr(sha256)}) than those of {name} here ({reprlib.repr(found)}); {remedy}."
        )
    preprocessed = {"decode": "full", **preprocessed}
    # What is compared has been through JSON on the adapter's side.
    for key, value in json.loads(json.dumps({"decode": "full", **preprocess})).items():
        if preprocessed.get(key) != value:
            raise UserError(
                f"The adapter was fitted on images preprocessed with {key} "
                f"{reprlib.repr(preprocessed.get(key))}, {name} here uses "
                f"{reprlib.repr(value)}; extract and fit again."
            )


def warn_of_unknown(identity: Mapping[str, Any], these: str, listener: Listener) -> None:
    """Say where equal hashes of weights prove nothing, as `import` knows none.

    identity: of either of `these`, whose hashes are equal.
    """
    if identity.get("weights_sha256") == UNKNOWN_WEIGHTS:
        listener.warn(
            f"nothing says that {these} are of one encoder, since the weights of both are unknown"
        )


def check_same_width(found: int, wanted: int, name: str) -> None:
    """Raises UserError where `name` gives features of another width than the adapter takes."""
    if found != wanted:
        raise UserError(
            f"The adapter takes features {wanted} wide, those of {name} are {found} wide; fit it "
            "again."
        )
