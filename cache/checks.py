"""What a writer is given, checked before anything of it is on the disk."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from clip_adapter.cache import schema
from clip_adapter.cache.assemble import Projection
from clip_adapter.cache.metadata import Part
from clip_adapter.errors import UserError
from clip_adapter.words import quoted


def check_strings(strings: Iterable[str]) -> None:
    """Raises UserError for strings that a fixed-length UTF-8 field would not give back."""
    for string in strings:
        if "\0" in string or any("\ud800" <= character <= "\udfff" for character in string):
            raise UserError(
                f"{quoted(string)} cannot be stored: it holds a NUL or is not valid Unicode; "
                "rename it."
            )


def indistinct(class_names: Sequence[str]) -> str | None:
    """How class names tell no class from another, as a clause: they are all empty or all equal."""
    if any(class_names) and not len(class_names) > 1 == len(set(class_names)):
        return None
    return f"its {len(class_names)} class names are all {quoted(class_names[0])}"


def check_features(features: np.ndarray, names: Sequence[str]) -> None:
    """(B, …, D): each a finite direction of a usual size. Raises UserError with the name of the
    first other."""
    if features.dtype not in (np.float32, np.float16):
        raise ValueError(f"features are {features.dtype}, not float32 or float16")
    largest = np.abs(features).max(axis=2).astype(np.float64)  # NaN where one is NaN
    usual = (largest >= schema.SMALLEST_FEATURE) & (largest <= schema.LARGEST_FEATURE)
    usable = usual.all(axis=1)
    if not usable.all():
        bad = int(usable.argmin())
        what = "far smaller or larger than CLIP's" if largest[bad].all() else "zero"
        what = what if np.isfinite(largest[bad]).all() else "not finite numbers"
        raise UserError(
            f"The features of {quoted(names[bad])} are {what}; the weights are damaged or overflow "
            "in this precision."
        )


def check_projection(
    arrays: Mapping[str, Mapping[str, tuple[np.dtype, tuple[int, ...]]]],
    projection: Projection | None,
    part: Part | None,
) -> None:
    """Raises ValueError unless all splits have features before the projection, and the file the
    projection, or none has."""
    splits = [found for name, found in arrays.items() if name != schema.TEXT]
    having = [found["pre_projection"] for found in splits if "pre_projection" in found]
    widths = {shape[1] for _, shape in having}
    if having and len(having) < len(splits):
        raise ValueError("not every split has pre-projection features")
    if projection is not None:
        weights, bias = projection
        dims = {found["features"][1][1] for found in arrays.values()}
        fits = weights.ndim == 2 and {weights.shape[1]} == dims and widths <= {weights.shape[0]}
        fits &= weights.dtype == np.float32
        if bias is not None:
            fits &= bias.shape == weights.shape[1:] and bias.dtype == np.float32
        if not fits:
            raise ValueError(f"a projection of {weights.shape} for features of {dims}")
    elif having and (part is None or part.index == 1):
        raise ValueError("pre-projection features without a projection")
