"""Encoding: equal to open_clip by hand, whatever the architecture, precision and batch."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.device import find_device, find_precision
from clip_adapter.extract.encoding.encoder import EncodedBatch, Encoder, Stopwatch, encode_images
from tests.extract.image_folders import photograph
from tests.extract.tiny_models import TEXT

CPU = torch.device("cpu")
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {
                "image_size": 64,
                "layers": [1, 1, 1, 1],
                "width": 16,
                "head_width": 64,
            },
            "text_cfg": TEXT,
        }
    },
    "vit": {
        "model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}
    },
    "siglip": {
        "model_cfg": {
            "embed_dim": 64,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 32,
                "timm_model_name": "test_vit",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "none",
            },
            "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    },
}
IMAGES = 11
BATCH = 4


def make_model(folder: Path, kind: str) -> str:
    """A model with random weights in a folder; its name for `--backbone`."""
    folder.mkdir()
    torch.manual_seed(0)
    config = json.loads(json.dumps(MODELS[kind]))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module", params=list(MODELS))
def name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(make_model(tmp_path_factory.mktemp("model") / "vit", "vit"))


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads PyTorch has for the length of a test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def a_split(count: int = IMAGES) -> Split:
    labels = np.zeros(count, np.int32)
    return Split([f"image {row}" for row in range(count)], labels, photograph, "made up")


def encode(encoder: Encoder, split: Split, **plan: Any) -> list[EncodedBatch]:
    rows = np.arange(plan.pop("start", 0), len(split.labels))
    options = {"batch_size": BATCH, "workers": 2, **plan}
    return list(encode_images(encoder, split, Plan(rows, **options), Stopwatch()))


def features(batches: list[EncodedBatch]) -> np.ndarray:
    return np.concatenate([batch.features for batch in batches])


@torch.inference_mode()
def test_features_equal_open_clip_by_hand(name: str) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    encoder = Encoder(load_backbone(name), CPU, BATCH)
    found = features(encode(encoder, a_split()))
    assert found.dtype == np.float32
    for row in range(IMAGES):
        by_hand = model.encode_image(preprocess(photograph(row))[None])[0].numpy()
        np.testing.assert_allclose(found[row, 0], by_hand, atol=1e-5, rtol=1e-5)
    tokens = open_clip.tokenize(["a photo of a cat.", "two dogs"])
    text = model.encode_text(tokens).numpy()
    np.testing.assert_allclose(
        next(encoder.texts([["a photo of a cat.", "two dogs"]])), text, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@torch.inference_mode()
def test_lower_precisions_are_open_clips(name: str, precision: Any) -> None:
    whole = load_backbone(name)
    lower = load_backbone(name, precision=precision)
    assert lower.identity == whole.identity
    assert (lower.logit_scale, lower.logit_bias) == (whole.logit_scale, whole.logit_bias)
    found = features(encode(Encoder(lower, CPU, BATCH), a_split()))
    assert found.dtype == np.float16
    model, _, preprocess = open_clip.create_model_and_transforms(name, precision=precision)
    batch = torch.stack([preprocess(photograph(row)) for row in range(4)])
    by_hand = model.eval().encode_image(batch.to(lower.dtype)).float().numpy()
    size = np.abs(by_hand).max()
    np.testing.assert_allclose(found[:4, 0], by_hand, atol=size * 0.02)
    exact = features(encode(Encoder(whole, CPU, BATCH), a_split()))
    error = np.abs(found.astype(np.float32) - exact).max() / np.abs(exact).max()
    assert 0 < error < (0.01 if precision == "fp16" else 0.08)


def test_the_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_precision("auto", CPU) == "fp32"
    assert find_precision("bf16", CPU) == "bf16"
    for capability, wanted in [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert find_precision("auto", torch.device("cuda")) == wanted
    # PyTorch knows the others by name; hpu, of Habana, it looks for as a module.
    for name in ("nonsense", "hpu", "privateuseone", "mkldnn", "opengl", "cpu\n"):
        with warnings.catch_warnings(action="error"), pytest.raises(UserError) as caught:
            find_device(name)
        assert re.fullmatch(r"--device [\w\\]+ is not available: .*", str(caught.value))


def test_the_others_in_a_batch_change_no_bit(vit: Backbone) -> None:
    """Batches are filled up, and an image's place in one does not matter: what a run encodes after
    an interruption or for an update equals what an undisturbed one would have."""
    encoder = Encoder(vit, CPU, BATCH)
    whole = features(encode(encoder, a_split()))
    for start in (1, 4, 6, 10):
        found = features(encode(encoder, a_split(), start=start))
        np.testing.assert_array_equal(found, whole[start:])
    sizes = [len(batch.rows) for batch in encode(encoder, a_split(), start=3, batch_size=4)]
    assert sizes == [4, 4]
    chosen = np.array([2, 5, 9])
    (batch,) = encode_images(encoder, a_split(), Plan(chosen, BATCH, 2), Stopwatch())
    assert batch.rows.tolist() == [2, 5, 9]
    np.testing.assert_array_equal(batch.features, whole[chosen])


def test_a_device_without_the_memory_is_named(
    vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(vit, CPU, batch_size=6)

    def full(values: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vit.model, "encode_image", full)
    with pytest.raises(UserError, match=r"^cpu lacks the memory for 6 images at once; take fewer"):
        encoder.images(torch.zeros((1, 2, 32, 32, 3), dtype=torch.uint8))


def test_skipped_images_leave_the_others_in_place(vit: Backbone) -> None:
    def read(row: int) -> Image.Image:
        if row in (0, 5, 8, 9, 10):
            raise OSError("broken\nfile")
        return photograph(row)

    split = Split(a_split().ids, a_split().labels, read, "made up")
    encoder = Encoder(vit, CPU, BATCH)
    with pytest.raises(UserError, match=r"image 0 cannot be decoded: broken file; .*--on-error"):
        encode(encoder, split)
    batches = encode(encoder, split, skip=True)
    rows = [batch.rows.tolist() for batch in batches]
    assert rows == [[1, 2, 3], [4, 6, 7], []]
    assert [[s.name for s in b.skipped] for b in batches][1:] == [
        ["image 5"],
        ["image 8", "image 9", "image 10"],
    ]
    kept = np.concatenate(rows).astype(int)
    whole = features(encode(encoder, a_split()))
    np.testing.assert_array_equal(features(batches), whole[kept])
    assert batches[2].features.shape == (0, 1, 24)


def test_views_depend_on_seed_and_name_alone(vit: Backbone) -> None:
    encoder = Encoder(vit, CPU, BATCH)
    some = features(encode(encoder, a_split(), views=3))
    assert some.shape == (IMAGES, 3, 24)
    np.testing.assert_array_equal(some[:, :1], features(encode(encoder, a_split())))
    small = Encoder(vit, CPU, 3)
    other = features(encode(small, a_split(), views=4, batch_size=3, workers=5, start=3))
    np.testing.assert_allclose(other[:, :3], some[3:], atol=1e-5)
    seeded = features(encode(encoder, a_split(), views=3, seed=1))
    np.testing.assert_array_equal(seeded[:, 0], some[:, 0])
    # Of a very long image there is only the central crop, and its mirror image.
    assert (np.abs(seeded[:, 1:] - some[:, 1:]).max(axis=(1, 2)) > 1e-3).mean() > 0.7
    assert (np.abs(some[:, 1] - some[:, 2]).max(axis=1) > 1e-3).mean() > 0.7


def test_equal_pixels_have_equal_digests(vit: Backbone) -> None:
    split = Split(list("abcd"), np.zeros(4, np.int32), lambda row: photograph(row % 3), "made up")
    (batch,) = encode(Encoder(vit, CPU, BATCH), split)
    assert batch.digests[0] == batch.digests[3]
    assert len(set(batch.digests.tolist())) == 3


def test_prompts_are_too_long_from_the_token_on_that_has_no_place() -> None:
    backbone = load_backbone("glyph-clip")
    prompts = ["", "a", "dog " * 21, "dog " * 22, "dog " * 23, "dog " * 80, "a dog"]
    kept = backbone.tokenizer.context_length - 2  # beside the tokens of the two ends
    wanted = [prompt for prompt in prompts if len(backbone.tokenizer.encode(prompt)) > kept]
    assert wanted == prompts[4:6]
    assert Encoder(backbone, CPU, BATCH).too_long(prompts) == wanted


def test_prompts_are_too_long_for_tokenizers_that_fill_up_with_the_end(vit: Backbone) -> None:
    """As SigLIP's does."""

    def tokenizer(prompts: list[str], context: int = 5) -> torch.Tensor:
        rows = [[ord(letter) for letter in prompt][: context - 1] for prompt in prompts]
        return torch.tensor([row + [1] * (context - len(row)) for row in rows])

    encoder = Encoder(replace(vit, tokenizer=tokenizer), CPU, BATCH)
    assert encoder.too_long(["", "ab", "abcd", "abcde", "abcdefgh"]) == ["abcde", "abcdefgh"]


