"""Backbones: the right activation for the weights, and a sentence for weights that won't do."""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file

from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.backbones.names import GLYPH_CLIP_FOLDER
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.console.terminal import Terminal
from tests.extract.image_folders import make_folder
from tests.extract.tiny_models import (
    VIT_CONFIG,
    Attack,
    random_model,
    refused,
    register,
    with_weights_of,
)


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path / "configs", monkeypatch)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Weights of a tiny ViT-B-32."""
    torch.save(random_model("ViT-B-32").state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def downloads(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(factory, "download_pretrained", lambda config, **options: str(path))


@torch.inference_mode()
def text_features(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :4] = torch.tensor([49406, 320, 2368, 49407])
    tokens[1, :3] = torch.tensor([49406, 1929, 49407])
    return model.encode_text(tokens)


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu"),
    [
        ("RN50", "openai", True),
        ("RN50", None, True),
        ("RN50-quickgelu", "openai", True),
        ("RN50", "cc12m", True),
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", None, True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32-quickgelu", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "metaclip_400m", True),
        ("ViT-L-14", "openai", True),
        ("ViT-L-14", "laion2b_s32b_b82k", False),
    ],
)
def test_the_activation_is_that_of_the_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tag: str | None, quick_gelu: bool
) -> None:
    plain = name.removesuffix("-quickgelu")
    trained = random_model(plain, quick_gelu=quick_gelu)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    downloads(monkeypatch, tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # open_clip warns about an activation that does not fit
        backbone = load_backbone(name, tag)
    assert backbone.identity["quick_gelu"] is quick_gelu
    assert backbone.identity["pretrained"] == (tag or "openai")
    torch.testing.assert_close(text_features(backbone.model), text_features(trained))
    other = with_weights_of(trained, plain, quick_gelu=not quick_gelu)
    assert (text_features(backbone.model) - text_features(other)).abs().max() > 1e-4


def publish(monkeypatch: pytest.MonkeyPatch, tag: str, path: Path, digits: int) -> None:
    """Let open_clip's table say that the file is that of a ViT-B-32 tag."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:digits]
    url = f"https://x/models/{digest}/x.pt" if digits == 64 else f"https://x/vit-{digest}.pt"
    monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-32"][tag], "url", url)


@pytest.mark.parametrize(
    ("name", "tag", "digits", "quick_gelu"),
    [
        ("ViT-B-32", "openai", 64, True),
        ("ViT-B-32-quickgelu", "openai", 64, True),
        ("ViT-B-32", "laion400m_e32", 8, True),
        ("ViT-B-32", "laion2b_e16", 8, False),
        ("ViT-B-32-quickgelu", "laion2b_e16", 8, False),
        ("ViT-B-32", None, 0, False),
        ("ViT-B-32-quickgelu", None, 0, True),
    ],
)
def test_a_published_file_is_recognised_by_its_hash(
    monkeypatch: pytest.MonkeyPatch,
    saved: Path,
    name: str,
    tag: str | None,
    digits: int,
    quick_gelu: bool,
) -> None:
    if tag:
        monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-32"][tag], "quick_gelu", quick_gelu)
        publish(monkeypatch, tag, saved, digits)
    backbone = load_backbone(name, str(saved))
    assert backbone.identity["quick_gelu"] is quick_gelu
    assert backbone.identity["pretrained"] == "weights.pt"
    assert (backbone.assumption is None) is (tag is not None or quick_gelu)


