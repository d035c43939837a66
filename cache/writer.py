"""Write a feature cache: staged while it grows, assembled and renamed when it is whole."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from clip_adapter.cache import atomic, layout
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.staging import StagedRows

ARGUMENTS = "arguments.json"


class CacheWriter:
    """Collects features batch by batch beside `path` and puts the finished file there.

    Everything is staged in the folder `<path>.partial`. `finish` assembles the HDF5 file in that
    folder and renames it, so that `path` either does not exist or is complete. A writer opened
    with the same `arguments` after an interruption goes on behind the last whole batch.

    arguments: JSON-able description of what is written; two runs with equal arguments write the
        same cache.
    Raises UserError where the folder cannot be written, another process is writing the same file,
    or an interrupted run with other arguments lies there (unless `restart`).
    """

    def __init__(
        self, path: Path, arguments: dict[str, Any], *, views: int, restart: bool = False
    ) -> None:
        self.path = path
        self.arguments = arguments
        self._views = views
        self._folder = path.with_name(path.name + ".partial")
        self._staged: dict[str, StagedRows] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            self._lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
        self._take_lock()
        if restart:
            self._empty_folder()
        self._agree_on_arguments()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"Another process is writing {self.path}; wait for it or choose another --out."
            ) from None

    def _empty_folder(self) -> None:
        for entry in self._folder.iterdir():
            if entry.name != "lock":
                entry.unlink()

    def _agree_on_arguments(self) -> None:
        stated = self._folder / ARGUMENTS
        if not stated.exists():
            self._empty_folder()
            atomic.write_text(stated, json.dumps(self.arguments, sort_keys=True))
            return
        earlier = json.loads(stated.read_text())
        now = json.loads(json.dumps(self.arguments))
        if earlier != now:
            differing = sorted(
                key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key)
            )
            self.close()
            raise UserError(
                f"{self._folder} holds an interrupted run with other arguments "
                f"({', '.join(differing)} differ); repeat those arguments to go on, "
                "or use --force to start again."
            )

    def consumed(self, split: str) -> int:
        """Source images of a split that are dealt with already, skipped ones included."""
        journal = self._folder / f"{split}.journal"
        if not journal.exists():
            return 0
        with journal.open("rb") as lines:
            return sum(
                len(record["ids"]) + len(record["skipped"])
                for record in (json.loads(line) for line in lines if line.endswith(b"\n"))
            )

    def append_images(
        self,
        split: str,
        features: np.ndarray,
        labels: npt.ArrayLike,
        ids: Sequence[str],
        skipped: Sequence[str] = (),
    ) -> None:
        """Add a batch of images to a split.

        features: (B, V, D) float32 or float16, un-normalised; V is `views` for train, else 1.
        labels: (B,) integers. ids: B strings. skipped: ids of images that could not be read.
        """
        record = {
            "labels": np.asarray(labels, np.int32).tolist(),
            "ids": list(ids),
            "skipped": list(skipped),
        }
        self._stage(split, features).append(features, record)

    def append_text(self, features: np.ndarray, class_names: Sequence[str]) -> None:
        """Add the text features of some classes, (B, P, D), un-normalised."""
        self._stage(layout.TEXT, features).append(features, {"class_names": list(class_names)})

    def text_rows(self) -> int:
        """Classes whose text features are staged already."""
        return self._reopened(layout.TEXT).rows if self._has(layout.TEXT) else 0

    def _has(self, name: str) -> bool:
        return name in self._staged or (self._folder / f"{name}.shape").exists()

    def _stage(self, name: str, features: np.ndarray) -> StagedRows:
        if not self._has(name):
            _, inner, dim = features.shape
            shape = {"inner": inner, "dim": dim, "dtype": features.dtype.name}
            atomic.write_text(self._folder / f"{name}.shape", json.dumps(shape))
        return self._reopened(name)

    def _reopened(self, name: str) -> StagedRows:
        if name not in self._staged:
            shape = json.loads((self._folder / f"{name}.shape").read_text())
            dtype = np.dtype(shape["dtype"])
            self._staged[name] = StagedRows(
                self._folder, name, shape["inner"], shape["dim"], dtype
            )
        return self._staged[name]

    def finish(
        self,
        *,
        templates: Sequence[str],
        backbone: dict[str, Any],
        preprocess: dict[str, Any],
        dataset: dict[str, Any],
        logit_scale: float,
        logit_bias: float,
    ) -> None:
        """Assemble the HDF5 file, give it its final name and remove the staging folder."""
        assembled = self._folder / "assembled.h5"
        with h5py.File(assembled, "w") as file:
            for split in layout.SPLITS:
                if self._has(split):
                    self._assemble_split(file, split)
            self._assemble_text(file, templates)
            file.attrs.update(
                format=layout.FORMAT,
                format_version=layout.FORMAT_VERSION,
                complete=True,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                writer=f"clip-adapter {version('clip-adapter')}",
                backbone=json.dumps(backbone),
                preprocess=json.dumps(preprocess),
                dataset=json.dumps(dataset),
                logit_scale=float(logit_scale),
                logit_bias=float(logit_bias),
                arguments=json.dumps(self.arguments, sort_keys=True),
                content_sha256=layout.content_sha256(file),
            )
        with assembled.open("rb") as whole:
            os.fsync(whole.fileno())
        assembled.replace(self.path)
        self.close()
        shutil.rmtree(self._folder)

    def _assemble_split(self, file: h5py.File, split: str) -> None:
        staged = self._reopened(split)
        group = file.create_group(f"images/{split}")
        rows = layout.chunk_rows(staged.rows, staged.dim * staged.dtype.itemsize)
        features = group.create_dataset(
            "features",
            (staged.inner, staged.rows, staged.dim),
            staged.dtype,
            chunks=(1, rows, staged.dim),
            fletcher32=True,
        )
        for start in range(0, staged.rows, rows):
            stop = min(start + rows, staged.rows)
            features[:, start:stop] = staged.read(start, stop).transpose(1, 0, 2)
        labels = [label for record in staged.records() for label in record["labels"]]
        group.create_dataset("labels", data=np.array(labels, np.int32), fletcher32=True, chunks=True)
        _write_strings(group, "ids", (i for record in staged.records() for i in record["ids"]))
        skipped = [i for record in staged.records() for i in record["skipped"]]
        if skipped:
            _write_strings(group, "skipped", skipped)

    def _assemble_text(self, file: h5py.File, templates: Sequence[str]) -> None:
        staged = self._reopened(layout.TEXT)
        group = file.create_group(layout.TEXT)
        group.create_dataset(
            "features", data=staged.read(0, staged.rows), fletcher32=True, chunks=True
        )
        names = [name for record in staged.records() for name in record["class_names"]]
        _write_strings(group, "class_names", names)
        _write_strings(group, "templates", templates)

    def close(self) -> None:
        """Let go of the files; what is staged stays for the next run."""
        for staged in self._staged.values():
            staged.close()
        self._staged.clear()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _write_strings(group: h5py.Group, name: str, strings: Iterable[str]) -> None:
    """Fixed-length UTF-8, which unlike variable-length strings is covered by the checksum."""
    encoded = [string.encode() for string in strings]
    length = max((len(string) for string in encoded), default=1)
    values = np.array(encoded, dtype=f"S{max(1, length)}")
    dtype = h5py.string_dtype("utf-8", max(1, length))
    group.create_dataset(name, data=values.astype(dtype), fletcher32=True, chunks=True)
