"""One `extract` from the opened data set to the finished file."""

import hashlib
import warnings
from contextlib import ExitStack
from typing import Any

import torch

from clip_adapter.cache.content import check_strings, in_several_splits, tally
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.text_tower import encode_text_tower, tower_path, write_text_tower
from clip_adapter.cache.writer import write_cache
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.backbones.second import load_second
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encode_job import EncodeJob
from clip_adapter.extract.encoding.device import (
    find_device,
    find_precision,
    threads_of_a_pass,
)
from clip_adapter.extract.encoding.encoder import FEATURES2, Encoder
from clip_adapter.extract.known import rows_sha256
from clip_adapter.extract.outcome import (
    warn_of_duplicates,
    warn_of_lost_classes,
    warn_of_shared_groups,
)
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.stage import text_plan
from clip_adapter.extract.text.encode_text import classes_with_one_text
from clip_adapter.extract.update import UPDATABLE, refuse_other_features, text_of
from clip_adapter.listener import Listener
from clip_adapter.words import same_text


def run_job(config: ExtractConfig, shard: Shard, place: StagingFolder, listener: Listener) -> str:
    """Encode what is not known yet, write the file (a part of a cache where there are several
    shards) and return what to say about it.

    place: where to write.
    """
    dataset = open_dataset(config.dataset, config.source_options(listener))
    for remark in dataset.remarks:
        listener.warn(remark)
    for split in dataset.splits.values():
        check_strings(split.ids)
    text = text_plan(config, dataset)
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    backbone = load_backbone(config.backbone, config.pretrained, precision).decoding(config.decode)
    if backbone.assumption:
        listener.warn(backbone.assumption)
    described, preprocess = dict(backbone.identity), backbone.preprocess_config
    weights = backbone.identity["weights_sha256"]
    taken = text_of(config.like, weights, preprocess) if config.like else None
    also = config.also and load_second(config.also, config.also_pretrained, precision).decoding(
        config.decode
    )
    tower = _tower(config, backbone, precision, dataset) if config.with_text_tower else None
    if tower is not None:
        described["text_tower_sha256"] = hashlib.sha256(tower).hexdigest()
    # What a resumed run must agree on beyond its arguments: the weights, which may change under an
    # unchanged path.
    identity = {
        **config.identity(),
        "precision": precision,
        "weights_sha256": weights,
        "preprocess": preprocess,
    }
    second = {**also.identity, "preprocess": also.preprocess_config} if also else None
    if second:
        identity["also_weights"] = second["weights_sha256"]
    # Said only where it is not one, as on up to four cores: other caches are what they were.
    threads = {} if (count := threads_of_a_pass(device)) == 1 else {"threads": count}
    of_part = {} if shard.of == 1 else threads
    place.begin(
        identity | of_part, restart=config.force, may_differ=UPDATABLE if config.update else ()
    )
    with warnings.catch_warnings(), ExitStack() as stack:
        # Pillow remarks on oddities of files that decode all the same; the others get a sentence.
        warnings.filterwarnings("ignore", module="PIL")
        encoder = Encoder(
            backbone,
            device,
            config.batch_size,
            compiled=config.compile,
            with_projection=config.with_projection,
        )
        earlier = None
        if config.update and config.out.exists():
            earlier = stack.enter_context(FeatureCache(config.out))
            refuse_other_features(earlier, weights, preprocess, precision)
        job = EncodeJob(config, shard, dataset, encoder, place, listener)
        if also and second:
            other = Encoder(
                also, device, config.batch_size, compiled=config.compile, name=FEATURES2
            )
            job.take_second(other, second)
        job.look_around(earlier)
        content: dict[str, Any] = {}
        if shard.index == 1:  # which has what belongs to no image
            content |= taken or job.text(text, earlier)
            if not taken and (groups := classes_with_one_text(encoder, text)):
                listener.warn(same_text(groups))
            if encoder.projection is not None:
                content["projection/weights"], bias = encoder.projection.arrays()
                content |= {} if bias is None else {"projection/bias": bias}
        for name in dataset.splits:
            job.encode_split(name)
        content |= job.content()
        record: dict[str, Any] = {
            **dataset.provenance,
            "splits": {name: split.origin for name, split in dataset.splits.items()},
            "device": str(device),
            "torch_version": torch.__version__,
            **threads,
        }
        tallies = tally(content)
        if shard.of == 1:
            if several := in_several_splits(content):
                record["in_several_splits"] = several
            warn_of_duplicates(several, listener)
            labelled = {n: one.groups for n, one in dataset.splits.items() if n != UNLABELLED}
            warn_of_shared_groups(labelled, listener)
            warn_of_lost_classes(tallies, dataset.class_names, listener)
        with job.watch("write"):
            if tower is not None and shard.index == 1:
                write_text_tower(tower_path(place.path), tower)
            write_cache(
                place,
                content,
                backbone=described,
                preprocess=preprocess,
                dataset=record,
                logit_scale=backbone.logit_scale,
                logit_bias=backbone.logit_bias,
                arguments={**identity, "rows_sha256": rows_sha256(dataset.splits)},
                part=job.part,
                templates=taken["text/templates"] if taken else text.stored_templates,
                backbone2=second,
            )
    return job.summary(tallies)


def _tower(
    config: ExtractConfig, backbone: Backbone, precision: str, dataset: ImageDataset
) -> bytes:
    if precision != "fp32":  # the tower is stored as it was trained
        backbone = load_backbone(config.backbone, config.pretrained, "fp32")
    return encode_text_tower(take_text_tower(backbone, dataset.class_names))
