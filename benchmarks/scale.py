"""CPU seconds and peak memory of `fit` at ImageNet's size: python benchmarks/scale.py --help

The cache is made up, and written block by block: 1,281,167 training images of 1,000 classes, listed
class by class, of 1,024 float16 numbers, and 50,000 test images; 2.8 GB, removed at the end. Each
command is a process of its own, which compiles anew, and a row as it ends: CPU seconds and largest
resident memory, as the kernel counts them, and what it said of a long search. CPU seconds, as what
else runs on the machine changes them less than those of the wall; its load stands beside them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from idle import machine
from synthetic import LOGIT_SCALE, Population

from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.rows import Chosen, Picked, Places
from clip_adapter.cache.writer import write_cache

SHOTS = 16
SPLITS = ("train", "val", "test")
# Of what a trained method takes, so many epochs; all would be hours on a few cores.
EPOCHS = 1
MANY = "clip-adapter, 5 shots × 3 seeds"
# Those of an ordinary cache: no prompts' tower, no features before the projection.
NAMES = [name for name, m in METHODS.items() if not {"tower", "projection"} & {*m.needs}]


@dataclass(frozen=True)
class Size:
    """classes, dim: C, D. images: of train, val and test."""

    classes: int
    dim: int
    images: tuple[int, int, int]


IMAGENET = Size(1000, 1024, (1_281_167, 8_000, 50_000))
SMALL = Size(10, 64, (1_300, 60, 500))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", choices=[*NAMES, MANY, []], help="by default all")
    parser.add_argument("--small", action="store_true", help="1,300 images, to try it out")
    parser.add_argument("--cache", type=Path, help="kept here, and taken from here if it is there")
    parser.add_argument("--minutes", type=float, default=20, help="CPU minutes of each, at most")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of what is trained")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cache = given.cache or place / "cache.h5"
        print(machine())
        if not cache.exists():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            make(cache, SMALL if given.small else IMAGENET)
            used = resource.getrusage(resource.RUSAGE_SELF)
            print(f"making {cache.stat().st_size / 1e9:.2f} GB: {used.ru_utime - before:.0f} CPU s")
        print("| work | CPU s | wall s | peak MiB | test % | load | |\n|" + "---|" * 7)
        for name in given.methods or [*NAMES, MANY]:
            print(measured(name, cache, place / "run", given.epochs, given.minutes), flush=True)


class Listed:
    """The images of a split, class by class, as rows that are made when they are read."""

    def __init__(self, split: str, count: int, drawn: Population, classes: int) -> None:
        self.split, self._drawn = split, drawn
        self.labels = (np.arange(count) * classes // count).astype(np.int32)

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float16]:
        rng = np.random.default_rng([SPLITS.index(self.split), start])
        return self._drawn.images(self.labels[start:stop], rng)[:, None].astype(np.float16)

    def __getitem__(self, row: int) -> str:
        return f"{self.split}/{row:08d}.jpg"


def make(path: Path, size: Size) -> None:
    """Write the cache; some blocks of it are in memory at a time."""
    drawn = Population(size.dim, size.classes)
    content: dict[str, Any] = {
        "text/features": drawn.weights[:, None],
        "text/class_names": [f"class {number}" for number in range(size.classes)],
        "text/templates": ["a photo of a {}."],
    }
    for split, count in zip(SPLITS, size.images, strict=True):
        listed, rows = Listed(split, count, drawn, size.classes), np.arange(count)
        places = Places([listed], np.zeros(count, np.int32), rows)
        content |= {
            f"images/{split}/features": Picked("features", places, np.dtype("f2"), (1, size.dim)),
            f"images/{split}/labels": listed.labels,
            f"images/{split}/ids": Chosen(listed, rows),
        }
    backbone = {"name": "made-up", "pretrained": "made-up", "weights_sha256": "0" * 64}
    backbone |= {"embed_dim": size.dim, "image_size": 224, "quick_gelu": False}
    dataset = {"name": "made-up", "source": "benchmarks/scale.py"}
    dataset["splits"] = {split: "drawn" for split in SPLITS}
    write_cache(path, content, backbone=backbone, dataset=dataset, logit_scale=LOGIT_SCALE)


def measured(name: str, cache: Path, run: Path, epochs: int, minutes: float) -> str:
    """A row of the table: `fit` of a method at 16 shots and one seed, or of `MANY`."""
    method = METHODS[name.partition(",")[0]]
    shots, seeds = ("1 2 4 8 16", "1 2 3") if name == MANY else (str(SHOTS), "1")
    command = [str(Path(sys.executable).with_name("fit")), "--cache", str(cache), "--baselines"]
    command += ["--method", method.name, "--shots", *shots.split(), "--seeds", *seeds.split()]
    if method.is_trained:
        command += ["--epochs", str(epochs)]
        name += f", epochs {epochs}"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(60 * minutes), int(60 * minutes) + 5))

    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        out = Path(folder) / "run"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        said = Path(folder) / "said"
        started = time.perf_counter()
        with said.open("w") as file:
            child = subprocess.Popen(
                [*command, "--out", str(out)],
                stdout=file,
                stderr=file,
                env=environment,
                preexec_fn=limit,
            )
            _, status, used = os.wait4(child.pid, 0)  # which alone says what this one took
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        lines = said.read_text().splitlines()
        notes = [line for line in lines if "takes about" in line]
        if child.returncode < 0:
            notes.append(f"stopped after {minutes:g} CPU minutes")
        elif child.returncode:
            notes.append(f"failed: {lines[-1] if lines else child.returncode}")
        accuracy = "–"
        with suppress(OSError):
            rows = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
            tests = [100 * row["test_accuracy"] for row in rows]
            accuracy = f"{np.mean(tests):.2f}"
    cells = (name, f"{cpu:.1f}", f"{wall:.0f}", f"{peak:,.0f}", accuracy)
    return f"| {' | '.join(cells)} | {os.getloadavg()[0]:.1f} | {' '.join(notes)} |"


if __name__ == "__main__":
    main()
