"""Whole runs against PyTorch's optimisers and schedulers, on the same start and batch order."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine import epoch_draws as draws
from clip_adapter.adapters.engine.runner import Chunk, Engine
from clip_adapter.adapters.engine.training import RunState
from clip_adapter.adapters.method import Setting, Task
from clip_adapter.adapters.optimisation import evaluated_epochs, scheduled_rate, steps_and_batch
from tests.adapters import torch_reference as reference
from tests.adapters.tasks import (
    CLIP_ADAPTER,
    EACH_EPOCH,
    SHORT,
    row_of,
    separable_task,
    setting_of,
    start_arrays,
    tempered_nll,
)

SPARSE = EACH_EPOCH | {"evaluate_every": 3}
PLAIN = EACH_EPOCH | {"optimizer": "sgd"}
PAPER = PLAIN | {"warmup": "constant", "drop_last": True, "learning_rate": 0.02}
ADAM = EACH_EPOCH | {"optimizer": "adam", "adam_epsilon": 1e-4}
HYPER = {"alpha": 0.6, "learning_rate": 3e-3, "weight_decay": 0.1}
LEARNED = {"branch": "both", "reduction": 2, "alpha": "learned", "beta": "learned"}
PREDICTED = {"branch": "both", "alpha": "hypernet", "beta": "hypernet", "learning_rate": 1e-3}
STARTS = {"alpha_init": 0.4, "beta_init": 0.3}


def batches(task: Task, setting: Setting, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views and rows of each batch: a permutation cut into batches as equal as can be.

    The order comes from the seed and the epoch alone, by JAX's own generator.
    """
    views, support, _ = task.features.shape
    count = int(np.ceil(support / setting["batch_size"]))
    size = int(np.ceil(support / count))
    if setting["drop_last"]:
        count, size = support // setting["batch_size"], setting["batch_size"]
    key = jax.random.fold_in(jax.random.key(task.seed), epoch + 1)
    order_key, view_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, support))
    drawn = np.asarray(jax.random.randint(view_key, (count, size), 0, views))
    for batch in range(count):
        rows = order[batch * size : (batch + 1) * size]
        yield drawn[batch, : len(rows)], rows


class TorchRun:
    """The same run as a PyTorch user would write it. `snapshots`: parameters after each epoch.

    Ratios are moved by an Adam of their own, at a rate of their own and without weight decay.
    """

    def __init__(self, setting: Setting, task: Task) -> None:
        self.parameters = reference.tensors(start_arrays(CLIP_ADAPTER, setting, task))
        self.setting, self.task = setting, task
        self.snapshots: list[dict[str, np.ndarray]] = []
        self.evaluations: list[tuple[float, float]] = []
        for tensor in self.parameters.values():
            tensor.requires_grad_()
        kernels = [value for name, value in self.parameters.items() if "/ratio/" not in name]
        ratios = [value for name, value in self.parameters.items() if "/ratio/" in name]
        epsilon = setting.get("adam_epsilon", 1e-8)
        given: dict[str, Any] = {"lr": setting["learning_rate"]}
        given["weight_decay"] = setting["weight_decay"]
        optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "adamw": lambda: torch.optim.AdamW(kernels, eps=epsilon, **given),
            "adam": lambda: torch.optim.Adam(kernels, eps=epsilon, **given),
            "sgd": lambda: torch.optim.SGD(kernels, momentum=0.9, **given),
        }
        self.optimizers = [optimizers[setting["optimizer"]]()]
        if ratios:
            rate = setting["ratio_learning_rate"]
            self.optimizers.append(torch.optim.Adam(ratios, eps=epsilon, lr=rate))

    def logits(self, features: Any) -> torch.Tensor:
        head = self.task.head
        return reference.logits(
            self.parameters,
            self.setting,
            reference.tensor(features),
            reference.tensor(head.weights),
            float(head.logit_scale),
            float(head.logit_bias),
        )

    def train(self, epochs: int) -> "TorchRun":
        features, labels = np.asarray(self.task.features), np.asarray(self.task.labels)
        setting, total = self.setting, self.setting["epochs"]
        steps = len(list(batches(self.task, setting, 0)))
        groups = [optimizer.param_groups[0] for optimizer in self.optimizers]
        peaks = [group["lr"] for group in groups]
        cosines = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
            for optimizer in self.optimizers
        ]
        seen: list[int] = []
        for epoch in range(epochs):
            if setting["warmup"] == "constant":
                # Dassl: one epoch at 1e-5, then PyTorch's cosine from its beginning.
                for group, cosine in zip(groups, cosines, strict=True):
                    group["lr"] = 1e-5 if epoch == 0 else cosine.get_last_lr()[0]
            for step, (view, rows) in enumerate(batches(self.task, setting, epoch)):
                if setting["warmup"] == "linear":
                    share = reference.warmed_up_cosine(epoch * steps + step, steps * total)
                    for group, peak in zip(groups, peaks, strict=True):
                        group["lr"] = peak * share
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                targets = torch.tensor(labels[rows], dtype=torch.int64)
                logits = self.logits(features[view, rows])
                torch.nn.functional.cross_entropy(logits, targets).backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                seen += rows.tolist()
            if setting["warmup"] == "constant" and epoch >= 1:
                for cosine in cosines:
                    cosine.step()
            self.snapshots.append(
                {name: value.detach().numpy().copy() for name, value in self.parameters.items()}
            )
            self.evaluations.append(self.evaluate())
        if not setting["drop_last"]:
            assert np.bincount(seen).tolist() == [epochs] * len(labels)
        return self

    def evaluate(self) -> tuple[float, float]:
        labels = torch.tensor(np.asarray(self.task.validation_labels), dtype=torch.int64)
        with torch.no_grad():
            logits = self.logits(self.task.validation_features)
        right = (logits.argmax(dim=1) == labels).double().mean().item()
        return right, tempered_nll(logits.numpy(), labels.numpy())


