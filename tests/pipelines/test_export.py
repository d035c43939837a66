"""An exported classifier computes what `predict` does, in a runtime that knows nothing of us."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from torch import nn

from clip_adapter.adapters.registry import METHODS
from clip_adapter.adapters.stata import Refinement
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.encoding.images import open_image, read_rgb
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.pipelines.commands import export as command
from clip_adapter.pipelines.commands.export import ExportConfig, export
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.deciding import export as exporting
from clip_adapter.pipelines.deciding.export import export_classifier
from clip_adapter.pipelines.deciding.model_card import model_card, preprocessing
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip, FittedHead

SIDE, DIM, BEFORE = 4, 128, 96
EXACT = {"size": SIDE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
TEMPERATURE = 2.5


class Tower(nn.Module):
    """Images of 4 × 4 pixels → features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3 * SIDE * SIDE, width, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.matrix


def with_tower(adapter: SavedAdapter, tower: nn.Module) -> tuple[Any, SavedAdapter]:
    """What `export_classifier` takes of a model, and the adapter on images of 4 × 4 pixels."""
    clip = SimpleNamespace(visual=tower, encode_image=tower)
    small = replace(adapter, info=replace(adapter.info, preprocess=EXACT))
    return SimpleNamespace(clip=clip, head=FittedHead(small)), small


def adapter_of(method: str, saved_adapters: Mapping[str, SavedAdapter]) -> SavedAdapter:
    """One that was fitted, or, of methods that need more of a cache, one with random arrays."""
    if method in saved_adapters:
        return saved_adapters[method]
    plain, record = saved_adapters["zero-shot"], METHODS[method]
    rng, lengths = np.random.default_rng(3), {"C": 10, "D": DIM, "F": BEFORE}
    known = {n: s.split() for n, s in record.shapes.items() if {*s.split()} <= lengths.keys()}
    arrays = {
        name: rng.normal(size=[lengths[letter] for letter in axes]).astype(np.float32)
        for name, axes in known.items()
    }
    info = replace(plain.info, method=method, setting=record.defaults())
    return SavedAdapter(info, arrays, plain.weights)


