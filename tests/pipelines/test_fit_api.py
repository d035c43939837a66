"""`fit` as a function: what it takes, what it returns, and what it leaves alone."""

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.fitting.results import Spread
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.cache.small_cache import STATED, small_content, text, unlabelled
from tests.pipelines.tiny_cache import tiny_data, write_cache

DATA = tiny_data()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


QUIET = """
import logging, signal, sys

def state():
    # optax, flax and orbax set flags and loggers of JAX when they are imported; that is theirs.
    import flax.nnx, optax, jax
    names = sorted(logging.root.manager.loggerDict)
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    return (
        dict(jax.config.values),
        {log.name: (log.level, list(log.handlers), log.disabled) for log in loggers},
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        list(sys.path),
    )

from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
before = state()
result = fit(FitConfig(
    cache=sys.argv[1], out=sys.argv[2], shots=2, search="halving",
    hyper={"alpha": (0.3, 0.9), "epochs": 10, "learning_rate": (0.01, 1e30)},
))
after = state()
for name, one, other in zip(("flags", "loggers", "signals", "path"), before, after):
    if name == "loggers":  # those that were there
        other = {key: other[key] for key in one}
    assert one == other, name
assert len(result.results) == 3
"""


def test_it_prints_nothing_and_changes_nothing_global(cache: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", QUIET, cache, tmp_path / "run"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_prints_nothing_within_a_process(cache: Path, tmp_path: Path, capfd):
    fit(FitConfig(cache, tmp_path / "run", method="zero-shot", baselines=(), shots=2))  # type: ignore[arg-type]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_it_takes_what_a_person_types(cache: Path, tmp_path: Path):
    """One value for several, strings for paths, numbers of NumPy; and what is spelled out."""
    typed = FitConfig(
        cache=str(cache),  # type: ignore[arg-type]
        out=str(tmp_path / "run"),  # type: ignore[arg-type]
        method="clip-adapter",  # type: ignore[arg-type]
        baselines="zero-shot",  # type: ignore[arg-type]
        shots=np.int64(4),  # type: ignore[arg-type]
        seeds=1,  # type: ignore[arg-type]
        hyper={"alpha": 0.6, "epochs": 3, "clip-adapter.learning_rate": np.float64(0.01)},
    )
    spelled = FitConfig(
        cache=cache,
        out=tmp_path / "run",
        method=("clip-adapter",),
        baselines=("zero-shot",),
        shots=(4,),
        seeds=(1,),
        hyper={"alpha": (0.6,), "epochs": (3,), "clip-adapter.learning_rate": (0.01,)},
    )
    assert typed == spelled
    result = fit(typed)
    setting = result.results[-1].setting
    assert setting and setting.items() >= {"alpha": 0.6, "epochs": 3, "learning_rate": 0.01}.items()
    assert FitConfig(seeds=range(3)).seeds == (0, 1, 2)  # type: ignore[arg-type]
    assert FitConfig(shots="all").shots == ("all",)  # type: ignore[arg-type]
    assert FitConfig(cache="~/x.h5").cache == Path.home() / "x.h5"  # type: ignore[arg-type]


def test_rows_are_typed_and_predictions_can_be_read(cache: Path, tmp_path: Path):
    config = FitConfig(
        cache=cache, out=tmp_path / "run", shots=(2, 4), seeds=(1, 2), hyper={"epochs": 3}
    )
    result = fit(config)
    assert [row.key for row in result.results] == [
        (method, shots, seed)
        for shots in (2, 4)
        for seed in (1, 2)
        for method in ("zero-shot", "linear-probe", "clip-adapter")
    ]
    labels = DATA.splits["test"][1]
    for row in result.results:
        assert is_dataclass(row) and all(hasattr(row, field.name) for field in fields(row))
        assert isinstance(row.test_accuracy, float) and isinstance(row.val_accuracy, float)
        predictions = read_predictions(result.run, *row.key)
        assert predictions.labels.tolist() == labels.tolist()
        assert predictions.accuracy == row.test_accuracy == predictions.right.mean()
    for line in result.summary:
        key = line.method, line.shots
        accuracies = [r.test_accuracy for r in result.results if r.key[:2] == key]
        mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
        assert isinstance(line.test_accuracy, Spread) and line.seeds == 2
        assert (line.test_accuracy.mean, line.test_accuracy.std) == pytest.approx((mean, std))
    assert result.kept and result.kept.key == ("clip-adapter", 4, 1)
    assert result.plan.shots == (2, 4) and result.problem == ""
    assert list(result.provenance.class_names) == [f"class {number}" for number in range(4)]


def test_images_without_labels_change_nothing(tmp_path: Path):
    """And alone they are nothing to fit or to score."""
    runs = []
    for name, more in (("plain", {}), ("beside", unlabelled(5))):
        write_content(tmp_path / f"{name}.h5", small_content() | more, **STATED)
        options = {"method": ("tip-adapter",), "baselines": (), "shots": (4,), "select": "none"}
        runs.append(tmp_path / f"run of {name}")
        fit(FitConfig(cache=tmp_path / f"{name}.h5", out=runs[-1], **options))
    for file in ("adapter.safetensors", "tasks.json", "selected.jsonl"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
    assert load_adapter(runs[0]).info.cache_sha256 == load_adapter(runs[1]).info.cache_sha256
    caches = (tmp_path / "plain.h5", tmp_path / "beside.h5")
    one, two = (evaluate(EvaluateConfig(cache, runs[0])).accuracy for cache in caches)
    assert one == two
    alone = tmp_path / "alone.h5"
    write_content(alone, text() | unlabelled(5), **STATED)
    with pytest.raises(UserError, match="no train split, only unlabelled; give a cache of lab"):
        fit(FitConfig(cache=alone, out=tmp_path / "none"))
    with pytest.raises(UserError, match="no test split, only unlabelled"):
        evaluate(EvaluateConfig(alone, runs[0]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"select": "luck"}, "--select must be one of few-shot-val, full-val, cv, loo, none"),
        ({"search": "random"}, "--search must be one of"),
        ({"shots": 2.5}, "--shots 2.5 is no number of images"),
        ({"shots": "some"}, "--shots 'some' is no number of images"),
        ({"hyper": {"sigma": 1}}, "clip-adapter has no sigma; no method has that"),
        ({"hyper": {"C": 1.0}}, "clip-adapter has no C; it belongs to linear-probe"),
        ({"hyper": {"zero-shot.alpha": 1.0}}, "clip-adapter has no alpha"),
        ({"hyper": None}, "hyper is None, not a mapping from names to values"),
        ({"hyper": {"alpha": "much"}}, "alpha is 'much', not"),
        ({"hyper": {"epochs": (3, 4)}}, "epochs takes one value"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(
    cache: Path, tmp_path: Path, values: dict, words: str
):
    with pytest.raises(UserError) as refused:
        fit(FitConfig(**{"cache": cache, "out": tmp_path / "run", "shots": 2} | values))
    assert words in str(refused.value)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
