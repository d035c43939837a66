"""Published accuracies, for runs on the data sets and the backbone that they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from clip_adapter.pipelines.fitting.provenance import Provenance


@dataclass(frozen=True)
class Published:
    """Of one data set: method → shots → test accuracy in %.

    source: where they come from. selection: method → what its settings were chosen on.
    """

    source: str
    selection: Mapping[str, str]
    accuracies: Mapping[str, Mapping[int, float]]


def published(provenance: Provenance) -> Published | None:
    """The figures of this cache's data set; None where there are none for its backbone."""
    stored, backbone = _stored(), provenance.backbone
    if any(backbone.get(name) != stored["backbone"][name] for name in ("name", "pretrained")):
        return None
    return published_of(str(provenance.dataset.get("name")))


def published_of(dataset: str) -> Published | None:
    """The figures of a data set of the literature; None for any other name."""
    stored = _stored()
    figures = stored["datasets"].get(dataset)
    if figures is None:
        return None
    accuracies = {
        method: dict(zip(stored["shots"], numbers, strict=True))
        for method, numbers in figures.items()
    }
    return Published(stored["source"], stored["selection"], accuracies)


def published_datasets() -> list[str]:
    """The data sets that there are figures of."""
    return list(_stored()["datasets"])


def published_backbone() -> str:
    """The backbone that the figures are of."""
    return _stored()["backbone"]["name"]


def methods_of_the_paper() -> tuple[str, ...]:
    """What the paper compares, by the names that `fit` has for them."""
    return tuple(_stored()["methods_of_the_paper"])


@cache
def _stored() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("published_results.json").read_text("utf-8"))
