"""The page: one file that needs nothing from outside, and the figures in it as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.files import refuse_links, write_bytes, write_text
from clip_adapter.pipelines.fitting.config import shots_words
from clip_adapter.pipelines.fitting.options import command_line
from clip_adapter.pipelines.fitting.provenance import Provenance
from clip_adapter.pipelines.fitting.run_folder import adapter_folder, writing
from clip_adapter.pipelines.fitting.tasks import RULES
from clip_adapter.pipelines.reporting.accuracies import Ablation, Accuracies
from clip_adapter.pipelines.reporting.beside_the_mean import (
    beside_guessing,
    beside_the_mean,
    chosen_settings,
)
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.figures import Section
from clip_adapter.pipelines.reporting.published import published
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.pipelines.reporting.sections.accuracy import ablation_section, accuracy_section
from clip_adapter.pipelines.reporting.sections.classes import (
    Pair,
    calibration_section,
    class_section,
)
from clip_adapter.pipelines.reporting.sections.first import first_screen
from clip_adapter.pipelines.reporting.sections.images import image_section
from clip_adapter.pipelines.reporting.sections.manifold import manifold_section, space_of
from clip_adapter.pipelines.reporting.sections.pairs import pairs_section
from clip_adapter.pipelines.reporting.sections.selection import selection_section
from clip_adapter.pipelines.reporting.verdict import Verdict, judge
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from clip_adapter.words import counted, printable

Facts = list[tuple[str, str]]
"""(what, how it is)."""
FIGURES = "figures"
TEMPLATE = "report.html"


def write_page(
    path: Path,
    runs: Sequence[Run],
    entries: Sequence[Entry],
    table: Accuracies,
    ablations: Sequence[Ablation],
    cache: FeatureCache | None,
    images: Path | None = None,
) -> None:
    """Write the page to `path` and its figures beside it, into `figures/`.

    cache: what the runs were made on, for the parts that need features or images; None where it is
        not to be had. images: the folder of the original images, where the user names one.
    Raises UserError for parts of a run that cannot be read, and where nothing can be written.
    """
    verdict = judge(entries)
    sections = _sections(runs, entries, table, ablations, verdict, cache, images)
    page = rendered(
        TEMPLATE,
        title=_title(runs[0]),
        first=first_screen(verdict),
        facts=provenance_facts(runs, table),
        plans=plans(runs),
        sections=sections,
    )
    with writing(path.parent):
        refuse_links(path.parent, [FIGURES])
        folder = path.parent / FIGURES
        folder.mkdir(parents=True, exist_ok=True)
        for section in sections:
            for picture in section.pictures:
                write_bytes(folder / f"{picture.name}.svg", picture.svg, sync=False)
                write_bytes(folder / f"{picture.name}.png", picture.png, sync=False)
        write_text(path, page)


def _title(run: Run) -> str:
    about = run.provenance
    return printable(f"{about.dataset['name']}, {about.backbone['name']}")


def _sections(
    runs: Sequence[Run],
    entries: Sequence[Entry],
    table: Accuracies,
    ablations: Sequence[Ablation],
    verdict: Verdict | None,
    cache: FeatureCache | None,
    images: Path | None,
) -> list[Section]:
    sections: list[Section | None] = [accuracy_section(table, published(runs[0].provenance))]
    sections.append(pairs_section(entries, table.shots))
    sections.append(_beside_the_mean(entries))
    sections.append(selection_section(entries))
    sections += map(ablation_section, ablations)
    pair = _pair(verdict)
    if verdict and pair:
        if cache is None:
            words = (
                "The cache that the runs were made on was not found; name it with --cache for the "
                "test images before and after adapting, and for those helped and hurt most."
            )
            sections.append(Section("Test images before and after", [words]))
        else:
            sections.append(_manifold(verdict, pair, cache))
        sections += [class_section(pair), calibration_section(pair)]
        if cache is not None:
            sections.append(image_section(pair, cache, images))
    return [section for section in sections if section]


def _beside_the_mean(entries: Sequence[Entry]) -> Section | None:
    """What a mean accuracy hides, and what was chosen for each task."""
    lines = [*beside_guessing(entries), *beside_the_mean(entries)]
    tables = [table for e in entries if e.asked and (table := chosen_settings(e))]
    if not (lines or tables):
        return None
    text = [printable(f"{line[:1].upper()}{line[1:]}.") for line in lines]
    return Section("Beside the mean", text, tables=tables)


def _pair(verdict: Verdict | None) -> Pair | None:
    """Zero-shot CLIP and the adapter that the first screen is about."""
    if verdict is None or verdict.zero_shot is None:
        return None
    before, after = (
        entry.predictions(verdict.shots) for entry in (verdict.zero_shot.other, verdict.entry)
    )
    seeds = verdict.zero_shot.seeds
    return Pair(
        [before[seed] for seed in seeds],
        [after[seed] for seed in seeds],
        verdict.zero_shot.other.label,
        verdict.entry.label,
        verdict.entry.first.class_names,
    )


def _manifold(verdict: Verdict, pair: Pair, cache: FeatureCache) -> Section | None:
    """Of the first seed's adapter."""
    entry, shots = verdict.entry, verdict.shots
    assert verdict.zero_shot is not None
    for seed in verdict.zero_shot.seeds:
        _, run = entry.rows[shots, seed]
        folder = run.path / adapter_folder(entry.method.name, shots, seed)
        if not folder.is_dir():  # a baseline of that run
            continue
        adapter = load_adapter(folder)
        name = f"{entry.label}, {shots_words(shots)}, seed {seed}"
        return manifold_section(space_of(cache, entry, adapter, pair), pair, name)
    return None