def test_what_an_unknown_file_does_not_say_is_said(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", {"train": 1, "test": 1}, ("cat", "dog"))
    source = {"dataset": f"folder:{data}", "val": 0.0, "pretrained": str(saved)}
    config = ExtractConfig(backbone="ViT-B-32", out=tmp_path / "features.h5", **source)
    extract(config, Terminal("extract"))
    assert capsys.readouterr().err == (
        "warning: weights.pt is not known by its hash and taken to use GELU; if it was trained "
        "with QuickGELU, as OpenAI's models were, name the backbone ViT-B-32-quickgelu.\n"
    )
    other = replace(config, backbone="ViT-B-32-quickgelu", out=tmp_path / "other.h5")
    extract(other, Terminal("extract"))
    assert capsys.readouterr().err == ""


def test_identity_and_logit_scale() -> None:
    backbone = load_backbone("glyph-clip")
    identity = dict(backbone.identity)
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert identity.pop("weights_sha256") == digest.hexdigest()
    assert identity == {
        **{"name": "glyph-clip", "pretrained": "glyph-clip", "quick_gelu": False},
        **{"embed_dim": 128, "image_size": (32, 32), "open_clip_version": open_clip.__version__},
    }
    assert backbone.logit_scale == pytest.approx(backbone.model.logit_scale.exp().item())
    assert 5 < backbone.logit_scale < 101
    assert backbone.logit_bias == 0
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_the_hash_is_of_the_weights_whatever_file_holds_them(tmp_path: Path) -> None:
    state = random_model("ViT-B-32").state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pt")
    torch.save({f"module.{k}": v for k, v in reversed(state.items())}, tmp_path / "parallel.pt")
    save_file(state, tmp_path / "a.safetensors")

    def sha256(file: str) -> str:
        return load_backbone("ViT-B-32", str(tmp_path / file)).identity["weights_sha256"]

    found = {sha256(file) for file in ("a.pt", "checkpoint.pt", "parallel.pt", "a.safetensors")}
    # What wraps a model in training stands before its names, in any order, or within them.
    for before in ("_orig_mod.", "model.", "module.model.", "_orig_mod.module.", "model.clip."):
        wrapped = {before + name: tensor for name, tensor in state.items()}
        save_file(wrapped, tmp_path / "wrapped.safetensors")
        found.add(sha256("wrapped.safetensors"))
    compiled = {k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()}
    for nested in (wrapped, compiled, {"model": wrapped}, {"module": state}, {"state_dict": state}):
        torch.save({**nested, "epoch": 3} if len(nested) == 1 else nested, tmp_path / "nested.pt")
        found.add(sha256("nested.pt"))
    assert len(found) == 1
    within_itself: dict[str, Any] = {"epoch": 3}
    within_itself["model"] = within_itself
    torch.save(within_itself, tmp_path / "itself.pt")
    refused("ViT-B-32", tmp_path / "itself.pt", "could not be loaded from itself.pt")
    torch.save(wrapped | {"loss.weight": torch.zeros(1)}, tmp_path / "more.pt")
    refused("ViT-B-32", tmp_path / "more.pt", r'from more.pt: .*Unexpected.*"loss.weight"')
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["visual.proj"][0, 0] += 1e-3
    save_file(changed, tmp_path / "changed.safetensors")
    assert sha256("changed.safetensors") != sha256("a.pt")


def folder_with(folder: Path, config: str | None, weights: bool = True) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "open_clip_config.json").write_text(config)
    if weights:
        save_file(random_model("ViT-B-32").state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_a_local_folder_works_as_name_and_as_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mine", json.dumps({"model_cfg": VIT_CONFIG}))
    by_name = load_backbone(f"local-dir:{folder}")
    by_weights = load_backbone("ViT-B-32", str(folder))
    assert by_name.identity["weights_sha256"] == by_weights.identity["weights_sha256"]
    assert by_weights.identity["pretrained"] == "mine"
    torch.testing.assert_close(
        text_features(by_name.model), text_features(random_model("ViT-B-32"))
    )


def test_a_copy_of_glyph_clip_is_glyph_clip(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(GLYPH_CLIP_FOLDER, copy)
    copied, own = load_backbone(f"local-dir:{copy}"), load_backbone("glyph-clip")
    assert copied.identity["weights_sha256"] == own.identity["weights_sha256"]
    prompt = ["a photo of the digit seven."]
    assert copied.tokenizer(prompt).tolist() == own.tokenizer(prompt).tolist()
    assert own.tokenizer(prompt).shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logit_scale", 100.0, r"scale in w\.pt is 100, .* the logarithm .* \(4\.605 for 100\)"),
        ("logit_scale", 14.3, r"is 14\.3, which"),
        ("logit_scale", float("nan"), r"is nan, which"),
        ("logit_scale", float("inf"), r"is inf, which"),
        ("logit_scale", -1000.0, r"is -1000, which"),
        ("logit_bias", float("nan"), r"logit bias in w\.pt is nan, which"),
    ],
)
def test_a_logit_scale_that_none_has_is_said_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, words: str
) -> None:
    model = random_model("ViT-B-32")
    model.logit_bias = torch.nn.Parameter(torch.zeros(()))
    monkeypatch.setitem(factory._MODEL_CONFIGS["ViT-B-32"], "init_logit_bias", 0.0)
    torch.save(model.state_dict() | {name: torch.tensor(value)}, tmp_path / "w.pt")
    refused("ViT-B-32", tmp_path / "w.pt", words)


