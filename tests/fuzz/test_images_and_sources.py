"""A short run of what the mutations make: every image and every source is read or refused."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
CONFIG: dict[str, Any] = {
    **{"size": 32, "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "fill_color": 0},
    **{"interpolation": "bicubic", "resize_mode": "shortest"},
}


def pixels(rng: random.Random, place: Path) -> None:
    what = image_mutations.make(rng, place)
    (path,) = place.iterdir()
    found = Preprocess(CONFIG).view(read_rgb(partial(open_image, path)), what, 0, 0)
    assert found.shape == (32, 32, 3), what


def opened(rng: random.Random, place: Path) -> None:
    """What `extract` does with the arguments that name files, up to the images."""
    arguments = source_mutations.make(rng, place)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("use", "inputs", "longest"),
    [(pixels, 250, 500), (opened, 60, 3000)],
    ids=["images", "sources"],
)
def test_every_input_is_used_or_refused_in_one_sentence(
    use: Callable[[random.Random, Path], None], inputs: int, longest: int, tmp_path: Path
) -> None:
    refused = 0
    for seed in range(inputs):
        place = tmp_path / str(seed)
        place.mkdir()
        try:
            use(random.Random(seed), place)
        except (BadImage, UserError) as error:
            assert "\n" not in str(error), seed
            assert len(str(error)) < longest, seed
            refused += 1
    assert 0.1 < refused / inputs < 0.9


def test_killed_runs_end_as_undisturbed_ones_do() -> None:
    """In a process of its own, which forks before anything has started a thread."""
    program = "from tests.fuzz.kill_extract import main; main()"
    command = ["python", "-c", program, "--kills", "3", "--small"]
    finished = processes.run(command, ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("3 runs killed") == 3
