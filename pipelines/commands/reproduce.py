"""`clip-adapter reproduce`: the paper's study from raw data, beside the published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import nan
from pathlib import Path
from typing import NoReturn

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.reporting.published import (
    methods_of_the_paper,
    published_backbone,
    published_datasets,
    published_of,
)
from clip_adapter.pipelines.reporting.table import NOTHING, Table

PRESETS = ("paper", "default")
CACHES, PAGE = "caches", "reproduction.md"
HEAD = (
    *("data set", "method", "shots", "published", "ours", "difference"),
    "within the tolerance",
)


@dataclass(frozen=True)
class ReproduceConfig:
    """Run the paper's study on the literature's data sets that lie in CoOp's layout in a folder.

    Each is extracted, and every method of the paper fitted on it under `--preset paper` and under
    this package's defaults. The last page sets each published number beside the two. The same
    command goes on where an interrupted one stopped.

    Attributes:
        data_root: Folder that holds the data sets in CoOp's layout; those that are missing are
            named, with what to put where.
        backbone: CLIP model, as `extract` takes it. The published numbers are RN50's.
        pretrained: Its weights, as `extract` takes them, such as RN50.pt.
        out: Folder of the study.
        shots: Labelled images per class.
        seeds: Seeds of the few-shot draws and of training.
        epochs: Passes over the support set, for a quick trial; by default each method's own.
        context: CoOp's context vectors, for a text tower that reads few tokens; by default 16.
        tolerance: Points within which two accuracies are taken to agree.
        device: PyTorch device that encodes; auto takes a GPU where there is one.
    """

    data_root: Path
    backbone: str = "RN50"
    pretrained: str | None = None
    out: Path = Path("paper")
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int | None = None
    context: int | None = None
    tolerance: float = 1.0
    device: str = "auto"


@dataclass(frozen=True)
class Reproduction:
    """page: the file with the comparison. missing: what to put where, by data set. failed: a
    sentence for each data set that could not be extracted or fitted."""

    page: Path
    missing: dict[str, str]
    failed: dict[str, str]


def reproduce(config: ReproduceConfig, listener: Listener | None = None) -> Reproduction:
    """Extract, fit and compare.

    Raises UserError for bad arguments, and where none of the data sets is there or can be used.
    """
    from clip_adapter.extract.datasets.catalogue import load_catalogue
    from clip_adapter.extract.datasets.coop_layout import coop_instructions

    listener = listener or Listener()
    if not config.data_root.is_dir():
        raise UserError(f"{config.data_root} is no folder; --data-root holds the data sets.")
    catalogue = load_catalogue()
    missing, there = {}, []
    for name in published_datasets():
        entry = catalogue[name]
        if (config.data_root / entry.coop_dir).is_dir():
            there.append(name)
        else:
            missing[name] = coop_instructions(entry, config.data_root)
    for name, advice in missing.items():
        listener.note(f"{name} is not there: {advice}")
    if not there:
        raise UserError(f"None of the data sets lies under {config.data_root}; see above.")
    failed: dict[str, str] = {}
    caches = [c for name in there if (c := _extracted(config, name, failed, listener))]
    if not caches:
        raise UserError("No data set could be extracted; see the sentences above.")
    runs = {preset: _fitted(config, preset, caches, failed, listener) for preset in PRESETS}
    if not any(runs.values()):
        raise UserError("No data set could be fitted; see the sentences above.")
    page = config.out / PAGE
    files.write_text(page, _page(config, there, runs, missing, failed))
    return Reproduction(page, missing, failed)


def _extracted(
    config: ReproduceConfig, name: str, failed: dict[str, str], listener: Listener
) -> Path | None:
    from clip_adapter.extract.config import ExtractConfig
    from clip_adapter.extract.run import extract

    wanted = ExtractConfig(
        dataset=name,
        backbone=config.backbone,
        pretrained=config.pretrained,
        data_root=config.data_root,
        out=config.out / CACHES / f"{name}.h5",
        device=config.device,
        with_text_tower=True,
    )
    try:
        listener.note(f"extract {name}")
        extract(wanted, listener)
    except UserError as error:
        failed[name] = str(error)
        listener.warn(f"{name}: {error}")
        return None
    return wanted.out


def _fitted(
    config: ReproduceConfig,
    preset: str,
    caches: Sequence[Path],
    failed: dict[str, str],
    listener: Listener,
) -> dict[str, list[Path]]:
    from clip_adapter.pipelines.commands.study import StudyConfig, study
    from clip_adapter.pipelines.fitting.config import FitConfig

    given = {"epochs": config.epochs, "coop.context_length": config.context}
    fit = FitConfig(
        method=methods_of_the_paper(),
        baselines=(),
        shots=config.shots,
        seeds=config.seeds,
        preset=preset,  # type: ignore[arg-type]
        hyper={name: value for name, value in given.items() if value is not None},
    )
    try:
        result = study(StudyConfig(tuple(caches), config.out / preset, fit), listener)
    except UserError as error:
        failed[f"all ({preset})"] = str(error)
        return {}
    failed |= {f"{name} ({preset})": sentence for name, sentence in result.failed.items()}
    return result.runs


def _page(
    config: ReproduceConfig,
    datasets: Sequence[str],
    runs: dict[str, dict[str, list[Path]]],
    missing: dict[str, str],
    failed: dict[str, str],
) -> str:
    weights = "" if config.pretrained is None else f" with {Path(config.pretrained).name}"
    lines = [
        "# Published and reproduced test accuracies",
        "",
        f"Ours: {config.backbone}{weights}, mean over seeds {', '.join(map(str, config.seeds))}, "
        "settings chosen on min(shots, 4) validation images per class.",
    ]
    figures = published_of(published_datasets()[0])
    if figures:
        lines += [f"Published: {figures.source}.", ""]
        lines += [
            f"- {method}, published: {rule}"
            for method, rule in figures.selection.items()
            if method in methods_of_the_paper()
        ]
    if config.backbone != published_backbone():
        lines += ["", f"The published numbers are {published_backbone()}'s: no agreement is meant."]
    for preset in PRESETS:
        ours = _accuracies(runs[preset])
        places = product(datasets, methods_of_the_paper(), config.shots)
        rows = [_row(config, *place, *ours.get(place, (nan, nan))) for place in places]
        lines += ["", f"## --preset {preset}", "", Table(HEAD, rows, names=3).markdown()]
        lines += [f"Averages, ranks and differences: {preset}/study.md, {preset}/study.png"]
    for title, sentences in (("Not there", missing), ("Failed", failed)):
        if sentences:
            lines += ["", f"## {title}", ""]
            lines += [f"- {name}: {sentence}" for name, sentence in sentences.items()]
    return "\n".join(lines) + "\n"


def _accuracies(runs: dict[str, list[Path]]) -> dict[tuple[str, str, Shots], tuple[float, float]]:
    """Mean and deviation in %, by data set, method and shots."""
    from clip_adapter.pipelines.reporting.comparison import read_comparisons

    if not runs:
        return {}
    (found,) = read_comparisons(runs)
    places = list(product(found.datasets, found.methods, found.shots))
    means, stds = 100 * found.accuracy.ravel(), 100 * found.std.ravel()
    return dict(zip(places, zip(means, stds, strict=True), strict=True))


def _row(
    config: ReproduceConfig, dataset: str, method: str, shots: int, ours: float, std: float
) -> list[str]:
    number = NOTHING if ours != ours else f"{ours:.2f}" + ("" if std != std else f" ± {std:.2f}")
    figures = published_of(dataset)
    wanted = figures.accuracies.get(method, {}).get(shots) if figures else None
    published, compared = NOTHING, [NOTHING, NOTHING]
    if wanted is not None:
        published = f"{wanted:.2f}"
        if ours == ours:
            difference = round(ours - wanted, 2)  # of what is shown, whatever lies behind it
            agrees = "yes" if abs(difference) <= config.tolerance else "no"
            compared = [f"{difference:+.2f}", agrees]
    return [dataset, method, str(shots), published, number, *compared]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter reproduce`."""
    from clip_adapter.pipelines.console.running import EXIT_PARTIAL, run

    def parse_and_reproduce() -> int:
        from clip_adapter.pipelines.console.parser import parse

        config = parse(ReproduceConfig, "clip-adapter reproduce", arguments)

        from clip_adapter.pipelines.console.jax_setup import set_up_jax
        from clip_adapter.pipelines.console.terminal import Terminal

        set_up_jax()
        result = reproduce(config, Terminal("reproduce"))
        print(result.page.read_text(encoding="utf-8"))
        return EXIT_PARTIAL if result.failed else 0

    run("clip-adapter reproduce", parse_and_reproduce)
