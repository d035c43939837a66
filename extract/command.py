"""`extract`: encode a data set once and write the feature cache."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clip_adapter.cache.errors import UserError

if TYPE_CHECKING:
    from clip_adapter.cache.writer import CacheWriter
    from clip_adapter.extract.backbone import Backbone
    from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions


@dataclass(frozen=True)
class ExtractConfig:
    """Encode a data set once with a frozen CLIP and write its features to one HDF5 file."""

    dataset: str = "digits"
    """Data set: digits (embedded), a name of the literature such as oxford_pets,
    tfds:BUILDER[/CONFIG], coop:FOLDER, folder:FOLDER, csv:FILE, or hf:ORG/NAME."""
    backbone: str = "glyph-clip"
    """CLIP model: glyph-clip (embedded, a demonstration), an open_clip name such as RN50,
    local-dir:FOLDER or hf-hub:ORG/NAME."""
    pretrained: str | None = None
    """Weights: a tag of open_clip's, or a local file or folder. By default openai where it
    exists."""
    out: Path = Path("features.h5")
    """Where the feature cache goes."""
    templates: tuple[str, ...] = ()
    """Prompt templates with {} for the class name; by default the data set's own."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its data; by default its own folder."""
    data_root: Path | None = None
    """Folder that holds data sets in CoOp's layout; a name found there is taken with its published
    split."""
    image_root: Path | None = None
    """What relative paths in a csv: table start from; by default the table's folder."""
    val: float | None = None
    """Share of the training images that becomes val where the data set has none. [0.2; 0: none]"""
    test: float | None = None
    """The same for test. [0.3]"""
    split_seed: int = 0
    """Seed of that division."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = os.cpu_count() or 1
    """Threads that decode images."""
    device: str = "auto"
    """PyTorch device; auto takes a GPU where there is one."""
    force: bool = False
    """Overwrite an existing cache or an interrupted run."""

    def source_options(self) -> "SourceOptions":
        from clip_adapter.extract.datasets.source import SourceOptions

        return SourceOptions(
            data_dir=self.data_dir,
            data_root=self.data_root,
            image_root=self.image_root,
            val=self.val,
            test=self.test,
            seed=self.split_seed,
        )

    def identity(self) -> dict[str, Any]:
        """The arguments that decide what the cache holds, as JSON."""
        return {
            "dataset": self.dataset,
            "backbone": self.backbone,
            "pretrained": self.pretrained,
            "templates": list(self.templates),
            "data_root": None if self.data_root is None else str(self.data_root),
            "image_root": None if self.image_root is None else str(self.image_root),
            "val": self.val,
            "test": self.test,
            "split_seed": self.split_seed,
        }


def extract(config: ExtractConfig) -> Path:
    """Run `extract` and return the path of the cache.

    Raises UserError for bad input; see the messages.
    """
    if _already_there(config):
        print(f"{config.out} is complete and was made with these arguments: nothing to do.")
        return config.out
    _check_numbers(config)

    from clip_adapter.cache.writer import CacheWriter
    from clip_adapter.extract.datasets.registry import open_dataset
    from clip_adapter.extract.prompts import check_templates

    check_templates(config.templates)
    dataset = open_dataset(config.dataset, config.source_options())
    from clip_adapter.extract.backbone import load_backbone

    backbone = load_backbone(config.backbone, config.pretrained)
    with CacheWriter(config.out, config.identity(), views=1, restart=config.force) as writer:
        _encode(config, dataset, backbone, writer)
    size = config.out.stat().st_size / 2**20
    images = ", ".join(f"{len(split.labels)} {name}" for name, split in dataset.splits.items())
    print(f"{config.out}: {images} images, {len(dataset.class_names)} classes, {size:.1f} MiB")
    return config.out


def _encode(
    config: ExtractConfig, dataset: "ImageDataset", backbone: "Backbone", writer: "CacheWriter"
) -> None:
    import torch

    from clip_adapter.console.progress import progress
    from clip_adapter.extract.encode import encode_images, encode_text

    device = _device(config.device)
    backbone.model.to(device)
    templates = config.templates or tuple(dataset.templates)
    for class_name in dataset.class_names[writer.text_rows() :]:
        writer.append_text(encode_text(backbone, class_name, templates, device), [class_name])
    for name, split in dataset.splits.items():
        done = writer.consumed(name)
        with progress(f"encode {name}", len(split.labels), done) as advance:
            batches = encode_images(
                backbone,
                split,
                device,
                start=done,
                batch_size=config.batch_size,
                workers=config.workers,
            )
            for features, rows in batches:
                writer.append_images(name, features, split.labels[rows], split.ids[rows])
                advance(len(features), "")
    writer.finish(
        templates=templates,
        backbone=backbone.identity,
        preprocess=backbone.preprocess_config,
        dataset={
            **dataset.provenance,
            "splits": {name: split.origin for name, split in dataset.splits.items()},
            "device": str(device),
            "torch_version": torch.__version__,
        },
        logit_scale=backbone.logit_scale,
        logit_bias=backbone.logit_bias,
    )


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available: {str(error).splitlines()[0]}") from None


def _check_numbers(config: ExtractConfig) -> None:
    if config.batch_size < 1 or config.workers < 1:
        raise UserError("--batch-size and --workers must be at least 1.")


def _already_there(config: ExtractConfig) -> bool:
    """Whether the cache exists with these arguments.

    Raises UserError where something else stands in its place.
    """
    if not config.out.exists() or config.force:
        return False
    from clip_adapter.cache.reader import FeatureCache

    with FeatureCache(config.out) as cache:
        earlier = ExtractConfig().identity() | cache.arguments
    now = config.identity()
    if earlier == now:
        return True
    differing = sorted(key for key in now if earlier.get(key) != now[key])
    raise UserError(
        f"{config.out} exists and was made with other arguments ({', '.join(differing)} differ); "
        "choose another --out, or --force to overwrite it."
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script `extract`."""
    from clip_adapter.console.command import run_command

    run_command(ExtractConfig, extract, "extract", arguments)
