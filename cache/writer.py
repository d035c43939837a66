"""Write a feature cache: staged while it grows, assembled and renamed when it is whole."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.assemble import Projection, assemble
from clip_adapter.cache.checks import check_features, check_projection, check_strings, indistinct
from clip_adapter.cache.metadata import Metadata, Part, encode, parse, parse_object
from clip_adapter.cache.staging import StagedRows, StagingFolder
from clip_adapter.errors import Contradiction, UserError


class CacheWriter:
    """Collects features batch by batch beside a path and puts the finished file there.

    Everything is staged in the folder `<path>.partial`. `finish` assembles the HDF5 file in that
    folder and renames it, so that the path either does not exist or is complete. A writer opened
    with the same `arguments` after an interruption goes on behind the last whole batch.

    place: the path, or the folder taken beside it, which the writer closes.
    arguments: JSON-able description of what is written; two runs with equal arguments write the
        same cache.
    stated: those that an interrupted run must agree on, by default all; may_differ: but not these.
    staging: sub-folder in which the rows are staged, so that others may lie beside them; all go in
        the end.
    Raises UserError where the folder cannot be written, another process is writing the same file,
    or an interrupted run with other arguments lies there (unless `restart`).
    """

    def __init__(
        self,
        place: Path | StagingFolder,
        arguments: dict[str, Any],
        *,
        views: int,
        restart: bool = False,
        stated: dict[str, Any] | None = None,
        may_differ: Collection[str] = (),
        staging: str = "",
    ) -> None:
        self._place = StagingFolder(place) if isinstance(place, Path) else place
        self.path = self._place.path
        self.arguments = arguments
        self._views = views
        self._restart = restart
        self._folder = self._place.folder / staging
        self._staged: dict[str, StagedRows] = {}
        try:
            with self._writing():
                if restart:
                    self._place.empty()
                stated = arguments if stated is None else stated
                self._place.refuse_other(stated, may_differ=may_differ)
                self._place.state(stated)
                self._folder.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    @property
    def staging(self) -> Path:
        """The folder in which the rows are staged."""
        return self._folder

    def consumed(self, split: str) -> int:
        """Source images of a split that are dealt with already, skipped ones included."""
        staged = self._reopened(split)
        if staged is None:
            return 0
        return sum(len(record["ids"]) + len(record["skipped"]) for record in staged.records())

    def append_images(
        self,
        split: str,
        features: np.ndarray,
        labels: npt.ArrayLike,
        ids: Sequence[str],
        skipped: Sequence[str] = (),
        digests: npt.NDArray[np.uint64] | None = None,
        skipped_labels: npt.ArrayLike = (),
        pre_projection: np.ndarray | None = None,
        stamps: npt.NDArray[np.uint64] | None = None,
        contents: npt.NDArray[np.uint64] | None = None,
        skipped_stamps: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        """Add a batch of images to a split.

        features: (B, V, D) float32 or float16, un-normalised; V is `views` for train, else 1.
        labels: (B,) integers. ids: B strings. skipped: ids of images that could not be read.
        digests: (B,) hashes of the images' pixels, for all batches of a split or for none.
        skipped_labels: those of `skipped`, for all batches of a split or for none.
        stamps, contents: (B,) hashes by which the images are known again (FORMAT.md), and
        skipped_stamps those of `skipped`; for all batches of a split or for none.
        pre_projection: (B, V, F) float32 or float16, what the encoder's last linear map is applied
            to, for all batches of all splits or for none.
        Raises UserError for features that are not finite or zero and ids that the file cannot hold,
        before anything of the batch is staged, and where the disk is full.
        """
        views = self._views if split == "train" else 1
        if features.shape[:2] != (len(ids), views) or np.shape(labels) != (len(ids),):
            raise ValueError(f"{features.shape} features of {len(ids)} images, {views} views")
        check_strings([*ids, *skipped])
        values = {"features": features}
        if pre_projection is not None:
            if pre_projection.shape[:2] != features.shape[:2]:
                raise ValueError(f"{pre_projection.shape} pre-projection features")
            values["pre_projection"] = pre_projection
        for array in values.values():
            check_features(array, ids)
        record = {
            "labels": np.asarray(labels, np.int32).tolist(),
            "ids": list(ids),
            "skipped": list(skipped),
            "skipped_labels": np.asarray(skipped_labels, np.int32).tolist(),
        }
        hashes = {
            "digests": digests,
            "stamps": stamps,
            "contents": contents,
            "skipped_stamps": skipped_stamps,
        }
        record |= {name: found.tolist() for name, found in hashes.items() if found is not None}
        self._stage(split, values, record)

    def append_text(
        self,
        features: np.ndarray,
        class_names: Sequence[str],
        prompts: Sequence[Sequence[str]] | None = None,
        tokens: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Add the text features of some classes, (B, P, D), un-normalised.

        prompts: (B, P) what was encoded, "" for rows that fill up a class with fewer prompts than
            others (FORMAT.md says with what); for all classes or for none.
        tokens: (B, P, L) what the text tower was given, zeros for rows that fill up; the same.
        Raises UserError as `append_images` does.
        """
        if len(features) != len(class_names):
            raise ValueError(f"text features of {len(features)} for {len(class_names)} classes")
        check_strings(class_names)
        check_features(features, class_names)
        record: dict[str, Any] = {"class_names": list(class_names)}
        if prompts is not None:
            for row in prompts:
                check_strings(row)
            record["prompts"] = [list(row) for row in prompts]
        values = {"features": features}
        if tokens is not None:
            if tokens.shape[:2] != features.shape[:2] or tokens.dtype != np.int32:
                raise ValueError(f"{tokens.dtype} tokens of shape {tokens.shape}")
            values["tokens"] = tokens
        self._stage(schema.TEXT, values, record)

    def text_rows(self) -> int:
        """Classes whose text features are staged already."""
        staged = self._reopened(schema.TEXT)
        return staged.rows if staged else 0

    def listed(self, split: str, key: str) -> Iterator[Any]:
        """What is noted of a split's images so far, in order.

        key: labels, ids, digests; skipped, skipped_labels of those that are not there.
        """
        staged = self._reopened(split)
        return staged.listed(key) if staged else iter(())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of the disk into a sentence."""
        try:
            yield
        # HDF5 raises RuntimeError where it fails to write on closing.
        except (OSError, RuntimeError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
            kept = "what is encoded is kept beside it, and the same command goes on from there"
            advice = "mend that and start again" if self._restart else kept
            raise UserError(f"Cannot write {self.path}: {reason}; {advice}.") from error

    def _stage(self, name: str, values: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
        with self._writing():
            staged = self._reopened(name)
            if staged is None:
                fields = [(key, array.dtype, array.shape[1:]) for key, array in values.items()]
                staged = StagedRows(self._folder, name, np.dtype(fields))
                self._staged[name] = staged
            staged.append(values, record)

    def _reopened(self, name: str) -> StagedRows | None:
        """What is staged under a name; None where nothing is that can be trusted."""
        if name not in self._staged:
            try:
                self._staged[name] = StagedRows(self._folder, name)
            except FileNotFoundError:
                return None
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise self._place.damaged(f"{name}.*") from error
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
        projection: Projection | None = None,
        part: Part | None = None,
    ) -> None:
        """Assemble the HDF5 file, give it its final name and remove the staging folder.

        projection: weights (F, D) float32 of the encoder's last linear map, and bias (D,) or None.
        part: make a part of a cache, for `merge_parts`. It may hold no image of a split.
        Raises UserError for a split without a readable image, templates that the file cannot hold,
        class names that are all empty or all equal,
        metadata that is not what FORMAT.md asks for, and a full disk.
        """
        check_strings(templates)
        names = [name for name in (*schema.SPLITS, schema.TEXT) if self._reopened(name)]
        staged = {name: self._staged[name] for name in names}
        text = staged.get(schema.TEXT)
        if text is not None and text.arrays["features"][1][0] != len(templates):
            raise ValueError(f"{len(templates)} templates, others than those of the text features")
        for split, rows in staged.items():
            if part is None and not rows.rows:
                raise UserError(f"The {split} split has no image that could be read.")
            if (found := rows.arrays["features"][1][1]) != backbone.get("embed_dim"):
                raise ValueError(f"features of {found} numbers and embed_dim of {backbone}")
        if text is not None and (reason := indistinct(list(text.listed("class_names")))):
            raise UserError(f"Cannot write {self.path}: {reason}; name the classes.")
        check_projection({name: rows.arrays for name, rows in staged.items()}, projection, part)
        metadata = Metadata(
            created_at=_now(),
            writer=f"clip-adapter {version('clip-adapter')}",
            backbone=backbone,
            preprocess=preprocess,
            dataset=dataset,
            logit_scale=float(logit_scale),
            logit_bias=float(logit_bias),
            arguments=self.arguments,
            part=part,
            templates=None if part is None else [*templates],
        )
        try:
            parse(parse_object(encode(metadata)[0]))
        except Contradiction as reason:
            raise UserError(f"Cannot write {self.path}: {reason}.") from reason
        assembled = self._place.folder / "assembled.h5"
        with self._writing():
            assemble(assembled, staged, templates, metadata, projection)
            assembled.replace(self.path)
            self._place.remove()
        self.close()

    def close(self) -> None:
        """Let go of the files; what is staged stays for the next run."""
        for staged in self._staged.values():
            staged.close()
        self._staged.clear()
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