def test_the_bias_of_a_sigmoid_model_is_carried(tmp_path: Path) -> None:
    config = {**VIT_CONFIG, "init_logit_bias": -10, "init_logit_scale": 2.0}
    folder = folder_with(tmp_path / "siglip", json.dumps({"model_cfg": config}), weights=False)
    state = open_clip.CLIP(**config).state_dict()
    state["logit_bias"].fill_(-7.5)
    save_file(state, folder / "open_clip_model.safetensors")
    backbone = load_backbone(f"local-dir:{folder}")
    assert backbone.logit_bias == -7.5
    assert backbone.logit_scale == pytest.approx(2.718281828**2)


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("RN5O", None, r"Unknown backbone 'RN5O'; near matches: RN50, "),
        ("ViT-B/32", None, r"Unknown backbone 'ViT-B/32'; near matches: ViT-B-32, "),
        ("glyphclip", None, r"near matches: glyph-clip"),
        ("????", None, r"near matches: none"),
        ("RN50", "opanai", r"'opanai' is neither a file nor a folder nor a tag .*cc12m, openai"),
        ("RN50", "missing.pt", r"'missing.pt' is neither a file"),
        ("coca_ViT-B-32", None, r"Name the weights of coca_ViT-B-32 with --pretrained: .*laion2b"),
        ("glyph-clip", "openai", r"brings its own weights; leave --pretrained out"),
        ("local-dir:/nowhere", None, r"could not be loaded: .*not found: /nowhere"),
        ("local-dir:", None, r"could not be loaded: no folder is named"),
    ],
)
def test_unknown_names_and_weights(name: str, weights: str | None, words: str) -> None:
    refused(name, weights, words)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("published_digits", [0, 8])
def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, published_digits: int
) -> None:
    evil, trace = tmp_path / "evil.pt", tmp_path / "was here"
    torch.save(
        {"state_dict": Attack(os.mkdir, str(trace))}, evil, _use_new_zipfile_serialization=zipped
    )
    if published_digits:
        publish(monkeypatch, "openai", evil, published_digits)
    refused("ViT-B-32", evil, r"evil.pt .* holds Python code .* not run")
    assert not trace.exists()
    torch.load(evil, weights_only=False)
    assert trace.exists()  # the code works where it is let


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    path.write_text("hello\n")
    refused("ViT-B-32", path, rf"bad.{suffix}")


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(random_model("RN50").state_dict(), tmp_path / "rn50.pt")
    refused("ViT-B-32", tmp_path / "rn50.pt", r"ViT-B-32 could not be loaded from rn50.pt")


@pytest.mark.parametrize(
    "config",
    [None, "{", "{}", '{"model_cfg": {"embed_dim": 8}}',
     '{"model_cfg": {"embed_dim": 8, "vision_cfg": {"x": 1}, "text_cfg": {}}}'],
)  # fmt: skip
def test_folders_that_are_no_model(tmp_path: Path, config: str | None) -> None:
    folder = folder_with(tmp_path / "folder", config)
    refused(f"local-dir:{folder}", None, r"could not be loaded")
    refused("ViT-B-32", folder, r"The backbone ViT-B-32 could not be loaded")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    config = json.dumps({"model_cfg": VIT_CONFIG})
    folder = folder_with(tmp_path / "folder", config, weights=False)
    refused(f"local-dir:{folder}", None, r"model of more than \S+ numbers, .* have \S+ bytes")


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object, **options: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(factory, "download_pretrained", fail)
    refused("RN50", None, r"'openai' of RN50 could not be downloaded .*no route.*--pretrained")
