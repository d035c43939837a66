"""`clip-adapter inspect` on caches and adapters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect, main
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, save_adapter
from tests.cache.rewriting import rewrite

CLASSES = 1000
TEMPLATES = [f"photo {n} of a {{}}" for n in range(80)]


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with as many classes and templates as ImageNet's."""
    path = tmp_path_factory.mktemp("cache") / "features.h5"
    rng = np.random.default_rng(0)
    names = [f"class {n}" for n in range(CLASSES)]
    names[3] = "evil\x1b[2J\nclass"
    content = {
        "text/features": rng.normal(size=(CLASSES, len(TEMPLATES), 4)).astype(np.float32),
        "text/class_names": names,
        "text/templates": TEMPLATES,
    }
    for split, each, views in (("train", 2, 2), ("test", 1, 1)):
        labels = np.repeat(np.arange(CLASSES), each)
        labels = labels[:-1] if split == "train" else labels
        content |= {
            f"images/{split}/features": rng.normal(size=(views, len(labels), 4)).astype("f4"),
            f"images/{split}/labels": labels,
            f"images/{split}/ids": [f"{split}/{n}.jpg" for n in range(len(labels))],
        }
    write_cache(
        path,
        content,
        backbone={
            "name": "RN50",
            "pretrained": "openai",
            "weights_sha256": "ab" * 32,
            "embed_dim": 4,
            "image_size": 224,
            "quick_gelu": False,
        },
        preprocess={"size": 224},
        dataset={"name": "made-up", "source": "nowhere", "splits": {"test": "the first half"}},
        logit_scale=100.0,
        logit_bias=-12.5,
    )
    return path


def facts(path: Path) -> dict[str, str]:
    return dict(inspect(InspectConfig(path)))


def test_a_cache_in_words(cache_path: Path) -> None:
    found = facts(cache_path)
    assert found["images/train"] == "1999 images, 1–2 per class, width 4, 2 views"
    assert found["images/test"] == "1000 images, 1 per class, width 4"
    assert "images/val" not in found
    assert found["text"] == "1000 classes × 80 templates, float32"
    assert found["classes"].startswith("1000: class 0, class 1, class 2, ")
    assert found["templates"] == "80: photo 0 of a {}, photo 1 of a {}, …"
    backbone = "embed_dim 4, image_size 224, name RN50, pretrained openai, quick_gelu False, "
    assert found["backbone"] == f"{backbone}weights_sha256 {'ab' * 32}"
    assert found["data set"] == "name made-up, source nowhere, splits.test the first half"
    assert found["logits"] == "scale 100, bias -12.5"
    assert "clip-adapter" in found["made by"]
    with FeatureCache(cache_path) as cache:
        assert cache.content_sha256 in found["content"]


@pytest.mark.parametrize("path", ["images/train/features", "images/test/labels", "text/features"])
def test_a_cache_is_read_whole_and_verified(cache_path: Path, tmp_path: Path, path: str) -> None:
    damaged = tmp_path / "features.h5"
    content = bytearray(cache_path.read_bytes())
    with h5py.File(cache_path) as file:
        content[file[path].id.get_chunk_info(0).byte_offset] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        facts(damaged)


def test_what_a_cache_is_verified_by(cache_path: Path, tmp_path: Path) -> None:
    """A cache of another writer may state neither, or one."""
    path = tmp_path / "features.h5"
    path.write_bytes(cache_path.read_bytes())
    stated = facts(path)["content"]
    assert stated.endswith(", verified as a whole and row by row")
    rewrite(path, lambda file, document: document.pop("content_sha256"))
    assert facts(path)["content"] == stated.replace("as a whole and ", "")

    def without(file: h5py.File, document: dict[str, Any]) -> None:
        del file["images/train/features_hashes"]

    rewrite(path, without)
    words = "computed: the file states none"
    assert facts(path)["content"] == stated.replace("verified as a whole and row by row", words)


@pytest.mark.parametrize(
    "name",
    ["both-fixed", "image-learned", "text-hypernet", "image-hypernet", "linear-probe", "lp++"],
)
def test_an_adapter_in_words(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], name: str
) -> None:
    adapter = saved_adapters[name]
    save_adapter(tmp_path, adapter)
    found = facts(tmp_path)
    assert found == facts(tmp_path / "adapter.json") == facts(tmp_path / "adapter.safetensors")
    numbers = sum(array.size for array in adapter.arrays.values())
    assert found["what"] == f"adapter of {adapter.info.method}, {numbers} fitted numbers"
    for key, value in adapter.info.setting.items():
        assert f"{key} {value}" in found["setting"]
    assert found["fitted"] == f"shots 4, seed {adapter.info.fitted['seed']}, select none"
    assert found["classes"] == "10: zero, one, two, three, four, …"
    assert adapter.info.backbone["weights_sha256"] in found["backbone"]
    assert adapter.info.cache_sha256 in found["cache"]
    learned = {key: value for key, value in found.items() if key.startswith("learned")}
    if name == "image-learned":
        logit = float(adapter.arrays["image/ratio/logit"])
        assert float(learned["learned alpha"]) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-3)
    elif name == "text-hypernet":  # a ratio for each class, which no image is needed for
        names = ("hidden/kernel", "direction", "logit")
        hidden, direction, logit = (adapter.arrays[f"text/ratio/{n}"] for n in names)
        predicted = np.maximum(adapter.weights @ hidden, 0) @ direction + logit
        ratios = 1 / (1 + np.exp(-predicted.astype(np.float64)))
        mean, deviation = map(float, learned["learned beta"].split(" ± "))
        assert (mean, deviation) == pytest.approx((ratios.mean(), ratios.std()), abs=1e-3)
    else:
        assert not learned


def test_it_fits_on_one_screen(
    cache_path: Path,
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = saved_adapters["both-learned"]
    long = dataclasses.replace(adapter.info, dataset={"notes": "x" * 10_000}, templates=TEMPLATES)
    save_adapter(tmp_path, dataclasses.replace(adapter, info=long))
    for path in (cache_path, tmp_path):
        with pytest.raises(SystemExit) as ended:
            main([str(path)])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        screen_lines = sum(-(-len(line) // 80) for line in printed.splitlines())
        assert 10 < screen_lines <= 40
        assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path, cache: None, "does not exist"),
        (lambda path, cache: path.mkdir(), "no adapter at"),
        (lambda path, cache: path.write_text("hello"), "neither a feature cache nor an adapter"),
        (lambda path, cache: path.write_bytes(cache[: len(cache) // 2]), "cannot be read as HDF5"),
        (lambda path, cache: np.savez(path.open("wb")), "ZIP archive, as .npz and PyTorch's files"),
        (lambda path, cache: h5py.File(path, "w").close(), "not a CLIP feature cache"),
    ],
)
def test_what_is_neither_is_refused(
    tmp_path: Path,
    cache_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: object,
    sentence: str,
) -> None:
    assert callable(make)
    make(tmp_path / "thing", cache_path.read_bytes())
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "thing")])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert sentence in printed.err


def test_a_changed_adapter_is_refused(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    save_adapter(tmp_path, saved_adapters["image-fixed"])
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text.replace('"alpha": 0.6', '"alpha": 0.2'))
    with pytest.raises(UserError, match="changed after it was written"):
        facts(tmp_path)
