"""Closed forms against their formulas in float64 NumPy: one key, or one linear system, a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine import closed_form, scoring
from clip_adapter.adapters.engine.evaluation import rounds_of
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.method import Head, Method, Setting, Task
from clip_adapter.adapters.methods import proker
from clip_adapter.adapters.methods.gda import NEIGHBOURS, by_shots
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import (
    CLASSES,
    DIM,
    Notes,
    exact,
    separable_task,
    setting_of,
    unit,
    validation_accuracy,
    validation_nll,
    with_second,
    zero_shot,
)

TIP_ADAPTER, GDA, PROKER = (METHODS[name] for name in ("tip-adapter", "gda", "proker"))
Logits = Callable[[np.ndarray], np.ndarray]


def first(images: np.ndarray) -> np.ndarray:
    """Unit features of the first encoder."""
    return unit(np.asarray(images)[..., :DIM])


def second(task: Task, images: np.ndarray) -> np.ndarray:
    """Unit features of the second one, from the centre on; (…, 0) where there is none."""
    return unit(np.asarray(images)[..., DIM:] - task.extra.get("centre", np.zeros(0)))


def flattened(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Unit support rows, all views beside each other, and their labels."""
    views = len(task.features)
    return first(task.features).reshape(-1, DIM), np.tile(task.labels, views)


def second_flattened(task: Task) -> np.ndarray:
    found = second(task, task.features)
    return found.reshape(found.shape[0] * found.shape[1], found.shape[2])


def tip_keys(task: Task) -> np.ndarray:
    return unit(first(task.features).mean(axis=0))


def tip_adapter(task: Task, setting: Setting, keys: np.ndarray | None = None) -> Logits:
    """keys: others than those it has without training."""
    keys = tip_keys(task) if keys is None else keys

    others, weight = unit(second(task, task.features).mean(axis=0)), setting.get("second", 0)

    def logits(images: np.ndarray) -> np.ndarray:
        found = zero_shot(task, images[:, :DIM])
        for image, own, row in zip(first(images), second(task, images), found, strict=True):
            for key, other, label in zip(keys, others, task.labels, strict=True):
                row[label] += setting["alpha"] * np.exp(-setting["beta"] * (1 - image @ key))
                row[label] += weight * np.exp(-3 * (1 - own @ other))
        return found

    return logits


