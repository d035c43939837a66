"""`clip-adapter import`: a feature cache of features that something else has encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.cache.content import check_features, tally
from clip_adapter.cache.schema import (
    ALL_SPLITS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    UNLABELLED,
    of_images,
)
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.source import DEFAULT_TEMPLATES, MINIMUM_CLASSES, splits_among
from clip_adapter.extract.outcome import describe
from clip_adapter.extract.text.prompts import read_class_names, resolve_templates
from clip_adapter.files import check_new
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal
from clip_adapter.pipelines.deciding.import_features import (
    class_numbers,
    joined,
    named_classes,
    read_found,
    read_table,
    texts_of,
)
from clip_adapter.pipelines.saved.adapter_check import UNKNOWN_WEIGHTS
from clip_adapter.words import counted, same_text, some

UNIT = 1e-3  # how far from 1 lengths may be that somebody has made 1
UNKNOWN = {
    "name": "unknown",
    "weights_sha256": UNKNOWN_WEIGHTS,
    "image_size": 1,
    "quick_gelu": False,
}


@dataclass(frozen=True)
class ImportConfig:
    """Make a feature cache of features that something else has encoded.

    The classes' texts are encoded by the model that made the features (--backbone), or given with
    the scale of the logits (--text, --classes and --logit-scale); images can then not be encoded
    for what is fitted on the cache, as nobody knows the weights.

    Attributes:
        features: clip-retrieval's folder (img_emb/*.npy, metadata/*.parquet), or a file: .npy,
            .npz, .safetensors, .pt or .parquet.
        out: Where the feature cache goes.
        labels: CSV or Parquet table with a column label and, if you like, path, split and group;
            row by row where not both have paths. Rows without a label are unlabelled images.
        classes: Text file with one class name per line, in the order of labels that are numbers;
            by default the names that occur.
        backbone: Model that made the features: an open_clip name, local-dir:FOLDER or
            hf-hub:ORG/NAME.
        pretrained: Its weights: a tag of open_clip's, or a local file or folder.
        templates: Prompt templates, as extract takes them.
        text: Text features of the classes, (C, D) or (C, P, D), in a file of the same kinds.
        logit_scale: Multiplier of the cosines itself (about 100 for CLIP), with --text.
        force: Overwrite an existing file.
    """

    features: Positional[Path]
    out: Path = Path("features.h5")
    labels: Path | None = None
    classes: Path | None = None
    backbone: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] = ()
    text: Path | None = None
    logit_scale: float | None = None
    force: bool = False


def import_features(config: ImportConfig, listener: Listener) -> Path:
    """Run `import` and return the path of the cache.

    Raises UserError for what cannot be read, does not fit together, or is no feature.
    """
    _check(config)
    found = read_found(config.features)
    rows, columns = found.features(2), found.columns
    listener.note(_described(found.path, rows))
    if config.labels is not None:
        columns = joined(found, read_table(config.labels), config.labels, listener)
    labels = texts_of(columns.get("label", [""] * len(rows)))
    if config.classes is not None:
        class_names: Sequence[str] = read_class_names(config.classes)
    else:
        class_names = found.class_names or named_classes(labels)
    if len(class_names) < MINIMUM_CLASSES:
        raise UserError(f"There is one class, {class_names[0]!r}; at least two are needed.")
    numbers = class_numbers(labels, class_names)
    ids = np.array(texts_of(columns.get("id", range(len(rows)))), object)
    if len(set(ids)) < len(ids):
        raise UserError(f"{found.path} names an image twice; give each a name of its own.")
    check_features(rows[:, None], ids.tolist(), f"leave it out of {found.path}, or encode it anew")
    text, stated = _encoded(config, class_names, listener) if config.backbone else _given(config)
    of_classes, _, width = text["text/features"].shape
    if (of_classes, width) != (len(class_names), rows.shape[1]):
        raise UserError(
            f"The texts are of {of_classes} classes and {width} wide; there are {len(class_names)} "
            f"classes, and features {rows.shape[1]} wide: name the model that made both."
        )
    groups = np.array(texts_of(columns.get("group", ())), object)
    splits = _splits(columns.get("split"), numbers)
    content: dict[str, Any] = {**text, "text/class_names": class_names}
    for split in [split for split in ALL_SPLITS if split in splits]:
        own = np.flatnonzero(splits == split)
        named = {"features": rows[own][None], "ids": ids[own], "labels": numbers[own]}
        if split == UNLABELLED:
            del named["labels"]
        if len(groups) and groups[own].any():  # a cache may have groups in some splits alone
            if not groups[own].all():
                raise UserError(
                    f"The column group is empty for some {split} images; fill it in, or leave it "
                    "empty for all of them."
                )
            named["groups"] = groups[own]
        content |= {of_images(split, name): values for name, values in named.items()}
    origin = "column split" if "split" in columns else "all rows with a label"
    write_cache(
        config.out,
        content,
        dataset={
            "name": found.path.stem,
            "source": "import",
            "splits": dict.fromkeys(sorted({*splits} - {UNLABELLED}), origin),
        },
        arguments={"dataset": f"import:{found.path.name}"},
        force=config.force,
        **stated,
    )
    listener.result(describe(config.out, tally(content), len(class_names)))
    if (known := numbers >= 0).any():
        _say_zero_shot(rows[known], numbers[known], text["text/features"], listener)
    return config.out


def _check(config: ImportConfig) -> None:
    """Raises UserError where nothing says what the texts are, or two things do."""
    check_new(config.out, config.force)
    by_text = config.text is not None or config.logit_scale is not None
    if (config.backbone is None) != by_text:
        raise UserError(
            "Say once what the classes' texts are: by --backbone and --pretrained, the model that "
            "made the features, or by --text, --classes and --logit-scale."
        )
    scale = config.logit_scale
    if scale is not None and not SMALLEST_SCALE <= scale <= LARGEST_SCALE:  # nor is NaN
        raise UserError(
            f"--logit-scale {scale:g} is no multiplier from {SMALLEST_SCALE:g} to "
            f"{LARGEST_SCALE:g}."
        )
    if by_text and None in (config.text, config.classes, config.logit_scale):
        raise UserError("--text, --classes and --logit-scale belong together; give all three.")
    if by_text and (config.pretrained or config.templates):
        raise UserError("--pretrained and --templates are of a --backbone; leave them out.")


def _described(path: Path, rows: np.ndarray) -> str:
    lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
    said = f"{path}: {counted(len(rows), 'row')} of {rows.shape[1]} numbers, {rows.dtype}"
    if np.abs(lengths - 1).max() <= UNIT:
        return (
            f"{said}, all of length 1: somebody has normalised them, and a linear probe reads "
            "lengths, so that its C means another strength then"
        )
    return f"{said}, of lengths from {lengths.min():.3g} to {lengths.max():.3g}"


def _encoded(
    config: ImportConfig, class_names: Sequence[str], listener: Listener
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text elements of the cache, and what `write_cache` is told of the backbone."""
    import torch

    from clip_adapter.extract.backbones.loading import load_backbone
    from clip_adapter.extract.encoding.encoder import Encoder
    from clip_adapter.extract.text.encode_text import (
        TextPlan,
        classes_with_one_text,
        encode_classes,
    )

    templates = resolve_templates(config.templates) or DEFAULT_TEMPLATES
    backbone = load_backbone(str(config.backbone), config.pretrained)
    encoder, plan = Encoder(backbone, torch.device("cpu"), 64), TextPlan(class_names, templates)
    encoded = encode_classes(encoder, plan, start=0, batch_size=64)
    if groups := classes_with_one_text(encoder, plan):
        listener.warn(same_text(groups))
    text = {
        "text/features": np.concatenate([part.features for part in encoded]),
        "text/templates": templates,
    }
    return text, {
        "backbone": backbone.identity,
        "preprocess": backbone.preprocess_config,
        "logit_scale": backbone.logit_scale,
        "logit_bias": backbone.logit_bias,
    }


