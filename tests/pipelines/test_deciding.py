"""`predict` and `evaluate` with a promise: sets, none of these, hidden classes, and refusals."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import log_loss

from clip_adapter.adapters.decisions import Decisions, class_means, nearest_cosines, probabilities
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate, print_scores
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict, print_predictions
from clip_adapter.pipelines.deciding.answers import answers_of, calibrated_by
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from tests.pipelines.test_held_out import BIAS, FIXED, SCALE, texts, unit
from tests.pipelines.tiny_cache import tiny_data, write_cache

COVERAGE, REJECT = 0.9, 0.1


def decided(adapter: SavedAdapter, digits: Any, count: int) -> SavedAdapter:
    """With digits 50 … as the held-out images, by a temperature that is far from 1."""
    rows = slice(50, 50 + count)
    means = class_means(digits.features[:40], digits.labels[:40], adapter.weights)
    found = Decisions.of(
        adapter.logits(digits.features[rows]),
        digits.labels[rows],
        nearest_cosines(digits.features[rows], means, adapter.weights),
        prior=2.0,
        folds=0,
        chose=0,
        prototypes=means,
    )
    return replace(adapter, decisions=found)


@pytest.fixture
def run(tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], digits: Any) -> Path:
    save_adapter(tmp_path / "run", decided(saved_adapters["tip-adapter"], digits, 40))
    return tmp_path / "run"


@pytest.fixture
def pictures(image_folder: Path) -> Path:
    """Twelve digits and, last, what is none."""
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image_folder / "noise.png")
    return image_folder


def test_probabilities_sets_and_refusals_are_those_of_the_held_out_images(
    run: Path, pictures: Path, digits: Any
) -> None:
    adapter = load_adapter(run)
    known, names = adapter.decisions, np.array(adapter.info.class_names)
    assert known is not None and not 0.9 < known.temperature < 1.1
    config = PredictConfig((pictures,), run, top=10, coverage=COVERAGE, reject=REJECT)
    found = {p.path.name: p for p in predict(config)}
    logits = adapter.logits(digits.features[:12]).astype(np.float64)
    shares = softmax(logits / known.temperature, axis=1)
    q = np.sort(known.scores)[int(np.ceil(41 * COVERAGE)) - 1]
    own = known.known_of(shares, digits.features[:12], adapter.weights)
    several = 0
    for row in range(12):
        prediction = found[f"{row:02}.png"]
        order = np.argsort(-shares[row])
        assert [name for name, _ in prediction.top] == names[order].tolist()
        np.testing.assert_allclose([p for _, p in prediction.top], shares[row, order], atol=1e-4)
        wanted = [c for n, c in enumerate(order) if n == 0 or 1 - shares[row, c] <= q]
        assert prediction.answer is not None
        assert [name for name, _ in prediction.answer.classes] == names[wanted].tolist()
        assert prediction.answer.known == pytest.approx(own[row], abs=1.5 / 41)
        assert prediction.answer.is_none == (prediction.answer.known <= REJECT)
        several += len(wanted) > 1
    assert 0 < several < 12
    strange = found["noise.png"].answer
    assert strange is not None and strange.is_none and strange.classes


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any, **given: Any) -> str:
    assert print_predictions(PredictConfig(*arguments, **given)) == 0
    return capsys.readouterr().out


def test_what_is_printed(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"coverage": COVERAGE, "reject": REJECT}
    found = list(predict(PredictConfig((pictures,), run, **asked)))
    rows = list(csv.reader(StringIO(printed(capsys, (pictures,), run, format="csv", **asked))))
    tops = [f"{name}_{n}" for n in (1, 2, 3) for name in ("class", "probability")]
    assert rows[0] == ["image", "answer", "classes", "known", *tops]
    documents = json.loads(printed(capsys, (pictures,), run, format="json", **asked))
    lines = printed(capsys, (pictures,), run, **asked).splitlines()
    for p, row, document, line in zip(found, rows[1:], documents, lines, strict=True):
        assert p.answer is not None and p.answer.known is not None
        names = [name for name, _ in p.answer.classes]
        answer = "none of these" if p.answer.is_none else p.top[0][0]
        assert row[1:5] == [answer, " | ".join(names), str(document["known"]), p.top[0][0]]
        assert document["answer"] == answer and document["classes"] == names
        assert document["known"] == pytest.approx(p.answer.known, rel=1e-5)
        if p.answer.is_none:
            assert line.endswith(f"(nearest: {p.top[0][0]})") and "%" not in line
        else:
            assert " | ".join(names) in line and line.count("%") == len(names)
    assert any(line.count("%") > 1 for line in lines)


def test_each_promise_brings_its_own_columns_and_without_one_all_is_as_it_was(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = [
        printed(capsys, (pictures,), run, format="csv", **asked).splitlines()[0].split(",")[:4]
        for asked in ({"coverage": 0.9}, {"reject": 0.1}, {})
    ]
    assert head[0][1:] == ["answer", "classes", "class_1"]
    assert head[1][1:] == ["answer", "known", "class_1"]
    assert head[2][1:] == ["class_1", "probability_1", "class_2"]
    assert set(json.loads(printed(capsys, (pictures,), run, format="json"))[0]) == {"image", "top"}
    # Where nothing is a set, the first classes stand as ever, beside refusals.
    lines = printed(capsys, (pictures,), run, reject=0.1).splitlines()
    assert {line.count("%") for line in lines} == {0, 3}


def test_what_is_promised_is_said(run: Path, pictures: Path, tmp_path: Path) -> None:
    adapter = load_adapter(run)
    assert adapter.decisions is not None
    answers = answers_of(adapter, 0.95, 0.05)
    assert answers is not None
    coverage, reject = answers.sentences()
    assert "coverage 95 %: by 40 images, each unseen by the fit that judged it;" in coverage
    assert "one time in ten below 90 %" in coverage and "not for each class" in coverage
    assert "two in three may pass" in reject
    chose = replace(adapter, decisions=replace(adapter.decisions, chose=16))
    answers = answers_of(chose, 0.9, None)
    assert answers is not None and "(16 chose the setting)" in answers.sentences()[0]


@pytest.mark.parametrize(
    ("given", "count", "sentence"),
    [
        ({"coverage": 0.95}, 12, "12 images can promise at most 92 %; label 7 more, or ask for "),
        ({"coverage": 0.95}, 12, r"or ask for --coverage 0\.92\.$"),
        (
            {"reject": 0.05},
            12,
            r"no less than 8 %; label 7 more, or ask for --reject 0\.08\.$",
        ),
        ({"coverage": 95}, 40, r"--coverage is a share between 0 and 1, such as 0\.95, not 95\."),
        ({"reject": 0.0}, 40, r"--reject is a share between 0 and 1, such as 0\.05, not 0\."),
        ({"coverage": float("nan")}, 40, "not nan"),
        ({"coverage": 0.9, "transductive": True}, 40, "leave them or --transductive out"),
        ({"reject": 0.9}, 0, "No image was held out when the adapter was fitted, so --reject 0.9"),
        ({"coverage": 0.9}, None, "--coverage needs images that were held out .* fit it again"),
        ({"reject": 0.1}, None, "--reject needs images that were held out"),
    ],
)
def test_what_cannot_be_promised_is_one_sentence(
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
    image_folder: Path,
    given: dict[str, Any],
    count: int | None,
    sentence: str,
) -> None:
    adapter = saved_adapters["ridge"]
    save_adapter(tmp_path, adapter if count is None else decided(adapter, digits, count))
    with pytest.raises(UserError, match=sentence):
        predict(PredictConfig((image_folder,), tmp_path, **given))


def test_few_images_are_called_few(saved_adapters: Mapping[str, SavedAdapter], digits: Any) -> None:
    found = decided(saved_adapters["ridge"], digits, 12).decisions
    assert "12 images" in calibrated_by(found) and "too few to trust" in calibrated_by(found)
    assert not calibrated_by(decided(saved_adapters["ridge"], digits, 20).decisions)


DATA = tiny_data(train=(9, 9, 9, 9), val=6, test=40, noise=2.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deciding")
    cache = write_cache(folder / "features.h5", DATA)
    asked: dict[str, Any] = {"method": "tip-adapter", "shots": (5,), "hyper": FIXED}
    fit(FitConfig(cache, folder / "run", baselines=(), **asked))
    return folder


def evaluated(place: Path, **given: Any) -> Any:
    return evaluate(EvaluateConfig(place / "features.h5", place / "run", **given))


def test_evaluate_scores_the_probabilities_and_the_promises(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load_adapter(place / "run")
    assert adapter.decisions is not None
    features, labels = DATA.splits["test"]
    shares = adapter.probabilities(adapter.logits(features[0]))
    trust = evaluated(place, coverage=0.9, reject=0.1).trust
    assert trust.nll == pytest.approx(log_loss(labels, shares), rel=1e-6)
    top, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (top >= low) & (top < low + 1 / 15)
        error += abs(top[inside].sum() - right[inside].sum()) / len(top)
    assert trust.calibration_error == pytest.approx(error, abs=1e-9)
    sets = adapter.decisions.sets(shares, 0.9)
    assert np.array_equal(trust.covered, sets[np.arange(len(labels)), labels])
    assert np.array_equal(trust.sizes, sets.sum(axis=1))
    known = adapter.decisions.known_of(shares, features[0], adapter.weights)
    assert np.array_equal(trust.rejected, known <= 0.1)
    assert 0 < trust.rejected.mean() < 0.3 and 0.8 < trust.covered.mean() < 1
    config = EvaluateConfig(place / "features.h5", place / "run", coverage=0.9, reject=0.1)
    assert print_scores(config) == 0
    out = capsys.readouterr().out
    by_class = [trust.covered[labels == c].mean() for c in range(4)]
    assert f"coverage   {100 * trust.covered.mean():6.2f} % where 90 % is promised" in out
    assert f"class {np.argmin(by_class)}, {100 * min(by_class):.1f} % of 40 images" in out
    assert f"none of these {100 * trust.rejected.mean():6.2f} %" in " ".join(out.split("\n"))
    assert f"negative log-likelihood {trust.nll:.3f}" in out


def test_without_decisions_probabilities_are_those_of_before(place: Path) -> None:
    scores = evaluate(
        EvaluateConfig(place / "features.h5", place / "run/adapters/tip-adapter/shots-5-seed-1")
    )
    top = evaluated(place)
    assert np.array_equal(scores.predicted, top.predicted), "no order of classes changes"
    assert scores.trust.nll != pytest.approx(top.trust.nll, rel=1e-3)
    adapter = load_adapter(place / "run")
    labels = DATA.splits["test"][1]
    raw = probabilities(adapter.logits(DATA.splits["test"][0][0]))
    assert scores.trust.nll == pytest.approx(log_loss(labels, raw), rel=1e-6)


def test_a_hidden_class_is_asked_of_an_adapter_without_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: its keys, its text and its mean are left out; temperature and bound stay."""
    adapter = load_adapter(place / "run")
    known = adapter.decisions
    assert known is not None
    hidden = evaluated(place, unknown=True).hidden
    support = support_rows(place)
    features, labels = DATA.splits["train"][0][0, support], DATA.splits["train"][1][support]
    images, shown = DATA.splits["test"][0][0].astype(np.float64), DATA.splits["test"][1]
    shares = []
    for label in range(4):
        others = [c for c in range(4) if c != label]
        rows = images[shown == label]
        near = np.exp(-FIXED["beta"] * (1 - unit(rows) @ unit(features.astype(np.float64)).T))
        sums = np.stack([near[:, labels == c].sum(axis=1) for c in others], axis=1)
        logits = SCALE * unit(rows) @ texts(DATA)[others].T + BIAS + FIXED["alpha"] * sums
        decisions = replace(known, prototypes=known.prototypes[others])
        found = decisions.known_of(
            softmax(logits / known.temperature, axis=1), rows, texts(DATA)[others]
        )
        shares.append(np.mean(found <= 0.05))
    np.testing.assert_allclose(hidden.shares, shares, atol=1.5 / 40)
    assert hidden.images == [40] * 4 and max(shares) > 0.1
    print_scores(EvaluateConfig(place / "features.h5", place / "run", unknown=True))
    out = capsys.readouterr().out
    assert f"hidden     {100 * np.mean(hidden.shares):6.2f} % called none of these" in out
    assert f"least of class {np.argmin(hidden.shares)}" in out


