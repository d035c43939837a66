"""What `fit` keeps with the adapter at the top of a run folder: by hand, in float64."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.deciding.answers import answers_of, calibrated_by
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from tests.pipelines.test_adapter_file import edit, replace_arrays
from tests.pipelines.test_fit_unlabelled import new_images, with_images
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

SCALE, BIAS = 20.0, 0.5
DATA = tiny_data(noise=2.5)
FIXED = {"beta": 2.0, "alpha": 3.0}
Drawn = Sequence[int]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def texts(data: TinyData) -> np.ndarray:
    return unit(unit(data.text.astype(np.float64)).mean(axis=1))


def kept(path: Path, data: TinyData, **given: Any) -> tuple[SavedAdapter, Drawn, Drawn]:
    """The adapter at the top of a run, and the rows of train and val that it took."""
    usual: dict[str, Any] = {"method": "tip-adapter", "shots": (5,), "hyper": FIXED}
    cache = path / "features.h5"
    if not cache.exists():
        write_cache(cache, data)
    out = given.pop("out", path / "run")
    result = fit(FitConfig(cache, out, baselines=(), **usual | given))
    (task,) = json.loads((result.run / "tasks.json").read_text())
    support, validation = (
        [int(name.split("/")[1]) for name in task[part]] for part in ("support", "validation")
    )
    return load_adapter(result.run), support, validation


def tip_adapter(keys: np.ndarray, labels: np.ndarray, rows: np.ndarray, data: TinyData) -> Any:
    near = np.exp(-FIXED["beta"] * (1 - unit(rows) @ unit(keys).T))
    return (
        SCALE * unit(rows) @ texts(data).T
        + BIAS
        + FIXED["alpha"] * near @ np.eye(data.classes)[labels]
    )


def by_hand(support: Drawn, validation: Drawn, data: TinyData) -> tuple[Any, ...]:
    """Logits, labels, cosines and features of the validation images, then fold by fold of the
    support set: a class's images, in the order of drawing, go to folds 0, 1, 2, 3, 0, …"""
    train, labels = (own.astype(np.float64) for own in data.splits["train"])
    features, own = train[0, support], labels[list(support)].astype(int)
    judged = data.splits["val"][0][0, validation].astype(np.float64)
    places = [
        list(dict.fromkeys(r for r, c in zip(support, own, strict=True) if c == k))
        for k in range(data.classes)
    ]
    fold_of = np.array(
        [
            places[c].index(r) % 4 if len(places[c]) > 1 else -1
            for r, c in zip(support, own, strict=True)
        ]
    )

    def cosines(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        means = unit(
            np.stack([unit(features[kept & (own == k)]).sum(0) for k in range(data.classes)])
        )
        return np.stack([(unit(rows) @ each.T).max(1) for each in (means, texts(data))], axis=1)

    found = [
        (
            tip_adapter(features, own, judged, data),
            data.splits["val"][1][list(validation)],
            cosines(judged, np.ones(len(own), bool)),
            judged,
        )
    ]
    for fold in range(min(4, fold_of.max() + 1)):
        out, taken = fold_of == fold, np.arange(len(own))
        for k in range(data.classes):
            rest, gone = np.flatnonzero(~out & (own == k)), np.flatnonzero(out & (own == k))
            taken[gone] = [rest[n % len(rest)] for n in range(len(gone))]
        once = [n for n in np.flatnonzero(out) if support.index(support[n]) == n]
        logits = tip_adapter(features[taken], own[taken], features[once], data)
        found.append((logits, own[once], cosines(features[once], ~out), features[once]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("train", "given", "images"),
    [
        ((9, 9, 9, 9), {}, 36),
        ((9, 9, 3, 1), {"repeat": True}, 5 + 5 + 3 + 4 * 4),
        ((9, 9, 9, 9), {"select": "none"}, 20),
    ],
    ids=["both", "drawn repeatedly", "support images alone"],
)
def test_images_are_judged_by_fits_without_them(
    tmp_path: Path, train: tuple[int, ...], given: dict[str, Any], images: int
) -> None:
    data = tiny_data(train=train, noise=2.5)
    adapter, support, validation = kept(tmp_path, data, **given)
    logits, labels, cosines, rows = by_hand(support, validation, data)
    known = adapter.decisions
    assert known is not None
    assert (known.images, known.folds, known.chose) == (images, 4, len(validation))
    assert np.array_equal(known.labels, labels)
    zero_shot = SCALE * unit(rows) @ texts(data).T
    prior = np.log(np.median(np.ptp(logits, axis=1) / np.ptp(zero_shot, axis=1)))

    def loss(x: float) -> float:
        own = log_softmax(logits / np.exp(x), axis=1)[np.arange(images), labels]
        return -own.mean() + (x - prior) ** 2 / images

    temperature = np.exp(minimize_scalar(loss, bracket=(-2, 2)).x)
    assert known.temperature == pytest.approx(temperature, rel=1e-4)
    shares = softmax(logits / known.temperature, axis=1)
    np.testing.assert_allclose(known.scores, 1 - shares[np.arange(images), labels], atol=1e-4)
    np.testing.assert_allclose(known.known[:, 0], shares.max(axis=1), atol=1e-4)
    np.testing.assert_allclose(known.known[:, 1:], cosines, atol=1e-5)
    assert load_adapter(tmp_path / "run/adapters/tip-adapter/shots-5-seed-1").decisions is None


@pytest.mark.parametrize(
    ("method", "hyper"),
    [("zero-shot", {}), ("ridge", {}), ("clip-adapter", {"alpha": 0.5, "epochs": 5})],
)
def test_validation_images_are_judged_by_the_adapter_itself(
    tmp_path: Path, method: str, hyper: dict[str, Any]
) -> None:
    adapter, _, validation = kept(tmp_path, DATA, method=method, hyper=hyper)
    check_validation(adapter, DATA, validation)


def test_so_are_they_where_images_without_labels_refined_it(tmp_path: Path) -> None:
    data = tiny_data(train=(9,) * 6, val=6, test=30, noise=3.0, dim=64, seed=3)
    write_cache(tmp_path / "plain.h5", data)
    cache = with_images(tmp_path / "features.h5", tmp_path / "plain.h5", new_images())
    given: dict[str, Any] = {"method": "ridge", "shots": (2,), "hyper": {}, "unlabelled": cache}
    adapter, _, validation = kept(tmp_path, data, **given)
    assert adapter.refinement is not None
    check_validation(adapter, data, validation)


def test_so_are_they_with_a_second_encoder(tmp_path: Path) -> None:
    """Strangeness is told by the features of the first, which have a text."""
    rng = np.random.default_rng(0)
    second = {
        split: (np.eye(4, 6)[labels] + rng.normal(size=(1, len(labels), 6))).astype(np.float32)
        for split, (_, labels) in DATA.splits.items()
    }
    write_cache(tmp_path / "features.h5", DATA, second=second)
    given: dict[str, Any] = {"method": "ridge", "hyper": {"second": 1.0}}
    adapter, support, validation = kept(tmp_path, DATA, **given)
    check_validation(adapter, DATA, validation, second["val"][0])
    assert adapter.decisions is not None
    *_, cosines, _ = by_hand(support, validation, DATA)
    np.testing.assert_allclose(adapter.decisions.known[:, 1:], cosines, atol=1e-5)
    scores = evaluate(EvaluateConfig(tmp_path / "features.h5", tmp_path / "run", unknown=True))
    assert scores.hidden is not None and scores.hidden.images == [15] * 4


def check_validation(
    adapter: SavedAdapter, data: TinyData, validation: Drawn, second: np.ndarray | None = None
) -> None:
    features, labels = data.splits["val"]
    known = adapter.decisions
    assert known is not None and known.chose == len(validation) < known.images
    rows = features[0] if second is None else np.concatenate([features[0], second], axis=1)
    logits = adapter.logits(rows[list(validation)]).astype(np.float64)
    shares = softmax(logits / known.temperature, axis=1)
    own = labels[list(validation)]
    wanted = 1 - shares[np.arange(len(own)), own]
    np.testing.assert_allclose(known.scores[: len(own)], wanted, atol=1e-5)
    np.testing.assert_allclose(adapter.probabilities(logits), shares, atol=1e-12)


def test_one_image_a_class_leaves_none_to_hold_out(tmp_path: Path) -> None:
    """The temperature then makes the logits as far apart as zero-shot's are."""
    adapter, support, _ = kept(tmp_path, DATA, method="ridge", shots=(1,), select="cv", hyper={})
    rows = DATA.splits["train"][0][0, support]
    known, logits = adapter.decisions, adapter.logits(rows)
    assert known is not None and (known.images, known.folds, known.chose) == (0, 0, 0)
    zero_shot = SCALE * unit(rows.astype(np.float64)) @ texts(DATA).T
    ratio = np.median(np.ptp(logits, axis=1) / np.ptp(zero_shot, axis=1))
    assert known.temperature == pytest.approx(ratio, rel=1e-4)
    assert "no image was held out" in calibrated_by(known)
    with pytest.raises(UserError, match=r"No image was held out .* label 19 more"):
        answers_of(adapter, None, 0.05)


def test_a_refit_leaves_out_images_of_every_split(tmp_path: Path) -> None:
    adapter, *_ = kept(tmp_path, DATA, method="ridge", hyper={}, refit=True)
    known = adapter.decisions
    assert known is not None and (known.images, known.folds, known.chose) == (4 * 30, 4, 4 * 4)
    assert np.bincount(known.labels).tolist() == [30] * 4
    chosen, support, _ = kept(
        tmp_path, DATA, method="ridge", hyper={}, refit=True, select="cv", out=tmp_path / "cv"
    )
    assert chosen.decisions is not None
    assert (chosen.decisions.images, chosen.decisions.chose) == (4 * 30, len(support))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held out")
    kept(folder, DATA, method="zero-shot", hyper={})
    return folder / "run"


def test_they_come_back_as_they_were(run: Path, tmp_path: Path) -> None:
    before = load_adapter(run)
    save_adapter(tmp_path, before)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    assert json.loads((tmp_path / "adapter.json").read_text())["format_version"] == 3


Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.pop("decisions/labels"), "has the arrays"),
        (lambda a: a.update({"decisions/more": a["decisions/labels"]}), "has the arrays"),
        (lambda a: a["decisions/labels"].fill(4), "decisions/labels is not int32"),
        (lambda a: a["decisions/scores"].fill(np.nan), "decisions/scores is not float32"),
        (lambda a: a["decisions/known"].fill(7), "decisions/known is not float32"),
        (lambda a: a.update({"decisions/scores": a["decisions/scores"][1:]}), r"shape \(36,\)"),
        (lambda a: a.update({"decisions/prototypes": a["weights"][1:]}), "decisions/prototypes"),
    ],
)
def test_damaged_arrays_are_refused(
    run: Path, tmp_path: Path, change: Callable[[Arrays], object], sentence: str
) -> None:
    save_adapter(tmp_path, load_adapter(run))
    arrays = {n: a.copy() for n, a in load_file(tmp_path / "adapter.safetensors").items()}
    change(arrays)
    replace_arrays(tmp_path, save(arrays))
    with pytest.raises(UserError, match=sentence):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 0.0}, "decisions.temperature is 0.0, not a number from 0.001 to 1000"),
        ({"temperature": float("nan")}, "decisions.temperature is nan"),
        ({"images": 35}, r"decisions/scores is not float32 of the shape \(35,\)"),
        ({"folds": -1}, "decisions.folds is -1"),
        ({"more": 1}, "more"),
    ],
)
def test_damaged_numbers_are_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    save_adapter(tmp_path, load_adapter(run))
    edit(tmp_path, lambda document: document["decisions"].update(change))
    with pytest.raises(UserError, match=sentence):
        load_adapter(tmp_path)