def rendered(template: str, **values: object) -> str:
    """One of the pages that lie beside this module."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # our own SVG, in which names are text already
    return environment.get_template(template).render(**values)


def find_cache(runs: Sequence[Run], named: Path | None) -> FeatureCache | None:
    """The cache of the runs, opened: the one that is named, or where it lay when they were made.

    None where it lies there no longer. Raises UserError where the one that is named is another.
    """
    wanted = runs[0].plan.cache_sha256
    if named is not None:
        cache = FeatureCache(named)
        if cache.content_sha256 != wanted:
            cache.close()
            raise UserError(f"{named} is not the cache that {runs[0].path} was made on.")
        return cache
    for path in dict.fromkeys(Path(run.plan.cache) for run in runs):
        try:
            cache = FeatureCache(path)
        except UserError:
            continue
        if cache.content_sha256 == wanted:
            return cache
        cache.close()
    return None


def provenance_facts(runs: Sequence[Run], table: Accuracies) -> Facts:
    """Backbone, data, protocol, selection rule, commands and versions."""
    about = runs[0].provenance
    backbone, dataset = about.backbone, about.dataset
    facts = [
        ("backbone", f"{backbone.get('name')}, weights {backbone.get('pretrained')}"),
        ("weights, SHA-256", str(backbone.get("weights_sha256", "not recorded"))),
        ("data set", _joined(dataset, ("name", "source", "version"))),
        *((f"{split} split", str(words)) for split, words in _splits(about)),
        (
            "classes",
            f"{len(about.class_names)}, with {counted(len(about.templates), 'prompt')} each",
        ),
        ("test images", f"{about.test_images:,}"),
        ("cache, SHA-256", about.cache_sha256),
        ("protocol", "; ".join(dict.fromkeys([*map(_protocol, runs), *table.about[2:]]))),
        *(("command", command_line(run.plan, run.path)) for run in runs),
    ]
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs
    )
    facts += [("versions", words) for words in versions]
    return [(what, printable(words)) for what, words in facts]


def plans(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(folder, its plan in full); where the cache lay on that machine is nobody else's business."""
    documents = []
    for run in runs:
        document = {name: own for name, own in run.plan.document().items() if name != "cache"}
        documents.append((printable(run.path.resolve().name), _compact(document)))
    return documents


def _compact(document: dict[str, object]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False)


def _joined(document: dict[str, object], names: Sequence[str]) -> str:
    return ", ".join(str(document[name]) for name in names if document.get(name) is not None)


def _splits(about: Provenance) -> list[tuple[str, object]]:
    splits = about.dataset.get("splits")
    return list(splits.items()) if isinstance(splits, dict) else []


def _protocol(run: Run) -> str:
    """How the images of a task are drawn."""
    plan = run.plan
    words = ["support images drawn by class from the train split as in CoOp"]
    rule = RULES[plan.select]
    if rule.validation == "few":
        words.append(f"{rule.words} beside them")
    if plan.validation == "join":
        words.append("the validation images joined to them")
    words.append("small classes repeated" if plan.repeat else "small classes taken once")
    if plan.train_classes == "base":
        words.append("fitted on the first half of the classes")
    if plan.augment:
        words.append("augmented views in training")
    return ", ".join(words)
