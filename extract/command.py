"""`extract`: encode a data set once and write the feature cache."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.workplace import Workplace
from clip_adapter.extract.prompts import read_descriptions, resolve_templates
from clip_adapter.extract.shards import (
    Launch,
    Shard,
    find_launch,
    parse_shard,
    part_path,
    wait_for_all,
)

if TYPE_CHECKING:
    from clip_adapter.extract.datasets.source import SourceOptions

VIEWS_MAX = 100  # of a batch all views are in memory at once


@dataclass(frozen=True)
class ExtractConfig:
    """Encode a data set once with a frozen CLIP and write its features to one HDF5 file.

    An interrupted run goes on where it stopped when the same command is given again.

    Attributes:
        dataset: Data set: digits (embedded), a name of the literature such as oxford_pets,
            tfds:BUILDER[/CONFIG], coop:FOLDER, folder:FOLDER, csv:FILE, or hf:ORG/NAME.
        backbone: CLIP model: glyph-clip (embedded, a demonstration), an open_clip name such
            as RN50, local-dir:FOLDER or hf-hub:ORG/NAME.
        pretrained: Weights: a tag of open_clip's, or a local file or folder. By default
            openai where it exists.
        out: Where the feature cache goes.
        templates: Prompt templates with {} for the class name, text files with one per
            line, or `ensemble` for ImageNet's seven; by default the data set's own.
        descriptions: JSON file {class: [sentences]} of prompts for each class, in place of
            the data set's own templates and beside those given with --templates.
        views: Augmented views (random crop and flip) to store of each training image, for
            fit --augment.
        augment_seed: Seed of these views.
        data_dir: Where TensorFlow Datasets keeps its data; by default its own folder.
        data_root: Folder that holds data sets in CoOp's layout; a name found there is taken
            with its published split.
        image_root: What relative paths in a csv: table start from; by default the table's
            folder.
        val: Share of the training images that becomes val where the data set has none.
            Default 0.2; 0 makes none.
        test: The same for test. Default 0.3.
        split_seed: Seed of that division.
        on_error: What to do about an image that cannot be decoded: stop, or leave it out
            and list it in the cache.
        precision: What the model computes in; auto is fp32 on a CPU, bf16 or fp16 on a GPU.
        compile: Compile the image encoder first, which takes from a quarter of a minute to some
            minutes. On a CPU it made RN50 faster from 800 images on, and ViT-B-32 slower.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        device: PyTorch device; auto takes a GPU where there is one.
        shard: Encode only part I of N, written I/N (1/4 … 4/4); `clip-adapter merge` joins
            the parts. Under torchrun every process takes its part by itself.
        update: Bring an existing cache up to date with its source and with the prompts: encode what
            is new or has changed, keep the rest.
        force: Overwrite an existing cache or an interrupted run.
    """

    dataset: str = "digits"
    backbone: str = "glyph-clip"
    pretrained: str | None = None
    out: Path = Path("features.h5")
    templates: tuple[str, ...] = ()
    descriptions: Path | None = None
    views: int = 0
    augment_seed: int = 0
    data_dir: Path | None = None
    data_root: Path | None = None
    image_root: Path | None = None
    val: float | None = None
    test: float | None = None
    split_seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    compile: bool = False
    batch_size: int = 64
    workers: int = os.cpu_count() or 1
    device: str = "auto"
    shard: str | None = None
    update: bool = False
    force: bool = False

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
        """The arguments that decide what the cache holds, as JSON.

        Raises UserError for files of prompts that cannot be used.
        """
        return {
            "dataset": self.dataset,
            "backbone": self.backbone,
            "pretrained": self.pretrained,
            "templates": list(resolve_templates(self.templates)),
            "descriptions": self.descriptions and _sha256(read_descriptions(self.descriptions)),
            "views": self.views,
            "augment_seed": self.augment_seed,
            "data_root": None if self.data_root is None else str(self.data_root),
            "image_root": None if self.image_root is None else str(self.image_root),
            "val": self.val,
            "test": self.test,
            "split_seed": self.split_seed,
            "precision": self.precision,
        }


def extract(config: ExtractConfig) -> Path:
    """Run `extract` and return the path of the cache, or of the part that `shard` asks for.

    Raises UserError for bad input; see the messages.
    """
    _check(config)
    launch = find_launch()
    if launch is not None:
        return _extract_together(config, launch)
    shard = parse_shard(config.shard)
    if _already_there(config, shard):
        print(_nothing_to_do(config.out))
        return config.out
    with _workplace(config, _own(config, shard)) as place:
        from clip_adapter.extract.job import run_job

        print(run_job(config, shard, place))
    return config.out


def _extract_together(config: ExtractConfig, launch: Launch) -> Path:
    """This process's part, and in the first process the whole, as soon as all parts are there."""
    if config.shard is not None:
        raise UserError("Under torchrun each process takes its part by itself; leave out --shard.")
    if _already_there(config, Shard()):
        if launch.rank == 0:
            print(_nothing_to_do(config.out))
        return config.out
    if launch.rank == 0:
        from clip_adapter.cache.parts import MERGING

        with _workplace(config, MERGING):  # better to find out before the parts are encoded
            pass
    from clip_adapter.extract.device import device_of_process
    from clip_adapter.extract.job import run_job
    from clip_adapter.extract.join import join_parts

    out = part_path(config.out, launch.shard)
    device = device_of_process(config.device, launch.local_rank)
    own = replace(config, out=out, shard=None, device=device)
    if not _already_there(own, launch.shard):
        with _workplace(own, _own(own, launch.shard)) as place:
            run_job(own, launch.shard, place, quiet=launch.rank > 0)
    wait_for_all()
    if launch.rank == 0:
        parts = [
            part_path(config.out, Shard(i + 1, launch.processes)) for i in range(launch.processes)
        ]
        print(join_parts(parts, config.out))
        for part in parts:
            part.unlink()
    return config.out