def _given(config: ImportConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of texts in a file."""
    assert config.text is not None
    features = read_found(config.text).features(2, 3)
    features = features[:, None] if features.ndim == 2 else features
    names = [f"description {number + 1}" for number in range(features.shape[1])]
    backbone = {**UNKNOWN, "pretrained": config.features.name, "embed_dim": features.shape[2]}
    text = {"text/features": features, "text/templates": names}
    return text, {"backbone": backbone, "logit_scale": config.logit_scale}


def _splits(column: Sequence[Any] | None, numbers: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """The split of each row: train without a column, UNLABELLED where there is no label.

    Raises UserError for names that mean none.
    """
    written = texts_of(column) if column is not None else ["train"] * len(numbers)
    labelled = {name for name, number in zip(written, numbers, strict=True) if number >= 0}
    means = splits_among(labelled)
    if unknown := sorted(labelled - means.keys()):
        raise UserError(f"The column split says {some(unknown)}; write train, val or test.")
    found = [means.get(name, UNLABELLED) for name in written]
    return np.where(numbers >= 0, np.array(found, object), UNLABELLED)


def _say_zero_shot(
    rows: np.ndarray, labels: npt.NDArray[np.int32], text: np.ndarray, listener: Listener
) -> None:
    """Features of another model than the texts' agree with them by chance alone."""
    weights = classifier_weights(np, text.astype(np.float32))
    right = float(np.mean((rows.astype(np.float32) @ weights.T).argmax(axis=1) == labels))
    guessed = float(np.bincount(labels).max() / len(labels))
    found = f"zero-shot: {100 * right:.1f} % of {counted(len(labels), 'labelled image')}"
    listener.result(f"{found}; always the most frequent class: {100 * guessed:.1f} %")
    if right <= guessed:
        listener.warn(
            "by their texts the images are told no better than by guessing: the features may be of "
            "another model than the texts, or the labels of other rows."
        )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter import`."""

    def command(config: ImportConfig) -> None:
        import_features(config, Terminal("clip-adapter import"))

    run_command(ImportConfig, command, "clip-adapter import", arguments)