@pytest.fixture(scope="module", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """PyTorch makes its table of operators anew for each export, which is half of the time."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        if made := getattr(getattr(_registration, "ONNXRegistry", None), "from_torchlib", None):
            patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(cache(made)))
        yield


def run_onnx(content: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, probabilities = onnxruntime.InferenceSession(content).run(None, {"images": images})
    return logits, probabilities


@pytest.mark.parametrize("method", [*METHODS, "both-hypernet", "refined"])
def test_the_head_of_every_method(method: str, saved_adapters: Mapping[str, SavedAdapter]) -> None:
    """At numbers of images that the export itself does not try."""
    if method == "refined":
        plain = saved_adapters["zero-shot"]
        variances = np.random.default_rng(1).uniform(0.5, 1, plain.weights.shape) / DIM
        parts = (plain.weights, variances.astype(np.float32), np.float32(1.5))
        fitted = replace(plain, refinement=Refinement(*parts))
    else:
        fitted = adapter_of(method, saved_adapters)
    tower = Tower(BEFORE if "projection" in fitted.method.needs else DIM)
    model, adapter = with_tower(fitted, tower)
    content, difference, allowed = export_classifier(
        model, adapter, TEMPERATURE, ".onnx", {"method": method}
    )
    assert difference <= allowed
    for count in (2, 5):
        images = np.random.default_rng(count).normal(size=(count, 3, SIDE, SIDE))
        images = images.astype(np.float32)
        logits, probabilities = run_onnx(content, images)
        with torch.no_grad():
            expected = adapter.logits(tower(torch.from_numpy(images)).numpy())
        largest = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, atol=1e-5 * max(largest, 17.8))
        np.testing.assert_allclose(probabilities, softmax(logits / TEMPERATURE, axis=1), atol=1e-6)


def test_a_file_of_another_classifier_is_not_taken_for_this_one(
    saved_adapters: Mapping[str, SavedAdapter],
) -> None:
    model, _ = with_tower(saved_adapters["zero-shot"], Tower(DIM))
    _, other = with_tower(saved_adapters["both-fixed"], Tower(DIM))
    _, difference, allowed = export_classifier(model, other, 1.0, ".onnx", {})
    assert difference > 10 * allowed


def test_a_tower_that_cannot_be_traced(saved_adapters: Mapping[str, SavedAdapter]) -> None:
    class Branching(Tower):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images if images.sum() > 0 else -images)

    model, adapter = with_tower(saved_adapters["zero-shot"], Branching(DIM))
    with pytest.raises(UserError, match=r"^The backbone glyph-clip cannot be traced by torch.exp"):
        export_classifier(model, adapter, 1.0, ".pt2", {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path, digits: Any) -> Path:
    """A run, and what both endings make of its adapter."""
    folder = tmp_path_factory.mktemp("exported")
    hyper = {"epochs": 5}
    fit(FitConfig(digits_cache, folder / "run", baselines=(), shots=2, select="none", hyper=hyper))
    for name in ("classifier.onnx", "torch.pt2"):
        assert export(ExportConfig((), folder / name, folder / "run")) == 0
    digits.pictures[7].resize((40, 51)).save(folder / "photo.png")
    return folder


@pytest.mark.parametrize("name", ["classifier.onnx", "torch.pt2"])
def test_the_card_says_how_to_run_it(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    card = (place / name).with_suffix(".md").read_text(encoding="utf-8")
    capsys.readouterr()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec("\n".join(code), {})
    said, share = capsys.readouterr().out.split()
    (found,) = predict(PredictConfig((place / "photo.png",), place / "run", top=1))
    assert said == found.top[0][0]
    adapter = load_adapter(place / "run")
    assert adapter.decisions is not None and adapter.decisions.temperature != 1
    assert float(share) == pytest.approx(found.top[0][1], abs=1e-5)
    assert f"Temperature: {adapter.decisions.temperature:.6g};" in card
    accuracy = (place / "run" / "summary.csv").read_text().splitlines()[-1].split(",")[6]
    assert f"Accuracy: {100 * float(accuracy):.2f} % of 899 test images" in card
    assert '"seven", "eight", "nine"]' in card


def test_the_onnx_file(place: Path, glyph_clip: Backbone, digits: Any) -> None:
    content = (place / "classifier.onnx").read_bytes()
    session = onnxruntime.InferenceSession(content)
    shapes = {part.name: part.shape for part in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "images": ["batch", 3, 32, 32],
        "logits": ["batch", 10],
        "probabilities": ["batch", 10],
    }
    stated = {n: json.loads(v) for n, v in session.get_modelmeta().custom_metadata_map.items()}
    document = json.loads((place / "run" / "adapter.json").read_text())
    for name in ("class_names", "preprocess", "backbone", "method"):
        assert stated[name] == document[name]
    adapter = load_adapter(place / "run")
    assert adapter.decisions is not None
    assert stated["temperature"] == adapter.decisions.temperature != 1
    assert (stated["held_out"], [*stated["thresholds"]]) == (20, ["0.9", "0.95"])
    # Of the machine that wrote it nothing is told: no path of a library or of ours.
    assert b".py" not in content and b"site-packages" not in content
    model = AdaptedClip.from_run(place / "run")
    expected = model(digits.images).numpy()
    logits, shares = run_onnx(content, digits.images.numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for coverage, q in stated["thresholds"].items():
        answered = shares >= 1 - q
        answered[np.arange(len(shares)), shares.argmax(axis=1)] = True
        assert np.array_equal(answered, adapter.decisions.sets(shares, float(coverage)))
        assert 1 < answered.sum(axis=1).mean() < 9
    # The tower of texts, which is as large as that of images, is in neither file.
    visual = sum(p.numel() * p.element_size() for p in glyph_clip.model.visual.parameters())
    for name in ("classifier.onnx", "torch.pt2"):
        assert visual < (place / name).stat().st_size < 1.2 * visual


def test_the_pt2_file(place: Path, digits: Any) -> None:
    extra = {"metadata.json": ""}
    content = (place / "torch.pt2").read_bytes()
    program = torch.export.load(io.BytesIO(content), extra_files=extra)
    logits, probabilities = program.module()(digits.images)
    expected = AdaptedClip.from_run(place / "run")(digits.images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    stated = json.loads(extra["metadata.json"])
    wanted = (expected / stated["temperature"]).softmax(dim=1)
    torch.testing.assert_close(probabilities, wanted, rtol=0, atol=1e-5)
    assert stated["class_names"][9] == "nine"


def test_too_few_images_promise_nothing(place: Path) -> None:
    """Ten say 90 % at most: of eleven, with the new one, it is the last one time in eleven."""
    adapter = load_adapter(place / "run")
    assert adapter.decisions is not None
    few = replace(adapter.decisions, scores=np.arange(10, dtype=np.float32) / 10)
    stated = command.described(replace(adapter, decisions=few), place / "run")
    assert (stated["held_out"], stated["thresholds"]) == (10, {"0.9": pytest.approx(0.9)})
    none = command.described(replace(adapter, decisions=None), place / "run")
    assert (none["temperature"], none["held_out"], none["thresholds"]) == (1.0, 0, {})
    info = adapter.info
    card = model_card(place / "c.onnx", info, none, accuracy="unknown", difference=0.0)
    assert "Coverage: nothing is promised, by 0 held-out images." in card


def test_what_computes_something_else_is_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    assert export(ExportConfig((), tmp_path / "c.pt2", place / "run")) == 1
    assert "nothing is kept of it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_logits_far_beyond_the_scale_are_compared_by_their_own_size(
    saved_adapters: Mapping[str, SavedAdapter],
) -> None:
    """Of 1e5, float32 has steps of 0.008, where 1e-5 of a logit scale of 18 would be 0.0002."""
    fitted = saved_adapters["tip-adapter"]
    strong = replace(fitted, info=replace(fitted.info, setting={"alpha": 3e4, "beta": 1.0}))
    model, adapter = with_tower(strong, Tower(DIM))
    _, difference, allowed = export_classifier(model, adapter, 1.0, ".pt2", {})
    assert 1e-5 * adapter.info.logit_scale < difference <= allowed


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ExportConfig((), Path("c.onnx")), "Name one thing to export"),
        (ExportConfig((Path("f.h5"),), Path("c.onnx"), Path("run")), "Name one thing to export"),
        (ExportConfig((), Path("c.bin"), Path("run")), r"exported as .onnx or .pt2; let --out end"),
        (ExportConfig((Path("f.h5"),), Path("c.csv")), "let --out end with .parquet"),
        (ExportConfig((Path("f.h5"),), Path("c.parquet"), method="a:b"), "are of an adapter"),
        (ExportConfig((), Path("no/c.onnx"), Path("run")), "there is no such folder"),
        (ExportConfig((), Path("f.onnx"), Path("run"), force=True), "f.onnx cannot be written"),
        (ExportConfig((), Path("g.onnx"), Path("run"), force=True), "g.md cannot be written"),
        (ExportConfig((Path("c.h5"),), Path("f.parquet"), force=True), "or it is one itself"),
        (ExportConfig((), Path("photo.onnx"), Path("run")), r"photo.md exists; choose another"),
        (ExportConfig((), Path("c.onnx"), Path("none")), "There is no adapter at none"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ExportConfig, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.md").write_text("mine")
    for folder in ("f.onnx", "g.md", "f.parquet"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        export(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_onnx_needs_its_extra(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clip-adapter\[onnx\]'"):
        export(ExportConfig((), tmp_path / "c.onnx", place / "run"))


def test_an_adapter_of_two_encoders(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(place / "run")
    both = replace(adapter, info=replace(adapter.info, backbone2={"name": "dino"}))
    monkeypatch.setattr(command, "load_adapter", lambda *_: both)
    with pytest.raises(UserError, match="takes two encoders, and an exported file holds one"):
        export(ExportConfig((), tmp_path / "c.pt2", place / "run"))


def test_an_adapter_that_names_no_backbone(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    adapter = saved_adapters["zero-shot"]
    unknown = {**adapter.info.backbone, "name": "mine", "pretrained": "mine.npy"}
    save_adapter(tmp_path, replace(adapter, info=replace(adapter.info, backbone=unknown)))
    with pytest.raises(UserError, match="no model and tag of open_clip's"):
        export(ExportConfig((), tmp_path / "c.pt2", tmp_path))


PICTURES = {
    "wide": lambda rng: Image.fromarray(rng.integers(0, 256, (47, 131, 3), np.uint8)),
    "tall": lambda rng: Image.fromarray(rng.integers(0, 256, (90, 33, 3), np.uint8)),
    "one pixel more": lambda rng: Image.fromarray(rng.integers(0, 256, (33, 32, 3), np.uint8)),
    "square": lambda rng: Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)),
    "grey": lambda rng: Image.fromarray(rng.integers(0, 256, (20, 50), np.uint8)),
    "transparent": lambda rng: Image.fromarray(rng.integers(0, 256, (40, 44, 4), np.uint8)),
    "grey, transparent": lambda rng: PICTURES["transparent"](rng).convert("LA"),
    "palette": lambda rng: PICTURES["wide"](rng).quantize(16),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "shortest": {"size": (32, 32)},
    "number": {"size": 24, "interpolation": "bilinear"},
    "oblong": {"size": (24, 40)},
    "squash": {"size": (32, 32), "resize_mode": "squash", "interpolation": "bicubic"},
    "longest": {"size": (32, 30), "resize_mode": "longest", "fill_color": 7},
    "fast": {"size": (8, 8), "decode": "fast"},  # of a JPEG at a half of its size
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_lines_of_the_card_are_our_preprocessing(
    kind: str, tmp_path: Path, glyph_clip: Backbone
) -> None:
    """Bit for bit, also where rounding decides which pixels stay."""
    config = {"interpolation": "bicubic", "mean": (0.48, 0.45, 0.4), "std": (0.26, 0.3, 0.27)}
    config |= CONFIGS[kind]
    lines = preprocessing(config)
    assert len(lines.splitlines()) <= 15
    scope: dict[str, Any] = {}
    exec(lines, scope)
    ours = Preprocess(config)
    for name, draw in PICTURES.items():
        path = tmp_path / "picture.png"
        picture = draw(np.random.default_rng(len(name)))
        if kind == "fast":
            picture.convert("RGB").save(path, "jpeg")
        else:
            picture.save(path)
        stored = read_rgb(lambda: open_image(tmp_path / "picture.png"), ours.drafted)
        view = ours.view(stored, name, 0, 0)
        expected = ours.normalised(torch.from_numpy(view.copy())[None])[0].numpy()
        found = scope["preprocess"](path)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected), f"{kind}, {name}"
