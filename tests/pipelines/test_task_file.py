"""Tasks that a file states: those of a run, others, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.run import run_fit
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.run_files import adapters, killed_after, results
from tests.pipelines.tiny_cache import tiny_data, write_cache

pytestmark = pytest.mark.usefixtures("pictures_drawn_once")
DATA = tiny_data(train=(9, 7, 8), val=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


@pytest.fixture(scope="module")
def drawn(cache: Path) -> Path:
    return fit(config(cache, cache.parent / "drawn", shots=(1, 4), seeds=(1, 2))).run


def config(cache: Path, out: Path, **values: Any) -> FitConfig:
    usual: dict[str, Any] = {"method": "tip-adapter", "hyper": {"alpha": (1, 2), "beta": 3}}
    return FitConfig(cache=cache, out=out, **usual | values)


def documents(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "tasks.json").read_text())


def test_ids_are_read_once_for_all_tasks(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    ids = FeatureCache.ids

    def listening(self, split, rows=None):  # type: ignore[no-untyped-def]
        read.append(split)
        return ids(self, split, rows)

    monkeypatch.setattr(FeatureCache, "ids", listening)
    fit(config(cache, tmp_path / "run", method="zero-shot", hyper={}, shots=2, seeds=(1, 2, 3)))
    assert sorted(read) == ["test", "train", "val"]


@pytest.mark.parametrize("lines", [False, True])
def test_the_tasks_of_a_run_are_the_run_again(
    cache: Path, drawn: Path, tmp_path: Path, lines: bool
):
    path = drawn / "tasks.json"
    if lines:
        path = tmp_path / "tasks.jsonl"
        path.write_text("".join(json.dumps(task) + "\n" for task in documents(drawn)))
    result = fit(config(cache, tmp_path / "again", tasks=path))
    again = result.run
    assert (result.plan.shots, result.plan.seeds) == ((1, 4), (1, 2))
    assert results(again) == results(drawn)
    assert adapters(again) == adapters(drawn)
    assert documents(again) == documents(drawn)
    assert (again / "summary.csv").read_bytes() == (drawn / "summary.csv").read_bytes()


def test_the_images_are_those_that_it_names(cache: Path, tmp_path: Path, capsys):
    """Training rows first to last and one of val; the latter's features are what val has."""
    support = ["train/8", "train/0", "train/20", "val/3", "train/10"]
    stated = [{"shots": 2, "seed": 7, "support": support, "validation": ["val/0", "val/9"]}]
    (tmp_path / "tasks.json").write_text(json.dumps(stated))
    result = fit(config(cache, tmp_path / "run", tasks=tmp_path / "tasks.json"))
    (rows,) = result.tasks
    count = len(DATA.splits["train"][1])
    assert rows.support.tolist() == [8, 0, 20, count + 3, 10]
    assert (rows.shots, rows.seed, rows.validation.tolist()) == (2, 7, [0, 9])
    labels = np.concatenate([DATA.splits[split][1] for split in ("train", "val")])
    counts = np.bincount(labels[rows.support], minlength=DATA.classes).tolist()
    assert rows.small_classes == tuple(c for c, n in enumerate(counts) if n == 1)
    assert rows.absent_classes == tuple(c for c, n in enumerate(counts) if n == 0)
    print_run(result, verbose=False)
    small, absent = len(rows.small_classes), len(rows.absent_classes)
    said = capsys.readouterr().out
    assert "fewer than 2 training images: as --tasks names them" in said or not small
    assert "without a training image" in said or not absent
    assert small + absent
    joined = config(
        cache,
        tmp_path / "joined",
        tasks=tmp_path / "tasks.json",
        select="loo",
        validation="join",
    )
    (rows,) = fit(joined).tasks
    assert rows.support.tolist() == [8, 0, 20, count + 3, 10, count, count + 9]
    assert rows.validation.tolist() == []


