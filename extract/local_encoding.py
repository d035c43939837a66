"""What encodes: the models on a device of this machine, or whatever stands in for them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import torch

from clip_adapter.cache.rows import Rows
from clip_adapter.cache.text_tower import encode_text_tower
from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.backbones.second import load_second
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.device import (
    Precision,
    find_device,
    find_precision,
    threads_of_a_pass,
)
from clip_adapter.extract.encoding.encoder import (
    FEATURES,
    FEATURES2,
    EncodedBatch,
    Encoder,
    Stopwatch,
    encode_images,
)
from clip_adapter.extract.known import rows_sha256
from clip_adapter.extract.text.encode_text import (
    EncodedClasses,
    TextPlan,
    classes_with_one_text,
    encode_classes,
)

Projection = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class About:
    """All that decides the numbers that come out, and what a cache says of it.

    backbone, preprocess, logit_scale, logit_bias, assumption: see Backbone. second: identity and
    preprocessing of the second encoder, if there is one. threads: of a pass of images. packages:
    their versions. rows_sha256: of the data set.
    """

    backbone: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    logit_scale: float
    logit_bias: float
    assumption: str | None
    second: Mapping[str, Any] | None
    precision: Precision
    device: str
    threads: int
    packages: Mapping[str, str]
    rows_sha256: str


class Encoding(Protocol):
    """What `run_job` is given to encode with. Encoders are named as the cache names what they give:
    `features` and, of a second one, `features2`. Raises UserError as Encoder does.
    """

    about: About

    @property
    def compile_seconds(self) -> float:
        """How long compiling took."""

    def rows(self, encoder: str, views: int) -> Rows:
        """What each image gets, see `EncodedBatch.of_each_image`."""

    def projection(self) -> Projection | None:
        """The image encoder's last linear map, (F, D), and its bias, if asked for."""

    def text_tower(self) -> bytes:
        """The file of the text tower with the prompts' context."""

    def same_text(self, plan: TextPlan) -> list[list[str]]:
        """See `classes_with_one_text`."""

    def text(self, plan: TextPlan, labels: range) -> Iterator[EncodedClasses]:
        """These classes, in order."""

    def images(
        self, encoder: str, split: str, plan: Plan, watch: Stopwatch
    ) -> Iterator[EncodedBatch]:
        """The planned rows of a split. Batches may come in any order; what is missing at the
        end is asked for again. Raises UserError as `encode_images` does."""


def packages() -> dict[str, str]:
    """Versions of what decodes and computes; that of open_clip is in the backbone's identity."""
    versions = {name: version(name) for name in ("clip-adapter", "numpy", "pillow")}
    return versions | {"torch": str(torch.__version__)}


EncodingOf = Callable[[ExtractConfig, ImageDataset], Encoding]


class LocalEncoding:
    """The models in this process."""

    def __init__(self, config: ExtractConfig, dataset: ImageDataset) -> None:
        self._config, self._dataset = config, dataset
        self._device = find_device(config.device)
        precision = find_precision(config.precision, self._device)
        backbone = load_backbone(config.backbone, config.pretrained, precision)
        self._backbone = backbone.decoding(config.decode)
        self._also = second = None
        if config.also:
            also = load_second(config.also, config.also_pretrained, precision)
            self._also = also.decoding(config.decode)
            second = {**self._also.identity, "preprocess": self._also.preprocess_config}
        self.about = About(
            backbone=self._backbone.identity,
            preprocess=self._backbone.preprocess_config,
            logit_scale=self._backbone.logit_scale,
            logit_bias=self._backbone.logit_bias,
            assumption=self._backbone.assumption,
            second=second,
            precision=precision,
            device=str(self._device),
            threads=threads_of_a_pass(self._device),
            packages=packages(),
            rows_sha256=rows_sha256(dataset.splits),
        )

    @cached_property
    def _encoders(self) -> Mapping[str, Encoder]:
        """Made when first asked for something: compiling takes time."""
        config = self._config
        own = Encoder(
            *(self._backbone, self._device, config.batch_size),
            compiled=config.compile,
            with_projection=config.with_projection,
        )
        if self._also is None:
            return {FEATURES: own}
        other = Encoder(
            *(self._also, self._device, config.batch_size), compiled=config.compile, name=FEATURES2
        )
        return {FEATURES: own, FEATURES2: other}

    @property
    def compile_seconds(self) -> float:
        return self._encoders[FEATURES].compile_seconds

    def rows(self, encoder: str, views: int) -> Rows:
        return self._encoders[encoder].rows(views)

    def projection(self) -> Projection | None:
        projection = self._encoders[FEATURES].projection
        return None if projection is None else projection.arrays()

    def text_tower(self) -> bytes:
        backbone = self._backbone
        if self.about.precision != "fp32":  # the tower is stored as it was trained
            backbone = load_backbone(self._config.backbone, self._config.pretrained, "fp32")
        return encode_text_tower(take_text_tower(backbone, self._dataset.class_names))

    def same_text(self, plan: TextPlan) -> list[list[str]]:
        return classes_with_one_text(self._encoders[FEATURES], plan)

    def text(self, plan: TextPlan, labels: range) -> Iterator[EncodedClasses]:
        encoder, size = self._encoders[FEATURES], self._config.batch_size
        return encode_classes(encoder, plan, start=labels.start, stop=labels.stop, batch_size=size)

    def images(
        self, encoder: str, split: str, plan: Plan, watch: Stopwatch
    ) -> Iterator[EncodedBatch]:
        plan = replace(plan, workers=self._config.workers, pinned=self._device.type == "cuda")
        return encode_images(self._encoders[encoder], self._dataset.splits[split], plan, watch)
