"""What chooses among settings that a few validation images judge."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from clip_adapter.adapters.engine.evaluation import Evaluation, Images
from clip_adapter.adapters.method import Task
from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.choice import Search, t_quantile
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.run import FitResult
from clip_adapter.pipelines.saved.adapter_file import image_hashes, load_adapter
from tests.pipelines.run_files import nearest_of, results
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

RATES = (1e-3, 1e-2, 4e-2, 6e-2, 8e-2, 0.15)


def evaluated(losses: np.ndarray) -> Evaluation:
    images = Images(np.ones(len(losses), bool), losses.astype(np.float32))
    return Evaluation({}, 1, 1, 1.0, float(losses.mean()), 0.0, images)


def search_over(rows: int, weights: np.ndarray | None = None) -> Search:
    labels = np.zeros(rows, np.int32)
    task = Task(None, None, None, labels, None, None, validation_weights=weights)
    return Search(METHODS["clip-adapter"], {}, "default", [task], np.arange(rows))


def test_the_excess_is_the_paired_t_statistic():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 40)).astype(np.float32)
    found = search_over(40).excess(evaluated(one + 0.3), evaluated(other))
    assert found == pytest.approx(ttest_rel(one + np.float32(0.3), other).statistic, rel=1e-5)
    assert search_over(40).excess(evaluated(one), evaluated(one)) == 0
    # Images that count nothing are as if they were not there, but for n / (n − 1).
    weights = np.repeat([1.0, 0.0], 20)
    half = search_over(40, weights).excess(evaluated(one), evaluated(other))
    alone = ttest_rel(one[:20], other[:20]).statistic
    assert half == pytest.approx(alone * np.sqrt((20 / 19) / (40 / 39)), rel=1e-5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that say little, and images enough to judge by."""
    data = tiny_data(noise=1.2, val=15)
    unlike = 2 * np.random.default_rng(1).normal(size=data.text.shape).astype(np.float32)
    poor = TinyData(data.splits, data.text + unlike)
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", poor)


def run(cache: Path, out: Path, rates: tuple[float, ...]) -> FitResult:
    hyper = {"learning_rate": rates, "epochs": 50}
    return fit(FitConfig(cache, out, baselines=(), shots=8, select="full-val", hyper=hyper))


def test_of_the_rates_within_a_standard_error_of_the_likeliest_the_smallest(
    cache: Path, tmp_path: Path
):
    """Computed anew in float64 from what results.csv says of each image."""
    found = run(cache, tmp_path / "run", RATES)
    rows = results(found.run)
    (row,) = found.results
    rate = float(nearest_of(rows)["learning_rate"])
    assert row.setting["learning_rate"] == rate
    likeliest = min(rows, key=lambda r: float(r["val_nll"]))
    assert min(RATES) < rate < float(likeliest["learning_rate"]), "another rule would do it too"


def test_zero_shot_is_outdone_where_validation_shows_it(cache: Path, tmp_path: Path):
    """Trained with a rate of which nothing comes, and with a good one."""
    shown = {}
    for rate in (1e-9, 1e-2):
        (row,) = run(cache, tmp_path / f"{rate}", (rate,)).results
        shown[rate] = row.outdoes_zero_shot
    assert shown == {1e-9: False, 1e-2: True}


@pytest.mark.parametrize("probability", [0.95, 1 - 0.05 / 4, 1 - 0.05 / 100])
def test_the_bound_is_students(probability: float):
    for freedom in (5, 23, 95, 1000):
        assert t_quantile(probability, freedom) == pytest.approx(
            t.ppf(probability, freedom), rel=0.15 if freedom == 5 else 0.01
        )
    assert t_quantile(probability, 1) == np.inf


def test_where_every_setting_says_the_same_the_default_is_taken(cache: Path, tmp_path: Path):
    """At two shots a round leaves GDA one image a class, and with it no covariance."""
    for shots, chosen in ((2, False), (8, True)):
        out = tmp_path / str(shots)
        fit(FitConfig(cache, out, method="gda", baselines=(), shots=shots, select="loo"))
        row = json.loads((out / "selected.jsonl").read_text())
        assert (row["setting"]["alpha"] == "by-shots") != chosen
        assert row["val_accuracy"] is not None


def test_what_joins_is_trained_on_and_known(cache: Path, tmp_path: Path):
    """The adapter has seen the validation images, and the tasks name them."""
    config = FitConfig(cache, tmp_path, method="gda", baselines=(), shots=2, select="loo")
    fit(replace(config, validation="join"))
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert [name.partition("/")[0] for name in task["support"]] == ["train"] * 8 + ["val"] * 8
    with FeatureCache(cache) as opened:
        rows = [opened.ids("val").index(name) for name in task["support"][8:]]
        hashes = image_hashes(opened.features("val", rows, 1)[0], None)
    assert load_adapter(tmp_path).has_seen(hashes).all()
