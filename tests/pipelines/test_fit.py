"""`fit` as a command: its files, its table, its numbers."""

import csv
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from clip_adapter.adapters.methods import METHODS
from clip_adapter.pipelines.adapter_file import load_adapter
from clip_adapter.pipelines.fit import FitConfig, fit
from clip_adapter.pipelines.run_folder import new_folder
from tests.pipelines.run_files import results, selected, summary
from tests.pipelines.tiny_cache import TinyData, run_fit, tiny_data, write_cache

DATA = tiny_data()
SHORT = ["--epochs", "10", "--evaluate-every", "1", "--lr", "0.01"]
SETTINGS = [(alpha, rate) for alpha in ("0.3", "0.9") for rate in ("0.001", "0.01")]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess]:
    """A grid of 4 on 2 × 2 tasks, run as a process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("command")
    write_cache(folder / "features.h5", DATA)
    arguments = ["--alpha", "0.3", "0.9", "--lr", "0.001", "0.01", "--shots", "2", "4"]
    done = run_fit(folder, *arguments, "--seeds", "3", "1", *SHORT[:4], "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_a_run_leaves_its_files(command: tuple[Path, CompletedProcess]):
    run, done = command
    assert all(line.startswith("fit: ") for line in done.stderr.splitlines()), done.stderr
    tasks = [f"shots-{shots}-seed-{seed}" for shots in (2, 4) for seed in (3, 1)]
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        *(f"adapters/{task}/adapter.{kind}" for task in tasks for kind in ("json", "safetensors")),
        *("adapter.json", "adapter.safetensors", "run.json", "tasks.json", "validation.png"),
        *("results.csv", "selected.jsonl", "summary.csv", "provenance.json"),
    }
    top, first = (
        (folder / "adapter.safetensors").read_bytes()
        for folder in (run, run / "adapters" / "shots-4-seed-3")
    )
    assert top == first, "the adapter on top is that of most shots and the first seed"


def test_results_have_a_row_per_fit(command: tuple[Path, CompletedProcess]):
    run, _ = command
    text = (run / "results.csv").read_text()
    assert text.splitlines()[0] == (
        "method,shots,seed,branch,alpha,beta,alpha_init,beta_init,reduction,learning_rate,"
        "weight_decay,optimizer,warmup,drop_last,epochs,batch_size,evaluate_every,C,"
        "epochs_run,best_epoch,val_accuracy,val_nll,status,seconds"
    )
    rows = results(run)
    tried = [(r["alpha"], r["learning_rate"]) for r in rows if r["method"] == "clip-adapter"]
    assert tried == SETTINGS * 4
    counts = Counter((r["method"], r["shots"], r["seed"]) for r in rows)
    for shots in ("2", "4"):
        for seed in ("1", "3"):
            assert counts["zero-shot", shots, seed] == 1
            assert 11 <= counts["linear-probe", shots, seed] <= 15
    assert {row["status"] for row in rows} == {"ok"}
    assert len({tuple(row.items()) for row in rows}) == len(rows)


def test_the_summary_is_mean_and_deviation_over_seeds(command: tuple[Path, CompletedProcess]):
    run, done = command
    lines = summary(run)
    methods = ["zero-shot", "linear-probe", "clip-adapter"]
    assert {(line["method"], line["shots"]) for line in lines} == {
        (method, shots) for method in methods for shots in ("2", "4")
    }
    for line in lines:
        rows = [
            r
            for r in selected(run)
            if (r["method"], str(r["shots"])) == (line["method"], line["shots"])
        ]
        assert line["seeds"] == "2" == str(len(rows))
        for measure in ("val_accuracy", "test_accuracy"):
            values = [row[measure] for row in rows]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert float(line[f"{measure}_mean"]) == pytest.approx(mean)
            assert float(line[f"{measure}_std"]) == pytest.approx(deviation, abs=1e-12)
        assert f"{100 * mean:.2f} ± {100 * deviation:.2f}" in done.stdout
    assert all(method in done.stdout for method in methods)
    assert any(float(line["test_accuracy_std"]) > 0 for line in lines)


def test_what_is_printed_says_where_numbers_come_from(command: tuple[Path, CompletedProcess]):
    _, done = command
    for words in (
        "tiny-clip (nothing) on tiny: 4 classes, 60 test images",
        "test split: made up",
        "min(shots, 4) validation images per class",
        "standard deviation over seeds 3, 1",
        "2 programs compiled or loaded",
    ):
        assert words in done.stdout


def published(labels: np.ndarray, shots: int, rng: random.Random) -> list[int]:
    """CoOp's draw, as DESIGN states it."""
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    return [
        row
        for rows in groups.values()
        for row in (rng.sample(rows, shots) if len(rows) >= shots else rng.choices(rows, k=shots))
    ]


