"""A run in parts that are fitted elsewhere: each a run folder within the run's own, which takes it
over when it is gone on with.

A part is a method at a number of shots, whose seeds share their compiled programs; where that makes
fewer parts than there are cores, a seed of these.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clip_adapter import files
from clip_adapter.cluster import Cluster, this_node
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig, shots_words
from clip_adapter.pipelines.fitting.plan import TASKS
from clip_adapter.pipelines.fitting.preparation import identity_of_step, opened
from clip_adapter.pipelines.fitting.results import TaskKey
from clip_adapter.pipelines.fitting.run import run_steps, runner_of
from clip_adapter.pipelines.fitting.run_folder import PARTS, PLAN, read_selected

Identity = tuple[TaskKey, str]  # of a result


@dataclass(frozen=True)
class Part:
    """config: that resumes the part's folder. steps: what is to be fitted."""

    config: FitConfig
    steps: Sequence[Identity]

    @property
    def words(self) -> str:
        (method, shots, _), _ = self.steps[0]
        return f"{method}, {shots_words(shots)}"


def fit_parts(configs: Sequence[FitConfig], cluster: Cluster, listener: Listener) -> None:
    """Begin a run for each, or go on with it, and fit all parts of all of them on a cluster. What
    cannot be fitted is said, and stays for whoever goes on with the run."""
    begun = []
    for config in configs:
        with suppress(UserError):  # which `run_fit` raises again
            begun.append((config, _waiting(config)))
    several = sum(len({key[:2] for key, _ in steps}) for _, steps in begun) >= cluster.cores
    parts = [p for config, steps in begun for p in _divided(config, steps, 2 if several else 3)]
    said: set[str] = set()
    calls = ((os.getcwd(), part) for part in parts)  # noqa: PTH109
    results = cluster.results(_fit, calls, gpu=cluster.gpus > 0, kept=not cluster.gpus)
    with listener.progress("fit", sum(len(part.steps) for part in parts)) as advance:
        for part, (notes, failure) in zip(parts, results, strict=True):
            for sentence in dict.fromkeys(notes):
                if sentence not in said:
                    listener.note(sentence)
            said.update(notes)
            if failure:
                listener.warn(failure)
            advance(len(part.steps), part.words)


def _waiting(config: FitConfig) -> list[Identity]:
    """What has no result yet, neither in the run nor in a part of it."""
    assert config.out
    with opened(config, Listener(), may_go_on=True) as run:
        known = {r.identity for p in (config.out / PARTS).glob("*") for r in read_selected(p)}
        return [one for one in map(identity_of_step, run.waiting) if one not in known]


def _divided(config: FitConfig, steps: Sequence[Identity], depth: int) -> list[Part]:
    """By the first of method, shots and seed."""
    assert config.out
    divided: dict[Any, list[Identity]] = defaultdict(list)
    for one in steps:
        divided[one[0][:depth]].append(one)
    elsewhere = tuple(name for name in config.method if ":" in name)  # to be known there
    parts = []
    for key, own in divided.items():
        folder = config.out / PARTS / " ".join(map(str, key))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            for name in (TASKS, PLAN):  # with the plan it is begun
                files.write_bytes(folder / name, (config.out / name).read_bytes())
        resuming = FitConfig(resume=folder, cache=config.cache, method=elsewhere)
        parts.append(Part(resuming, own))
    return parts


class _Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    warn = note


def _fit(folder: str, part: Part) -> tuple[list[str], str]:
    """In a worker. What it said, and a sentence on what could not be done, or ""."""
    from clip_adapter.pipelines.console.jax_setup import set_up_jax

    with suppress(OSError):
        os.chdir(folder)
    heard = _Heard()
    try:
        set_up_jax()
        with opened(part.config, Listener()) as run:
            steps = [step for step in run.waiting if identity_of_step(step) in part.steps]
            run_steps(runner_of(run, heard), run.folder, steps, lambda done, note: None)
    except UserError as error:
        return heard.notes, f"{part.words} on node {this_node()}: {error}"
    return heard.notes, ""
