"""Images that belong together, in `fit` and `evaluate`: no fold and no choice parts them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate, main
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.groups import folds_of_some
from clip_adapter.pipelines.fitting.tasks import (
    MAX_FOLDS,
    TaskRows,
    cross_validation,
    draw_tasks,
    only_classes,
)
from tests.pipelines.tiny_cache import tiny_data, write_cache

DATA = tiny_data(train=(12,) * 4, test=20)
LABELS = {name: labels.astype(np.int32) for name, (_, labels) in DATA.splits.items()}
EVERY = np.concatenate([LABELS["train"], LABELS["val"]])


def groups_of(size: int, prefix: str = "g") -> dict[str, list[str]]:
    """By split: `size` images of one class are of one group; no two splits share one."""
    named: dict[str, list[str]] = {}
    for split, labels in LABELS.items():
        seen = dict.fromkeys(range(4), 0)
        named[split] = []
        for label in labels.tolist():
            named[split].append(f"{prefix}{split}-{label}-{seen[label] // size}")
            seen[label] += 1
    return named


def write(path: Path, groups: dict[str, list[str]]) -> Path:
    return write_cache(path, DATA, groups=groups)


@pytest.mark.parametrize("seed", range(6))
def test_folds_keep_groups_whole_and_every_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 14, len(EVERY))  # most of them of several classes
    (rows,) = draw_tasks(
        LABELS["train"], LABELS["val"], 4, ("all",), (1,), "cv", repeat=False, groups=groups
    )
    folds = cross_validation(rows, EVERY)
    assert 2 <= len(folds) <= MAX_FOLDS
    judged = np.concatenate([fold.validation for fold in folds])
    assert sorted(judged.tolist()) == sorted(rows.support.tolist())
    for fold in folds:
        assert not np.intersect1d(groups[fold.support], groups[fold.validation]).size
        assert set(EVERY[fold.support].tolist()) == set(range(4))
        assert len(fold.validation) < 2 * len(rows.support) / len(folds)


def test_groups_of_one_image_are_no_groups() -> None:
    """The same folds as without, also of images that were drawn repeatedly."""
    for shots, repeat in ((3, False), (12, True), ("all", False)):
        how: dict[str, Any] = {"repeat": repeat}
        (plain,) = draw_tasks(LABELS["train"], None, 4, (shots,), (2,), "cv", **how)
        own = np.arange(len(LABELS["train"]))
        (grouped,) = draw_tasks(LABELS["train"], None, 4, (shots,), (2,), "cv", **how, groups=own)
        for one, other in zip(*(cross_validation(r, EVERY) for r in (plain, grouped)), strict=True):
            assert one.validation.tolist() == other.validation.tolist()
            assert one.support.tolist() == other.support.tolist()


def test_what_cannot_be_divided_chooses_nothing() -> None:
    """A class in one group; and two classes whose two groups are one and the same."""
    support = np.arange(8)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    none = np.zeros(0, np.int64)
    for groups in ([0, 0, 0, 0, 1, 1, 2, 2], [0] * 8):
        rows = TaskRows(4, 1, support, none, groups=np.array(groups))
        assert cross_validation(rows, labels) == []
    rows = TaskRows(4, 1, support, none, groups=np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    assert [fold.validation.tolist() for fold in cross_validation(rows, labels)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]
    kept = only_classes(rows, 1, labels, None)
    assert kept.groups is not None and kept.groups.tolist() == [0, 0, 1, 1]


def test_what_judges_is_of_no_group_that_is_trained_on() -> None:
    groups = np.concatenate([np.arange(48) // 2, np.arange(24)])
    for rule, shots in (("few-shot-val", 3), ("full-val", 3), ("full-val", "all")):
        arguments = LABELS["train"], LABELS["val"], 4, (shots,), (1,), rule
        if shots == "all":
            with pytest.raises(UserError, match="Every validation image is of a group"):
                draw_tasks(*arguments, repeat=False, groups=groups)
            continue
        (rows,) = draw_tasks(*arguments, repeat=False, groups=groups)
        assert len(rows.validation)
        own = groups[48 + rows.validation]
        assert not np.isin(own, groups[rows.support]).any()
        free = ~np.isin(groups[48:], groups[rows.support])
        assert rule != "full-val" or len(rows.validation) == free.sum()


class Told(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def gda(cache: Path, out: Path, **how: Any) -> FitConfig:
    return FitConfig(cache=cache, out=out, method=("gda",), baselines=(), **{"select": "cv"} | how)


def test_fit_by_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images drawn are those of a cache without groups; what chooses is not."""
    cache, plain = (
        write(tmp_path / "f.h5", groups_of(3)),
        write_cache(tmp_path / "plain.h5", DATA),
    )
    with pytest.raises(UserError, match="--select loo leaves out single images"):
        fit(gda(cache, tmp_path / "loo", select="loo"))
    told = Told()
    result = fit(gda(cache, tmp_path / "run", shots=(1, 8)), told)
    other = fit(gda(plain, tmp_path / "plain", shots=(1, 8)))
    assert told.notes == []
    tasks, expected = ((tmp_path / name / "tasks.json").read_text() for name in ("run", "plain"))
    assert json.loads(tasks) == json.loads(expected)
    assert result.plan.groups.startswith("24 groups ")
    assert "groups" not in other.plan.document()
    assert [row.val_nll for row in result.results] != [row.val_nll for row in other.results]
    print_run(result)
    assert (
        "selected on cross-validation on the support set, divided by groups (at 1 shot a class has "
        "images of one group alone: nothing, the defaults)"
    ) in " ".join(capsys.readouterr().out.split())
    renamed = write(tmp_path / "renamed.h5", groups_of(3, "other-"))
    assert fit(FitConfig(cache=renamed, resume=tmp_path / "run")).results == result.results
    for changed in (plain, write(tmp_path / "changed.h5", groups_of(2))):
        with pytest.raises(UserError, match=r"other groups than when .*run was started"):
            fit(FitConfig(cache=changed, resume=tmp_path / "run"))