def test_tasks_are_written_in_drawing_order(command: tuple[Path, CompletedProcess]):
    run, _ = command
    documents = json.loads((run / "tasks.json").read_text())
    assert [(d["shots"], d["seed"]) for d in documents] == [
        (shots, seed) for shots in (2, 4) for seed in (3, 1)
    ]
    for document in documents:
        rng = random.Random(document["seed"])
        support = published(DATA.splits["train"][1], document["shots"], rng)
        validation = published(DATA.splits["val"][1], document["shots"], rng)
        assert document["support"] == [f"train/{row}" for row in support]
        assert document["validation"] == [f"val/{row}" for row in validation]


def test_test_accuracies_are_those_of_the_saved_adapters(command: tuple[Path, CompletedProcess]):
    run, _ = command
    features, labels = DATA.splits["test"]
    for row in selected(run):
        if row["method"] == "clip-adapter":
            saved = load_adapter(run / "adapters" / f"shots-{row['shots']}-seed-{row['seed']}")
            logits = METHODS["clip-adapter"].logits(
                saved.info.setting, saved.arrays, features[0], saved.weights, 20.0, 0.5
            )
            assert row["test_accuracy"] == np.mean(logits.argmax(axis=1) == labels)
        elif row["method"] == "zero-shot":
            assert row["test_accuracy"] == pytest.approx(zero_shot_accuracy(DATA, 0, 4))


def zero_shot_accuracy(data: TinyData, first: int, last: int) -> float:
    """Among the classes first…last−1, by NumPy in float64."""
    features, labels = data.splits["test"]
    rows = (labels >= first) & (labels < last)
    text = data.text.astype(np.float64)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    weights = text.mean(axis=1)[first:last]
    weights /= np.linalg.norm(weights, axis=-1, keepdims=True)
    guesses = first + (features[0, rows] @ weights.T).argmax(axis=1)
    return float(np.mean(guesses == labels[rows]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


def short(cache: Path, run: Path, **values: object) -> FitConfig:
    stated: dict = {"shots": (4,), "epochs": 10, "evaluate_every": 1, "lr": (0.01,)}
    return FitConfig(cache=cache, out=run, **stated | values)


def test_halving_has_a_row_per_setting_and_rung(cache: Path, tmp_path: Path):
    grid = {"alpha": (0.1, 0.3, 0.5, 0.7, 0.9), "lr": (0.003, 0.01), "baselines": ()}
    full = fit(short(cache, tmp_path / "full", **grid))
    halved = fit(short(cache, tmp_path / "halved", search="halving", **grid))
    rows = results(halved.run)
    assert Counter(row["epochs_run"] for row in rows) == {"1": 10, "3": 4, "10": 2}
    (chosen,) = halved.selected
    final = [row for row in rows if row["epochs_run"] == "10"]
    best = min(final, key=lambda r: (-float(r["val_accuracy"]), float(r["val_nll"])))
    assert (str(chosen["alpha"]), str(chosen["learning_rate"])) == (
        best["alpha"],
        best["learning_rate"],
    )
    assert best in results(full.run), "a full run of this setting ends elsewhere"
    assert not (halved.run / "halving").exists()
    assert (chosen["tried"], chosen["trained_as_long"]) == (10, 2)
    accuracies = [float(row["val_accuracy"]) for row in final]
    error = (max(accuracies) * (1 - max(accuracies)) / 16) ** 0.5  # 4 images for each of 4 classes
    close = sum(accuracy >= max(accuracies) - error for accuracy in accuracies)
    assert chosen["within_one_standard_error"] == close


def test_one_value_each_is_a_grid_of_one(cache: Path, tmp_path: Path):
    result = fit(short(cache, tmp_path / "run", alpha=(0.5,), baselines=()))
    assert len(results(result.run)) == 1
    (row,) = result.selected
    assert (row["method"], row["tried"]) == ("clip-adapter", 1)
    (line,) = result.summary
    assert line["test_accuracy_std"] is None


def test_by_default_four_ratios_are_tried(cache: Path, tmp_path: Path):
    result = fit(short(cache, tmp_path / "run", baselines=()))
    assert [row["alpha"] for row in results(result.run)] == ["0.2", "0.4", "0.6", "0.8"]


def test_the_paper_preset(cache: Path, tmp_path: Path):
    config = FitConfig(cache=cache, out=tmp_path / "run", preset="paper", shots=(4,), baselines=())
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
    }
    assert setting.items() >= stated.items()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path: Path):
    folders = [new_folder(tmp_path / "runs") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)


