"""`fit` as a command: its files, its table, its numbers."""

import csv
import json
import os
import random
import statistics
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess, run

import numpy as np
import pytest

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.fitting.record import unpacked
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.run_files import files, nearest_of, results, same_fit, selected, summary
from tests.pipelines.tiny_cache import FIT, TinyData, run_fit, short, tiny_data, write_cache

DATA = tiny_data()
SETTINGS = [(alpha, rate) for alpha in ("0.3", "0.9") for rate in ("0.001", "0.01")]
Command = tuple[Path, CompletedProcess]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A grid of 4 on 2 × 2 tasks, run as a process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("command")
    write_cache(folder / "features.h5", DATA)
    grid = ["--alpha", "0.3", "0.9", "--lr", "0.001", "0.01", "--epochs", "10"]
    done = run_fit(folder, *grid, "--shots", "2", "4", "--seeds", "3", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_a_run_leaves_its_files(command: Command):
    run, done = command
    assert done.stderr == ""
    tasks = [f"shots-{shots}-seed-{seed}" for shots in (2, 4) for seed in (3, 1)]
    fitted = [f"adapters/clip-adapter/{task}/adapter" for task in tasks]
    assert set(files(run)) == {
        *(f"{name}.{kind}" for name in ("adapter", *fitted) for kind in ("json", "safetensors")),
        *(
            f"predictions/{method}/{task}.safetensors"
            for method in ("zero-shot", "linear-probe", "clip-adapter")
            for task in tasks
        ),
        *("run.json", "tasks.json", "validation.png", "provenance.json"),
        *("results.csv", "selected.jsonl", "summary.csv"),
    }
    best = run / "adapters/clip-adapter/shots-4-seed-3"
    assert same_fit(run, best), "most shots and the first seed"


def test_the_answer_comes_first_and_the_rest_on_request(command: Command, capsys):
    """A line per method, the best first and marked; nothing ends in blanks."""
    run, done = command
    lines = done.stdout.splitlines()
    assert len(lines) < 20 and all(line == line.rstrip() for line in lines)
    most = [row for row in summary(run) if row["shots"] == "4"]
    means = {row["method"]: float(row["test_accuracy_mean"]) for row in most}
    ranked = sorted(means, key=lambda name: -means[name])
    assert [line.split()[0] for line in lines[3:6]] == ranked
    assert lines[3].split()[1] == "*" and lines[6].startswith("* the best at 4 shots")
    print_run(fit(FitConfig(resume=run, cache=run.parent / "features.h5")), verbose=True)
    more = capsys.readouterr().out
    for words in ("chosen settings of clip-adapter", "does worst on", "compiled or loaded"):
        assert words in more and words not in done.stdout


def test_results_have_a_row_per_fit(command: Command):
    run, _ = command
    header = (run / "results.csv").read_text().splitlines()[0].split(",")
    planned = ("zero-shot", "linear-probe", "clip-adapter")
    ours = list(dict.fromkeys(name for method in planned for name in METHODS[method].hyper))
    assert header[:3] == ["method", "shots", "seed"]
    assert header[3 : 3 + len(ours)] == ours and set(METHODS["clip-adapter"].hyper) <= {*ours}
    assert header[3 + len(ours) :] == (
        ["epochs_run", "best_epoch", "val_accuracy", "val_nll", "status", "seconds", "images"]
    )
    rows = results(run)
    tried = [(r["alpha"], r["learning_rate"]) for r in rows if r["method"] == "clip-adapter"]
    assert tried == SETTINGS * 4
    counts = Counter((r["method"], r["shots"], r["seed"]) for r in rows)
    for shots in ("2", "4"):
        for seed in ("1", "3"):
            assert counts["zero-shot", shots, seed] == 0, "what is no search is no row"
            assert 11 <= counts["linear-probe", shots, seed] <= 15
    assert {row["status"] for row in rows} == {"ok"}
    assert len({tuple(row.items()) for row in rows}) == len(rows)
    for row in rows:
        assert None not in row and None not in row.values()
        images = unpacked(row["images"])  # a bit and a loss for each validation image
        assert float(row["val_accuracy"]) == pytest.approx(images.right.mean())
        assert float(row["val_nll"]) == pytest.approx(images.losses.mean(), rel=1e-5)


def test_the_summary_is_mean_and_deviation_over_seeds(command: Command):
    run, done = command
    lines = summary(run)
    methods = ["zero-shot", "linear-probe", "clip-adapter"]
    assert [(line["method"], line["shots"]) for line in lines] == [
        (method, shots) for shots in ("2", "4") for method in methods
    ]
    for line in lines:
        of_this = (line["method"], int(line["shots"]))
        rows = [row for row in selected(run) if (row["method"], row["shots"]) == of_this]
        assert line["seeds"] == "2" == str(len(rows))
        for measure in ("val_accuracy", "test_accuracy"):
            values = [row[measure] for row in rows]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert float(line[f"{measure}_mean"]) == pytest.approx(mean)
            assert float(line[f"{measure}_std"]) == pytest.approx(deviation, abs=1e-12)
        assert f"{100 * mean:.2f} ± {100 * deviation:.2f}" in done.stdout
    assert all(method in done.stdout for method in methods)
    assert any(float(line["test_accuracy_std"]) > 0 for line in lines)


def test_what_is_printed_says_where_numbers_come_from(command: Command):
    _, done = command
    for words in (
        "tiny-clip (nothing) on tiny: 4 classes, 60 test images",
        "test split: made up",
        "min(shots, 4) validation images per class",
        "mean ± standard deviation over seeds\n",
        "seeds 1, 3\n",
        "run: adapter of clip-adapter at 4 shots, seed 3",
    ):
        assert words in done.stdout


def published(labels: np.ndarray, shots: int, rng: random.Random) -> list[int]:
    """CoOp's draw, written out again."""
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    return [row for rows in groups.values() for row in rng.sample(rows, shots)]


def test_tasks_are_written_in_drawing_order(command: Command):
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


def test_test_accuracies_are_those_of_the_saved_adapters(command: Command):
    """And so is what was predicted, image by image; of zero-shot as NumPy has it in float64."""
    run, _ = command
    features, labels = DATA.splits["test"]
    for row in selected(run):
        key = row["method"], row["shots"], row["seed"]
        predictions = read_predictions(run, *key)
        assert predictions.labels.tolist() == labels.tolist()
        assert row["test_accuracy"] == np.mean(predictions.predicted == labels)
        assert row["test_images"] == len(labels)
        if row["method"] == "clip-adapter":
            task = f"shots-{row['shots']}-seed-{row['seed']}"
            saved = load_adapter(run / "adapters" / row["method"] / task)
            assert saved.info.setting == row["setting"]
            logits = METHODS["clip-adapter"].logits(
                np,
                saved.arrays,
                saved.info.setting,
                features[0].astype(np.float64),
                Head(saved.weights.astype(np.float64), 20.0, 0.5),
            )
            assert predictions.predicted.tolist() == logits.argmax(axis=1).tolist()
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            expected = (odds / odds.sum(axis=1, keepdims=True)).max(axis=1)
            np.testing.assert_allclose(predictions.confidence, expected, atol=1e-4)
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


def test_halving_has_a_row_per_setting_and_rung(cache: Path, tmp_path: Path):
    grid = {"alpha": (0.1, 0.3, 0.5, 0.7, 0.9), "learning_rate": (0.003, 0.01)}
    full = fit(short(cache, tmp_path / "full", **grid))
    halved = fit(short(cache, tmp_path / "halved", search="halving", **grid))
    rows = results(halved.run)
    assert Counter(row["epochs_run"] for row in rows) == {"1": 10, "3": 4, "10": 2}
    (chosen,) = halved.results
    final = [row for row in rows if row["epochs_run"] == "10"]
    best = nearest_of(final)
    assert chosen.setting
    assert (str(chosen.setting["alpha"]), str(chosen.setting["learning_rate"])) == (
        best["alpha"],
        best["learning_rate"],
    )
    assert best in results(full.run), "a full run of this setting ends elsewhere"
    assert not (halved.run / "halving").exists()
    assert (chosen.tried, chosen.compared) == (10, 2)


def test_compiled_programs_are_kept_for_the_next_process(cache: Path, tmp_path: Path):
    programs = tmp_path / "jax"
    before: set[str] = set()
    for name, alpha in (("first", "0.3"), ("second", "0.9")):
        arguments = ["--cache", cache, "--out", name, "--alpha", alpha, "--shots", "3"]
        arguments += ["--epochs", "10", "--baselines"]
        # In a fresh interpreter: JAX takes the folder from its environment where it is imported.
        done = run(
            [FIT, *arguments],
            cwd=tmp_path,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        after = {path.name for path in programs.iterdir() if not path.name.endswith("-atime")}
        assert after
        assert before in (set(), after), "the second run compiled something"
        before = after


def test_results_csv_is_read_by_any_csv_reader(command: Command):
    run, _ = command
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert 0 <= float(row["val_accuracy"]) <= 1
        assert float(row["seconds"]) >= 0