@pytest.mark.parametrize(("threads", "passes"), [(1, 1), (2, 2), (8, 4)])
def test_decoding_stays_two_batches_ahead(
    vit: Backbone, threads: int, passes: int, with_threads: Callable[[int], None]
) -> None:
    """Memory must not grow when the model is the slower part."""
    with_threads(threads)
    asked: list[int] = []

    def read(row: int) -> Image.Image:
        asked.append(row)
        return photograph(row)

    split = Split([str(row) for row in range(200)], np.zeros(200, np.int32), read, "made up")
    batches: Iterator[EncodedBatch] = encode_images(
        Encoder(vit, CPU, BATCH), split, Plan(np.arange(200), 4, 2), Stopwatch()
    )
    next(batches)
    assert len(asked) <= (passes + 3) * 4  # one given out, some in passes, two ahead
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_compiled_features_are_the_eager_ones(
    vit: Backbone, with_threads: Callable[[int], None]
) -> None:
    """In worker threads, which compile nothing again, though the last batch is smaller."""
    with_threads(2)
    encoder = Encoder(vit, CPU, BATCH, compiled=True)
    assert encoder.compile_seconds > 0
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    compiled = encode(encoder, a_split())
    assert counters["stats"]["unique_graphs"] == graphs
    assert [len(batch.rows) for batch in compiled] == [4, 4, 3]
    eager = features(encode(Encoder(vit, CPU, BATCH), a_split()))
    np.testing.assert_allclose(features(compiled), eager, atol=1e-5)


def test_a_gpu_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda is not available"):
            find_device("cuda")


def test_the_threads_decode_what_one_thread_decodes() -> None:
    """`read` is called in several threads at once."""
    from clip_adapter.extract.encoding.decode import decode
    from clip_adapter.extract.encoding.preprocess import Preprocess

    config = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "shortest"}
    preprocess = Preprocess({**config, "interpolation": "bicubic"})
    pixels = partial(decode, a_split(), preprocess)
    one, many = (list(pixels(Plan(np.arange(IMAGES), 4, workers))) for workers in (1, 8))
    for some, other in zip(one, many, strict=True):
        assert torch.equal(some.pixels, other.pixels)
        assert some.rows.tolist() == other.rows.tolist()
