"""open_clip_config.json of a folder or a repository: read, and checked before open_clip sees it.

Parts of it reach functions of other libraries as keywords, among them some that run Python which
lies beside the weights or fetch things from elsewhere. So it may say what the configurations that
come with open_clip say, and nothing else.
"""

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from clip_adapter.errors import Contradiction
from clip_adapter.extract.files import LFS_ADVICE, is_lfs_pointer
from clip_adapter.files import named_once
from clip_adapter.words import quoted

CONFIG_FILE = "open_clip_config.json"
LARGEST_FILE = 2**20
LARGEST_NUMBER = 2**24  # more than any vocabulary or width
MOST_LAYERS = 1024
LARGEST_IMAGE = 8192
LONGEST_WORD = 200

MODEL = {
    *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
}
TOWERS = {
    "vision_cfg": {field.name for field in fields(CLIPVisionCfg)},
    "text_cfg": {field.name for field in fields(CLIPTextCfg)},
    "multimodal_cfg": {field.name for field in fields(MultimodalCfg)},
}
NESTED = {
    "tokenizer_kwargs": {"clean", "strip_sep_token"},
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps"},
}
PREPROCESS = {field.name for field in fields(PreprocessCfg)}
WORDS = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The checked configuration in a folder.

    Raises ValueError where it is missing, no JSON, or says what it may not; also where something
    in the folder is neither a file nor a folder, and where the model would be larger than the
    files are: a page of JSON must not take all memory.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder is not found: {folder}")
    total = 0
    for entry in folder.iterdir():
        status = entry.stat()
        if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{entry.name} is neither a file nor a folder")
        if stat.S_ISREG(status.st_mode) and is_lfs_pointer(entry):
            raise ValueError(f"{entry.name} {LFS_ADVICE}")
        total += status.st_size
    config = check_config(folder / CONFIG_FILE)
    if (least := _least_numbers(config["model_cfg"])) > total:
        raise ValueError(
            f"{CONFIG_FILE} describes a model of more than {least:.1e} numbers, and the files "
            f"beside it have {total:.1e} bytes"
        )
    return config


def _least_numbers(model: Mapping[str, Any]) -> float:
    """A bound from below on what open_clip allocates for its own kinds of towers: four square
    matrices a layer and the two of its perceptron, embeddings, the mask, and the projection."""
    total = 0.0
    for name, of_open_clip in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        tower = vars(of_open_clip) | model[name]
        if tower.get("timm_model_name") or tower.get("hf_model_name"):
            continue

        def number(key: str, stated: Mapping[str, Any] = tower) -> float:
            return abs(stated[key]) if _is_number(stated.get(key)) else 0

        layers = tower["layers"]
        blocks = sum(layers) if isinstance(layers, list) else number("layers")
        width, length = number("width"), number("context_length")
        total += blocks * width**2 * (4 + 2 * number("mlp_ratio"))
        total += (number("vocab_size") + length) * width + length**2
        patches = [side / max(1, number("patch_size")) for side in _pair(tower.get("image_size"))
                   if _is_number(side)]  # fmt: skip
        if not isinstance(layers, list) and patches:
            total += patches[0] * patches[-1] * width
        if _is_number(model.get("embed_dim")):
            total += abs(model["embed_dim"]) * width
    return total


def check_config(path: Path) -> dict[str, Any]:
    """The checked configuration in a file; raises ValueError as `read_config` does."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{CONFIG_FILE} is too large for a configuration")
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=named_once)
    except Contradiction as error:
        raise ValueError(f"{CONFIG_FILE} {error}") from None
    except FileNotFoundError:
        raise ValueError(f"the config file is missing: {CONFIG_FILE}") from None
    except RecursionError:
        raise ValueError(f"{CONFIG_FILE} is nested too deeply") from None
    model = _object(_object(config, "the configuration").get("model_cfg"), "model_cfg")
    _check_keys(model, MODEL, "model_cfg")
    for name in ("vision_cfg", "text_cfg"):
        _object(model.get(name), name)
    for name, value in model.items():
        if name in TOWERS:
            _check_keys(_object(value, name), TOWERS[name], name)
            _check_tower(value)
        else:
            _check_value(name, value)
    _check_preprocessing(_object(config.get("preprocess_cfg", {}), "preprocess_cfg"))
    return config


def _check_tower(tower: Mapping[str, Any]) -> None:
    for name, value in tower.items():
        if name in NESTED and value is not None:
            _check_keys(_object(value, name), NESTED[name], name)
            for inner, content in value.items():
                _check_value(inner, content)
        elif name in NAMES and value is not None:
            if not (isinstance(value, str) and NAMES[name](value)):
                raise ValueError(f"{name} {quoted(value)} is not a model that open_clip uses")
        else:
            _check_value(name, value)


def _check_preprocessing(config: Mapping[str, Any]) -> None:
    _check_keys(config, PREPROCESS, "preprocess_cfg")
    for name, value in config.items():
        if name in WORDS:
            good = value in WORDS[name]
        elif name == "fill_color":
            good = _is_count(value, 255)
        elif name == "size":
            good = all(_is_count(side, LARGEST_IMAGE) and side for side in _pair(value))
        else:
            numbers = value if isinstance(value, list) else [value]
            least = 0 if name == "std" else -math.inf
            good = len(numbers) in (1, 3) and all(_is_number(n) and n > least for n in numbers)
        if not good:
            raise ValueError(f"{name} cannot be {quoted(value)}")


def _check_keys(found: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in found:
        if name not in known:
            raise ValueError(f"{where} has {quoted(name)}, which is not read from a file")


def _check_value(name: str, value: Any) -> None:
    """A number of a sensible size, a word, true, false, null, or a list of numbers."""
    if name == "image_size":
        good = all(_is_count(side, LARGEST_IMAGE) for side in _pair(value))
    elif name == "layers":
        stages = value if isinstance(value, list) else [value]
        good = len(stages) <= 4 and all(_is_count(count, MOST_LAYERS) for count in stages)
    elif isinstance(value, str):
        good = len(value) <= LONGEST_WORD
    else:
        good = value is None or isinstance(value, bool) or _is_number(value)
    if not good:
        raise ValueError(f"{name} cannot be {quoted(value)}")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is missing or no object")
    return value


def _pair(value: Any) -> list[Any]:
    return value if isinstance(value, list) and len(value) == 2 else [value]


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # false for NaN


@cache
def _text_models() -> frozenset[str]:
    """The text towers from elsewhere that open_clip's own configurations name."""
    configs = map(open_clip.get_model_config, open_clip.list_models())
    names = (config["text_cfg"].get("hf_model_name") for config in configs if config)
    return frozenset(name for name in names if name)


NAMES: Mapping[str, Callable[[str], bool]] = {
    "hf_model_name": lambda name: name in _text_models(),
    "timm_model_name": lambda name: (
        bool(re.fullmatch(r"\w+(\.\w+)?", name)) and timm.is_model(name.partition(".")[0])
    ),
    "hf_tokenizer_name": lambda name: bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name)),
}
