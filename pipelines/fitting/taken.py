"""`fit --from RUN`: the method and the setting of an adapter for another cache, with no search; and
what that changed for the classes that it knew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter import files
from clip_adapter.adapters.registry import find_method
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.predictions import Predictions
from clip_adapter.pipelines.saved.adapter_check import INFO_FILE, check_same_backbone
from clip_adapter.pipelines.saved.adapter_file import (
    ARRAYS_FILE,
    SavedAdapter,
    image_hashes,
    know_method,
    load_adapter,
)
from clip_adapter.pipelines.scoring.cached import cached_images, warn_of_unproven
from clip_adapter.words import counted, dashed, some

# What a run has decided already; the others, such as --shots and --refit, are still free.
DECIDED = ("select", "score", "preset", "search", "ablate", "train_classes", "class_weight")


@dataclass(frozen=True)
class Taken:
    """An adapter whose method and setting are taken. sha256: of its description."""

    run: Path
    adapter: SavedAdapter
    sha256: str

    @property
    def epoch(self) -> int | None:
        """The one that was kept of it, None for the last."""
        epoch = self.adapter.info.fitted.get("epoch")
        return epoch if type(epoch) is int and epoch > 0 else None

    def config(self, config: FitConfig) -> FitConfig:
        """The same, of one setting of one method; at the adapter's shots and seed unless others
        were asked for.

        Raises UserError for options that contradict it.
        """
        plain, info = FitConfig(), self.adapter.info
        given = {
            f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)
        }
        given |= config.stated
        known = (info.method, *(n for n in config.method if ":" in n))
        own = [n for n in config.method if n in known and find_method(n).name == info.method]
        if own == [*config.method]:
            given.discard("method")  # the same, or named to make it known
        flags = [name for name in ("method", *DECIDED) if name in given] + [*config.hyper]
        if flags:
            raise UserError(
                f"--from {self.run} takes {info.method} with the setting chosen there, so "
                f"--{dashed(flags[0])} contradicts it; leave one of them out."
            )
        taken = replace(
            config,
            method=tuple(own) or (info.method,),
            hyper={f"{info.method}.{name}": value for name, value in info.setting.items()},
            select="none",
            class_weight=info.fitted.get("class_weight", "none"),
        )
        if config.tasks is None and "shots" not in given:
            taken = replace(taken, shots=(info.fitted.get("shots", 0),))
        if config.tasks is None and "seeds" not in given:
            taken = replace(taken, seeds=(info.fitted.get("seed", -1),))
        return taken

    def compared(self, cache: FeatureCache, predictions: Predictions | None) -> str:
        """What was taken, and how both adapters do on the test images of the classes that the old
        one knows, but for those that it was fitted or chosen on."""
        said = f"the setting of {self.run}"
        old = self.adapter.info.class_names
        if gone := sorted(set(old) - set(cache.class_names)):
            return f"{said}; not compared with it: its classes {some(gone)} are not in this cache"
        if predictions is None:
            return f"{said}; not compared with it: there are no test images"
        number = {name: label for label, name in enumerate(old)}
        own = np.array([number.get(name, -1) for name in cache.class_names])[predictions.labels]
        right = np.concatenate([*self._right(cache, own)])
        rows = right[:, 1] & (own >= 0)
        if not rows.any():
            return f"{said}; not compared with it: it has seen all test images of its classes"
        before, now = (100 * values[rows].mean() for values in (right[:, 0], predictions.right))
        added = len(cache.class_names) - len(old)
        more = f" beside {counted(added, 'new class', 'new classes')}" if added else ""
        return (
            f"{said}; on {counted(int(rows.sum()), 'test image')} of its "
            f"{counted(len(old), 'class', 'classes')} {before:.2f} % there → {now:.2f} % here{more}"
        )

    def _right(
        self, cache: FeatureCache, labels: npt.NDArray[np.int64]
    ) -> list[npt.NDArray[np.bool_]]:
        """By block (R, 2): whether the old adapter is right, and whether the image is new to it."""
        found = []
        for block in cached_images(cache, "test", self.adapter).blocks():
            right = self.adapter.logits(block.features).argmax(axis=1) == labels[block.rows]
            fresh = ~self.adapter.has_seen(image_hashes(block.encoded, block.digests))
            found.append(np.stack([right, fresh], axis=1))
        return found


def taken_of(
    config: FitConfig, stored: Plan | None, cache: FeatureCache, listener: Listener
) -> Taken | None:
    """What --from names, or the run that is gone on with was begun with.

    Raises UserError where it is not there, is another one now, or is of another backbone.
    """
    run = config.from_run
    if run is None and stored is not None and stored.from_run:
        run = Path(stored.from_run)
    if run is None:
        return None
    for name in config.method:
        if ":" in name:
            know_method(name)
    adapter = load_adapter(run)
    folder = run.parent if run.name in (INFO_FILE, ARRAYS_FILE) else run
    sha256 = hashlib.sha256(files.read_bytes(folder / INFO_FILE)).hexdigest()
    if stored is not None and stored.from_sha256 != sha256:
        raise UserError(
            f"The adapter of {run} is not the one whose setting was taken; start a new run."
        )
    remedy = "whose settings are of no use here; fit without --from"
    check_same_backbone(cache.backbone, cache.preprocess, adapter.info, remedy)
    warn_of_unproven(cache, adapter, listener)
    return Taken(run, adapter, sha256)