@pytest.mark.parametrize(
    "given", [{"select": "loo", "validation": "join"}, {"refit": True}], ids=["join", "refit"]
)
def test_so_is_one_that_was_fitted_on_images_of_other_splits(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    """What it was fitted on is in its keys; of a refit no image is left for an accuracy."""
    data = tiny_data(train=(9,) * 4, val=6, test=6, noise=0.6)
    cache = write_cache(tmp_path / "features.h5", data)
    fit(FitConfig(cache, tmp_path / "run", "tip-adapter", (), shots=(5,), hyper=FIXED, **given))
    adapter = load_adapter(tmp_path / "run")
    known, keys, labels = adapter.decisions, adapter.arrays["keys"], adapter.arrays["labels"]
    assert known is not None and len(keys) == 4 * (21 if "refit" in given else 9)
    hidden = evaluate(EvaluateConfig(cache, tmp_path / "run", unknown=True)).hidden
    assert hidden is not None
    images, shown = data.splits["test"][0][0].astype(np.float64), data.splits["test"][1]
    for label, share in enumerate(hidden.shares):
        others = [c for c in range(4) if c != label]
        rows = images[shown == label]
        near = np.exp(-FIXED["beta"] * (1 - unit(rows) @ keys.astype(np.float64).T))
        sums = np.stack([near[:, labels == c].sum(axis=1) for c in others], axis=1)
        logits = SCALE * unit(rows) @ texts(data)[others].T + BIAS + FIXED["alpha"] * sums
        decisions = replace(known, prototypes=known.prototypes[others])
        shares = softmax(logits / known.temperature, axis=1)
        found = decisions.known_of(shares, rows, texts(data)[others])
        assert share == pytest.approx(np.mean(found <= 0.05), abs=1.5 / 6)


def support_rows(place: Path) -> Sequence[int]:
    (task,) = json.loads((place / "run" / "tasks.json").read_text())
    return [int(name.split("/")[1]) for name in task["support"]]


def test_trained_methods_and_unequal_classes_are_fitted_without_a_class(tmp_path: Path) -> None:
    """A class far from the others is caught, and one that hides between them is not."""
    data = tiny_data(train=(9, 8, 6, 9, 7), test=20, noise=0.6)
    cache = write_cache(tmp_path / "features.h5", data)
    hyper = {"alpha": 0.5, "epochs": 5}
    asked: dict[str, Any] = {"shots": ("all",), "select": "none", "hyper": hyper}
    fit(FitConfig(cache, tmp_path / "run", "clip-adapter", (), **asked))
    hidden = evaluate(EvaluateConfig(cache, tmp_path / "run", unknown=True)).hidden
    assert hidden is not None and hidden.names == [f"class {n}" for n in range(5)]
    assert np.mean(hidden.shares) > 0.5


def test_what_cannot_be_hidden(place: Path, tmp_path: Path) -> None:
    def refused(sentence: str, data: Path, run: Path, **given: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            evaluate(EvaluateConfig(data, run, unknown=True, **given))

    run, cache = place / "run", place / "features.h5"
    other = write_cache(tmp_path / "other.h5", DATA.noisy_features("val"))
    refused(r"other\.h5 is not the cache that it was fitted on", other, run)
    refused("leave them or --only-present out", cache, run, only_present=True)
    refused("name the cache that it was fitted on", tmp_path, run)
    refused("needs images that were held out", cache, run / "adapters/tip-adapter/shots-5-seed-1")
    two = write_cache(tmp_path / "two.h5", tiny_data(train=(9, 9), val=9))
    asked: dict[str, Any] = {"shots": (5,), "hyper": FIXED}
    fit(FitConfig(two, tmp_path / "two", "tip-adapter", (), **asked))
    refused("it has two classes", two, tmp_path / "two", reject=0.1)
    blind = replace(load_adapter(run), seen=None)
    save_adapter(tmp_path / "blind", blind)
    refused("does not say which images it was fitted on", cache, tmp_path / "blind")
