"""Read a feature cache, refusing with one sentence whatever cannot be trusted."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import layout
from clip_adapter.cache.errors import UserError

ATTRIBUTES = ("backbone", "preprocess", "dataset", "logit_scale", "logit_bias", "complete")
JSON_ATTRIBUTES = ("backbone", "preprocess", "dataset", "arguments")
# What h5py raises where the bytes of a file contradict each other.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def _is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_fixed_utf8(dtype: np.dtype) -> bool:
    string = h5py.check_string_dtype(dtype)
    return string is not None and string.encoding == "utf-8" and string.length is not None


_TYPES: dict[str, Callable[[np.dtype], bool]] = {
    "features": lambda dtype: dtype in (np.float32, np.float16),
    "labels": lambda dtype: dtype == np.int32,
    "ids": _is_fixed_utf8,
    "class_names": _is_fixed_utf8,
    "templates": _is_fixed_utf8,
}


@dataclass(frozen=True)
class Images:
    """One split: features (V, N, D) float32, un-normalised; labels (N,) int32; N ids."""

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    ids: list[str]


class FeatureCache:
    """A complete feature cache of format version 1, opened for reading.

    Opening checks the format, its version and completeness, and that all shapes agree; no
    features are read until `images` or `text_features` asks for them, which also checks their
    values.

    Raises UserError for a file that is missing, not HDF5, foreign, newer, incomplete, or whose
    shapes or values contradict the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"There is no feature cache at {path}; `extract` makes one.")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read as HDF5: it is damaged, truncated or something else; "
                "make it again with `extract`."
            ) from error
        try:
            self._check()
        except BaseException as error:
            self._file.close()
            if isinstance(error, DAMAGE) and not isinstance(error, UserError):
                raise self._broken("its structure is damaged") from error
            raise

    def _check(self) -> None:
        if self._scalar("format") == layout.PART_FORMAT:
            raise UserError(
                f"{self.path} is one part of a cache; join the parts with `clip-adapter merge`."
            )
        if self._scalar("format") != layout.FORMAT:
            raise UserError(
                f"{self.path} is an HDF5 file but not a CLIP feature cache; `extract` makes one."
            )
        if self._scalar("format_version") != layout.FORMAT_VERSION:
            raise UserError(
                f"{self.path} has format version {self._scalar('format_version')}, this program "
                f"reads version {layout.FORMAT_VERSION}; update clip-adapter or extract again."
            )
        missing = [name for name in ATTRIBUTES if name not in self._file.attrs]
        if missing or not self._scalar("complete"):
            raise self._broken(f"it is incomplete ({', '.join(missing) or 'marked so'})")
        for name in JSON_ATTRIBUTES:
            if name in self._file.attrs and not _is_json_object(self._scalar(name)):
                raise self._broken(f"attribute {name} is not a JSON object")
        for name in ("logit_scale", "logit_bias"):
            value = self._scalar(name)
            if not isinstance(value, np.number) or not np.isfinite(value):
                raise self._broken(f"attribute {name} is not a finite number")
        if not _is_sha256(self._file.attrs.get("content_sha256", "0" * 64)):
            raise self._broken("attribute content_sha256 is not a SHA-256")
        self._check_datasets()

    def _scalar(self, name: str) -> Any:
        """An attribute of one value, None for an array or none."""
        value = self._file.attrs.get(name)
        return None if isinstance(value, np.ndarray) else value

    def _check_datasets(self) -> None:
        paths = layout.dataset_paths(self._file)
        absent = [path for path in paths if not isinstance(self._file.get(path), h5py.Dataset)]
        if absent or not self.splits:
            raise self._broken(f"it lacks {', '.join(absent) or 'images'}")
        for path in paths:
            dataset = self._file[path]
            kind = path.rpartition("/")[2]
            if not _TYPES[kind](dataset.dtype):
                raise self._broken(f"{path} has a type that the format does not know")
            if dataset.ndim != (3 if kind == "features" else 1) or 0 in dataset.shape:
                raise self._broken(f"{path} has the shape {dataset.shape}")
        text = self._file["text/features"]
        if text.shape[:2] != (len(self.class_names), len(self.templates)):
            raise self._broken(f"text features {text.shape} disagree with the classes or templates")
        for split in self.splits:
            features = self._file[f"images/{split}/features"]
            rows = {self._file[f"images/{split}/{name}"].shape for name in ("labels", "ids")}
            if rows != {features.shape[1:2]}:
                raise self._broken(f"features, labels and ids of {split} disagree in shape")
            if features.shape[2] != text.shape[2]:
                raise self._broken(f"image and text features of {split} differ in width")

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self.path} cannot be used: {reason}; make it again with `extract`.")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in layout.SPLITS if f"images/{split}" in self._file)

    @property
    def backbone(self) -> dict[str, Any]:
        return json.loads(self._file.attrs["backbone"])

    @property
    def preprocess(self) -> dict[str, Any]:
        return json.loads(self._file.attrs["preprocess"])

    @property
    def dataset(self) -> dict[str, Any]:
        return json.loads(self._file.attrs["dataset"])

    @property
    def arguments(self) -> dict[str, Any]:
        """What `extract` was asked for, {} for a cache written by something else."""
        return json.loads(self._file.attrs.get("arguments", "{}"))

    @property
    def content_sha256(self) -> str:
        """Identity of the cached numbers (FORMAT.md), computed where the file does not state it."""
        return self._file.attrs.get("content_sha256") or layout.content_sha256(self._file)

    @property
    def logit_scale(self) -> float:
        """The multiplier itself (about 100 for CLIP), not its logarithm."""
        return float(self._file.attrs["logit_scale"])

    @property
    def logit_bias(self) -> float:
        return float(self._file.attrs["logit_bias"])

    @property
    def skipped(self) -> int:
        """Images of the data set that could not be read and are not here."""
        return layout.count_skipped(self._file)

    @cached_property
    def class_names(self) -> list[str]:
        return self._strings("text/class_names")

    @cached_property
    def templates(self) -> list[str]:
        return self._strings("text/templates")

    def text_features(self) -> npt.NDArray[np.float32]:
        """(C, P, D) float32, un-normalised."""
        return self._values("text/features")

    def shape(self, split: str) -> tuple[int, int, int]:
        """(V, N, D) of a split's features."""
        views, rows, dim = self._file[f"images/{split}/features"].shape
        return views, rows, dim

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """(N,) int32, checked to lie within the classes."""
        labels = self._read(f"images/{split}/labels")
        if not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise self._broken(f"labels of {split} lie outside the {len(self.class_names)} classes")
        return labels

    def images(self, split: str, views: int | None = None) -> Images:
        """The features, labels and ids of one split.

        views: how many to read, view 0 being the first; None for all.
        Raises UserError where the cache has no such split, a checksum fails, a feature is NaN or
        infinite, or a label lies outside the classes.
        """
        if split not in self.splits:
            raise UserError(
                f"{self.path} has no {split} split, only {', '.join(self.splits)}; "
                "extract a data set with one."
            )
        features = self._values(f"images/{split}/features", views)
        return Images(features, self.labels(split), self._strings(f"images/{split}/ids"))

    def ids(self, split: str) -> list[str]:
        """N strings."""
        return self._strings(f"images/{split}/ids")

    def hashes(self, split: str, name: str) -> npt.NDArray[np.uint64] | None:
        """One of a split's optional lists of hashes, of rows or of skipped images; None where it is
        not there or not of that type."""
        path = f"images/{split}/{name}"
        found = self._file.get(path)
        if not isinstance(found, h5py.Dataset) or found.dtype != np.uint64 or found.ndim != 1:
            return None
        return self._read(path)

    def skipped_ids(self, split: str) -> list[str]:
        """Those images of a split that could not be read."""
        path = f"images/{split}/skipped"
        return self._strings(path) if path in self._file else []

    def skipped_labels(self, split: str) -> list[int]:
        """Their labels."""
        path = f"images/{split}/skipped_labels"
        return self._read(path).tolist() if path in self._file else []

    def stored_features(self, split: str, start: int, stop: int) -> np.ndarray:
        """(V, M, D) of the rows start…stop−1, in the type in which they are stored."""
        path = f"images/{split}/features"
        try:
            return self._file[path][:, start:stop]
        except DAMAGE as error:
            raise self._broken(f"{path} is damaged (its checksum does not match)") from error

    def prompts(self) -> list[list[str]] | None:
        """(C, P) what was encoded for each class, where that is recorded."""
        if "text/prompts" not in self._file:
            return None
        return [[text.decode() for text in row] for row in self._read("text/prompts")]

    def _values(self, path: str, first: int | None = None) -> npt.NDArray[np.float32]:
        values = self._read(path, first).astype(np.float32)
        if not np.isfinite(values).all():
            raise self._broken(f"{path} holds values that are not finite")
        return values

    def _strings(self, path: str) -> list[str]:
        try:
            return [value.decode() for value in self._read(path)]
        except UnicodeDecodeError as error:
            raise self._broken(f"{path} is not UTF-8") from error

    def _read(self, path: str, first: int | None = None) -> np.ndarray:
        """A dataset, or its `first` entries along the first axis."""
        try:
            return self._file[path][:first]
        except DAMAGE as error:
            raise self._broken(f"{path} is damaged (its checksum does not match)") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