def test_groups_that_are_trained_on_and_tested_are_told(tmp_path: Path) -> None:
    groups = groups_of(3)
    groups["test"][5] = groups["train"][7]
    told = Told()
    fit(gda(write(tmp_path / "f.h5", groups), tmp_path / "run", shots=4), told)
    name = repr(groups["train"][7])
    assert any(f"1 group has images in train and in test, such as {name}" in n for n in told.notes)
    groups["test"][5] = groups["val"][7]
    cache, told = write(tmp_path / "joined.h5", groups), Told()
    fit(gda(cache, tmp_path / "joined", shots=4, validation="join"), told)
    assert any(f"such as {groups['val'][7]!r}" in note for note in told.notes)


def test_base_classes_that_nothing_is_left_to_judge_are_refused(tmp_path: Path) -> None:
    """Images of the other classes judge while rows are drawn, and go with these."""
    groups = groups_of(3)
    base = LABELS["val"] < 2
    groups["val"] = [
        "gtrain-0-0" if own else name for own, name in zip(base, groups["val"], strict=True)
    ]
    cache = write(tmp_path / "f.h5", groups)
    with pytest.raises(UserError, match="No validation image of the first half of the classes"):
        fit(gda(cache, tmp_path / "run", shots=12, select="full-val", train_classes="base"))


def test_stated_tasks_part_no_group(tmp_path: Path) -> None:
    groups = groups_of(3)
    groups["val"][0] = groups["train"][0]
    cache = write(tmp_path / "f.h5", groups)
    task = {"shots": 1, "seed": 1, "support": [f"train/{row}" for row in range(8)]}
    (tmp_path / "t.json").write_text(json.dumps([task | {"validation": ["val/1", "val/0"]}]))
    config = gda(cache, tmp_path / "run", tasks=tmp_path / "t.json", select="few-shot-val")
    with pytest.raises(UserError, match=r"of 1 shot, seed 1 that are of one group .* 'val/0'; "):
        fit(config)
    (tmp_path / "t.json").write_text(json.dumps([task | {"validation": ["val/1", "val/2"]}]))
    assert fit(config).kept


def test_accuracy_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a second computation of it, and the standard error of sums over groups."""
    groups = groups_of(7)  # of 20 test images a class: 7, 7, 6
    cache = write(tmp_path / "f.h5", groups)
    fit(gda(cache, tmp_path / "run", shots=4))
    scores = evaluate(EvaluateConfig(cache, tmp_path / "run"))
    right = (scores.predicted == scores.labels).astype(float)
    of_group = {
        name: right[[own == name for own in groups["test"]]] for name in set(groups["test"])
    }
    means = {name: own.mean() for name, own in of_group.items()}
    worst = min(means, key=lambda name: (means[name], -len(of_group[name])))
    found = scores.by_group()
    assert found is not None and found.count == 12 and found.worst is not None
    assert found.mean == pytest.approx(np.mean([*means.values()]))
    assert found.std == pytest.approx(np.std([*means.values()], ddof=1))
    assert found.worst[1] == means[worst] < scores.accuracy
    sums = [(own - right.mean()).sum() for own in of_group.values()]
    assert scores.standard_errors()[0] == pytest.approx(np.sqrt(np.square(sums).sum()) / len(right))
    with pytest.raises(SystemExit):
        main(["--adapter", str(tmp_path / "run"), str(cache)])
    printed = capsys.readouterr().out
    assert "± is a standard error over 12 groups" in printed
    assert f"mean over groups: adapter {100 * found.mean:.2f} % (± {100 * found.std:.2f}" in printed
    assert (
        f"worst group of five images or more: {found.worst[0]}: {100 * means[worst]:.2f}" in printed
    )
    plain = write_cache(tmp_path / "plain.h5", DATA)
    alone = evaluate(EvaluateConfig(plain, tmp_path / "run"))
    assert alone.by_group() is None
    assert alone.standard_errors()[0] == pytest.approx(right.std() / np.sqrt(len(right)))
    few = replace(scores, groups=np.arange(len(right)).astype(object))
    single = few.by_group()
    assert single is not None and (single.worst, single.count) == (None, len(right))


def test_what_is_held_out_for_probabilities_is_whole_groups() -> None:
    """Of a class in one group nothing is left out, nor what is of one group with it."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 1], np.int32)
    units = np.array([0, 0, 1, 2, 3, 4, 5, 6, 6, 6])
    folds = folds_of_some(units, labels, np.arange(10), 4)
    assert folds.tolist() == [0, 0, 1, 2, 0, 1, 2, -1, -1, -1]
    # Without what shares a group with the only image of class 0, class 1 is in one group, too.
    labels = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3], np.int32)
    units = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7])
    folds = folds_of_some(units, labels, np.arange(9), 4)
    assert folds.tolist() == [-1, -1, -1, 0, 1, 2, 0, 1, 2]
    labels = np.repeat(np.arange(2, dtype=np.int32), 5)
    alone = folds_of_some(np.zeros(10, np.int64), labels, np.arange(10), 4)
    assert set(alone.tolist()) == {-1}
