"""`--decode fast`: JPEG files at a part of their size, said by the cache and never mixed."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract import job
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.encoding.images import open_image, read_rgb
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.merge import MergeConfig, merge

LARGE = "test/cat/large.jpg"
SMALL: dict[str, Any] = {"batch_size": 4, "workers": 2}
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by a quarter, which is not applied
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "colours": ("RGB", {}),
    "grey": ("L", {}),
    "inks": ("CMYK", {}),
    "progressive": ("RGB", {"progressive": True}),
    "no subsampling": ("RGB", {"subsampling": 0}),
    "turned": ("RGB", {"exif": EXIF}),
    "several frames": ("RGB", {"format": "MPO", "save_all": True}),
}


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 95} | options)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("least", "part"), [((25, 25), 4), ((60, 50), 2), ((61, 51), 1)])
def test_it_is_the_mean_of_blocks(
    mode: str, options: dict[str, Any], least: tuple[int, int], part: int
) -> None:
    """Of 2 × 2 or 4 × 4 pixels of the whole image, to a few of 255 levels."""
    image = smooth(121, 103).convert(mode)
    if options.get("format") == "MPO":
        options = options | {"append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    read = partial(open_image, jpeg(image, **options))
    whole, found = (np.asarray(read_rgb(read, size), float) for size in (None, least))
    if part == 1:
        assert np.array_equal(whole, found)
        return
    assert found.shape == (-(-103 // part), -(-121 // part), 3)
    height, width = 103 // part, 121 // part
    blocks = whole[: height * part, : width * part].reshape(height, part, width, part, 3)
    assert np.abs(blocks.mean((1, 3)) - found[:height, :width]).mean() < 2.5


def test_twice_what_the_shorter_side_becomes() -> None:
    config: dict[str, Any] = {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert Preprocess(config).drafted is None
    assert Preprocess(config | {"decode": "fast"}).drafted == (448, 448)
    oblong = {"size": (32, 40), "decode": "fast"}
    assert Preprocess(config | oblong).drafted == (80, 64)
    timm = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
    assert Preprocess(config | timm | {"decode": "fast"}).drafted == (512, 512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each class a large JPEG, a small one and a large PNG file."""
    root = tmp_path_factory.mktemp("fast") / "data"
    for seed, name in enumerate(("cat", "dog")):
        for split in ("train", "val", "test"):
            (root / split / name).mkdir(parents=True)
            small, large = smooth(90, 70, 2 * seed), smooth(300, 150, 2 * seed + 1)
            (root / split / name / "small.jpg").write_bytes(jpeg(small))
            (root / split / name / "large.jpg").write_bytes(jpeg(large))
            large.save(root / split / name / "large.png")
    return root


def run(data: Path, out: Path, **options: Any) -> Path:
    return extract(ExtractConfig(dataset=f"folder:{data}", out=out, **SMALL, **options))


@pytest.fixture(scope="module")
def caches(data: Path) -> dict[str, Path]:
    return {how: run(data, data.with_name(f"{how}.h5"), decode=how) for how in ("full", "fast")} | {
        "default": run(data, data.with_name("default.h5"))
    }


def test_what_the_cache_says(caches: dict[str, Path], data: Path) -> None:
    opened = {how: FeatureCache(path) for how, path in caches.items()}
    assert opened["fast"].preprocess["decode"] == opened["fast"].arguments["decode"] == "fast"
    for how in ("full", "default"):
        assert "decode" not in opened[how].preprocess | opened[how].arguments
    full, fast, default = (cache.images("test").features for cache in opened.values())
    assert np.array_equal(full, default)
    large = np.array([name.endswith("large.jpg") for name in opened["full"].ids("test")])
    assert large.sum() == 2
    assert np.array_equal(full[:, ~large], fast[:, ~large])
    assert (full[:, large] != fast[:, large]).any(-1).all()
    unit = [
        features / np.linalg.norm(features, axis=-1, keepdims=True) for features in (full, fast)
    ]
    assert (unit[0] * unit[1]).sum(-1).min() > 0.99
    for cache in opened.values():
        cache.close()


@pytest.mark.parametrize("options", [{}, {"update": True}])
@pytest.mark.parametrize(("made", "now"), [("full", "fast"), ("fast", "full")])
def test_no_cache_is_of_both(
    caches: dict[str, Path], data: Path, made: str, now: str, options: dict[str, Any]
) -> None:
    before = caches[made].read_bytes()
    with pytest.raises(UserError, match=r"other arguments \(decode differ\)"):
        run(data, caches[made], decode=now, **options)
    assert caches[made].read_bytes() == before


def test_an_interrupted_run_does_not_go_on_in_another_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "write_cache", cut)
        run(data, tmp_path / "out.h5", decode="fast")
    with pytest.raises(UserError, match="decode"):
        run(data, tmp_path / "out.h5")
    run(data, tmp_path / "out.h5", decode="fast")


def test_parts_are_not_joined(data: Path, tmp_path: Path) -> None:
    parts = [
        run(data, tmp_path / f"{n}.h5", shard=f"{n}/2", decode=how)
        for n, how in ((1, "fast"), (2, "full"))
    ]
    with pytest.raises(UserError, match="decode, preprocess differ"):
        merge(MergeConfig(tmp_path / "whole.h5", tuple(parts)))
    assert not (tmp_path / "whole.h5").exists()


def test_views_are_refused() -> None:
    with pytest.raises(UserError, match="--decode fast"):
        ExtractConfig(views=2, decode="fast").check()


def test_images_for_a_cache_are_decoded_as_its_own(
    caches: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "one.jpg").write_bytes((data / LARGE).read_bytes())
    for how in ("full", "fast"):
        out = run_unlabelled(new, tmp_path / f"{how}.h5", like=caches[how])
        with FeatureCache(out) as cache, FeatureCache(caches[how]) as labelled:
            own = labelled.features("test", [labelled.ids("test").index(LARGE)])
            assert np.array_equal(cache.features("unlabelled", [0]), own)
    with pytest.raises(UserError, match="made without --decode fast"):
        run_unlabelled(new, tmp_path / "other.h5", like=caches["full"], decode="fast")


def run_unlabelled(folder: Path, out: Path, **options: Any) -> Path:
    return extract(ExtractConfig(dataset=f"images:{folder}", out=out, **SMALL, **options))
