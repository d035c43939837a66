"""`predict`: classify image files, and the images of caches, with a fitted adapter."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal, NoReturn

from clip_adapter.cores import available_cores, limit_openmp
from clip_adapter.errors import UserError, require_within
from clip_adapter.extract.config import check_work
from clip_adapter.extract.datasets.image_files import Listing
from clip_adapter.extract.shards import parse_shard
from clip_adapter.files import check_new, check_writable, unreadable
from clip_adapter.listener import Listener
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import EXIT_PARTIAL, run_command
from clip_adapter.pipelines.console.terminal import Terminal, no_advance, progress
from clip_adapter.pipelines.deciding.answers import answers_of
from clip_adapter.pipelines.saved.adapter_file import adapter_sha256, load_adapter
from clip_adapter.pipelines.scoring.cached import Source, cached_sources, is_cache
from clip_adapter.pipelines.scoring.images import encoded_files, refuse_encoding
from clip_adapter.pipelines.scoring.predicted_images import PredictedImages
from clip_adapter.pipelines.scoring.prediction_formats import (
    FORMATS,
    PARQUET,
    Prediction,
    write_file,
)
from clip_adapter.pipelines.scoring.prediction_parts import write_parts
from clip_adapter.words import counted, printable

MOST_CLASSES = 100_000
SUFFIXES = {
    ".txt": "table",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".parquet": PARQUET,
}


@dataclass(frozen=True)
class PredictConfig:
    """Classify image files with a fitted adapter and the backbone it was fitted for, and images
    that `extract` has encoded without it.

    A probability is a share of the softmax over the adapter's classes, at the temperature that
    images held out by `fit` have given it, for models with a logit bias
    (SigLIP) too: an adapter is fitted to tell its classes apart, and that is what softmax says;
    the sigmoid of such a model's own head would say whether one caption fits one image.

    Attributes:
        paths: Image files, folders to search for them, and feature caches, whose images come behind
            those of files.
        adapter: Run folder that `fit` wrote, or one of the adapter's two files.
        method: MODULE:NAME of the adapter's method, where that is one of your own.
        backbone: Backbone to load, where the adapter names one that is neither glyph-clip nor a
            model and tag of open_clip's; what an adapter names otherwise is not loaded unasked.
        pretrained: Where the backbone's weights lie now, if they were given as a local file or
            folder.
        coverage: Answer with so many classes that the right one is among them for this share of
            images like those that were held out, such as 0.95.
        reject: Answer "none of these" for images that are as strange as this share of those that
            were held out, the strangest ones, such as 0.05.
        transductive: Classify the images together, by what they have in common too (StatA). What
            is said of an image then depends on the others: an accuracy of it stands beside none of
            images that were classified one by one.
        also: Second encoder of an adapter that takes one, where the adapter does not name one that
            is published.
        also_pretrained: Where its weights lie now, if they were given as a local file.
        split: Which images of a cache. By default those without labels, or, where there are none,
            all.
        top: How many classes to name for each image.
        format: How to print or write, table where nothing is said; json is one array with an object
            per image, jsonl has an object to a line, and parquet needs --out. In csv, a cell that a
            spreadsheet would take for a formula begins with an apostrophe.
        out: File to write instead of printing, by its suffix if --format does not say how: .csv,
            .json, .jsonl, .parquet, or .txt for the table. It gets its name when it is whole; a run
            that was killed starts over. A name without a suffix is a folder of Parquet files of
            up to 8,192 images each, which goes on where it stopped.
        shard: Classify only part I of N, written I/N; parts one behind the other are the answers of
            an undivided run. `auto` and auto/N as `extract` takes them. All parts may have one
            folder as --out.
        force: Overwrite an existing file.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        device: PyTorch device; auto takes a GPU where there is one.

    Examples:
        >>> from clip_adapter import PredictConfig
        >>> PredictConfig(["images"], "runs/first", coverage=0.95).top
        3
    """

    paths: Positional[tuple[Path, ...]]
    adapter: Path
    method: str | None = None
    backbone: str | None = None
    pretrained: str | None = None
    coverage: float | None = None
    reject: float | None = None
    transductive: bool = False
    also: str | None = None
    also_pretrained: str | None = None
    split: Literal["train", "val", "test", "unlabelled"] | None = None
    top: int = 3
    format: Literal["table", "csv", "json", "jsonl", "parquet"] | None = None
    out: Path | None = None
    shard: str | None = None
    force: bool = False
    batch_size: int = 64
    workers: int = available_cores()
    device: str = "auto"


def predict(config: PredictConfig, listener: Listener | None = None) -> PredictedImages:
    """Load the adapter and its backbone, find the images, and return what classifies them, or those
    of the part that `shard` asks for.

    Raises UserError for a coverage or a share to reject that the adapter's held-out images are too
    few for, where none of the paths can be read, when there is no image at all, for numbers
    out of range, and where adapter and backbone cannot be had or do not belong together. An image
    that cannot be read, or a path where nothing is, is no error: its Prediction says so.

    Examples:
        >>> from clip_adapter import PredictConfig, predict
        >>> from pathlib import Path
        >>> found = predict(PredictConfig([Path("features.h5")], Path("runs/first"), split="test"))
        >>> [(name, probability)] = next(iter(found)).top[:1]
        >>> len(found), name, probability > 0.3
        (899, 'two', True)
    """
    require_within("--top", config.top, MOST_CLASSES)
    shard = parse_shard(config.shard)
    named: Any = config.paths
    paths = [Path(path) for path in ([named] if isinstance(named, str | Path) else named)]
    caches = [path for path in paths if is_cache(path)]
    if caches == paths != []:
        refuse_encoding(config)
    if config.split and not caches:
        raise UserError("--split is of feature caches, and none is named; leave it out.")
    check_work(config.batch_size, config.workers)
    adapter = load_adapter(config.adapter, config.method)
    answers = answers_of(adapter, config.coverage, config.reject)
    if answers and config.transductive:
        raise UserError(
            "--coverage and --reject speak of images that are classified one by one; leave them or "
            "--transductive out."
        )
    if config.transductive and shard.of > 1:
        raise UserError("--transductive classifies all images together; leave out --shard.")
    listener = listener or Listener()
    sources: list[Source] = []
    images = [path for path in paths if path not in caches]
    if images or not caches:
        refused: dict[str, str] = {}
        named_files = image_files(images, listener, refused)
        sources.append(encoded_files(named_files, refused, adapter, config))
    for path in caches:
        for split, source in cached_sources(path, config.split, adapter, listener):
            listener.note(f"{path}: {counted(len(source.rows), f'{split} image')}")
            sources.append(source)
    firsts = accumulate((len(source.rows) for source in sources), initial=0)
    sources = [replace(own, first=first) for own, first in zip(sources, firsts, strict=False)]
    for sentence in answers.sentences() if answers else ():
        listener.note(sentence)
    tell = listener.note if config.transductive else None
    identity = {
        **{name: getattr(config, name) for name in ("top", "coverage", "reject")},
        "adapter": adapter_sha256(Path(config.adapter)),
        "images": [source.sha256 for source in sources],
        "batch_size": config.batch_size if images else None,
        "number of shards": shard.of,
    }
    found = PredictedImages(adapter, sources, config.top, answers, tell, identity)
    part = found.shard(shard)
    if shard.of > 1:
        share = f"{len(part):,} of {counted(len(found), 'image')}"
        listener.note(f"part {shard.index} of {shard.of}: {share}")
    return part


def image_files(paths: Sequence[Path], listener: Listener, refused: dict[str, str]) -> list[str]:
    """The files among `paths` and the image files below the folders among them, in their order; as
    text, a fourth of the memory of a Path.

    refused: is told of those paths that cannot be read, which are in the list too, why.
    Raises UserError if nothing else is found.
    """
    found: list[str] = []
    reason: UserError | None = None
    for path in paths:
        try:
            found += _images_at(path, listener)
        except UserError as error:
            reason = reason or error
            refused[str(path)] = str(error).removeprefix(f"Cannot read {path}: ").rstrip(".")
            found.append(str(path))
    if reason and refused.keys() == set(found):
        raise reason
    if not paths:
        raise UserError("Name the images to classify: files, or folders that hold them.")
    if not found:
        raise UserError(f"There is no image file in {', '.join(map(str, paths))}.")
    return found


def _images_at(path: Path, listener: Listener) -> list[str]:
    try:
        is_folder = S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_folder:
        return [str(path)]
    listing = Listing(path, listener)
    found = [str(path / inner) for inner in listing.below(path)]
    for remark in listing.remarks():
        listener.warn(remark)
    return found


def form_of(config: PredictConfig) -> str:
    """How to print or write.

    Raises UserError where that cannot be, or is said in two ways.
    """
    form, out = config.format, config.out
    if out is None:
        if form == PARQUET:
            raise UserError("--format parquet is no text to print; give it a file with --out.")
        if config.force:
            raise UserError("--force overwrites the file that --out names; leave it out.")
        return form or "table"
    in_parts = not out.suffix
    by_name = PARQUET if in_parts else SUFFIXES.get(out.suffix)
    if by_name is None or (form and form != by_name):
        wanted = next((s for s, own in SUFFIXES.items() if own == form), ", ".join(SUFFIXES))
        raise UserError(f"{out} is not named for what it would hold; let it end in {wanted}.")
    if in_parts and config.transductive:
        raise UserError("--transductive classifies all images together; let --out name a file.")
    if in_parts and out.exists() and not out.is_dir():
        raise UserError(
            f"{out} is a file; name a folder, or a file by one of {', '.join(SUFFIXES)}."
        )
    if in_parts and config.force:
        raise UserError(f"--force is for a file; remove the folder {out} to start again.")
    if by_name == PARQUET:
        from clip_adapter.pipelines.deciding.feature_table import require_pyarrow

        require_pyarrow(out)
    if not in_parts:
        check_writable(out)
        check_new(out, config.force)
    return by_name


def print_predictions(config: PredictConfig) -> int:
    """Run `predict`, print or write what it finds as it comes, and return the exit code."""
    form = form_of(config)
    predictions = predict(config, Terminal("predict"))
    unreadable_count = 0
    out = sys.stdout  # bound here, because a progress bar on standard error takes sys.stdout over
    # Where the rows appear on a terminal, they show the progress themselves.
    shows_itself = out.isatty() and config.out is None
    bar = nullcontext(no_advance) if shows_itself else progress("predict", len(predictions))
    parts: object = ""

    def readable(some: PredictedImages) -> Iterator[Prediction]:
        nonlocal unreadable_count
        for prediction in some:
            if prediction.unreadable is None:
                yield prediction
            else:
                unreadable_count += 1
                skipped = f"{prediction.path} skipped: {prediction.unreadable}"
                print(printable(skipped), file=sys.stderr)
            advance(1, "")

    with bar as advance:
        if config.out is None:
            FORMATS[form](out, predictions, readable(predictions))
        elif config.out.suffix:
            write_file(config.out, form, predictions, readable(predictions))
        else:
            shard = parse_shard(config.shard)
            parts = write_parts(config.out, shard, predictions, readable, advance)
            unreadable_count += parts.unreadable
    if config.out:
        print(f"{config.out}: {counted(len(predictions) - unreadable_count, 'image')}{parts}")
    if unreadable_count:
        total = len(predictions)
        counts = f"{unreadable_count} of {counted(total, 'image')} cannot be read"
        print(f"clip-adapter predict: {counts}", file=sys.stderr)
    return EXIT_PARTIAL if unreadable_count else 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter predict`."""
    limit_openmp()
    run_command(PredictConfig, print_predictions, "clip-adapter predict", arguments)
