"""A short run of what the mutations make: every image and every source is read or refused."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import SourceOptions
from clip_adapter.extract.encoding.images import BadImage, open_image, read_rgb
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.extract.text.prompts import read_descriptions, resolve_templates
from tests import processes
from tests.fuzz import image_mutations, source_mutations

ROOT = Path(__file__).parents[2]
IMAGES, SOURCES = 250, 60
CONFIG: dict[str, Any] = {
    "size": 32,
    "mode": "RGB",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@pytest.mark.filterwarnings("ignore")
def test_every_image_becomes_pixels_or_one_sentence(tmp_path: Path) -> None:
    preprocess = Preprocess(CONFIG)
    outcomes = []
    for seed in range(IMAGES):
        place = tmp_path / str(seed)
        place.mkdir()
        what = image_mutations.make(random.Random(seed), place)
        (path,) = place.iterdir()
        try:
            pixels = preprocess.view(read_rgb(partial(open_image, path)), what, 0, 0)
        except BadImage as error:
            assert "\n" not in str(error), what
            assert len(str(error)) < 500, what
            outcomes.append(False)
        else:
            assert pixels.shape == (32, 32, 3), what
            outcomes.append(True)
    assert 0.1 < np.mean(outcomes) < 0.6


def opened(arguments: list[str]) -> None:
    """What `extract` does with the arguments that name files, up to the images."""
    named: dict[str, list[str]] = {}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        named.setdefault(name, []).append(value)
    resolve_templates(named.get("--templates", []))
    for path in named.get("--descriptions", []):
        read_descriptions(Path(path))
    seed = int(named.get("--split-seed", ["0"])[-1])
    roots = {
        field: Path(named[option][-1])
        for option, field in (("--image-root", "image_root"), ("--data-root", "data_root"))
        if option in named
    }
    open_dataset(named["--dataset"][0], SourceOptions(seed=seed, **roots))


def test_every_source_is_opened_or_refused_in_one_sentence(tmp_path: Path) -> None:
    outcomes = []
    for seed in range(SOURCES):
        place = tmp_path / str(seed)
        place.mkdir()
        arguments = source_mutations.make(random.Random(seed), place)
        try:
            opened(arguments)
        except UserError as error:
            assert "\n" not in str(error), arguments
            assert len(str(error)) < 3000, arguments
            outcomes.append(False)
        else:
            outcomes.append(True)
    assert 0.1 < np.mean(outcomes) < 0.9


def test_killed_runs_end_as_undisturbed_ones_do() -> None:
    """In a process of its own, which forks before anything has started a thread."""
    program = "from tests.fuzz.kill_extract import main; main()"
    command = ["python", "-c", program, "--kills", "3", "--small"]
    finished = processes.run(command, ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("3 runs killed") == 3
