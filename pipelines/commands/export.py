"""`clip-adapter export`: a fitted classifier, or the features of a cache, for other programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clip_adapter.adapters.decisions import images_for
from clip_adapter.cores import limit_openmp
from clip_adapter.errors import UserError
from clip_adapter.files import check_new, check_writable, write_bytes, write_text
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.parser import version
from clip_adapter.pipelines.console.running import EXIT_PARTIAL, run_command
from clip_adapter.pipelines.console.terminal import Terminal
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, adapter_sha256, load_adapter
from clip_adapter.words import counted, size

ENDINGS = (".onnx", ".pt2")
TABLE = ".parquet"
COVERAGES = (0.9, 0.95)


@dataclass(frozen=True)
class ExportConfig:
    """Write a fitted classifier, or the features of a cache, as a file that other programs read.

    With --adapter the file holds the backbone's image tower, the adapter, its temperature and the
    softmax, for an ONNX runtime (NAME.onnx, extra `onnx`) or for PyTorch (NAME.pt2). It is held
    against what predict computes before it gets its name, and a model card is written beside it
    (NAME.md). With a cache it is a table (NAME.parquet, extra `parquet`), a row per image.

    Attributes:
        cache: Feature cache to write as a table.
        out: Where the file goes; its ending says what it is.
        adapter: Run folder that `fit` wrote, or one of the adapter's two files.
        method: MODULE:NAME of the adapter's method, where that is one of your own.
        backbone: Backbone to load, where the adapter names one that is neither glyph-clip nor a
            model and tag of open_clip's.
        pretrained: Where the backbone's weights lie now, if they were given as a local file or
            folder.
        force: Overwrite existing files.
    """

    cache: Positional[tuple[Path, ...]]
    out: Path
    adapter: Path | None = None
    method: str | None = None
    backbone: str | None = None
    pretrained: str | None = None
    force: bool = False


def export(config: ExportConfig) -> int:
    """Run `export` and return the exit code: 1 where the file would not have computed what predict
    does, of which nothing is kept then.

    Raises UserError for what cannot be exported, and where files exist.
    """
    if len(config.cache) + (config.adapter is not None) != 1:
        raise UserError("Name one thing to export: an adapter with --adapter, or a feature cache.")
    card = config.out.with_suffix(".md")
    for path in (config.out, card) if config.adapter else (config.out,):
        check_writable(path)
        check_new(path, config.force)
    if config.adapter is None:
        return _table(config)
    return _classifier(config, config.adapter, card)


def _table(config: ExportConfig) -> int:
    from clip_adapter.cache.reader import FeatureCache
    from clip_adapter.pipelines.deciding.feature_table import require_pyarrow, write_table

    if config.method or config.backbone or config.pretrained:
        raise UserError(
            "--method, --backbone and --pretrained are of an adapter; leave them out to export a "
            "cache."
        )
    if config.out.suffix != TABLE:
        raise UserError(f"A cache is exported as a table; let --out end with {TABLE}.")
    require_pyarrow(config.out)
    with FeatureCache(config.cache[0]) as cache:
        rows, terminal = write_table(cache, config.out), Terminal("clip-adapter export")
        parts = {
            "augmented views": any(cache.shape(split)[0] > 1 for split in cache.splits),
            "features of the second encoder": cache.has("features2"),
            "features of before the projection": cache.has("pre_projection"),
            "the text tower": cache.has("tokens"),
        }
        left_out = [what for what, there in parts.items() if there]
    terminal.result(f"{config.out}: {counted(rows, 'row')}, {size(config.out.stat().st_size)}")
    if left_out:
        terminal.note(f"the table has no place for what else the cache has: {', '.join(left_out)}")
    return 0


def _classifier(config: ExportConfig, run: Path, card: Path) -> int:
    ending = config.out.suffix
    if ending not in ENDINGS:
        raise UserError(f"A classifier is exported as {' or '.join(ENDINGS)}; let --out end so.")
    adapter = load_adapter(run, config.method)
    if adapter.info.backbone2 is not None:
        raise UserError(
            f"{run} takes two encoders, and an exported file holds one; AdaptedClip runs it in "
            "PyTorch, or fit on a cache without the second."
        )
    from clip_adapter.pipelines.deciding.export import export_classifier, require_onnx
    from clip_adapter.pipelines.deciding.model_card import measured, model_card
    from clip_adapter.pipelines.saved.pytorch import AdaptedClip, find_backbone

    if ending == ".onnx":
        require_onnx()
    folder = run if run.is_dir() else run.parent
    backbone = find_backbone(adapter.info, config.backbone, config.pretrained)
    metadata = described(adapter, folder)
    content, difference, allowed = export_classifier(
        AdaptedClip(backbone, adapter), adapter, metadata["temperature"], ending, metadata
    )
    terminal = Terminal("clip-adapter export")
    if not difference <= allowed:
        terminal.note(
            f"the file's logits differ from those of predict by {difference:.1e}, more than "
            f"{allowed:.1e}, so that nothing is kept of it"
        )
        return EXIT_PARTIAL
    found = {"accuracy": measured(folder, adapter.info), "difference": difference}
    page = model_card(config.out, adapter.info, metadata, **found)
    write_bytes(config.out, content)
    write_text(card, page)
    terminal.result(
        f"{config.out}: {size(len(content))}; its logits differ from those of predict by at most "
        f"{difference:.1e} ({allowed:.1e} are allowed)\n{card}: model card"
    )
    return 0


def described(adapter: SavedAdapter, folder: Path) -> dict[str, Any]:
    """What an exported classifier says of itself, as JSON. thresholds: q by the coverage that it
    promises; the classes of probability 1 − q or more are answered, and always the most probable
    one. held_out: how many images say so; fewer than a coverage takes promise none."""
    info, held_out = adapter.info, adapter.decisions
    enough = [share for share in COVERAGES if held_out and images_for(share) <= held_out.images]
    return {
        "writer": version(),
        "class_names": info.class_names,
        "temperature": held_out.temperature if held_out else 1.0,
        "thresholds": {f"{share:g}": held_out.threshold(share) for share in enough if held_out},
        "held_out": held_out.images if held_out else 0,
        "preprocess": info.preprocess,
        "backbone": info.backbone,
        "method": info.method,
        "adapter_sha256": adapter_sha256(folder),
    }


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter export`."""
    limit_openmp()
    run_command(ExportConfig, export, "clip-adapter export", arguments)