def _check(config: ExtractConfig) -> None:
    if config.batch_size < 1 or config.workers < 1:
        raise UserError("--batch-size and --workers must be at least 1.")
    if config.views < 0 or config.augment_seed < 0:
        raise UserError("--views and --augment-seed must not be negative.")
    if config.views > VIEWS_MAX:
        raise UserError(f"--views {config.views} is more than {VIEWS_MAX}; store fewer.")
    if config.update and (config.force or config.shard is not None or find_launch() is not None):
        raise UserError(
            "--update brings one whole cache up to date, in one process; leave out --force and "
            "--shard, and torchrun."
        )


def _own(config: ExtractConfig, shard: Shard) -> dict[str, Any]:
    """What decides, beside the identity, which rows a run encodes: only the same ones go on."""
    own: dict[str, Any] = {"shard": f"{shard.index}/{shard.of}"}
    if shard.of > 1:  # shards meet at multiples of it
        own["batch_size"] = config.batch_size
    return own


@contextmanager
def _workplace(config: ExtractConfig, own: Mapping[str, Any]) -> Iterator[Workplace]:
    """The place beside --out, taken before anything is loaded.

    own: see Workplace.
    Raises UserError where nothing can be written there, by this run at least. An interruption is
    given to say that nothing is lost (--force, though, would start again).
    """
    from clip_adapter.extract.update import UPDATABLE

    arguments = config.identity()
    if config.precision == "auto":  # only the device will say
        del arguments["precision"]
    with Workplace(config.out, own) as place:
        if not config.force:
            place.refuse_other(
                arguments, known_so_far=True, may_differ=UPDATABLE if config.update else ()
            )
        try:
            yield place
        except KeyboardInterrupt:
            if config.force or not place.begun:
                raise
            raise KeyboardInterrupt(
                "what is encoded is kept, and the same command goes on from there"
            ) from None


def _already_there(config: ExtractConfig, shard: Shard) -> bool:
    """Whether the file exists with these arguments, made of the images that are there now.

    Raises UserError where something else stands in its place, or images were skipped that should
    not be, and, unless it is to be updated, where images have changed.
    """
    if config.force or not config.out.exists() or config.out.is_dir():
        return False
    from clip_adapter.extract.update import (
        UPDATABLE,
        find_changes,
        refuse_changed,
        refuse_other_rows,
    )

    stored, skipped = _arguments_of(config.out, shard)
    earlier = ExtractConfig().identity() | stored
    now = config.identity()
    if config.precision == "auto":  # whatever it was on the machine that made the file
        now["precision"] = earlier["precision"]
    differing = {key for key in now if earlier.get(key) != now[key]}
    if differing and not (shard.of == 1 and differing <= set(UPDATABLE)):
        raise UserError(
            f"{config.out} exists and was made with other arguments "
            f"({', '.join(sorted(differing))} differ); choose another --out, or --force to "
            "overwrite it."
        )
    if differing and not config.update:
        raise UserError(
            f"{config.out} exists and was made with other arguments "
            f"({', '.join(sorted(differing))} differ); choose another --out, --update to keep what "
            "can be kept of it, or --force to overwrite it."
        )
    if config.update:
        wanting = config.on_error == "fail" and skipped > 0
        return not differing and not wanting and find_changes(config) is None
    if config.on_error == "fail":
        from clip_adapter.extract.outcome import refuse_skipped

        refuse_skipped(config.out, skipped)
    if shard.of > 1:
        refuse_other_rows(config, stored.get("rows_sha256"))
    else:
        refuse_changed(config)
    return True


def _nothing_to_do(out: Path) -> str:
    return (
        f"{out} is complete and was made with these arguments of what its source holds now: "
        "nothing to do (weights were not looked at; --force starts again)."
    )


def _arguments_of(path: Path, shard: Shard) -> tuple[dict[str, Any], int]:
    """What a file was made with, and how many images were skipped."""
    if shard.of > 1:
        from clip_adapter.cache.parts import part_of

        arguments, part, skipped = part_of(path)
        if (part.index, part.of) != (shard.index, shard.of):
            raise UserError(
                f"{path} is part {part.index} of {part.of} of a cache; choose another --out, or "
                "--force to overwrite it."
            )
        return arguments, skipped
    import h5py

    from clip_adapter.cache.reader import FeatureCache

    if not h5py.is_hdf5(path):
        raise UserError(
            f"{path} exists and is no feature cache; choose another --out, or --force to "
            "overwrite it."
        )
    with FeatureCache(path) as cache:
        return cache.arguments, cache.skipped


def _sha256(value: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script `extract`."""
    from clip_adapter.console.command import run_command

    # PyTorch's threads would wait for each other spinning, on cores that the decoding threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(ExtractConfig, extract, "extract", arguments)
