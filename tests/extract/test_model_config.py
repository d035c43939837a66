"""What a folder says about its model is checked, and nothing that lies beside it is run."""

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip import factory
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, dynamic_module_utils

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones import loading as backbone_module
from clip_adapter.extract.backbones.config_check import check_config
from clip_adapter.extract.backbones.loading import load_backbone
from tests.extract import tiny_models
from tests.extract.tiny_models import VIT_CONFIG

VOCABULARY = {"<pad>": 0, "<unk>": 1, "a": 2, "photo": 3, "of": 4, "cat": 5}
TEXT = {**VIT_CONFIG["text_cfg"], "vocab_size": 6, "context_length": 5, "hf_tokenizer_name": "own"}
CONFIG = {**VIT_CONFIG, "text_cfg": TEXT, "custom_text": True}


def make_folder(folder: Path, model: Any, preprocess: Any = None) -> Path:
    """A folder with these configurations and fitting weights, and a tokenizer of its own."""
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model} | ({} if preprocess is None else {"preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    own = {name: value for name, value in CONFIG.items() if name != "custom_text"}
    weights = open_clip.CustomTextCLIP(**own).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def refused(folder: Path, words: str) -> None:
    tiny_models.refused(f"local-dir:{folder}", None, words)


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    loaded = load_backbone(f"local-dir:{make_folder(tmp_path / 'model', CONFIG)}")
    tokens = loaded.tokenizer(["a photo of a cat", "a dog"])
    assert tokens.tolist() == [[2, 3, 4, 2, 5], [2, 1, 0, 0, 0]]
    assert loaded.model.encode_text(tokens).shape == (2, 8)


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model", CONFIG)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, r"needs the package transformers: pip install 'clip-adapter\[transformers\]'")


@pytest.mark.parametrize("name", open_clip.list_models())
def test_what_open_clip_itself_says_may_be_said(tmp_path: Path, name: str) -> None:
    config = {"model_cfg": open_clip.get_model_config(name)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_config(tmp_path / "config.json") == config


EVIL = """
from pathlib import Path
Path({trace!r}).mkdir()
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the code beside the weights would make; somebody at the terminal says yes to all."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    return tmp_path / "was here"


def with_code(folder: Path, trace: Path, model: Any) -> Path:
    make_folder(folder, model)
    (folder / "own.py").write_text(EVIL.format(trace=str(trace)))
    stated = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "config.json").write_text(json.dumps({"model_type": "own", **stated}))
    return folder


@pytest.mark.parametrize(
    "kwargs", [{"trust_remote_code": True}, {"trust_remote_code": 1, "clean": "lower"}]
)
def test_a_configuration_cannot_ask_for_code_to_be_run(
    tmp_path: Path, trace: Path, kwargs: dict[str, Any]
) -> None:
    text = {**TEXT, "tokenizer_kwargs": kwargs}
    folder = with_code(tmp_path / "evil", trace, {**CONFIG, "text_cfg": text})
    refused(folder, "tokenizer_kwargs has 'trust_remote_code', which is not known here")
    with pytest.raises(UserError, match="trust_remote_code"):
        load_backbone("ViT-B-32", str(folder))
    assert not trace.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert trace.exists()  # the code works where it is let


def test_a_tokenizer_with_code_is_not_run(tmp_path: Path, trace: Path) -> None:
    folder = with_code(tmp_path / "evil", trace, CONFIG)
    refused(folder, "could not be loaded")
    assert not trace.exists()
    assert sys.stdin.read() == "y\n" * 10  # nobody was asked


def test_what_a_call_says_outdoes_the_configuration(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the check to miss something, the code would still not be run."""
    text = {**TEXT, "tokenizer_kwargs": {"trust_remote_code": True}}
    folder = with_code(tmp_path / "evil", trace, {**CONFIG, "text_cfg": text})
    unchecked = json.loads((folder / "open_clip_config.json").read_text())
    monkeypatch.setattr(backbone_module, "read_config", lambda folder: unchecked)
    refused(folder, "could not be loaded")
    assert not trace.exists()


def test_a_repository_is_checked_before_it_is_used(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**TEXT, "tokenizer_kwargs": {"trust_remote_code": True}}
    folder = with_code(tmp_path / "evil", trace, {**CONFIG, "text_cfg": text})

    def download(model_id: str, filename: str, **_: object) -> str:
        assert model_id == "somebody/something"
        return str(folder / filename)

    for module in (backbone_module, factory):
        monkeypatch.setattr(module, "download_pretrained_from_hf", download)
    with pytest.raises(UserError, match="trust_remote_code"):
        load_backbone("hf-hub:somebody/something")
    assert not trace.exists()


def changed(tower: str, **values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda model: {**model, tower: {**model[tower], **values}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: {**model, "cast_dtype": "x"}, "model_cfg has 'cast_dtype'"),
        (lambda model: {**model, "text_cfg": None}, "text_cfg is None, not an object"),
        (lambda model: [model], r"model_cfg is \[.*, not an object"),
        (lambda model: {**model, "embed_dim": 1e30}, "embed_dim is 1e\\+30"),
        (lambda model: {**model, "embed_dim": math.nan}, "embed_dim is nan"),
        (lambda model: {**model, "embed_dim": [8]}, "embed_dim is"),
        (changed("text_cfg", x=1), "text_cfg has 'x'"),
        (changed("text_cfg", layers=10**9), "layers is 1000000000"),
        (changed("text_cfg", layers=-1), "layers is -1"),
        (changed("text_cfg", pool_type="x" * 10_000), "pool_type is 'x+…"),
        (changed("text_cfg", tokenizer_kwargs={"bpe_path": "/etc/passwd"}), "has 'bpe_path'"),
        (
            changed("text_cfg", tokenizer_kwargs=["a"]),
            r"tokenizer_kwargs is \['a'\], not an object",
        ),
        (changed("text_cfg", act_kwargs={"inplace": True}), "act_kwargs has 'inplace'"),
        (changed("text_cfg", hf_model_name="../evil"), "hf_model_name is '../evil', not"),
        (
            changed("text_cfg", hf_model_name="somebody/else"),
            "hf_model_name is 'somebody/else', not",
        ),
        (
            changed("text_cfg", hf_tokenizer_name="/evil"),
            "hf_tokenizer_name is '/evil', not a string that",
        ),
        (changed("vision_cfg", image_size=10**6), "image_size is 1000000"),
        (changed("vision_cfg", image_size=[8, 8, 8]), "image_size is"),
        (
            changed("vision_cfg", timm_model_name="hf-hub:a/b"),
            "timm_model_name is 'hf-hub:a/b', not",
        ),
        (
            changed("vision_cfg", timm_model_name="local-dir:/x"),
            "timm_model_name is 'local-dir:/x'",
        ),
        (changed("vision_cfg", timm_model_name="nothing"), "timm_model_name is 'nothing', not"),
    ],
)
def test_odd_and_hostile_models(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    refused(make_folder(tmp_path / "model", change(CONFIG)), words)


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        ([], r"preprocess_cfg is \[\], not an object"),
        ({"x": 1}, "preprocess_cfg has 'x'"),
        ({"mode": "L"}, "mode is 'L'"),
        ({"mean": "grey"}, "mean is 'grey'"),
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\]"),
        ({"std": [0.5, 0, 0.5]}, "std is"),
        ({"std": math.inf}, "std is inf"),
        ({"interpolation": "magic"}, "interpolation is 'magic'"),
        ({"resize_mode": 3}, "resize_mode is 3"),
        ({"resize_mode": []}, r"resize_mode is \[\]"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": 0}, "size is 0"),
        ({"fill_color": -1}, "fill_color is -1"),
    ],
)
def test_odd_preprocessing(tmp_path: Path, preprocess: Any, words: str) -> None:
    refused(make_folder(tmp_path / "model", CONFIG, preprocess), words)


def test_preprocessing_that_is_known(tmp_path: Path) -> None:
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "size": 16}
    loaded = load_backbone(f"local-dir:{make_folder(tmp_path / 'model', CONFIG, stated)}")
    assert loaded.preprocess_config["mean"] == [0.5] * 3
    assert loaded.preprocess_config["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        (" " * 2**21, "too large"),
        ("\xff", "could not be loaded"),
        ('{"model_cfg": 1, "model_cfg": 2}', "names 'model_cfg' twice in one object"),
        ("version https://git-lfs.github.com/spec/v1", "the pointer that Git LFS left"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, words: str) -> None:
    folder = make_folder(tmp_path / "model", CONFIG)
    (folder / "open_clip_config.json").write_text(content, encoding="latin-1")
    refused(folder, words)


@pytest.mark.parametrize(
    "name", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "x.bin"]
)
def test_a_pipe_among_the_files_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "model", CONFIG)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name} is neither a file nor a folder")


def test_a_pipe_or_a_device_as_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    for path in (tmp_path / "weights.pt", Path("/dev/zero")):
        with pytest.raises(UserError, match="is neither a file nor a folder nor a tag"):
            load_backbone("ViT-B-32", str(path))


def test_loaders_log_again_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    load_backbone("glyph-clip")
    assert not caplog.records
    transformers.logging.get_logger("transformers").error("something")
    assert transformers.logging.get_verbosity() < 50


@pytest.mark.parametrize(
    ("tower", "name", "value"),
    [
        ("vision_cfg", "width", 2**23),
        ("vision_cfg", "image_size", 8192),
        ("text_cfg", "context_length", 2**20),
        ("text_cfg", "layers", 1024),
        ("vision_cfg", "mlp_ratio", 2**20),
    ],
)
def test_a_configuration_larger_than_the_weights_takes_no_memory(
    tower: str, name: str, value: int, tmp_path: Path
) -> None:
    model = CONFIG | {tower: {**CONFIG[tower], name: value, "patch_size": 1}}
    if tower == "text_cfg":
        model[tower].pop("patch_size")
    refused(make_folder(tmp_path / "model", model), "describes a model of more than")