def run(engine: Engine, setting: Setting, task: Task, **span: int) -> Chunk:
    (chunk,) = engine.run(CLIP_ADAPTER, [setting], task, **span)
    return chunk


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], by: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=by, err_msg=name)


ONE_BATCH = EACH_EPOCH | HYPER | {"batch_size": 20}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "adamw": (EACH_EPOCH | HYPER, 1),
    "adamw, learned, views": (SPARSE | HYPER | LEARNED | STARTS, 3),
    "sgd": (PLAIN | HYPER | {"learning_rate": 0.02}, 1),
    "adam": (ADAM | HYPER, 1),
    # Under Adam's usual epsilon, a hyper-network's unit that closes has steps of pure rounding.
    "adam, hypernet": (
        ADAM | PREDICTED | STARTS | {"adam_epsilon": 1e-3, "ratio_learning_rate": 0.05},
        1,
    ),
    "as in the paper, learned": (
        PAPER | LEARNED | STARTS | {"weight_decay": 5e-2, "ratio_learning_rate": 0.1},
        1,
    ),
    "one batch of all images": (ONE_BATCH, 1),
    "one batch, views": (ONE_BATCH | {"drop_last": True}, 3),
    "one batch of all images but three": (ONE_BATCH | {"batch_size": 17, "drop_last": True}, 1),
}


@pytest.mark.parametrize(("given", "views"), RUNS.values(), ids=RUNS)
def test_a_run_ends_where_pytorch_ends(engine: Engine, given: dict[str, Any], views: int):
    task = separable_task(views=views, seed=7, noise=2.0)
    setting = setting_of(**given)
    expected = TorchRun(setting, task).train(setting["epochs"])
    state: RunState = run(engine, setting, task).state
    assert_close(row_of(state.trained), expected.snapshots[-1], by=2e-5)
    for name, start in start_arrays(CLIP_ADAPTER, setting, task).items():
        moved = np.abs(expected.snapshots[-1][name] - start).max()
        assert moved > 100 * 2e-5, f"{name} hardly moved: nothing is compared"

    # The epochs that are due are evaluated, and the best of them is kept.
    due = evaluated_epochs(setting)
    evaluations = np.array([expected.evaluations[epoch - 1] for epoch in due])
    np.testing.assert_allclose(state.history[0], evaluations, rtol=5e-4, atol=1e-4)
    rule = [(-accuracy, nll) for accuracy, nll in evaluations]
    best = min(range(len(due)), key=rule.__getitem__)
    assert int(state.best_evaluation[0]) == best
    assert_close(row_of(state.best), expected.snapshots[due[best] - 1], by=2e-5)