def test_a_run_of_stated_tasks_goes_on(cache: Path, drawn: Path, tmp_path: Path):
    """By what its own folder has of them, which nobody may have changed."""
    tasks = tmp_path / "tasks.json"
    tasks.write_bytes((drawn / "tasks.json").read_bytes())
    stated = config(cache, tmp_path / "run", tasks=tasks)
    with killed_after(1):
        fit(stated)
    tasks.unlink()
    own = tmp_path / "run" / "tasks.json"
    kept = own.read_bytes()
    own.write_bytes(kept.replace(b"train/1", b"train/2", 1))
    with pytest.raises(UserError, match="is not what it was begun with"):
        fit(FitConfig(resume=tmp_path / "run"))
    own.write_bytes(kept)
    with pytest.raises(UserError, match=r"started with other arguments \(tasks\)"):
        drawing = config(cache, tmp_path / "run", shots=(1, 4), seeds=(1, 2))
        run_fit(drawing, Listener(), may_go_on=True)
    assert results(fit(FitConfig(resume=tmp_path / "run")).run) == results(drawn)


def test_validation_images_that_are_trained_on_do_not_judge(cache: Path, tmp_path: Path):
    support = [f"train/{row}" for row in range(24)] + [f"val/{row}" for row in range(4)]
    (tmp_path / "t.json").write_text(json.dumps([TASK | {"support": support, "validation": []}]))
    stated = config(cache, tmp_path / "run", tasks=tmp_path / "t.json", select="full-val")
    known = load_adapter(fit(stated).run).decisions
    assert known is not None and (known.chose, known.images) == (15 - 4, 15 - 4 + 24 + 4)
    support += [f"val/{row}" for row in range(4, 15)]
    (tmp_path / "t.json").write_text(json.dumps([TASK | {"support": support, "validation": []}]))
    with pytest.raises(UserError, match="Every validation image is trained on for 1 shot, seed 1"):
        fit(replace(stated, out=tmp_path / "other"))


TASK = {"shots": 1, "seed": 1, "support": ["train/0"], "validation": ["val/0"]}
REFUSED = {
    "no JSON": ("shots,seed\n1,1\n", "is neither a JSON list nor JSON lines"),
    "an empty list": ([], "states no tasks"),
    "an empty file": ("", "states no tasks"),
    "another document": ({"train": []}, "the list\\[0\\] lacks shots, seed, support"),
    "a number as id": ([TASK | {"support": [3]}], "support\\[0\\] is 3, not a string"),
    "no shots": ([TASK | {"shots": 0}], "shots is 0, not an integer from 1"),
    "a name twice": ('[{"shots": 1, "shots": 2}]', "names 'shots' twice"),
    "an unknown name": ([TASK | {"val": []}], "has 'val', which is not known"),
    "a task twice": ([TASK, TASK], "states the task of 1 shot, seed 1 twice"),
    "a seed missing": (
        [TASK, TASK | {"shots": 2}, TASK | {"seed": 2}],
        "no task of 2 shots with seed 2",
    ),
    "no support": ([TASK | {"support": []}], "names no support image"),
    "a test image": ([TASK | {"support": ["test/0"]}], "not among the train and val .*'test/0'"),
    "a train image to judge": ([TASK | {"validation": ["train/1"]}], "not among the val images"),
    "an image of both": (
        [TASK | {"support": ["train/0", "val/0"]}],
        "both as support and as validation: 'val/0'",
    ),
    "nothing to judge": ([TASK | {"validation": []}], "names none for 1 shot, seed 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(cache: Path, tmp_path: Path, case: str):
    content, sentence = REFUSED[case]
    path = tmp_path / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        fit(config(cache, tmp_path / "run", tasks=path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["shots", "seeds", "repeat"])
def test_what_the_file_says_is_not_said_again(cache: Path, drawn: Path, tmp_path: Path, name: str):
    values: dict[str, Any] = {"shots": (2,), "seeds": (2,), "repeat": True}
    stated = {"tasks": drawn / "tasks.json", name: values[name]}
    with pytest.raises(UserError, match=f"so --{name} is of no use"):
        fit(config(cache, tmp_path / "run", **stated))
    assert not (tmp_path / "run").exists()
