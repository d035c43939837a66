"""A run whose parts others fit ends as the run of one process does, whoever was lost on the way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.study import parse
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.one_task import TaskRunner
from clip_adapter.pipelines.fitting.parts import fit_parts
from clip_adapter.pipelines.fitting.run import run_fit
from tests.pipelines.run_files import files, killed_after, results
from tests.pipelines.tiny_cache import tiny_data, write_cache

WORDS = "--method clip-adapter tip-adapter --baselines zero-shot --shots 1 2 --seeds 1 2 "
WORDS += "--epochs 3 --clip-adapter.alpha 0.2 0.6 --tip-adapter.alpha 1 --tip-adapter.beta 1 5 "
WORDS += "--ablate alpha"


class Here:
    """A cluster of this process, whose driver is lost after some tasks."""

    gpus = 0

    def __init__(self, cores: int, tasks: int = 10**9) -> None:
        self.cores, self.tasks = cores, tasks
        self.done: list[str] = []

    def results(self, function: Any, calls: Any, **_: Any) -> Iterator[Any]:
        for folder, part in calls:
            if len(self.done) == self.tasks:
                raise KeyboardInterrupt
            self.done.append(part.config.resume.name)
            yield function(folder, part)


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    cache = write_cache(tmp_path_factory.mktemp("cache") / "a.h5", tiny_data(train=(5,) * 3))
    return replace(parse(["--caches", "a.h5", *WORDS.split()]).fit, cache=cache)


@pytest.fixture(scope="module")
def whole(config: FitConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_fit(replace(config, out=out), Listener())
    return out


def assert_alike(run: Path, whole: Path) -> None:
    """As `assert_same_end`, but that ablations fit in one process anew what others in it have
    fitted, and parts keep a row of each."""
    timed = ("results.csv", "run.json")
    one, other = ({n: c for n, c in files(f).items() if n not in timed} for f in (run, whole))
    assert one == other
    rows = [*map(str, results(run))]
    assert {*rows} == {*map(str, results(whole))} and len({*rows}) == len(rows)


def test_parts_end_as_one_process(
    config: FitConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was begun here; after a driver, then a worker, is lost; on few cores and many,
    where a part is of one seed. Nothing is fitted twice."""
    own = replace(config, out=tmp_path / "run")
    with killed_after(2, "add_result"):
        run_fit(own, Listener())
    few = Here(cores=2, tasks=2)
    with pytest.raises(KeyboardInterrupt):
        fit_parts([own], few, Listener())  # type: ignore[arg-type]
    assert few.done == ["tip-adapter 1", "zero-shot 1"]
    many = Here(cores=99)
    with killed_after(3, "add_fit"):
        fit_parts([own], many, Listener())  # type: ignore[arg-type]
    again = Here(cores=99)
    fit_parts([own], again, Listener())  # type: ignore[arg-type]
    assert again.done == [*many.done[-1:], *again.done[1:]]
    assert not {*again.done[1:]} & {*few.done, *many.done}
    assert "clip-adapter 2 1" in again.done
    nothing = Here(cores=2)
    fit_parts([own], nothing, Listener())  # type: ignore[arg-type]
    assert nothing.done == []
    monkeypatch.setattr(TaskRunner, "run", lambda *_: pytest.fail("something was left to fit"))
    run_fit(own, Listener(), may_go_on=True)
    assert not (own.out / "parts").exists()  # type: ignore[operator]
    assert_alike(tmp_path / "run", whole)


def test_what_a_part_cannot_do_is_said_and_left(
    config: FitConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is gone on with where that can be done."""
    own, missing = replace(config, out=tmp_path / "run"), replace(config, cache=tmp_path / "no.h5")
    missing = replace(missing, out=tmp_path / "missing")
    cluster, heard = Here(cores=2), Heard()
    results = cluster.results

    def one_blind_node(function: Any, calls: Any, **how: Any) -> Iterator[Any]:
        folder, part = next(calls)
        lost = replace(part.config, cache=tmp_path / "elsewhere.h5")
        yield function(folder, replace(part, config=lost))
        yield from results(function, calls, **how)

    monkeypatch.setattr(cluster, "results", one_blind_node)
    monkeypatch.setattr("clip_adapter.pipelines.fitting.parts.this_node", lambda: "b (10.0.0.2)")
    fit_parts([missing, own], cluster, heard)  # type: ignore[arg-type]
    (warning,) = heard.warnings
    assert warning.startswith("zero-shot, 1 shot on node b (10.0.0.2): ")
    assert "elsewhere.h5" in warning
    run_fit(own, Listener(), may_go_on=True)
    assert_alike(tmp_path / "run", whole)
