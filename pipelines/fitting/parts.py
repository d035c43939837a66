"""A run in parts that are fitted elsewhere: each a run folder within the run's own, which takes it
over when it is gone on with.

A part is a method at a number of shots, whose seeds share their compiled programs.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from clip_adapter.cluster import Cluster, this_node
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig, Shots, shots_words
from clip_adapter.pipelines.fitting.plan import TASKS
from clip_adapter.pipelines.fitting.preparation import identity_of_step, opened
from clip_adapter.pipelines.fitting.results import TaskKey
from clip_adapter.pipelines.fitting.run import run_steps, runner_of
from clip_adapter.pipelines.fitting.run_folder import PARTS, PLAN


@dataclass(frozen=True)
class Part:
    """config: that resumes the part's folder. steps: the identities of what is to be fitted."""

    config: FitConfig
    method: str
    shots: Shots
    steps: Sequence[tuple[TaskKey, str]]


def fit_parts(configs: Sequence[FitConfig], cluster: Cluster, listener: Listener) -> None:
    """Begin a run for each, or go on with it, and fit all parts of all of them on a cluster. What
    cannot be fitted is said, and stays for whoever goes on with the run."""
    parts = []
    for config in configs:
        with suppress(UserError):  # which `run_fit` raises again
            parts += _parts(config)
    said = set()
    calls = ((os.getcwd(), part) for part in parts)  # noqa: PTH109
    with listener.progress("fit", sum(len(part.steps) for part in parts)) as advance:
        results = cluster.results(_fit, calls, gpu=cluster.gpus > 0, kept=not cluster.gpus)
        for part, (notes, failure) in zip(parts, results, strict=True):
            for sentence in dict.fromkeys(notes):
                if sentence not in said:
                    listener.note(sentence)
            said.update(notes)
            if failure:
                listener.warn(failure)
            advance(len(part.steps), f"{part.method}, {shots_words(part.shots)}")


def _parts(config: FitConfig) -> list[Part]:
    elsewhere = tuple(name for name in config.method if ":" in name)  # to be known there
    resuming = FitConfig(cache=config.cache, method=elsewhere)
    with opened(config, Listener(), may_go_on=True) as run:
        divided = defaultdict(list)
        for step in run.waiting:
            divided[step[2].method.name, step[0].shots].append(identity_of_step(step))
        parts = []
        for (method, shots), steps in divided.items():
            folder = run.folder.path / PARTS / f"{method} {shots}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / PLAN).exists():
                for name in (TASKS, PLAN):  # with the plan it is begun
                    shutil.copyfile(run.folder.path / name, folder / name)
            parts.append(Part(replace(resuming, resume=folder), method, shots, steps))
        return parts


class _Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


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
        return heard.notes, f"{part.method} on node {this_node()}: {error}"
    return heard.notes, ""