def gaussians(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GDA's (kernel, bias), of classes that all have images, through the D × D pseudo-inverse."""
    count, dim = images.shape
    means = np.stack([images[labels == c].mean(axis=0) for c in range(CLASSES)])
    centred = images - means[labels]
    covariance = centred.T @ centred / (count - 1)
    shrunk = (count - 1) * covariance + np.trace(covariance) * np.eye(dim)
    kernel = dim * np.linalg.pinv(shrunk, hermitian=True) @ means.T
    return kernel, np.log(1 / CLASSES) - np.einsum("cd,dc->c", means, kernel) / 2


def gda(task: Task, setting: Setting) -> Logits:
    images, labels = flattened(task)
    kernel, bias = gaussians(images, labels)
    own, own_bias = np.zeros((0, CLASSES)), 0
    if task.extra:
        own, own_bias = gaussians(second_flattened(task), labels)
    weight = setting.get("second", 0)

    def logits(images: np.ndarray) -> np.ndarray:
        gaussian = first(images) @ kernel + bias
        gaussian += weight * (second(task, images) @ own + own_bias)
        return zero_shot(task, images[:, :DIM]) + setting["alpha"] * gaussian

    return logits


def residual(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(support rows, what zero-shot CLIP leaves of their labels), all views."""
    images, labels = flattened(task)
    return images, np.eye(CLASSES)[labels] - images @ unit(task.head.weights).T


def kernel_ridge(task: Task, setting: Setting) -> Logits:
    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.exp(-setting["beta"] * (1 - left @ right.T))

    support, left_over = residual(task)
    others, weight = second_flattened(task), setting.get("second", 0)
    both = kernel(support, support) + weight * kernel(others, others)
    duals = np.linalg.solve(both / setting["ridge"] + np.eye(len(support)), left_over)

    def logits(images: np.ndarray) -> np.ndarray:
        rows = first(images)
        near = kernel(rows, support) + weight * kernel(second(task, images), others)
        return rows @ unit(task.head.weights).T + near @ duals

    return logits


def ridge(task: Task, setting: Setting) -> Logits:
    """The normal equations, (D + E) × (D + E)."""
    root = setting.get("second", 0) ** 0.5
    images, labels = flattened(task)
    images = np.hstack([images, root * second_flattened(task)])
    start = setting["prior"] * unit(task.head.weights)
    start = np.hstack([start, np.zeros((CLASSES, images.shape[1] - DIM))])
    system = images.T @ images + setting["ridge"] * np.eye(images.shape[1])
    right = images.T @ np.eye(CLASSES)[labels] + setting["ridge"] * start.T
    weights = np.linalg.solve(system, right)
    return lambda images: np.hstack([first(images), root * second(task, images)]) @ weights


def timo(task: Task, setting: Setting) -> Logits:
    """Class by class: its prompts as its images weigh them, and those that join these."""
    images, labels = flattened(task)
    joined, of_joined, weights = [images], [labels], np.zeros((CLASSES, images.shape[1]))
    for c, own in enumerate(unit(task.head.text)):
        mean = images[labels == c].mean(axis=0) if c in labels else task.head.weights[c]
        likeness = own @ unit(mean)
        shares = np.exp(setting["gamma"] * likeness / np.linalg.norm(likeness))
        weights[c] = unit(shares @ own)
        order = [*np.argsort(-likeness), *np.argsort(-likeness)]
        chosen = order[: max(1, round(setting["beta"] * len(own)))]
        joined.append(likeness[chosen, None] * own[chosen])
        of_joined.append(np.full(len(chosen), c))
    kernel, bias = gaussians(np.concatenate(joined), np.concatenate(of_joined))
    return lambda images: unit(images) @ (setting["alpha"] * weights.T + kernel) + bias


REFERENCES: dict[str, Callable[[Task, Setting], Logits]] = {
    "zero-shot": lambda task, setting: partial(zero_shot, task),
    "tip-adapter": tip_adapter,
    "gda": gda,
    "proker": kernel_ridge,
    "ridge": ridge,
    "timo": timo,
    "timo-s": timo,
}


def repeated(task: Task) -> Task:
    """Each image three times."""
    return task._replace(
        features=jnp.repeat(task.features, 3, axis=1), labels=jnp.repeat(task.labels, 3)
    )


TASKS = {
    "one view": separable_task(),
    "views": separable_task(views=3),
    "one shot": separable_task(shots=1),
    "one shot with views": separable_task(shots=1, views=3),
    "as many images as dimensions": separable_task(shots=4),
    "a class without images": separable_task(empty=(2,)),
    "each image three times": repeated(separable_task()),
}
TIMO_POINTS = [
    {"beta": b, "gamma": g, "alpha": a}
    for b, g, a in ((1.0, 50.0, 100.0), (0.2, 5.0, 1.0), (1.6, 100.0, 1e-4))
]
POINTS: dict[str, list[dict[str, Any]]] = {
    "zero-shot": [{}],
    "tip-adapter": [{"beta": 5.5, "alpha": 1.5}],
    "gda": [{"alpha": 0.3}],
    "ridge": [{"ridge": r, "prior": c} for r, c in ((1.0, 3.0), (0.1, 0.0), (100.0, 100.0))],
    "timo": TIMO_POINTS,
    "timo-s": TIMO_POINTS,
    "proker": [{"beta": b, "ridge": r} for b, r in ((1.5, 0.05), (0.1, 1e-3), (20.0, 10.0))],
}
# Without spread, or with a class of no images, GDA is something else; see below.
NOT_GDA = {"one shot", "a class without images"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in POINTS for kind in TASKS if name != "gda" or kind not in NOT_GDA],
)
def test_fit_and_logits_are_the_formula(name: str, kind: str, engine: Engine):
    method, task = METHODS[name], TASKS[kind]
    for setting in POINTS[name]:
        arrays = fit(method, setting, None, task, engine)
        found = make_classify(method, setting, arrays, task.head)(task.validation_features)
        expected = REFERENCES[name](exact(task), setting)(exact(task).validation_features)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "zero-shot": {},
    "tip-adapter": {"beta": (0.1, 1.3, 5.5, 40.0), "alpha": (0.0, 3.0, 20.0)},
    "gda": {"alpha": (1e-4, 1e-2, 0.1, 1.0, 100.0)},
    "ridge": {"ridge": (0.01, 1.0, 100.0), "prior": (0.0, 1.0, 10.0)},
    "timo": {"beta": (1.0,), "gamma": (50.0,), "alpha": (1e-2, 1.0, 10.0, 100.0)},
    "timo-s": {"beta": (0.4, 1.0, 2.0), "gamma": (5.0, 80.0), "alpha": (1.0, 10.0, 100.0)},
    "proker": {"beta": (0.1, 1.5, 20.0), "ridge": (1e-3, 0.05, 1.0, 10.0)},
}


@pytest.mark.parametrize("name", GRIDS)
def test_each_point_of_the_grid_is_what_a_loop_in_float64_finds(name: str, engine: Engine):
    method, task = METHODS[name], separable_task(noise=3.0, data_seed=3)
    found = list(search(method, GRIDS[name], [task], engine, Notes()))
    assert [e.setting for e in found] == method.settings(GRIDS[name])
    expected = []
    for evaluation in found:
        logits = REFERENCES[name](exact(task), evaluation.setting)(exact(task).validation_features)
        accuracy, nll = validation_accuracy(logits, task), validation_nll(logits, task)
        expected.append((accuracy, -nll))
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)
    assert len({accuracy for accuracy, _ in expected}) > min(2, len(found) - 1), (
        "all points are alike"
    )
    best = max(range(len(found)), key=lambda index: found[index].score)
    assert best == max(range(len(found)), key=expected.__getitem__)


@pytest.mark.parametrize("name", REFERENCES)
def test_all_zero_features_are_finite(name: str, engine: Engine):
    task, setting = separable_task(), POINTS[name][0]
    nothing = jnp.zeros_like(task.features)
    zero_class = jnp.where(task.labels[None, :, None] == 1, 0, task.features)
    for features in (nothing, zero_class):
        arrays = fit(METHODS[name], setting, None, task._replace(features=features), engine)
        assert all(np.isfinite(array).all() for array in arrays.values())
        classify = make_classify(METHODS[name], setting, arrays, task.head)
        assert np.isfinite(classify(np.zeros((2, DIM)))).all()


# A second encoder

BOTH = [name for name, method in METHODS.items() if method.takes_second]


def test_what_takes_a_second_encoder():
    assert {*BOTH} == {"tip-adapter", "gda", "proker", "ridge"}


@pytest.mark.parametrize("kind", ["one view", "views", "as many images as dimensions"])
@pytest.mark.parametrize("name", BOTH)
def test_both_encoders_count_as_the_formula_has_it(name: str, kind: str, engine: Engine):
    method, task = METHODS[name], with_second(TASKS[kind])
    images = exact(task).validation_features
    for weight in (0.3, 10.0):
        setting = POINTS[name][0] | {"second": weight}
        arrays = fit(method, setting, None, task, engine)
        found = make_classify(method, setting, arrays, task.head)(task.validation_features)
        expected = REFERENCES[name](exact(task), setting)(images)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
        alone = REFERENCES[name](exact(task), setting | {"second": 0.0})(images)
        assert np.abs(alone - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("name", BOTH)
def test_each_weight_of_the_second_encoder_is_tried(name: str, engine: Engine):
    method, task = METHODS[name], with_second(separable_task(noise=3.0, data_seed=3))
    values = {n: (v,) for n, v in POINTS[name][0].items()} | {"second": (0.0, 0.3, 3.0)}
    found = list(search(method, values, [task], engine, Notes()))
    assert [e.setting["second"] for e in found] == [0.0, 0.3, 3.0]
    for evaluation in found:
        logits = REFERENCES[name](exact(task), evaluation.setting)(exact(task).validation_features)
        assert evaluation.accuracy == pytest.approx(validation_accuracy(logits, task))
        assert evaluation.nll == pytest.approx(validation_nll(logits, task), rel=1e-3)


@pytest.mark.parametrize("name", BOTH)
def test_without_weight_nothing_of_the_second_encoder_is_kept(name: str, engine: Engine):
    plain = separable_task(views=3)
    setting = POINTS[name][0]
    one = fit(METHODS[name], setting, None, plain, engine)
    other = fit(METHODS[name], setting | {"second": 0.0}, None, with_second(plain), engine)
    assert {*one} == {*other}
    for array, same in ((one[n], other[n]) for n in one):
        np.testing.assert_allclose(array, same, atol=1e-5 * np.abs(array).max(initial=1))


@pytest.mark.parametrize("name", BOTH)
def test_the_second_encoder_is_tried_from_four_shots_on(name: str):
    method = METHODS[name]
    assert "second" not in method.values({}) and "second" not in setting_of(method)
    with pytest.raises(ValueError, match="second has no effect on features of one encoder"):
        method.values({"second": (1.0,)})
    values = method.values({}, there=("second",))
    assert method.tried_at(4, values) == values and len(values["second"]) == 6
    assert method.tried_at(3.9, values)["second"] == (0.0,)
    given = method.values({"second": (1.0, 2.0)}, there=("second",))
    assert method.tried_at(1, given) == given
    assert method.values({}, one=True, there=("second",))["second"] == (0.0,)
    assert method.default_setting(values)["second"] == 0.0


def test_new_classes_are_told_by_the_first_encoder_alone():
    task = exact(with_second(separable_task(shots=30)))
    head = Head(unit(np.random.default_rng(5).normal(size=(3, DIM))), 20.0, 0.25)
    setting = {"alpha": 1.0, "second": 1.0}
    fitted = GDA.fit(np, task, setting)
    found = GDA.for_classes(fitted, setting, task, head)
    wanted = GDA.for_classes(fitted, setting, exact(separable_task(shots=30)), head)
    images = np.asarray(task.validation_features)
    logits = GDA.logits(np, found, setting, images, head)
    np.testing.assert_allclose(logits, GDA.logits(np, wanted, setting, images[:, :DIM], head))


# GDA


@pytest.mark.parametrize("task", [TASKS["one shot"], repeated(TASKS["one shot"])])
def test_without_spread_gda_is_zero_shot(task: Task, engine: Engine):
    arrays = fit(GDA, {"alpha": 100.0}, None, task, engine)
    assert not arrays["kernel"].any()
    assert np.unique(arrays["bias"]).size == 1
    found = make_classify(GDA, {"alpha": 100.0}, arrays, task.head)(task.validation_features)
    expected = zero_shot(exact(task), task.validation_features) + 100 * np.log(1 / CLASSES)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_class_without_images_takes_the_mean_of_its_neighbours(engine: Engine):
    task = separable_task(shots=40, empty=(1, 3))
    found = fit(GDA, {"alpha": 1.0}, None, task, engine)
    (images, labels), means = flattened(exact(task)), np.zeros((CLASSES, DIM))
    for c in range(CLASSES):
        own = images[labels == c]
        if c in (1, 3):
            own = images[np.argsort(-(images @ exact(task).head.weights[c]))[:NEIGHBOURS]]
        means[c] = own.mean(axis=0)
    centred = images - means[labels]
    trace = (centred**2).sum() / (len(images) - 1)
    kernel = DIM * np.linalg.inv(centred.T @ centred + trace * np.eye(DIM)) @ means.T
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-5 * np.abs(kernel).max())


def test_new_classes_are_made_from_their_nearest_neighbours():
    task = exact(separable_task(shots=30))
    images, _ = flattened(task)
    weights = unit(np.random.default_rng(5).normal(size=(3, DIM)))
    means, precision = np.zeros((3, DIM)), np.zeros((DIM, DIM))
    for c, w in enumerate(weights):
        near = images[np.argsort(-(images @ w))[:NEIGHBOURS]]
        means[c] = np.concatenate([near, np.tile(w, (16, 1))]).mean(0)
        covariance = (near - w).T @ (near - w) / (NEIGHBOURS - 1)
        shrunk = (NEIGHBOURS - 1) * covariance + np.trace(covariance) * np.eye(DIM)
        precision += DIM * np.linalg.pinv(shrunk) / 3
    kernel = precision @ means.T
    bias = np.log(1 / 3) - np.einsum("cd,dc->c", means, kernel) / 2
    head, fitted = Head(weights, 20.0, 0.25), {"weight": np.float32(1)}
    found = GDA.for_classes(fitted, {"alpha": 1.0}, task, head)
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-4 * np.abs(kernel).max())
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-4)


# Where nothing chooses


@pytest.mark.parametrize(("shots", "weight"), [(2, 0.0031748), (4, 0.010079), (16, 0.10159)])
def test_gdas_weight_grows_with_the_images_where_nothing_chooses(shots: int, weight: float):
    assert by_shots(separable_task(shots=shots)) == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize(
    ("shots", "beta", "ridge"),
    [
        *((1, 3, 0.05), (2, 2.6, 0.05), (4, 1.5, 0.05), (8, 1.66, 0.07)),
        *((16, 1.7, 0.1), (9, 1.66, 0.07)),
    ],
)
def test_proker_takes_the_authors_values_for_the_shots_where_nothing_chooses(
    shots: int, beta: float, ridge: float
):
    (setting,) = PROKER.settings(PROKER.values({}, one=True))
    task = separable_task(shots=shots)
    assert [proker.transferred(task, name, setting[name]) for name in setting] == [beta, ridge]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (PROKER, {"beta": 1.5, "ridge": 0.05}),
        (GDA, {"alpha": by_shots(separable_task())}),
        (METHODS["timo"], {"beta": 1.0, "gamma": 50.0, "alpha": 30 * 20 / 5**0.5}),
    ],
)
def test_those_values_are_what_is_fitted_with(
    method: Method, given: dict[str, float], engine: Engine
):
    (setting,) = method.settings(method.values({}, one=True))
    one, other = (
        fit(method, chosen, None, separable_task(), engine) for chosen in (setting, given)
    )
    assert {*one} == {*other}
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


# ProKeR


def test_a_search_that_takes_long_is_announced():
    task = separable_task()._replace(
        features=np.empty((1, 16000, 1)),
        validation_labels=np.empty(4000),
        head=Head(np.empty((1000, 1)), 20.0, 0.0),
    )
    assert "whole grid of 2,000 points takes about 27 CPU minutes" in proker.note(task)
    assert closed_form.note(METHODS["proker"], 2000, task, [task]) == proker.note(task)
    said = closed_form.note(METHODS["tip-adapter"], 4000, task, [task, task])
    assert said.startswith("tip-adapter: scoring 4,000 settings takes about 3 CPU minutes on")
    assert "about 4 CPU minutes" in closed_form.note(METHODS["tip-adapter-f"], 12000, task, [task])
    for short in ("clip-adapter", "gda"):
        assert closed_form.note(METHODS[short], 7, task, [task]) == ""
    assert closed_form.note(METHODS["clip-adapter"], 10**6, task, [task]) == "", (
        "training is what takes long"
    )
    assert closed_form.note(METHODS["tip-adapter"], 4000, task, []) == "", "nothing chooses"


@pytest.mark.parametrize("room", [1, 50_000, 1 << 28])
def test_one_eigendecomposition_serves_all_ridges(monkeypatch: pytest.MonkeyPatch, room: int):
    """There is one for each β and not one for each (β, λ), however few λ find room side by side:
    counted as they are computed."""
    decomposed: list[tuple[int, ...]] = []

    def on_the_host(matrix: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        decomposed.append(matrix.shape)
        values, vectors = np.linalg.eigh(np.asarray(matrix))
        return values, vectors

    def counted(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        shapes = jax.ShapeDtypeStruct(matrix.shape[:1], matrix.dtype), matrix
        return jax.pure_callback(on_the_host, shapes, matrix, vmap_method="sequential")

    monkeypatch.setattr(jnp.linalg, "eigh", counted)
    task = separable_task()
    axes = {"beta": (0.1, 1.0), "ridge": tuple(PROKER.hyper["ridge"].tried)}
    # A record of its own: programs are kept by their method, and this one is not as it should be.
    monkeypatch.setattr(closed_form, "SIDE_BY_SIDE_BYTES", room)
    scores = closed_form.grid_scores(replace(PROKER), {}, axes, task)
    assert decomposed == [(20, 20)] * 2
    monkeypatch.undo()
    whole = closed_form.grid_scores(PROKER, {}, axes, task)
    assert scores.score.shape == (2, 100, 2)
    np.testing.assert_allclose(scores.score, whole.score, rtol=1e-4)
    assert np.ptp(whole.score[..., 1], axis=1).min() > 1e-3, "all points are alike"


def test_a_large_support_set_is_approximated_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, engine: Engine
):
    task = separable_task(shots=14)
    images, setting = exact(task).validation_features, {"beta": 1.5, "ridge": 0.5}
    assert proker.note(task) == ""
    monkeypatch.setattr(proker, "MOST_ROWS", 55)
    monkeypatch.setattr(proker, "RANDOM_FEATURES", 1000)
    assert "56 support rows are more than 55, so 1,000 random" in proker.note(task)
    arrays = fit(PROKER, setting, None, task, engine)
    found = make_classify(PROKER, setting, arrays, task.head)(images)
    whole = kernel_ridge(exact(task), setting)(images)
    without = unit(images) @ unit(task.head.weights).T
    assert np.abs(found - whole).max() < 0.15 * np.abs(whole - without).max()

    frequencies, phases = arrays["points"].astype(np.float64), arrays["phases"]
    assert frequencies.shape == (1000, DIM)
    block = unit(frequencies[:DIM])
    np.testing.assert_allclose(block @ block.T, np.eye(DIM), atol=1e-5)

    def mapped(images: np.ndarray) -> np.ndarray:
        return np.cos(images @ frequencies.T + phases) * np.sqrt(2 / 1000)

    # Ridge regression on these features, through 56 × 56 as in the kernel's formula.
    support, left_over = residual(exact(task))
    system = mapped(support) @ mapped(support).T / 0.5 + np.eye(56)
    corrected = mapped(unit(images)) @ mapped(support).T @ np.linalg.solve(system, left_over)
    np.testing.assert_allclose(found, without + corrected, atol=1e-4)

    monkeypatch.setattr(proker, "RANDOM_FEATURES", 4000)
    both, with_both = with_second(task), setting | {"second": 1.0}
    arrays = fit(PROKER, with_both, None, both, engine)
    found = make_classify(PROKER, with_both, arrays, task.head)(both.validation_features)
    whole = kernel_ridge(exact(both), with_both)(exact(both).validation_features)
    assert np.abs(found - whole).max() < 0.15 * np.abs(whole - without).max()
    assert arrays["points"].shape == (2000, DIM) and arrays["duals"].shape == (4000, CLASSES)


# Rounds left out


def with_rows(task: Task, support: np.ndarray, judged: np.ndarray) -> Task:
    """Some of the support images, judged on others of them."""
    return task._replace(
        features=task.features[:, support],
        labels=task.labels[support],
        validation_features=task.features[0, judged],
        validation_labels=task.labels[judged],
    )


def cut(task: Task, counts: tuple[int, ...]) -> Task:
    """So many images of each class, in another order than class by class."""
    own = [np.flatnonzero(task.labels == c)[:count] for c, count in enumerate(counts)]
    rows = np.random.default_rng(1).permutation(np.concatenate(own))
    return with_rows(task, rows, rows)


ROUNDS = {
    "one view": separable_task(noise=3.0),
    "views": separable_task(views=3, noise=3.0),
    "more images than dimensions": separable_task(shots=9, noise=3.0),
    "unequal classes": cut(separable_task(shots=9, views=2, noise=3.0), (9, 4, 2, 3)),
    "a class with one image": cut(separable_task(noise=3.0), (5, 1, 3, 5)),
}
LEFT_OUT = [name for name, method in METHODS.items() if method.left_out]


def test_rounds_leave_out_what_can_be_left_out():
    labels = np.array([0, 0, 1, 2, 2, 2, 0, 0])
    found = rounds_of(labels, np.array([7, 9, 3, 4, 5, 6, 7, 8]))
    assert found.of_image.tolist() == [0, 1, -1, 0, 1, 2, 0, 2]
    members = [row[row >= 0].tolist() for row in found.members]
    assert members == [[0, 3, 6], [1, 4], [5, 7]]
    for image, (number, place) in enumerate(zip(found.of_image, found.place, strict=True)):
        assert number == -1 or found.members[number, place] == image
    assert rounds_of(np.arange(3)) is None
    assert rounds_of(np.zeros(2, int), np.zeros(2, int)) is None


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("name", [*LEFT_OUT, *(f"{name} with both encoders" for name in BOTH)])
def test_left_out_logits_are_those_of_fits_without_the_round(name: str, kind: str):
    name, _, both = name.partition(" ")
    task, more = exact(ROUNDS[kind]), {}
    if both:
        task, more = exact(with_second(ROUNDS[kind])), {"second": 0.3}
    rounds = rounds_of(task.labels)
    for setting in (point | more for point in POINTS[name]):
        found = METHODS[name].left_out(np, task, setting, rounds)
        assert found.dtype == np.float64
        for number, members in enumerate(rounds.members):
            members = members[members >= 0]
            without = with_rows(task, np.flatnonzero(rounds.of_image != number), members)
            expected = REFERENCES[name](without, setting)(task.features[0, members])
            np.testing.assert_allclose(
                found[members], expected, rtol=0, atol=1e-9 * max(1, np.abs(expected).max())
            )


@pytest.mark.parametrize(
    ("kind", "balanced"), [("unequal classes", True), ("a class with one image", False)]
)
@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_scores_are_those_of_folds(name: str, kind: str, balanced: bool):
    method, task = METHODS[name], ROUNDS[kind]
    rounds = rounds_of(np.asarray(task.labels))
    of_rounds = [np.flatnonzero(rounds.of_image == r) for r in range(len(rounds.members))]
    folds = [
        with_rows(task, np.flatnonzero(rounds.of_image != r), own)
        for r, own in enumerate(of_rounds)
    ]
    if balanced:
        folds = scoring.balanced(folds)
    settings = method.settings(GRIDS[name])
    wanted = closed_form.judged(method, settings, folds)
    found = closed_form.left_out_scores(method, settings, task, rounds, folds)
    for (accuracy, nll, images), one in zip(found, wanted, strict=True):
        assert accuracy == pytest.approx(one[0], abs=1e-6)
        assert nll == pytest.approx(one[1], rel=2e-3, abs=1e-4)
        np.testing.assert_array_equal(images.right, one[2].right)
        np.testing.assert_allclose(images.losses, one[2].losses, rtol=1e-2, atol=1e-3)
    if len(settings) > 1:
        assert len({accuracy for accuracy, *_ in found}) > 1, "all points are alike"


def factorised(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[str, int]]:
    """Each factorisation of a program, with the dimensions of what it takes."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("lu", "eigh", "cholesky", "geqrf", "svd"):
            yield equation.primitive.name, equation.invars[0].aval.ndim
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if isinstance(inner := getattr(inner, "jaxpr", inner), jax.extend.core.Jaxpr):
                yield from factorised(inner)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_matrices_are_factorised_one_by_one(name: str):
    """Of several at once JAX waits for ever where as many programs' parts ask as there are cores:
    `fit --select loo` did on two."""
    method, task = METHODS[name], jax.tree.map(jnp.asarray, ROUNDS["views"])
    rounds = jax.tree.map(jnp.asarray, rounds_of(np.asarray(task.labels)))
    static, numbers = method.split(POINTS[name][0])
    several = {key: jnp.full(3, value) for key, value in numbers.items()}

    def fitted(numbers: Setting) -> Any:
        return method.fit(jnp, task, {**static, **numbers})

    def left_out(numbers: Setting) -> Any:
        return method.left_out(jnp, task, {**static, **numbers}, rounds)

    programs = (
        [jax.make_jaxpr(jax.vmap(each))(several) for each in (fitted, left_out)] if several else []
    )
    found = [one for program in programs for one in factorised(program.jaxpr)]
    assert all(dimensions == 2 for _, dimensions in found), found
    assert found or name in ("zero-shot", "tip-adapter"), "no factorisation was found"
