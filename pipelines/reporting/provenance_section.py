"""Where the numbers come from, and how to have them again."""

from __future__ import annotations

import json
from collections.abc import Sequence

from clip_adapter.cache.few_shot import VALIDATION_SHOTS
from clip_adapter.pipelines.fitting.command_line_of import command_line
from clip_adapter.pipelines.fitting.provenance import Provenance
from clip_adapter.pipelines.reporting.accuracies import Accuracies
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.words import counted, printable

Facts = list[tuple[str, str]]
"""(what, how it is)."""


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
        *(("command", command_line(run.plan)) for run in runs),
    ]
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs
    )
    facts += [("versions", words) for words in versions]
    return [(what, printable(words)) for what, words in facts]


def plans(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(folder, its plan in full); where the cache lay on that machine is nobody else's business."""
    found = []
    for run in runs:
        document = {name: own for name, own in run.plan.document().items() if name != "cache"}
        found.append((printable(run.path.resolve().name), _compact(document)))
    return found


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
    if plan.select == "few-shot-val":
        words.append(f"min(shots, {VALIDATION_SHOTS}) validation images per class beside them")
    words.append("small classes repeated" if plan.repeat else "small classes taken once")
    if plan.train_classes == "base":
        words.append("fitted on the first half of the classes")
    if plan.augment:
        words.append("augmented views in training")
    return ", ".join(words)
