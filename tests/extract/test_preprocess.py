"""The two halves of the preprocessing together are open_clip's, and crops are torchvision's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from clip_adapter.extract.encoding.images import BadImage
from clip_adapter.extract.encoding.preprocess import (
    CROP_RATIO,
    CROP_SCALE,
    RESIZED_PIXELS_MAX,
    Preprocess,
    _entropy,
    crop_box,
    refuse_strips,
)
from tests.extract.image_folders import photograph

CONFIG: dict[str, Any] = {
    "size": 24,
    "mode": "RGB",
    "mean": (0.48, 0.45, 0.4),
    "std": (0.26, 0.26, 0.27),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [24, (24, 24), (20, 30)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_halves_make_the_whole_bit_for_bit(mode: str, size: Any, interpolation: str) -> None:
    config = {**CONFIG, "resize_mode": mode, "size": size, "interpolation": interpolation}
    whole = image_transform_v2(PreprocessCfg(**config), is_train=False)
    halves = Preprocess(config)
    images = [photograph(seed) for seed in range(4)] + [Image.new("RGB", (1, 1), "red")]
    pixels = torch.stack([torch.tensor(halves.view(image, "x", 0, 0)) for image in images])
    assert pixels.shape[1:] == (halves.height, halves.width, 3)
    values = halves.normalised(pixels)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(values, torch.stack([whole(image) for image in images]))


class Recorded:
    """A generator that hands out given numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.drawn: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append(self._rng.uniform(low, high))
        return self.drawn[-1]

    def integers(self, low: int, high: int) -> int:
        self.drawn.append(int(self._rng.integers(low, high)))
        return int(self.drawn[-1])


@pytest.mark.parametrize("size", [(64, 48), (30, 90), (200, 20), (1, 1), (3, 400), (7, 8)])
def test_crops_are_those_of_torchvision_for_the_same_draws(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: Iterator[float] = iter(())
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(next(draws)))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(draws)]))
    for seed in range(30):
        recorded = Recorded(np.random.default_rng(seed))
        left, top, width, height = crop_box(*size, recorded)  # type: ignore[arg-type]
        draws = iter(recorded.drawn)
        image = Image.new("RGB", size)
        wanted = RandomResizedCrop.get_params(image, list(CROP_SCALE), list(CROP_RATIO))
        assert (top, left, height, width) == wanted
        assert 0 <= left <= left + width <= size[0]
        assert 0 <= top <= top + height <= size[1]


def test_a_view_is_a_resized_crop_and_half_of_them_are_mirrored() -> None:
    image, halves = photograph(2), Preprocess(CONFIG)
    mirrored = 0
    for number in range(1, 101):
        view = halves.view(image, "x", number, seed=5)
        left, top, width, height = crop_box(
            image.width, image.height, np.random.default_rng(_entropy(5, "x", number))
        )
        crop = F.resized_crop(image, top, left, height, width, [24, 24], InterpolationMode.BICUBIC)
        straight = np.asarray(crop)
        if not np.array_equal(view, straight):
            np.testing.assert_array_equal(view[:, ::-1], straight)
            mirrored += 1
    assert 30 < mirrored < 70


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_strips_are_refused_before_they_grow(size: tuple[int, int]) -> None:
    strip = Image.new("RGB", size)
    with pytest.raises(BadImage, match=r"would become .*2400000.*, more than 33,554,432; cut it"):
        Preprocess(CONFIG).view(strip, "strip", 0, 0)
    squashed = Preprocess({**CONFIG, "resize_mode": "squash"}).view(strip, "strip", 0, 0)
    assert squashed.shape == (24, 24, 3)


def test_the_bound_is_on_the_resized_image() -> None:
    """At 24 pixels a strip may be 58,254 times as long as wide: that makes 24² · 58,254 pixels."""
    longest = RESIZED_PIXELS_MAX // 24**2
    refuse_strips(Image.new("L", (1, longest)), CONFIG)
    with pytest.raises(BadImage):
        refuse_strips(Image.new("L", (1, longest + 1)), CONFIG)
    refuse_strips(Image.new("L", (1000, 2000)), CONFIG)


def test_a_side_that_would_vanish_is_a_bad_image() -> None:
    longest = Preprocess({**CONFIG, "resize_mode": "longest"})
    with pytest.raises(BadImage, match="100000 pixels cannot be resized"):
        longest.view(Image.new("RGB", (1, 100_000)), "strip", 0, 0)
