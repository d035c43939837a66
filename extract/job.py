"""One `extract` from the opened data set to the finished file."""

import hashlib
import warnings
from contextlib import ExitStack
from typing import Any

from clip_adapter.cache.content import check_strings, in_several_splits, tally
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.text_tower import tower_path, write_text_tower
from clip_adapter.cache.writer import write_cache
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.encode_job import EncodeJob
from clip_adapter.extract.local_encoding import EncodingOf
from clip_adapter.extract.outcome import (
    warn_of_duplicates,
    warn_of_lost_classes,
    warn_of_shared_groups,
)
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.stage import text_plan
from clip_adapter.extract.update import UPDATABLE, refuse_other_features, text_of
from clip_adapter.listener import Listener
from clip_adapter.words import same_text


def run_job(
    config: ExtractConfig,
    shard: Shard,
    place: StagingFolder,
    listener: Listener,
    encoding_of: EncodingOf,
) -> str:
    """Encode what is not known yet, write the file (a part of a cache where there are several
    shards) and return what to say about it.

    place: where to write. encoding_of: what encodes, such as LocalEncoding.
    """
    dataset = open_dataset(config.dataset, config.source_options(listener))
    for remark in dataset.remarks:
        listener.warn(remark)
    for split in dataset.splits.values():
        check_strings(split.ids)
    text = text_plan(config, dataset)
    encoding = encoding_of(config, dataset)
    about = encoding.about
    if about.assumption:
        listener.warn(about.assumption)
    described, preprocess = dict(about.backbone), about.preprocess
    weights = described["weights_sha256"]
    taken = text_of(config.like, weights, preprocess) if config.like else None
    tower = encoding.text_tower() if config.with_text_tower else None
    if tower is not None:
        described["text_tower_sha256"] = hashlib.sha256(tower).hexdigest()
    # What a resumed run must agree on beyond its arguments: the weights, which may change under an
    # unchanged path.
    identity = {
        **config.identity(),
        "precision": about.precision,
        "weights_sha256": weights,
        "preprocess": preprocess,
    }
    if about.second:
        identity["also_weights"] = about.second["weights_sha256"]
    # Said only where it is not one, as on up to four cores: other caches are what they were.
    threads = {} if about.threads == 1 else {"threads": about.threads}
    of_part = {} if shard.of == 1 else threads
    place.begin(
        identity | of_part, restart=config.force, may_differ=UPDATABLE if config.update else ()
    )
    with warnings.catch_warnings(), ExitStack() as stack:
        # Pillow remarks on oddities of files that decode all the same; the others get a sentence.
        warnings.filterwarnings("ignore", module="PIL")
        projection = encoding.projection()
        earlier = None
        if config.update and config.out.exists():
            earlier = stack.enter_context(FeatureCache(config.out))
            refuse_other_features(earlier, weights, preprocess, about.precision)
        job = EncodeJob(config, shard, dataset, encoding, place, listener)
        job.look_around(earlier)
        content: dict[str, Any] = {}
        if shard.index == 1:  # which has what belongs to no image
            content |= taken or job.text(text, earlier)
            if not taken and (groups := encoding.same_text(text)):
                listener.warn(same_text(groups))
            if projection is not None:
                content["projection/weights"], bias = projection
                content |= {} if bias is None else {"projection/bias": bias}
        for name in dataset.splits:
            job.encode_split(name)
        content |= job.content()
        record: dict[str, Any] = {
            **dataset.provenance,
            "splits": {name: split.origin for name, split in dataset.splits.items()},
            "device": about.device,
            "torch_version": about.packages["torch"],
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
                logit_scale=about.logit_scale,
                logit_bias=about.logit_bias,
                arguments={**identity, "rows_sha256": about.rows_sha256},
                part=job.part,
                templates=taken["text/templates"] if taken else text.stored_templates,
                backbone2=about.second,
            )
    return job.summary(tallies)
