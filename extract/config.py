"""What one `extract` is asked for."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError, require_within
from clip_adapter.extract.like import (
    Decode,
    backbone_of,
    class_names_of,
    decode_of,
    has_projection,
    text_sha256,
)
from clip_adapter.extract.shards import find_launch
from clip_adapter.extract.text.prompts import (
    read_class_names,
    read_descriptions,
    resolve_templates,
)
from clip_adapter.listener import Listener
from clip_adapter.records import check_fields

if TYPE_CHECKING:
    from clip_adapter.extract.datasets.source import SourceOptions

LARGEST_BATCH = 2**14  # of 224 × 224 pixels: 10 GB before the first layer
MOST_THREADS = 1024
LARGEST_SEED = 2**31 - 1
ALSO = ("also", "also_pretrained")
WHERE_GIVEN = ("group", "prompt_control", "decode", *ALSO)  # are said: other caches are as before
VIEWS_MAX = 100  # of a batch all views are in memory at once


@dataclass(frozen=True)
class ExtractConfig:
    """Encode a data set once with a frozen CLIP and write its features to one HDF5 file.

    An interrupted run goes on where it stopped when the same command is given again.

    Attributes:
        dataset: Data set: digits (embedded), a name of the literature such as oxford_pets,
            tfds:BUILDER[/CONFIG], coop:FOLDER, folder:FOLDER, csv:FILE, hf:ORG/NAME,
            wds:FOLDER of tars, or images:FOLDER of images without labels.
        backbone: CLIP model: glyph-clip (embedded, a demonstration), an open_clip name such
            as RN50, local-dir:FOLDER or hf-hub:ORG/NAME.
        pretrained: Weights: a tag of open_clip's, or a local file or folder. By default
            openai where it exists.
        out: Where the feature cache goes.
        templates: Prompt templates with {} for the class name, text files with one per
            line, or `ensemble` for ImageNet's seven; by default the data set's own.
        descriptions: JSON file {class: [sentences]} of prompts for each class, in place of
            the data set's own templates and beside those given with --templates.
        like: Feature cache whose classes, prompts and backbone images: takes, and wds: of tars
            whose labels are not meant.
        classes: Text file with one class name per line, for these without such a cache.
        prompt_control: Seed of random words and letters in place of what descriptions say: 30
            prompts that are the same for every class, to hold other prompts against. One number is
            one draw; several, with --update, show how much such prompts vary.
        views: Augmented views (random crop and flip) to store of each training image, for
            fit --augment.
        augment_seed: Seed of these views.
        data_dir: Where TensorFlow Datasets keeps its data; by default its own folder.
        data_root: Folder that holds data sets in CoOp's layout; a name found there is taken
            with its published split.
        image_root: What relative paths in a csv: table start from; by default the table's
            folder.
        columns: What a csv: table calls its columns, where not path, label and split, and which of
            its columns an hf: data set means by the first two: path=image,label=choice.
        group: What says which images belong together (a burst, a video, a patient), so that all lie
            on one side of every split and fold: `parent`, the folder that an image lies in (within
            its class's), or a column of a csv: table, which takes one called group by itself.
        val: Share of the training images that becomes val where the data set has none.
            Default 0.2; 0 makes none.
        test: The same for test. Default 0.3.
        split_seed: Seed of that division.
        on_error: What to do about an image that cannot be decoded: stop, or leave it out
            and list it in the cache.
        precision: What the model computes in; auto is fp32 on a CPU, bf16 or fp16 on a GPU.
        decode: fast decodes a JPEG at 1/2, 1/4 or 1/8 of its size where its shorter side stays
            twice what the encoder takes: large ones in less time, and slightly other features.
        compile: Compile the image encoder first, which takes from a quarter of a minute to some
            minutes. On a CPU it made RN50 faster from 800 images on, and ViT-B-32 slower.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        device: PyTorch device; auto takes a GPU where there is one.
        shard: Encode only part I of N, written I/N (1/4 … 4/4); `clip-adapter merge` joins
            the parts. `auto` takes the part of a task of a Slurm array or step, auto/N the one of N
            that the task's id says. Under torchrun every process takes its part by itself.
        ray: Encode on the nodes of a Ray cluster: `auto` is the one that this machine belongs to,
            HOST:PORT another, `local` one of its own cores. Each task decodes with its node's
            cores; `workers` then only compare what is there already.
        with_text_tower: Store what CoOp needs: the text tower beside the cache, as
            NAME.text_tower.safetensors, and the prompts' tokens in it.
        with_projection: Store what ProLIP needs: the image encoder's last linear map and what it
            is applied to.
        also: A second frozen model for the same images, of which `fit` takes ridge, proker,
            tip-adapter and gda: dinov2_vits14, timm:NAME, or a name as --backbone takes it.
        also_pretrained: Its weights, as --pretrained has them; of a model of timm a local file.
        update: Bring an existing cache up to date with its source and with the prompts: encode what
            is new or has changed, keep the rest.
        force: Overwrite an existing cache or an interrupted run.

    Examples:
        >>> from clip_adapter import ExtractConfig
        >>> config = ExtractConfig(dataset="folder:photos", backbone="ViT-B-32", views=8)
        >>> config.out, config.precision
        (PosixPath('features.h5'), 'auto')
    """

    dataset: str = "digits"
    backbone: str = "glyph-clip"
    pretrained: str | None = None
    out: Path = Path("features.h5")
    templates: tuple[str, ...] = ()
    descriptions: Path | None = None
    like: Path | None = None
    classes: Path | None = None
    prompt_control: int | None = None
    views: int = 0
    augment_seed: int = 0
    data_dir: Path | None = None
    data_root: Path | None = None
    image_root: Path | None = None
    columns: tuple[str, ...] = ()
    group: str | None = None
    val: float | None = None
    test: float | None = None
    split_seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    decode: Decode = "full"
    compile: bool = False
    batch_size: int = 64
    workers: int = available_cores()
    device: str = "auto"
    shard: str | None = None
    ray: str | None = None
    with_text_tower: bool = False
    with_projection: bool = False
    also: str | None = None
    also_pretrained: str | None = None
    update: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        """Take what a person types: strings for paths, one template, columns in one word."""
        paths = ("out", "descriptions", "like", "classes", "data_dir", "data_root", "image_root")
        for name in paths:
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value).expanduser())
        for name in ("templates", "columns"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))
        check_fields(self)

    def check(self) -> None:
        """Raises UserError for numbers out of range and arguments that exclude each other."""
        check_work(self.batch_size, self.workers)
        if self.views < 0 or self.augment_seed < 0:
            raise UserError("--views and --augment-seed must not be negative.")
        if self.prompt_control is not None:
            require_within("--prompt-control", self.prompt_control, LARGEST_SEED, 0)
            if self.templates or self.descriptions:
                raise UserError(
                    "--prompt-control makes all prompts itself; leave out --templates and "
                    "--descriptions, and extract those to a cache of their own."
                )
        if self.also_pretrained is not None and self.also is None:
            raise UserError("--also-pretrained has no effect without --also.")
        if self.views > VIEWS_MAX:
            raise UserError(f"--views {self.views} is more than {VIEWS_MAX}; store fewer.")
        if self.views and self.decode == "fast":
            raise UserError(
                "--views cut parts out of images, which --decode fast may leave too few pixels of; "
                "leave one of the two out."
            )
        if self.update and (self.force or self.shard is not None or find_launch() is not None):
            raise UserError(
                "--update brings one whole cache up to date, in one process; leave out --force and "
                "--shard, and torchrun."
            )
        self._check_classes()

    def _check_classes(self) -> None:
        """Raises UserError where nothing says which classes there are, or two things do."""
        named = [given for given in (self.like, self.classes) if given is not None]
        only_unlabelled = self.dataset.startswith("images:")
        if named and not self.dataset.startswith(("images:", "wds:")):
            raise UserError(
                "--like and --classes are for --dataset images:FOLDER and wds:TARS, others have "
                "classes of their own; leave them out."
            )
        if len(named) > 1 or (only_unlabelled and not named):
            raise UserError(
                f"{self.dataset} has to be told the classes once, by a feature cache with "
                "--like FILE or by a list of their names with --classes FILE."
            )
        if named and self.views:
            raise UserError("--views are of training images, which there are none of here.")
        prompts = self.templates or self.descriptions or self.prompt_control is not None
        if self.like and (prompts or self.with_text_tower):
            raise UserError(
                "--like takes the prompts of its cache as they are; leave out --templates, "
                "--descriptions, --prompt-control and --with-text-tower."
            )
        if self.like and os.path.realpath(self.like) == os.path.realpath(self.out):
            raise UserError(f"--like and --out are both {self.out}; choose another --out.")

    def resolved(self) -> "ExtractConfig":
        """The same with the backbone of the cache that `like` names, where none is given, with the
        projection and `decode` as that has them. Raises UserError where it is of no use for it."""
        if self.like is None:
            return self
        projection = self.with_projection or has_projection(self.like)
        decode = decode_of(self.like, self.decode)
        name, pretrained = self.backbone, self.pretrained
        if name == ExtractConfig.backbone:
            name, pretrained = backbone_of(self.like, pretrained)
        own = replace(self, with_projection=projection, decode=decode)
        return replace(own, backbone=name, pretrained=pretrained)

    def named_columns(self) -> dict[str, str]:
        """What `columns` says. Raises UserError where it says nothing, or something twice."""
        from clip_adapter.extract.datasets.source import COLUMNS

        names = "|".join(COLUMNS)
        parts = [part for value in self.columns for part in re.split(rf",(?=(?:{names})=)", value)]
        named = {name: own for name, _, own in (part.partition("=") for part in parts)}
        if len(named) < len(parts) or not named.keys() <= set(COLUMNS) or not all(named.values()):
            raise UserError(
                f"--columns {' '.join(self.columns)} does not say what columns are called; write "
                "path=NAME,label=NAME or, with splits, path=NAME,label=NAME,split=NAME."
            )
        return named

    def source_options(self, listener: Listener | None = None) -> "SourceOptions":
        from clip_adapter.extract.datasets.source import SourceOptions

        return SourceOptions(
            data_dir=self.data_dir,
            data_root=self.data_root,
            image_root=self.image_root,
            columns=self.named_columns(),
            group=self.group,
            class_names=self._class_names(),
            val=self.val,
            test=self.test,
            seed=self.split_seed,
            listener=listener or Listener(),
        )

    def _class_names(self) -> Sequence[str]:
        if self.classes is not None:
            return read_class_names(self.classes)
        return () if self.like is None else class_names_of(self.like)

    def identity(self) -> dict[str, Any]:
        """The arguments that decide what the cache holds, as JSON.

        Raises UserError for files of prompts that cannot be used.
        """
        classes = {} if self.classes is None else {"classes": _sha256(self._class_names())}
        like = {} if self.like is None else {"like": text_sha256(self.like)}
        given = {name: getattr(self, name) for name in WHERE_GIVEN}
        return {
            **classes,
            **like,
            "dataset": self.dataset,
            "backbone": self.backbone,
            "pretrained": self.pretrained,
            "templates": list(resolve_templates(self.templates)),
            "descriptions": self.descriptions and _sha256(read_descriptions(self.descriptions)),
            "views": self.views,
            "augment_seed": self.augment_seed,
            "data_root": None if self.data_root is None else str(self.data_root),
            "image_root": None if self.image_root is None else str(self.image_root),
            "columns": self.named_columns(),
            "val": self.val,
            "test": self.test,
            "split_seed": self.split_seed,
            "precision": self.precision,
            "with_text_tower": self.with_text_tower,
            "with_projection": self.with_projection,
            **{name: own for name, own in given.items() if own != getattr(ExtractConfig, name)},
        }


def check_work(batch_size: int, workers: int) -> None:
    """Raises UserError for a batch or a number of threads that no machine has use for."""
    require_within("--batch-size", batch_size, LARGEST_BATCH)
    require_within("--workers", workers, MOST_THREADS)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
