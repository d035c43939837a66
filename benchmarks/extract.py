"""Time extraction against the loop that people write: python benchmarks/extract.py --help

Both sides encode the same images with the same weights in one process, alternating. A figure is
the median of the rounds in images per second, with the smallest and the largest behind it; a ratio
above 1 means that ours is faster. Beside them stand the two parts of ours alone, decoding and the
forward pass: ours cannot be faster than the slower of the two, and should come close to it; on a
CPU, where both need the same cores, to the time of both together.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `extract` does; it serves both sides

import numpy as np
import open_clip
import torch
from idle import machine, require_idle
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.writer import write_cache
from clip_adapter.cores import available_cores
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.datasets.image_files import ImageFiles
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.decode import Plan, decode
from clip_adapter.extract.encoding.device import find_device, find_precision, forward_passes
from clip_adapter.extract.encoding.encoder import Encoder, Stopwatch, encode_images
from clip_adapter.extract.known import Known, KnownRows
from clip_adapter.extract.stage import stage_images

# Oxford Pets' images are of about this size.
PHOTOGRAPH = (500, 375)
DEFAULT_IMAGES = {"RN50": 256, "ViT-B-32": 512, "glyph-clip": 1797}


@dataclass(frozen=True)
class Case:
    """What both sides are given."""

    backbone: Backbone
    split: Split
    device: torch.device
    batch_size: int
    workers: int
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backbones", nargs="*", default=list(DEFAULT_IMAGES), help="by default all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--images", type=int, help="images per round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=available_cores(), help="of both sides")
    parser.add_argument("--compile", action="store_true", help="ours with --compile as well")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    require_idle()
    device = find_device(arguments.device)
    print(machine(), f"| {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}")
    for name in arguments.backbones:
        count = arguments.images or DEFAULT_IMAGES[name]
        with (
            tempfile.TemporaryDirectory() as folder,
            prepared(name, Path(folder), device) as loaded,
        ):
            split = (
                digits_split(count) if name == "glyph-clip" else photographs(Path(folder), count)
            )
            case = Case(
                loaded, split, device, arguments.batch_size, arguments.workers, Path(folder)
            )
            compare(name, case, arguments.rounds, arguments.compile)
    require_idle()


@contextmanager
def prepared(name: str, folder: Path, device: torch.device) -> Iterator[Backbone]:
    """The backbone, with random weights where it is not the embedded one."""
    precision = find_precision("auto", device)
    if name == "glyph-clip":
        yield load_backbone(name, precision=precision)
        return
    torch.manual_seed(0)
    path = folder / "weights.pt"
    torch.save(open_clip.create_model(name).state_dict(), path)
    yield load_backbone(name, str(path), precision=precision)


def digits_split(count: int) -> Split:
    parts = open_dataset("digits").splits.values()
    images = [part.read(row) for part in parts for row in range(len(part.labels))][:count]
    labels = np.zeros(len(images), np.int32)
    return Split([str(row) for row in range(len(images))], labels, images.__getitem__, "digits")


def photographs(folder: Path, count: int) -> Split:
    """JPEG files with as much detail as photographs have."""
    rng = np.random.default_rng(0)
    paths = [f"{row:05}.jpg" for row in range(count)]
    for path in paths:
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / path, quality=90)
    return Split(paths, np.zeros(count, np.int32), ImageFiles(folder, paths), "made up")


def compare(name: str, case: Case, rounds: int, compiled: bool) -> None:
    count = len(case.split.labels)
    encoder = Encoder(case.backbone, case.device, case.batch_size)
    sides: dict[str, Callable[[], object]] = {
        "usual loop": partial(usual_loop, case),
        "usual loop, 0 workers": partial(usual_loop, case, workers=0),
        "ours": partial(ours, case, encoder),
        "ours, decode alone": partial(decode_alone, case, encoder),
        "ours, forward alone": partial(forward_alone, case, encoder),
    }
    if compiled:
        fast = Encoder(case.backbone, case.device, case.batch_size, compiled=True)
        sides["ours, compiled"] = partial(ours, case, fast)
        sides["ours, compiled, forward alone"] = partial(forward_alone, case, fast)
    print(f"\n{name}, {count} images of the same kind, batch {case.batch_size}")
    check_same(case, encoder)
    rates = alternate(sides, rounds, count)
    usual = max(rates["usual loop"], rates["usual loop, 0 workers"])
    print(f"  ours is {rates['ours'] / usual:.2f} × the faster of the usual loops")
    bound = min(rates["ours, decode alone"], rates["ours, forward alone"])
    print(f"  ours reaches {rates['ours'] / bound:.0%} of the slower of its two parts")
    if case.device.type == "cpu":  # where they take turns on the same cores
        both = 1 / (1 / rates["ours, decode alone"] + 1 / rates["ours, forward alone"])
        print(f"  and {rates['ours'] / both:.0%} of both one after the other")
    if compiled:
        saved = 1 / rates["ours"] - 1 / rates["ours, compiled"]
        pays = f"{fast.compile_seconds / saved:,.0f} images" if saved > 0 else "never"
        print(f"  compiled it is {rates['ours, compiled'] / usual:.2f} × the usual loop")
        print(f"  compiling takes {fast.compile_seconds:.0f} s and pays from {pays} on")


def alternate(sides: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Run the sides in turn and print images per second; the first call is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            rates[name].append(count / (time.perf_counter() - started))
    for name, values in rates.items():
        spread = f"({min(values):.1f} … {max(values):.1f})"
        print(f"  {name:30} {statistics.median(values):9.1f} images/s {spread}")
    return {name: statistics.median(values) for name, values in rates.items()}


class Images(Dataset):
    """What people write first: a data set that opens and preprocesses one image."""

    def __init__(self, case: Case) -> None:
        self._read, self._rows = case.split.read, len(case.split.labels)
        self._preprocess = case.backbone.preprocess

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._preprocess(self._read(row).convert("RGB"))


def usual_loop(case: Case, workers: int | None = None) -> np.ndarray:
    """DataLoader, encode, append, save."""
    model, dtype = case.backbone.model, case.backbone.dtype
    model.to(memory_format=torch.contiguous_format)
    loader = DataLoader(
        Images(case),
        batch_size=case.batch_size,
        num_workers=case.workers if workers is None else workers,
    )
    features = []
    with torch.no_grad():
        for images in loader:
            features.append(model.encode_image(images.to(case.device, dtype)).float().cpu().numpy())
    whole = np.concatenate(features)
    np.save(case.folder / "features.npy", whole)
    model.to(memory_format=torch.channels_last)
    return whole


def plan(case: Case) -> Plan:
    return Plan(
        rows=np.arange(len(case.split.labels)),
        batch_size=case.batch_size,
        workers=case.workers,
        pinned=case.device.type == "cuda",
    )


def ours(case: Case, encoder: Encoder) -> None:
    """What `extract` does with one split, from the files to the finished cache."""
    rows = len(case.split.labels)
    train = KnownRows(case.split, np.zeros(rows, np.uint64), encoder.rows(1), range(rows))
    known = Known({"train": train})
    with StagingFolder(case.folder / "features.h5") as place:
        batches = encode_images(encoder, case.split, plan(case), Stopwatch())
        for _ in stage_images(batches, train, known, place, Stopwatch()):
            pass
        text = {
            "text/features": np.ones((1, 1, encoder.dim), np.float32),
            "text/class_names": ["one"],
            "text/templates": ["{}"],
        }
        write_cache(
            place,
            {**known.content(), **text},
            backbone={
                "name": "made up",
                "pretrained": "made up",
                "weights_sha256": "0" * 64,
                "embed_dim": encoder.dim,
                "image_size": 224,
                "quick_gelu": False,
            },
            dataset={"name": "made up", "source": "made up", "splits": {"train": "made up"}},
            logit_scale=1.0,
        )


def decode_alone(case: Case, encoder: Encoder) -> None:
    for _ in decode(case.split, encoder.preprocess, plan(case)):
        pass


def forward_alone(case: Case, encoder: Encoder) -> None:
    """The forward passes of a round over pixels that are there already."""
    height, width = encoder.preprocess.height, encoder.preprocess.width
    count = len(case.split.labels)
    pixels = torch.zeros((1, case.batch_size, height, width, 3), dtype=torch.uint8)
    with forward_passes(encoder) as (begin, ahead):
        running = deque(begin(pixels) for _ in range(ahead))
        for first in range(ahead * case.batch_size, count, case.batch_size):
            running.append(begin(pixels[:, : count - first]))
            running.popleft()()
        for result in running:
            result()


def check_same(case: Case, encoder: Encoder) -> None:
    """Both sides compute the same features, or their times could not be compared."""
    batches = encode_images(encoder, case.split, plan(case), Stopwatch())
    found = np.concatenate([batch.features for batch in batches])[:, 0].astype(np.float32)
    usual = usual_loop(case, workers=0)
    error = float(np.abs(found - usual).max() / np.abs(usual).max())
    bound = 1e-4 if case.backbone.dtype == torch.float32 else 0.1
    if error > bound:
        raise SystemExit(f"the two sides differ by {error:.1e} of the largest feature")
    print(f"  both sides give the same features, within {error:.0e} of the largest")


if __name__ == "__main__":
    main()
