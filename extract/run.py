"""`extract`: encode a data set once and write the feature cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_adapter.cluster import check_address, connected
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.shards import (
    Launch,
    Shard,
    find_launch,
    parse_shard,
    part_path,
    wait_for_all,
)
from clip_adapter.files import is_there
from clip_adapter.listener import Listener

if TYPE_CHECKING:
    from clip_adapter.cache.staging import StagingFolder
    from clip_adapter.extract.local_encoding import EncodingOf


def extract(config: ExtractConfig, listener: Listener | None = None) -> Path:
    """Run `extract` and return the path of the cache, or of the part that `shard` asks for.

    listener: is told of progress, warnings and the result; by default nobody is.
    Raises UserError for bad input; see the messages.

    Examples:
        >>> from clip_adapter import ExtractConfig, extract
        >>> extract(ExtractConfig(out="features.h5"))
        PosixPath('features.h5')
    """
    config.check()
    config = config.resolved()
    listener = listener or Listener()
    launch = find_launch()
    if config.ray is not None:
        check_address(config.ray)
        if config.shard is not None or launch is not None:
            raise UserError("--ray divides the work by itself; leave out --shard, and torchrun.")
        if config.device not in ("auto", "cpu", "cuda"):
            raise UserError("--ray hands out GPUs by itself: --device takes auto, cpu or cuda.")
    if launch is not None and launch.rank > 0:
        listener = Listener()
    if config.like is not None:
        listener.note(
            f"takes classes and prompts of {config.like}, and encodes with {config.backbone}"
        )
    if launch is not None:
        return _extract_together(config, launch, listener)
    shard = parse_shard(config.shard)
    if _already_there(config, shard, listener):
        listener.result(_nothing_to_do(config.out))
        return config.out
    with (
        _staging_folder(config, _own(config, shard)) as place,
        _engine(config, listener) as encoding_of,
    ):
        from clip_adapter.extract.job import run_job

        listener.result(run_job(config, shard, place, listener, encoding_of))
    return config.out


@contextmanager
def _engine(config: ExtractConfig, listener: Listener) -> "Iterator[EncodingOf]":
    """What encodes: this process, or the nodes of a Ray cluster, found before PyTorch is loaded."""
    if config.ray is None:
        from clip_adapter.extract.local_encoding import LocalEncoding

        yield LocalEncoding
        return
    with connected(config.ray, listener) as cluster:
        from clip_adapter.extract.ray_encoding import RayEncoding

        yield partial(RayEncoding, cluster)


def _extract_together(config: ExtractConfig, launch: Launch, listener: Listener) -> Path:
    """This process's part, and in the first process the whole, as soon as all parts are there."""
    if config.shard is not None:
        raise UserError("Under torchrun each process takes its part by itself; leave out --shard.")
    if _already_there(config, Shard(), listener):
        listener.result(_nothing_to_do(config.out))
        return config.out
    if launch.rank == 0:
        # Better to find out before the parts are encoded.
        with _staging_folder(config, {"shard": "merge"}):
            pass
    from clip_adapter.extract.encoding.device import device_of_process
    from clip_adapter.extract.job import run_job
    from clip_adapter.extract.local_encoding import LocalEncoding
    from clip_adapter.extract.outcome import join_parts

    out = part_path(config.out, launch.shard)
    device = device_of_process(config.device, launch.local_rank)
    own = replace(config, out=out, shard=None, device=device)
    if not _already_there(own, launch.shard, listener):
        with _staging_folder(own, _own(own, launch.shard)) as place:
            run_job(own, launch.shard, place, listener, LocalEncoding)
    wait_for_all()
    if launch.rank == 0:
        parts = [
            part_path(config.out, Shard(i + 1, launch.processes)) for i in range(launch.processes)
        ]
        join_parts(parts, config.out, listener)
        for part in parts:
            part.unlink()
        if config.with_text_tower:
            from clip_adapter.cache.text_tower import tower_path

            tower_path(parts[0]).unlink()
    return config.out


def _own(config: ExtractConfig, shard: Shard) -> dict[str, Any]:
    """What decides, beside the identity, which rows a run encodes: only the same ones go on."""
    own: dict[str, Any] = {"shard": f"{shard.index}/{shard.of}"}
    if shard.of > 1:  # shards meet at multiples of it
        own["batch_size"] = config.batch_size
    return own


