"""What `fit`'s options do to its choices and numbers."""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.run_folder import new_folder
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.run_files import results
from tests.pipelines.test_fit import zero_shot_accuracy
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache

DATA = tiny_data()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


class Notes(Listener):
    """Keeps what `fit` says of its options, not of how few images there are to calibrate by."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        if not sentence.startswith(("probabilities are calibrated by", "no image was held out")):
            self.notes.append(sentence)


def test_one_value_each_is_a_grid_of_one(cache: Path, tmp_path: Path):
    result = fit(short(cache, tmp_path / "run", alpha=0.5))
    assert len(results(result.run)) == 1
    (row,) = result.results
    assert (row.method, row.tried, row.compared, row.indistinguishable) == ("clip-adapter", 1, 1, 1)
    (line,) = result.summary
    assert line.test_accuracy and line.test_accuracy.std is None
    assert not (result.run / "validation.png").exists(), "nothing to compare"


def test_classes_with_one_text_are_named(tmp_path: Path):
    """Apart by what another batch or 16 bits make of it; those that are near are two."""
    text = np.array(DATA.text)
    noise = np.random.default_rng(0).normal(size=text[0].shape)
    text[3] = 7 * (text[1] + 1e-3 * noise)
    text[2] = text[0] + 0.05 * noise
    cache = write_cache(tmp_path / "features.h5", replace(DATA, text=text))
    notes = Notes()
    fit(FitConfig(cache=cache, out=tmp_path / "run", method="zero-shot", shots=1), notes)
    (note,) = notes.notes
    assert note.startswith("these classes have the same text: 'class 1', 'class 3'; by it, all")


@pytest.mark.parametrize(
    ("select", "judging"), [("loo", 3), ("cv", 3), ("few-shot-val", 3), ("none", 0)]
)
def test_a_method_is_told_how_many_images_judge(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, judging: int
):
    """How long a search takes depends on them, whether they are of val or left out in turn."""
    method = METHODS["gda"]
    counting = replace(method, note=lambda task: f"{len(task.validation_labels)} judge")
    monkeypatch.setitem(METHODS, "gda", counting)
    notes = Notes()
    config = {"method": "gda", "baselines": (), "shots": 3, "hyper": {"alpha": (0.1, 1.0)}}
    if select == "none":
        config["hyper"] = {"alpha": 0.1}
    fit(FitConfig(cache=cache, out=tmp_path / "run", select=select, **config), notes)
    assert f"{judging * DATA.classes} judge" in notes.notes


def test_by_default_four_rates_are_tried(cache: Path, tmp_path: Path):
    hyper = {"epochs": 10}
    result = fit(FitConfig(cache, tmp_path / "run", baselines=(), shots=4, hyper=hyper))
    tried = [(row["alpha"], row["learning_rate"]) for row in results(result.run)]
    assert tried == [("0.2", rate) for rate in ("3e-05", "0.0001", "0.0003", "0.001")]


def test_the_last_epoch_is_kept_unless_the_best_is_asked_for(tmp_path: Path):
    """On a validation set that says so at once: a rate that is far too large."""
    data = tiny_data(noise=3.0)
    cache = write_cache(tmp_path / "features.h5", data)
    harmful = {"alpha": 1.0, "learning_rate": 0.3, "epochs": 20}
    last = fit(short(cache, tmp_path / "last", **harmful))
    best = fit(short(cache, tmp_path / "best", epoch="best", evaluate_every=1, **harmful))
    assert last.results[0].epoch == 20
    assert best.results[0].epoch and best.results[0].epoch < 20
    assert best.results[0].val_accuracy >= last.results[0].val_accuracy  # type: ignore[operator]
    chosen = load_adapter(best.run)
    assert chosen.info.fitted["epoch"] == best.results[0].epoch
    head = Head(chosen.weights, 20.0, 0.5)
    rows = fit_validation_rows(best)
    features, labels = data.splits["val"]
    logits = METHODS["clip-adapter"].logits(
        np, chosen.arrays, chosen.info.setting, features[0, rows], head
    )
    assert np.mean(logits.argmax(axis=1) == labels[rows]) == best.results[0].val_accuracy


def fit_validation_rows(result) -> np.ndarray:  # type: ignore[no-untyped-def]
    (task,) = result.tasks
    return task.validation


def test_the_paper_preset(cache: Path, tmp_path: Path):
    config = FitConfig(cache=cache, out=tmp_path / "run", preset="paper", shots=4, baselines=())
    (setting,) = [row for row in results(fit(config).run)]
    stated = {
        "branch": "image",
        "alpha": "0.2",
        "reduction": "4",
        "learning_rate": "0.002",
        "weight_decay": "0.0005",
        "optimizer": "sgd",
        "warmup": "constant",
        "drop_last": "True",
        "epochs": "200",
        "batch_size": "32",
        "epoch": "last",
    }
    assert setting.items() >= stated.items()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path: Path):
    folders = [new_folder(tmp_path / "runs") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)


def test_another_method_and_its_baselines(cache: Path, tmp_path: Path, capsys):
    config = FitConfig(
        cache=cache, out=tmp_path / "run", shots=4, method="linear-probe", baselines="zero-shot"
    )
    result = fit(config)
    assert [row.method for row in result.results] == ["zero-shot", "linear-probe"]
    assert load_adapter(result.run).info.method == "linear-probe"
    print_run(result, verbose=True)
    assert "clip-adapter" not in capsys.readouterr().out.replace(str(result.run), "")


def test_without_a_test_split_there_is_no_test_accuracy(tmp_path: Path, capsys):
    cache = write_cache(tmp_path / "features.h5", DATA.with_split("test", None))
    result = fit(short(cache, tmp_path / "run", alpha=0.5, baselines=("zero-shot",)))
    assert {row.test_accuracy for row in result.results} == {None}
    assert {line.test_accuracy for line in result.summary} == {None}
    print_run(result, verbose=True)
    assert "–" in capsys.readouterr().out
    assert (result.run / "adapter.json").exists()
    assert not (result.run / "predictions").exists()


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (
            {"branch": "text", "alpha": 0.5},
            ["--alpha has no effect without --branch image or both."],
        ),
        ({"beta": 0.5}, ["--beta has no effect without --branch text or both."]),
        (
            {"alpha": 0.5, "alpha_init": 0.1},
            ["--alpha-init has no effect without --alpha learned or hypernet."],
        ),
        ({"branch": "both", "alpha": 0.5, "beta": "learned", "beta_init": 0.1}, []),
        (
            {"alpha": 0.5, "evaluate_every": 2},
            ["--evaluate-every has no effect without --epoch best."],
        ),
        (
            {"search": "halving", "select": "none", "alpha": 0.5},
            ["--search halving has no effect with --select none."],
        ),
        (
            {"epoch": "best", "select": "none", "alpha": 0.5},
            ["--epoch best has no effect with --select none, where nothing is judged."],
        ),
    ],
)
def test_options_without_effect_are_named(
    cache: Path, tmp_path: Path, options: dict, sentences: list[str]
):
    notes = Notes()
    fit(short(cache, tmp_path / "run", **{"epochs": 1} | options), notes)
    assert notes.notes == sentences


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"augment": True}, "--augment has no effect: none of these methods uses views."),
        ({"search": "halving"}, "--search halving has no effect where no method is trained"),
        ({"preset": "paper"}, "--preset paper has no effect on these methods."),
    ],
)
def test_options_that_the_methods_do_not_use(tmp_path: Path, options: dict, sentence: str):
    cache = write_cache(tmp_path / "features.h5", tiny_data(views=2))
    notes = Notes()
    stated = {"method": "zero-shot", "baselines": (), "shots": 1} | options
    fit(FitConfig(cache=cache, out=tmp_path / "run", **stated), notes)
    assert len(notes.notes) == 1 and notes.notes[0].startswith(sentence)


def test_only_augment_trains_on_further_views(tmp_path: Path):
    """And only those of the methods that use views."""
    data = tiny_data(views=3)
    features, labels = data.splits["train"]
    other = features.copy()
    other[1:] = np.random.default_rng(5).normal(size=other[1:].shape)
    caches = [
        write_cache(tmp_path / "one.h5", data),
        write_cache(tmp_path / "other.h5", data.with_split("train", (other, labels))),
    ]
    both = ("zero-shot", "linear-probe")
    for augment in (False, True):
        one, two = (
            fit(
                short(
                    cache,
                    tmp_path / f"{cache.stem}-{augment}",
                    alpha=0.8,
                    augment=augment,
                    baselines=both,
                )
            ).results
            for cache in caches
        )
        alike = [a == b for a, b in zip(one, two, strict=True)]
        assert alike == [True, True, not augment]
        if not augment:
            plain = one
    first = write_cache(tmp_path / "first.h5", first_view(data))
    assert plain == fit(short(first, tmp_path / "plain", alpha=0.8, baselines=both)).results


def first_view(data: TinyData) -> TinyData:
    features, labels = data.splits["train"]
    return data.with_split("train", (features[:1], labels))


def test_base_to_new(tmp_path: Path, capsys):
    data = tiny_data(train=(9,) * 5, noise=1.0)
    cache = write_cache(tmp_path / "features.h5", data)
    grid = {"branch": "both", "alpha": (0.3, 0.9), "train_classes": "base"}
    baselines = ("zero-shot", "linear-probe")
    result = fit(short(cache, tmp_path / "run", baselines=baselines, **grid))
    rows = {row.method: row for row in result.results}
    zero = rows["zero-shot"]
    assert zero.test_accuracy == pytest.approx(zero_shot_accuracy(data, 0, 3))
    assert zero.new_accuracy == pytest.approx(zero_shot_accuracy(data, 3, 5))
    harmonic = statistics.harmonic_mean([zero.test_accuracy, zero.new_accuracy])
    assert zero.harmonic_mean == pytest.approx(harmonic)
    assert rows["linear-probe"].new_accuracy is None
    assert rows["linear-probe"].harmonic_mean is None

    saved = load_adapter(result.run)
    assert saved.info.class_names == ["class 0", "class 1", "class 2"]
    row = rows["clip-adapter"]
    features, labels = data.splits["test"]
    text = data.text / np.linalg.norm(data.text, axis=-1, keepdims=True)
    weights = text.mean(axis=1)
    weights /= np.linalg.norm(weights, axis=-1, keepdims=True)
    for found, classes in ((row.test_accuracy, range(3)), (row.new_accuracy, range(3, 5))):
        of_these = np.isin(labels, classes)
        head = Head(weights[classes], 20.0, 0.5)
        logits = METHODS["clip-adapter"].logits(
            np, saved.arrays, saved.info.setting, features[0, of_these], head
        )
        guesses = classes[0] + logits.argmax(axis=1)
        assert found == pytest.approx(np.mean(guesses == labels[of_these]))
    print_run(result, verbose=True)
    printed = " ".join(capsys.readouterr().out.split())
    n = int(np.isin(labels, range(3)).sum())
    error = (row.test_accuracy * (1 - row.test_accuracy) / n) ** 0.5
    assert f"clip-adapter base {100 * row.test_accuracy:.2f} ± {100 * error:.2f}" in printed
    assert f"clip-adapter new {100 * row.new_accuracy:.2f}" in printed
    assert f"clip-adapter H * † {100 * row.harmonic_mean:.2f}" in printed


def test_a_setting_that_diverges_is_recorded_and_not_chosen(cache: Path, tmp_path: Path, capsys):
    result = fit(short(cache, tmp_path / "run", alpha=0.5, learning_rate=(1e30, 0.01)))
    assert [row["status"] for row in results(result.run)] == ["failed", "ok"]
    (row,) = result.results
    assert row.setting and row.setting["learning_rate"] == 0.01
    assert (row.tried, row.diverged) == (2, 1)
    print_run(result, verbose=True)
    assert "1 diverged" in capsys.readouterr().out
