"""`fit --from`: a run's method and setting for another cache; what changed for the old classes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.options import command_line, parse
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.fitting.run_folder import RunFolder
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache

DATA = tiny_data(train=(9,) * 5, test=40)  # the last class came later, and stands first then
NAMES = [f"class {n}" for n in range(5)]
ORDER = [4, 0, 1, 2, 3]


def some_classes(order: list[int]) -> TinyData:
    """DATA's classes of these numbers, in this order."""
    place = {old: new for new, old in enumerate(order)}
    splits = {}
    for name, (features, labels) in DATA.splits.items():
        kept = np.isin(labels, order)
        splits[name] = features[:, kept], np.array([place[n] for n in labels[kept].tolist()])
    return TinyData(splits, DATA.text[order])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from")
    write_cache(folder / "old.h5", some_classes([0, 1, 2, 3]), NAMES[:4])
    write_cache(folder / "new.h5", some_classes(ORDER), [NAMES[n] for n in ORDER])
    fit(FitConfig(folder / "old.h5", folder / "old", "gda", (), shots=4, seeds=3, select="cv"))
    return folder


class Told(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def taken(place: Path, out: Path, **how: Any) -> FitConfig:
    return FitConfig(cache=place / "new.h5", out=out, from_run=place / "old", baselines=(), **how)


def test_the_setting_is_the_runs_and_nothing_is_searched(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old and the new accuracy on the images of the old classes, computed by other means."""
    told = Told()
    result = fit(replace(taken(place, tmp_path / "run"), baselines=("zero-shot",)), told)
    assert any("the adapter are of one encoder" in sentence for sentence in told.warnings)
    row, old = result.kept, load_adapter(place / "old")
    assert row is not None and (row.method, row.shots, row.seed) == ("gda", 4, 3)
    assert row.setting == old.info.setting and row.val_accuracy is None and row.tried == 1
    before = evaluate(  # the new class left out
        EvaluateConfig(place / "new.h5", place / "old", classes=mapping(tmp_path))
    )
    own = read_predictions(tmp_path / "run", "gda", 4, 3)
    kept = own.labels != 0
    now = own.right[kept].mean()
    assert len(before.labels) == kept.sum() == 160 and before.accuracy != now
    assert row.note == (
        f"the setting of {place / 'old'}; on 160 test images of its 4 classes "
        f"{100 * before.accuracy:.2f} % there → {100 * now:.2f} % here beside 1 new class"
    )
    print_run(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert row.note in printed
    assert f"selected on nothing here: the setting is that of {place / 'old'}" in printed
    report(ReportConfig((tmp_path / "run",), html="none"))
    printed = "".join(capsys.readouterr().out.split())  # a long path is broken where a line ends
    assert f"selectedonnothinghere:thesettingisthatof{place / 'old'}" in printed


def mapping(folder: Path) -> Path:
    path = folder / "classes.json"
    path.write_text(json.dumps({NAMES[4]: None}))
    return path


def test_the_same_as_saying_it(place: Path, tmp_path: Path) -> None:
    """All values given by hand; and the command that the plan amounts to."""
    first = fit(taken(place, tmp_path / "run", shots=2, refit=True, method="gda"))
    setting = {n: (v,) for n, v in load_adapter(place / "old").info.setting.items()}
    by_hand = FitConfig(
        place / "new.h5", tmp_path / "hand", "gda", (), (2,), (3,), select="none", hyper=setting,
        refit=True,
    )  # fmt: skip
    assert fit(by_hand).results[0].test_accuracy == first.results[0].test_accuracy
    for name, array in load_adapter(tmp_path / "hand").arrays.items():
        np.testing.assert_array_equal(load_adapter(tmp_path / "run").arrays[name], array)
    command = command_line(first.plan, tmp_path / "run").split()
    assert command[:3] == ["fit", "--from", str(place / "old")]
    again = parse(
        [*command[1:], "--cache", str(place / "new.h5"), "--out", str(tmp_path / "again")]
    )
    assert fit(again).plan == first.plan


def test_the_epoch_that_was_kept(place: Path, tmp_path: Path) -> None:
    """A run that kept its best epoch is trained as far as that, where nothing can judge."""
    config = short(place / "old.h5", tmp_path / "old", epoch="best", learning_rate=0.05, epochs=30)
    old = fit(config).kept
    assert old is not None and old.epoch is not None and old.epoch < 30
    row = fit(replace(taken(place, tmp_path / "run"), from_run=tmp_path / "old")).kept
    assert row is not None and row.epoch == old.epoch
    again = fit(
        short(
            place / "new.h5",
            tmp_path / "stopped",
            select="none",
            hyper={n: (v,) for n, v in (old.setting or {}).items()} | {"epoch": ("last",)},
        )
    ).kept
    assert again is not None
    arrays = [load_adapter(tmp_path / name).arrays for name in ("run", "stopped")]
    assert any(not np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


def test_a_killed_run_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(taken(place, tmp_path / "whole", seeds=(1, 2)))

    def stop(self: RunFolder, result: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add_result", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(taken(place, tmp_path / "run", seeds=(1, 2)))
    assert fit(FitConfig(resume=tmp_path / "run")).results == whole.results
    with pytest.raises(UserError, match="--resume takes no --from:"):
        fit(FitConfig(resume=tmp_path / "run", from_run=place / "old"))
    plan = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plan["from_run"] == str(place / "old") and len(plan["from_sha256"]) == 64


@pytest.mark.parametrize(
    ("how", "flag"),
    [
        ({"method": "tip-adapter"}, "method"),
        ({"select": "cv"}, "select"),
        ({"preset": "paper"}, "preset"),
        ({"score": "balanced-accuracy"}, "score"),
        ({"train_classes": "base"}, "train-classes"),
        ({"hyper": {"alpha": (0.5,)}}, "alpha"),
    ],
)
def test_what_contradicts_it_is_refused(
    place: Path, tmp_path: Path, how: dict[str, Any], flag: str
) -> None:
    config = taken(place, tmp_path / "run", **how)
    words = f"takes gda with the setting chosen there, so --{flag} contradicts it"
    with pytest.raises(UserError, match=words):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compared_is_said(place: Path, tmp_path: Path) -> None:
    renamed = write_cache(tmp_path / "r.h5", some_classes(ORDER), ["a", "b", *NAMES[1:4]])
    row = fit(replace(taken(place, tmp_path / "one"), cache=renamed)).kept
    assert row is not None
    assert row.note.endswith("not compared with it: its classes 'class 0' are not in this cache")
    untested = write_cache(tmp_path / "u.h5", some_classes(ORDER).with_split("test", None), NAMES)
    row = fit(replace(taken(place, tmp_path / "two"), cache=untested)).kept
    assert row is not None and row.note.endswith("not compared with it: there are no test images")
    with pytest.raises(UserError, match=r"There is no adapter at .*nowhere"):
        fit(replace(taken(place, tmp_path / "three"), from_run=tmp_path / "nowhere"))


def test_images_that_the_old_adapter_has_seen_do_not_count(place: Path, tmp_path: Path) -> None:
    """Its training images among the test images of the new cache, as when splits were cut anew."""
    data = some_classes(ORDER)
    features, labels = (
        np.concatenate(p, axis=a)
        for p, a in (
            ([data.splits[s][0] for s in ("test", "train")], 1),
            ([data.splits[s][1] for s in ("test", "train")], 0),
        )
    )
    mixed = data.with_split("test", (features, labels))
    cache = write_cache(tmp_path / "mixed.h5", mixed, [NAMES[n] for n in ORDER])
    row = fit(replace(taken(place, tmp_path / "run"), cache=cache)).kept
    assert row is not None
    found = re.search(r"on (\d+) test images of its 4 classes", row.note)
    assert found and int(found[1]) == 160 + 4 * 9 - 4 * 4