@contextmanager
def _staging_folder(config: ExtractConfig, own: Mapping[str, Any]) -> "Iterator[StagingFolder]":
    """The place beside --out, taken before anything is loaded.

    own: see StagingFolder.
    Raises UserError where nothing can be written there, by this run at least. An interruption is
    given to say that nothing is lost (--force, though, would start again).
    """
    from clip_adapter.cache.staging import StagingFolder
    from clip_adapter.extract.update import UPDATABLE

    arguments = config.identity()
    if config.precision == "auto":  # only the device will say
        del arguments["precision"]
    with StagingFolder(config.out, own) as place:
        if not config.force:
            may_differ = UPDATABLE if config.update else ()
            place.refuse_other(arguments, known_so_far=True, may_differ=may_differ)
        try:
            yield place
        except KeyboardInterrupt:
            if config.force or not place.begun:
                raise
            raise KeyboardInterrupt(
                "what is encoded is kept, and the same command goes on from there"
            ) from None


def _already_there(config: ExtractConfig, shard: Shard, listener: Listener) -> bool:
    """Whether the file exists with these arguments, made of the images that are there now.

    Raises UserError where something else stands in its place, or images were skipped that should
    not be, and, unless it is to be updated, where images have changed or the text tower is missing.
    """
    if config.force or not is_there(config.out) or config.out.is_dir():
        return False
    from clip_adapter.extract.update import (
        UPDATABLE,
        find_changes,
        refuse_changed,
        refuse_other_rows,
    )

    made_with, skipped = _made(config.out, shard)
    earlier = ExtractConfig().identity() | made_with
    now = config.identity()
    if config.precision == "auto":  # whatever it was on the machine that made the file
        now["precision"] = earlier["precision"]
    # An argument that stands there only where it was given may be gone now.
    names = now.keys() | (earlier.keys() & vars(config).keys())
    differing = {key for key in names if earlier.get(key) != now.get(key)}
    if differing and not (config.update and differing <= set(UPDATABLE)):
        updatable = shard.of == 1 and differing <= set(UPDATABLE)
        keeping = "--update to keep what can be kept of it, " if updatable else ""
        raise UserError(
            f"{config.out} exists and was made with other arguments "
            f"({', '.join(sorted(differing))} differ); choose another --out, "
            f"{keeping}or --force to overwrite it."
        )
    tower = _missing_tower(config, shard)
    if config.update:
        wanting = config.on_error == "fail" and skipped > 0
        return not (differing or wanting or tower or find_changes(config, listener))
    if config.on_error == "fail":
        from clip_adapter.extract.outcome import refuse_skipped

        refuse_skipped(config.out, skipped)
    if shard.of > 1:
        refuse_other_rows(config, made_with.get("rows_sha256"), listener)
    else:
        refuse_changed(config, listener)
    if tower:
        again = "--update makes it again" if shard.of == 1 else "--force makes both"
        raise UserError(f"{tower} is missing, which belongs to {config.out}; {again}.")
    return True


def _missing_tower(config: ExtractConfig, shard: Shard) -> Path | None:
    """Where the text tower should lie, if it does not."""
    if not config.with_text_tower or shard.index > 1:
        return None
    from clip_adapter.cache.text_tower import tower_path

    path = tower_path(config.out)
    return None if path.exists() else path


def _nothing_to_do(out: Path) -> str:
    return (
        f"{out} is complete and was made with these arguments of what its source holds now: "
        "nothing to do (weights were not looked at; --force starts again)."
    )


def _made(path: Path, shard: Shard) -> tuple[dict[str, Any], int]:
    """What a file was made with, and how many images were skipped."""
    if shard.of > 1:
        from clip_adapter.cache.parts import PartFile

        with PartFile(path) as opened:
            if (opened.part.index, opened.part.of) != (shard.index, shard.of):
                raise UserError(
                    f"{path} is part {opened.part.index} of {opened.part.of} of a cache; choose "
                    "another --out, or --force to overwrite it."
                )
            return opened.metadata.arguments, opened.skipped
    import h5py

    from clip_adapter.cache.reader import FeatureCache

    if not h5py.is_hdf5(path):
        raise UserError(
            f"{path} exists and is no feature cache; choose another --out, or --force to "
            "overwrite it."
        )
    with FeatureCache(path) as cache:
        return cache.arguments, cache.skipped
