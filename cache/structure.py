"""Which datasets a file has, and whether their shapes agree."""

from math import prod

import h5py

from clip_adapter.cache import schema
from clip_adapter.cache.hdf5 import CheckedDatasets
from clip_adapter.errors import Contradiction

OF_A_SPLIT = "VNS"


class Structure:
    """The datasets of a cache or a part, by path, found and measured without reading a value.

    lengths: what the letters of FORMAT.md stand for; those of one split as `N train`.
    Raises Contradiction for what FORMAT.md does not allow.
    """

    def __init__(self, file: h5py.File, name: str, version: int) -> None:
        self.datasets: dict[str, h5py.Dataset] = {}
        self.lengths: dict[str, int] = {}
        self._part = name == schema.PART_FORMAT
        checked = CheckedDatasets(file)
        images = checked.has_group("images")
        self.splits = tuple(
            split for split in schema.SPLITS if images and checked.has_group(f"images/{split}")
        )
        for path, element in schema.ELEMENTS.items():
            if element.since <= version:
                dataset = checked.find(path, element.kind, len(element.axes))
                if dataset is not None:
                    self._add(path, element.axes, dataset)
        self._check_presence()

    def _add(self, path: str, axes: str, dataset: h5py.Dataset) -> None:
        split = path.split("/")[1] if path.startswith("images/") else ""
        if not prod(dataset.shape) and not (self._part and split):
            raise Contradiction(f"{path} has the shape {dataset.shape}")
        for axis, length in zip(axes, dataset.shape, strict=True):
            letter = f"{axis} {split}" if axis in OF_A_SPLIT else axis
            if self.lengths.setdefault(letter, length) != length:
                raise Contradiction(
                    f"{path} has the shape {dataset.shape}, which disagrees with the others "
                    f"({letter.strip()} is {self.lengths[letter]})"
                )
        if split in ("val", "test") and self.lengths.get(f"V {split}", 1) != 1:
            raise Contradiction(f"{path} has several views, which only train may have")
        self.datasets[path] = dataset

    def _check_presence(self) -> None:
        missing = [
            path
            for path, element in schema.ELEMENTS.items()
            if element.required and path not in self.datasets and self._must_have(path)
        ]
        if not self._part and not self.splits:
            missing.insert(0, "images")
        projected = [split for split in self.splits if f"{self._pre(split)}" in self.datasets]
        if projected and not self._part:
            needed = [*map(self._pre, self.splits), "projection/weights"]
            missing += [path for path in needed if path not in self.datasets]
        if "projection/bias" in self.datasets and "projection/weights" not in self.datasets:
            missing.append("projection/weights")
        if missing:
            raise Contradiction(f"it lacks {', '.join(missing)}")

    @staticmethod
    def _pre(split: str) -> str:
        return f"images/{split}/pre_projection"

    def _must_have(self, path: str) -> bool:
        room, name = path.split("/")[:2]
        if room == "images":
            return name in self.splits
        return not self._part or any(other.startswith("text/") for other in self.datasets)
