"""open_clip_config.json of a folder or a repository: read, and checked before open_clip sees it.

Parts of it reach functions of other libraries as keywords, among them some that run Python which
lies beside the weights or fetch things from elsewhere. So it may say what the configurations that
come with open_clip say, and nothing else: names that open_clip has, of numbers of a sensible size,
words, true, false and null.
"""

import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import open_clip
import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from clip_adapter.files import LFS_ADVICE, is_lfs_pointer
from clip_adapter.records import Rule, between, from_document, from_json

CONFIG_FILE = "open_clip_config.json"
LARGEST_FILE = 2**20
LARGEST_NUMBER = 2**24  # more than any vocabulary or width
LARGEST_IMAGE = 8192
MOST_LAYERS = 1024
LONGEST_WORD = 200


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
        number = {key: abs(value) for key, value in tower.items() if type(value) in (int, float)}
        width, length = number.get("width", 0), number.get("context_length", 0)
        stages, sides = tower["layers"], tower.get("image_size", ())
        blocks = sum(stages) if isinstance(stages, list) else stages
        total += blocks * width**2 * (4 + 2 * number.get("mlp_ratio", 0))
        total += (number.get("vocab_size", 0) + length) * width + length**2
        if isinstance(model.get("embed_dim"), int | float):
            total += abs(model["embed_dim"]) * width
        if sides and not isinstance(stages, list):
            patch = max(1, number.get("patch_size", 0))
            high, wide = sides if isinstance(sides, list) else (sides, sides)
            total += (high / patch) * (wide / patch) * width
    return total


def check_config(path: Path) -> dict[str, Any]:
    """The checked configuration in a file; raises ValueError as `read_config` does."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is too large for a configuration")
        config = from_json(dict[str, Any], path.read_text(encoding="utf-8"))
        from_document(MODEL, config.get("model_cfg"), "model_cfg")
        from_document(PREPROCESS, config.get("preprocess_cfg", {}), "preprocess_cfg")
    except FileNotFoundError:
        raise ValueError(f"the config file is missing: {CONFIG_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from error
    return config


@cache
def _text_models() -> frozenset[str]:
    """The text towers from elsewhere that open_clip's own configurations name."""
    configs = map(open_clip.get_model_config, open_clip.list_models())
    names = (config["text_cfg"].get("hf_model_name") for config in configs if config)
    return frozenset(name for name in names if name)


def _used(is_one: Callable[[str], bool]) -> Any:
    return Annotated[str, Rule("that names a model which open_clip uses", is_one)] | None


def _is_of_timm(name: str) -> bool:
    return bool(re.fullmatch(r"\w+(\.\w+)?", name)) and timm.is_model(name.partition(".")[0])


def _is_of_a_hub(name: str) -> bool:
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name))


def _stated(open_clips: type | Iterable[str], needed: Sequence[str] = (), **kinds: Any) -> Any:
    """An object of the names that a class of open_clip's has, or of these: each a value of its own
    kind, or of any that does no harm."""
    if isinstance(open_clips, type):
        open_clips = [each.name for each in fields(open_clips)]
    optional = [(name, kinds.get(name, HARMLESS), field(default=None)) for name in open_clips]
    return make_dataclass("Stated", [*((name, kinds[name]) for name in needed), *optional])


NUMBER = Annotated[float, between(-LARGEST_NUMBER, LARGEST_NUMBER)]
POSITIVE = Annotated[float, between(0, LARGEST_NUMBER), Rule("and not 0", bool)]
WORD = Annotated[str, Rule("of at most 200 characters", lambda word: len(word) <= LONGEST_WORD)]
HARMLESS = NUMBER | WORD | bool | None
SIDE = Annotated[int, between(0, LARGEST_IMAGE)]
SIZE = Annotated[int, between(1, LARGEST_IMAGE)]
LAYERS = Annotated[int, between(0, MOST_LAYERS)]
STAGES = Annotated[list[LAYERS], Rule("of at most 4", lambda stages: len(stages) <= 4)]
ONE_OR_THREE = Rule("of 1 or 3", lambda values: len(values) in (1, 3))
OF_BLOCKS = {
    "act_kwargs": _stated(["approximate"]) | None,
    "norm_kwargs": _stated(["eps"]) | None,
    "layers": LAYERS | STAGES,
}
OF_TEXT = OF_BLOCKS | {
    "tokenizer_kwargs": _stated(["clean", "strip_sep_token"]) | None,
    "hf_model_name": _used(lambda name: name in _text_models()),
    "hf_tokenizer_name": _used(_is_of_a_hub),
}
MODEL = _stated(
    (
        *("embed_dim", "multimodal_cfg", "custom_text", "quick_gelu"),
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    ),
    needed=("vision_cfg", "text_cfg"),
    vision_cfg=_stated(
        CLIPVisionCfg,
        **OF_BLOCKS,
        image_size=SIDE | tuple[SIDE, SIDE],
        timm_model_name=_used(_is_of_timm),
    ),
    text_cfg=_stated(CLIPTextCfg, **OF_TEXT),
    multimodal_cfg=_stated(MultimodalCfg, **OF_TEXT),
)
PREPROCESS = _stated(
    PreprocessCfg,
    size=SIZE | tuple[SIZE, SIZE],
    mode=Literal["RGB"],
    mean=NUMBER | Annotated[list[NUMBER], ONE_OR_THREE],
    std=POSITIVE | Annotated[list[POSITIVE], ONE_OR_THREE],
    interpolation=Literal["bicubic", "bilinear", "random"],
    resize_mode=Literal["shortest", "longest", "squash"],
    fill_color=Annotated[int, between(0, 255)],
)