def test_by_default_only_the_last_epoch_is_judged_and_kept(engine: Engine):
    task = separable_task(seed=7, noise=2.0)
    setting = setting_of(**SHORT, **HYPER)
    assert setting["epoch"] == "last"
    expected = TorchRun(setting, task).train(setting["epochs"])
    state: RunState = run(engine, setting, task).state
    assert_close(row_of(state.trained), expected.snapshots[-1], by=2e-5)
    np.testing.assert_allclose(state.history[0], [expected.evaluations[-1]], atol=1e-4)
    assert state.best == {}
    # What is kept on the way changes nothing of the training.
    best: RunState = run(engine, setting_of(**EACH_EPOCH, **HYPER), task).state
    assert_close(row_of(best.trained), row_of(state.trained), by=1e-6)
    # Stopped early, it is judged where it stopped.
    stopped: RunState = run(engine, setting, task, stop=4).state
    np.testing.assert_allclose(stopped.history[0], [expected.evaluations[3]], atol=1e-4)


def test_a_long_warm_up_ends_after_a_hundred_steps(engine: Engine):
    """And the order of the images goes on over the epochs that are drawn at a time."""
    given = {"learning_rate": 2e-3, "weight_decay": 0.0, "optimizer": "sgd"}
    setting = setting_of(epochs=1200, batch_size=8, alpha=0.6, **given)
    task = separable_task(noise=2.0)
    assert draws.epochs_per_drawing(task.features.shape[1]) < 125
    expected = TorchRun(setting, task).train(125)
    state = run(engine, setting, task, stop=125).state
    assert_close(row_of(state.trained), expected.snapshots[-1], by=1e-5)


def test_advancing_in_pieces_is_advancing_at_once(engine: Engine):
    """Also of a run that keeps its best epoch; test_conformance.py has the others."""
    task, setting = separable_task(seed=3), setting_of(**EACH_EPOCH, **HYPER)
    whole = run(engine, setting, task)
    state = run(engine, setting, task, stop=2).row(0)
    for first, stop in ((2, 5), (5, 6), (6, 10)):
        states = [lambda s=state: s]
        (chunk,) = engine.run(CLIP_ADAPTER, [setting], task, first=first, stop=stop, states=states)
        state = chunk.row(0)
    for piecewise, at_once in zip(state, whole.row(0), strict=True):
        assert piecewise.tobytes() == at_once.tobytes()


def test_evaluations_not_reached_are_nan(engine: Engine):
    task = separable_task(seed=3)
    history = run(engine, setting_of(**EACH_EPOCH, **HYPER), task, stop=8).state.history[0]
    assert np.isfinite(history[:8]).all()
    assert np.isnan(history[8:]).all()


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [(10, 3, [3, 6, 9, 10]), (10, 5, [5, 10]), (3, 5, [3]), (5, 1, [1, 2, 3, 4, 5])],
)
def test_every_so_many_epochs_and_the_last_are_evaluated(
    epochs: int, every: int, expected: list[int]
):
    setting = setting_of(epoch="best", epochs=epochs, evaluate_every=every)
    assert evaluated_epochs(setting) == expected


def test_of_equal_evaluations_the_earliest_is_kept(engine: Engine):
    """With α = 0 the adapter changes nothing, so that all evaluations are equal."""
    task = separable_task(seed=3)
    state = run(engine, setting_of(**EACH_EPOCH, **HYPER | {"alpha": 0.0}), task).state
    assert (np.asarray(state.history[0]) == np.asarray(state.history[0, 0])).all()
    assert int(state.best_evaluation[0]) == 0


def test_accuracy_goes_before_likelihood(engine: Engine):
    """A run that overfits: its most accurate evaluation is not its most likely one."""
    task = separable_task(shots=5, seed=1, noise=3.0, data_seed=1)
    hyper = {"alpha": 0.9, "learning_rate": 0.2, "weight_decay": 0.0}
    state = run(engine, setting_of(**EACH_EPOCH, **hyper), task).state
    accuracy, nll = np.asarray(state.history[0]).T
    candidates = np.flatnonzero(accuracy == accuracy.max())
    best = candidates[nll[candidates].argmin()]
    assert best != nll.argmin(), "both rules choose the same here: nothing is tested"
    assert int(state.best_evaluation[0]) == best