def test_another_method_and_its_baselines(cache: Path, tmp_path: Path, capsys):
    result = fit(short(cache, tmp_path / "run", method="linear-probe", baselines=("zero-shot",)))
    assert [row["method"] for row in result.selected] == ["zero-shot", "linear-probe"]
    assert load_adapter(result.run).info.method == "linear-probe"
    assert "clip-adapter" not in capsys.readouterr().out.replace(str(result.run), "")


def test_without_a_test_split_there_is_no_test_accuracy(tmp_path: Path, capsys):
    cache = write_cache(tmp_path / "features.h5", DATA.with_split("test", None))
    result = fit(short(cache, tmp_path / "run", alpha=(0.5,), baselines=("zero-shot",)))
    assert {row["test_accuracy"] for row in result.selected} == {None}
    assert {line["test_accuracy_mean"] for line in result.summary} == {None}
    assert "–" in capsys.readouterr().out
    assert (result.run / "adapter.json").exists()


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"branch": "text", "alpha": (0.5,)}, ["--alpha has no effect with --branch text."]),
        ({"beta": (0.5,)}, ["--beta has no effect with --branch image."]),
        (
            {"alpha": (0.5,), "alpha_init": 0.1},
            ["--alpha-init has no effect without --alpha learned or hypernet."],
        ),
        ({"branch": "both", "alpha": (0.5,), "beta": ("learned",), "beta_init": 0.1}, []),
        (
            {"method": "zero-shot", "lr": (0.1,), "beta": (0.2,)},
            ["--lr has no effect with --method zero-shot."],
        ),
    ],
)
def test_options_without_effect_are_named(options: dict, sentences: list[str]):
    assert FitConfig(**options, baselines=()).without_effect() == sentences


def test_a_class_with_too_few_images_gives_each_once_and_is_said(tmp_path: Path, capsys):
    data = tiny_data(train=(9, 3, 9, 9))
    cache = write_cache(tmp_path / "features.h5", data)
    result = fit(short(cache, tmp_path / "run", alpha=(0.5,), baselines=()))
    printed = capsys.readouterr().out
    assert "1 class has fewer than 4 training images: each taken once" in printed
    (document,) = json.loads((result.run / "tasks.json").read_text())
    labels = data.splits["train"][1]
    drawn = [row for row in document["support"] if labels[int(row.split("/")[1])] == 1]
    assert len(drawn) == 3 == len(set(drawn))


def test_few_validation_images_are_taken_once_and_said(tmp_path: Path, capsys):
    """And each counts once in the standard error of the choice."""
    data = tiny_data(val=2)
    cache = write_cache(tmp_path / "features.h5", data)
    result = fit(short(cache, tmp_path / "run", alpha=(0.1, 0.5, 0.9), baselines=()))
    printed = capsys.readouterr().out
    assert "4 classes have fewer than 4 validation images: each taken once" in printed
    (document,) = json.loads((result.run / "tasks.json").read_text())
    assert len(document["validation"]) == 8
    (row,) = result.selected
    best = row["val_accuracy"]
    judged = len(set(document["validation"]))
    error = (best * (1 - best) / judged) ** 0.5
    accuracies = [float(fitted["val_accuracy"]) for fitted in results(result.run)]
    assert row["within_one_standard_error"] == sum(a >= best - error for a in accuracies)


@pytest.mark.parametrize("rule", ["few-shot-val", "full-val"])
def test_how_many_validation_images_a_rule_takes(cache: Path, tmp_path: Path, rule: str):
    result = fit(short(cache, tmp_path / "run", method="zero-shot", baselines=(), select=rule))
    (document,) = json.loads((result.run / "tasks.json").read_text())
    assert len(document["validation"]) == {"few-shot-val": 16, "full-val": 24}[rule]


def test_one_shot_cannot_be_cross_validated_and_says_so(cache: Path, tmp_path: Path, capsys):
    """Defaults are taken where they are among the values given, the first ones elsewhere."""
    grid = {"alpha": (0.3, 0.9), "lr": (1e-4, 1e-3), "reduction": (2, 4), "select": "cv"}
    result = fit(short(cache, tmp_path / "run", shots=(1, 4), **grid))
    printed = capsys.readouterr().out
    assert "on the support set (at 1 shots a class has one image: nothing, the defaults)" in printed
    single = {row["method"]: row for row in result.selected if row["shots"] == 1}
    assert all("cv impossible: defaults taken" in row["note"] for row in single.values())
    assert not any("val_accuracy" in row for row in single.values())
    chosen = single["clip-adapter"]
    assert (chosen["alpha"], chosen["learning_rate"], chosen["reduction"]) == (0.3, 1e-3, 4)
    assert single["linear-probe"]["C"] == 0.316


