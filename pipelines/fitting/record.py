"""What a search on one task has found: rows of results.csv, or the grid of a closed form; and the
states of runs that may go on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter import files
from clip_adapter.adapters.engine.evaluation import Evaluation, Images, Leaves
from clip_adapter.adapters.method import Method, Setting
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.tasks import TaskRows

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.run_folder import RunFolder

SUFFIX = ".state"
CHECKSUM_BYTES = 4
TASK_COLUMNS = ("method", "shots", "seed")
GRIDS = "grids"
DAMAGE = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)
Row = dict[str, Any]


class TaskRecord:
    """What a search on one task has found (a choice.Record).

    judged: how many validation images there are, over all folds. Thousands of settings that are
    found in no time are one array, which `finish` writes, and no rows to go on from.
    """

    def __init__(self, folder: RunFolder, method: Method, rows: TaskRows, judged: int) -> None:
        self._folder, self._judged = folder, judged
        self._key = method.name, rows.shots, rows.seed
        self._task = dict(zip(TASK_COLUMNS, self._key, strict=True))
        self._has_rows = has_rows(method)
        self._grid: list[tuple[Setting, float, float]] = []
        name = "-".join(str(value) for value in self._key)
        self.states = StateFolder(folder.path / "halving" / name)

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        row = self._folder.known(self._task | dict(setting) | {"epochs_run": epochs_run})
        images = unpacked(row["images"]) if row else None
        if row is None or images is None or len(images.right) != self._judged:
            return None  # not there, or of something else: it is found again
        return Evaluation(
            setting,
            epochs_run,
            int(row["best_epoch"]),
            float(row["val_accuracy"]),
            float(row["val_nll"]),
            float(row["seconds"]),
            images,
        )

    def add(self, evaluation: Evaluation) -> None:
        if not self._has_rows:
            self._grid.append((evaluation.setting, evaluation.accuracy, evaluation.nll))
            return
        if self.known(evaluation.setting, evaluation.epochs_run):
            return
        self._folder.add_fit(
            self._task
            | dict(evaluation.setting)
            | {
                "epochs_run": evaluation.epochs_run,
                "best_epoch": evaluation.epoch,
                "val_accuracy": evaluation.accuracy,
                "val_nll": evaluation.nll,
                "status": "failed" if evaluation.failed else "ok",
                "seconds": round(evaluation.seconds, 4),
                "images": packed(evaluation.images),
            }
        )

    def finish(self) -> None:
        """Write the grid, if there is one of several settings."""
        if len(self._grid) > 1:
            self._folder.write(grid_path(*self._key), grid_content(self._grid))


def has_rows(method: Method) -> bool:
    """Whether each fit of the method is a row of results.csv; else its searches are grids: of
    closed forms, and of what is tried by thousands after training (Method.after_training)."""
    return (method.is_trained or method.solver is not None) and not method.after_training


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
            and images is not None
            and row["status"] == ("failed" if failed else "ok")
            and (failed or (0 <= accuracy <= 1 and _agree(images, accuracy, row, images_alike)))
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


@dataclass(frozen=True)
class Fit:
    """A setting on a task. values: as results.csv writes them, for the hyper-parameters that have
    an effect. accuracy: on validation, in [0, 1]; None where it diverged."""

    shots: Shots
    seed: int
    values: Mapping[str, str]
    accuracy: float | None


def grid_path(method: str, shots: Shots, seed: int) -> str:
    """Where a run folder keeps the grid of a closed form on a task."""
    return f"{GRIDS}/{method}/shots-{shots}-seed-{seed}.safetensors"


def grid_content(settings: Sequence[tuple[Setting, float, float]]) -> bytes:
    """As a safetensors file: `axes`, the bytes of a JSON object from each hyper-parameter to its
    values (null for settings without it), and over them `val_accuracy` and `val_nll`, which is
    infinite where a setting diverged, and not a number where there is no such setting."""
    names = dict.fromkeys(name for setting, *_ in settings for name in setting)
    axes = {name: dict.fromkeys(s.get(name) for s, *_ in settings) for name in names}
    places = {name: {value: n for n, value in enumerate(axis)} for name, axis in axes.items()}
    shape = [len(axis) for axis in axes.values()]
    accuracies, losses = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for setting, accuracy, nll in settings:
        place = tuple(places[name][setting.get(name)] for name in names)
        failed = not np.isfinite(nll)
        accuracies[place], losses[place] = (np.nan, np.inf) if failed else (accuracy, nll)
    text = json.dumps({name: [*axis] for name, axis in axes.items()}).encode()
    arrays = {"axes": np.frombuffer(text, np.uint8)}
    return save(arrays | {"val_accuracy": accuracies, "val_nll": losses})


def read_grid(run: Path, method: str, shots: Shots, seed: int) -> list[Fit]:
    """The settings of a grid, [] where there is none.

    Raises UserError where it cannot be read.
    """
    path = run / grid_path(method, shots, seed)
    try:
        tensors = load(files.read_bytes(path))
        axes = json.loads(tensors["axes"].tobytes())
        accuracies, losses = tensors["val_accuracy"], tensors["val_nll"]
        tried = np.argwhere(~np.isnan(losses))
        if not accuracies.shape == losses.shape == tuple(map(len, axes.values())):
            raise ValueError("shapes")
        fits = []
        for place in map(tuple, tried):
            values = {
                str(name): str(axis[number])
                for (name, axis), number in zip(axes.items(), place, strict=True)
                if axis[number] is not None
            }
            sound = np.isfinite(losses[place])
            fits.append(Fit(shots, seed, values, float(accuracies[place]) if sound else None))
        if any(fit.accuracy is not None and not 0 <= fit.accuracy <= 1 for fit in fits):
            raise ValueError("no accuracies")
    except FileNotFoundError:
        return []
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read; fit it again.") from error
    return fits


class StateFolder(MutableMapping[str, Leaves]):
    """States of runs that may go on, each a file: a CRC-32, then safetensors; the folder is there
    only while it has any.

    A state that cannot be read, or was changed, counts as lost: looking it up raises KeyError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def __getitem__(self, name: str) -> Leaves:
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        try:
            stored = path.read_bytes()
            content = stored[CHECKSUM_BYTES:]
            if stored[:CHECKSUM_BYTES] != _checksum(content):
                raise KeyError(name)
            tensors = load(content)
            return [tensors[str(index)] for index in range(len(tensors))]
        except DAMAGE:
            raise KeyError(name) from None

    def __setitem__(self, name: str, leaves: Leaves) -> None:
        content = save({str(index): leaf for index, leaf in enumerate(leaves)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Megabytes for each setting: waiting for the disk would take as long as training.
            files.write_bytes(self._path(name), _checksum(content) + content, sync=False)
        except OSError as error:
            raise UserError(f"Cannot write to {self._folder}: {error.strerror}.") from error

    def __delitem__(self, name: str) -> None:
        if not self._path(name).exists():
            raise KeyError(name)
        self._path(name).unlink()
        with suppress(OSError):  # not empty yet
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob(f"*{SUFFIX}"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _checksum(content: bytes) -> bytes:
    return crc32(content).to_bytes(CHECKSUM_BYTES, "big")