def test_without_validation_images_the_last_parameters_are_kept(engine: Engine):
    task = separable_task(seed=3, validation=0)
    state = run(engine, setting_of(**EACH_EPOCH, **HYPER), task).state
    assert np.isnan(state.history).all()
    assert_close(row_of(state.best), row_of(state.trained), by=0)


def test_another_seed_starts_and_shuffles_otherwise():
    setting = setting_of(**SHORT)
    first, second = (separable_task(seed=seed) for seed in (1, 2))
    starts = [start_arrays(CLIP_ADAPTER, setting, task) for task in (first, second)]
    one, other = (start["image/bottleneck/down/kernel"] for start in starts)
    assert np.abs(one - other).max() > 0.1
    orders = [
        [rows.tolist() for _, rows in batches(task, setting, epoch)]
        for task, epoch in ((first, 0), (first, 1), (second, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    ("support", "batch_size", "equal", "dropping"),
    [(37, 32, (2, 19), (1, 32)), (592, 32, (19, 32), (18, 32)), (20, 32, (1, 20), (1, 20))],
)
def test_steps_and_batches_of_an_epoch(
    support: int, batch_size: int, equal: tuple[int, int], dropping: tuple[int, int]
):
    """Dassl's loader drops an incomplete last batch where there is a complete one."""
    setting = setting_of(batch_size=batch_size)
    assert steps_and_batch(support, setting) == equal
    assert steps_and_batch(support, setting | {"drop_last": True}) == dropping


def test_the_schedules_rate_of_each_step():
    """Three steps an epoch; the reference runs above take one warm-up length each."""
    linear = setting_of(epochs=20, learning_rate=0.5)
    found = [float(scheduled_rate(linear, 3, step)) for step in range(60)]
    wanted = [0.5 * reference.warmed_up_cosine(step, 60) for step in range(60)]
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    constant = linear | {"warmup": "constant"}
    found = [float(scheduled_rate(constant, 3, step)) for step in range(60)]
    cosine = 0.25 * (1 + np.cos(np.pi * np.arange(19) / 20))
    np.testing.assert_allclose(found, np.repeat([1e-5, *cosine], 3), atol=1e-7)


@pytest.mark.parametrize(
    ("views", "given"),
    [
        (3, {"batch_size": 8}),
        (1, {"batch_size": 8, "drop_last": True}),
        (3, {"batch_size": 256}),
    ],
    ids=["views", "drop-last", "one-batch"],
)
def test_each_epoch_has_its_own_order_whichever_drawing_it_is_in(
    views: int, given: dict[str, int | bool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(draws, "MOST_EPOCHS", 4)
    task = separable_task(views=views, seed=5)
    support = task.features.shape[1]
    setting = setting_of(epochs=10, **given)
    _, size = steps_and_batch(support, setting)
    drawn = draws.kept_draws(task, setting)
    for epoch in range(10):
        rows, chosen = (np.asarray(part)[epoch % 4] for part in drawn(epoch // 4))
        wanted = list(batches(task, setting, epoch))
        assert len(rows) == len(chosen) == len(wanted)
        for step, (view, row) in enumerate(wanted):
            assert rows[step, : len(row)].tolist() == row.tolist()
            assert chosen.shape == (len(rows), size if views > 1 else 0)
            if views > 1:
                assert chosen[step, : len(row)].tolist() == view.tolist()


def test_the_order_of_a_batch_of_all_images_is_not_drawn():
    task = separable_task()
    drawn = draws.draw(task, setting_of(epochs=10, batch_size=256), 0)
    assert drawn.rows.shape[1:] == drawn.views.shape[1:] == (1, 0)


def test_a_drawing_of_many_images_has_few_epochs():
    assert draws.epochs_per_drawing(20) == draws.MOST_EPOCHS
    assert draws.epochs_per_drawing(100_000) == 10
    assert draws.epochs_per_drawing(1_281_167) == 1