def test_only_augment_trains_on_further_views(tmp_path: Path):
    """And only those of the adapter, not of the baselines."""
    data = tiny_data(views=3)
    features, labels = data.splits["train"]
    other = features.copy()
    other[1:] = np.random.default_rng(5).normal(size=other[1:].shape)
    caches = [
        write_cache(tmp_path / "one.h5", data),
        write_cache(tmp_path / "other.h5", data.with_split("train", (other, labels))),
    ]
    for augment in (False, True):
        one, two = (
            fit(short(cache, tmp_path / f"{cache.stem}-{augment}", alpha=(0.8,), augment=augment))
            for cache in caches
        )
        alike = [a == b for a, b in zip(one.selected, two.selected, strict=True)]
        assert alike == [True, True, not augment]
    plain = fit(
        short(
            write_cache(tmp_path / "first.h5", first_view(data)), tmp_path / "plain", alpha=(0.8,)
        )
    )
    assert plain.selected == selected(tmp_path / "one-False")


def first_view(data: TinyData) -> TinyData:
    features, labels = data.splits["train"]
    return data.with_split("train", (features[:1], labels))


def test_base_to_new(tmp_path: Path, capsys):
    data = tiny_data(train=(9,) * 5, noise=1.0)
    cache = write_cache(tmp_path / "features.h5", data)
    grid = {"branch": "both", "alpha": (0.3, 0.9), "train_classes": "base"}
    result = fit(short(cache, tmp_path / "run", **grid))
    rows = {row["method"]: row for row in result.selected}
    zero = rows["zero-shot"]
    assert zero["test_accuracy"] == pytest.approx(zero_shot_accuracy(data, 0, 3))
    assert zero["new_accuracy"] == pytest.approx(zero_shot_accuracy(data, 3, 5))
    harmonic = statistics.harmonic_mean([zero["test_accuracy"], zero["new_accuracy"]])
    assert zero["harmonic_mean"] == pytest.approx(harmonic)
    assert "new_accuracy" not in rows["linear-probe"]

    saved = load_adapter(result.run)
    assert saved.info.class_names == ["class 0", "class 1", "class 2"]
    row = rows["clip-adapter"]
    features, labels = data.splits["test"]
    text = data.text / np.linalg.norm(data.text, axis=-1, keepdims=True)
    weights = text.mean(axis=1)
    weights /= np.linalg.norm(weights, axis=-1, keepdims=True)
    for name, classes in (("test_accuracy", range(3)), ("new_accuracy", range(3, 5))):
        of_these = np.isin(labels, classes)
        logits = METHODS["clip-adapter"].logits(
            saved.info.setting, saved.arrays, features[0, of_these], weights[classes], 20.0, 0.5
        )
        guesses = classes[0] + logits.argmax(axis=1)
        assert row[name] == pytest.approx(np.mean(guesses == labels[of_these]))
    printed = capsys.readouterr().out
    shown = [row["test_accuracy"], row["new_accuracy"], row["harmonic_mean"]]
    assert " ".join(f"{100 * value:.2f}" for value in shown) in " ".join(printed.split())


def test_a_setting_that_diverges_is_recorded_and_not_chosen(cache: Path, tmp_path: Path, capsys):
    result = fit(short(cache, tmp_path / "run", alpha=(0.5,), lr=(1e30, 0.01), baselines=()))
    assert [row["status"] for row in results(result.run)] == ["failed", "ok"]
    (row,) = result.selected
    assert (row["learning_rate"], row["tried"], row["diverged"]) == (0.01, 2, 1)
    assert "1 diverged" in capsys.readouterr().out


def test_compiled_programs_are_kept_for_the_next_process(cache: Path, tmp_path: Path):
    programs = tmp_path / "jax"
    before: set[str] = set()
    for run, alpha in (("first", "0.3"), ("second", "0.9")):
        arguments = ["--cache", cache, "--out", run, "--alpha", alpha, "--shots", "3", *SHORT]
        arguments += ["--baselines"]
        done = run_fit(tmp_path, *arguments, JAX_COMPILATION_CACHE_DIR=str(programs))
        assert done.returncode == 0, done.stderr
        after = {path.name for path in programs.iterdir() if not path.name.endswith("-atime")}
        assert after
        assert before in (set(), after), "the second run compiled something"
        before = after


def test_results_csv_is_read_by_any_csv_reader(command: tuple[Path, CompletedProcess]):
    run, _ = command
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    for row in rows:
        assert 0 <= float(row["val_accuracy"]) <= 1
        assert float(row["seconds"]) >= 0
