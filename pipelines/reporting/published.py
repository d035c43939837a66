"""Published test accuracies, with their source and what chose them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

Published = Mapping[str, Mapping[int, float]]
"""Method → shots → test accuracy in [0, 1]."""


@cache
def published_results() -> Mapping[str, Any]:
    """The document published_results.json: source, backbone, shots, methods_of_the_paper,
    selected_on (by method), and per data set and method the accuracies in %."""
    text = files(__package__).joinpath("published_results.json").read_text("utf-8")
    return json.loads(text)


def published_accuracies(dataset: str) -> Published:
    """What was published for a data set of the literature with RN50 and OpenAI's weights, {} for
    any other name. A number that does not depend on the shots stands at each of them."""
    document = published_results()
    shots = document["shots"]
    entry = document["datasets"].get(dataset, {})
    return {
        method: {
            count: percent / 100
            for count, percent in zip(
                shots,
                percents if isinstance(percents, list) else [percents] * len(shots),
                strict=True,
            )
        }
        for method, percents in entry.items()
    }
