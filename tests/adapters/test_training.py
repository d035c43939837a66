"""Whole runs against PyTorch's optimisers and schedulers, on the same start and batch order."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from clip_adapter.adapters.clip_adapter import Architecture
from clip_adapter.adapters.engine import Chunk, Engine
from clip_adapter.adapters.training import (
    HyperParameters,
    RunState,
    Schedule,
    Task,
    steps_and_batch,
)
from tests.adapters import torch_reference as reference
from tests.adapters.tasks import SHORT, named, separable_task, start_arrays

SPARSE = Schedule(epochs=10, batch_size=8, evaluate_every=3)
PLAIN = Schedule(10, 8, 1, "sgd", "linear")
PAPER = Schedule(10, 8, 1, "sgd", "constant", drop_last=True)


def batches(task: Task, schedule: Schedule, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views and rows of each batch: a permutation cut into batches as equal as can be.

    The order comes from the seed and the epoch alone, by JAX's own generator.
    """
    views, support, _ = task.features.shape
    count = int(np.ceil(support / schedule.batch_size))
    size = int(np.ceil(support / count))
    if schedule.drop_last:
        count, size = support // schedule.batch_size, schedule.batch_size
    key = jax.random.fold_in(jax.random.key(task.seed), epoch + 1)
    order_key, view_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, support))
    drawn = np.asarray(jax.random.randint(view_key, (count, size), 0, views))
    for batch in range(count):
        rows = order[batch * size : (batch + 1) * size]
        yield drawn[batch, : len(rows)], rows


class TorchRun:
    """The same run as a PyTorch user would write it. `snapshots`: parameters after each epoch."""

    def __init__(
        self, architecture: Architecture, schedule: Schedule, task: Task, hyper: HyperParameters
    ) -> None:
        trained, constants = start_arrays(architecture, schedule, task, hyper)
        self.trained = reference.tensors(trained)
        self.parameters = self.trained | reference.tensors(constants)
        self.architecture, self.schedule, self.task, self.hyper = (
            architecture,
            schedule,
            task,
            hyper,
        )
        self.snapshots: list[dict[str, np.ndarray]] = []
        self.evaluations: list[tuple[float, float]] = []
        for tensor in self.trained.values():
            tensor.requires_grad_()
        values = [*self.trained.values()]
        decay = {"lr": hyper.learning_rate, "weight_decay": hyper.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if schedule.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(values, **decay)
        else:
            self.optimizer = torch.optim.SGD(values, momentum=0.9, **decay)

    def logits(self, features: np.ndarray) -> torch.Tensor:
        task, architecture = self.task, self.architecture
        kind = architecture.image_ratio
        return reference.logits(
            self.parameters,
            architecture.branch,
            kind,
            torch.tensor(np.asarray(features), dtype=torch.float64),
            torch.tensor(np.asarray(task.weights), dtype=torch.float64),
            float(task.logit_scale),
            float(task.logit_bias),
        )

    def train(self, epochs: int) -> "TorchRun":
        features, labels = np.asarray(self.task.features), np.asarray(self.task.labels)
        steps = len(list(batches(self.task, self.schedule, 0)))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.schedule.epochs)
        (group,) = self.optimizer.param_groups
        seen: list[int] = []
        for epoch in range(epochs):
            if self.schedule.warmup == "constant":
                # Dassl: one epoch at 1e-5, then PyTorch's cosine from its beginning.
                group["lr"] = 1e-5 if epoch == 0 else cosine.get_last_lr()[0]
            for step, (view, rows) in enumerate(batches(self.task, self.schedule, epoch)):
                if self.schedule.warmup == "linear":
                    total = steps * self.schedule.epochs
                    share = reference.warmed_up_cosine(epoch * steps + step, total)
                    group["lr"] = self.hyper.learning_rate * share
                self.optimizer.zero_grad()
                targets = torch.tensor(labels[rows], dtype=torch.int64)
                logits = self.logits(features[view, rows])
                torch.nn.functional.cross_entropy(logits, targets).backward()
                self.optimizer.step()
                seen += rows.tolist()
            if self.schedule.warmup == "constant" and epoch >= 1:
                cosine.step()
            self.snapshots.append(
                {name: value.detach().numpy().copy() for name, value in self.trained.items()}
            )
            self.evaluations.append(self.evaluate())
        if not self.schedule.drop_last:
            assert np.bincount(seen).tolist() == [epochs] * len(labels)
        return self

    def evaluate(self) -> tuple[float, float]:
        labels = torch.tensor(np.asarray(self.task.validation_labels), dtype=torch.int64)
        with torch.no_grad():
            logits = self.logits(np.asarray(self.task.validation_features))
            loss = torch.nn.functional.cross_entropy(logits, labels).item()
        return (logits.argmax(dim=1) == labels).double().mean().item(), loss


def run(
    engine: Engine,
    architecture: Architecture,
    schedule: Schedule,
    task: Task,
    hyper: HyperParameters,
    **span: int,
) -> Chunk:
    (chunk,) = engine.run(architecture, schedule, task, [hyper], **span)
    return chunk


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], by: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=by, err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "schedule", "views", "hyper"),
    [
        (Architecture("image"), SHORT, 1, HyperParameters(0.6, 0.0, 3e-3, 0.1)),
        (
            Architecture("both", 2, "learned", "learned"),
            SPARSE,
            3,
            HyperParameters(0.4, 0.3, 3e-3, 0.1),
        ),
        (
            Architecture("both", 4, "hypernet", "hypernet"),
            PLAIN,
            1,
            HyperParameters(0.4, 0.3, 0.02, 5e-2),
        ),
        (
            Architecture("image"),
            PAPER,
            1,
            HyperParameters(0.6, 0.0, 0.02, 5e-2),
        ),
    ],
    ids=["adamw-image", "adamw-learned-views", "sgd-hypernet", "sgd-paper"],
)
def test_a_run_ends_where_pytorch_ends(
    engine: Engine,
    architecture: Architecture,
    schedule: Schedule,
    views: int,
    hyper: HyperParameters,
):
    task = separable_task(views=views, seed=7, noise=2.0)
    support = task.features.shape[1]
    assert support % schedule.batch_size, "the last batch has to be an incomplete one"
    expected = TorchRun(architecture, schedule, task, hyper).train(schedule.epochs)
    state: RunState = run(engine, architecture, schedule, task, hyper).state
    found = named(state.parameters, 0)
    assert_close(found, expected.snapshots[-1], by=2e-5)
    start, _ = start_arrays(architecture, schedule, task, hyper)
    for name, wanted in expected.snapshots[-1].items():
        moved = np.abs(wanted - start[name]).max()
        assert moved > 100 * 2e-5, f"{name} hardly moved: nothing is compared"

    # The epochs that are due are evaluated, and the best of them is kept.
    due = [3, 6, 9, 10] if schedule is SPARSE else list(range(1, 11))
    evaluations = np.array([expected.evaluations[epoch - 1] for epoch in due])
    np.testing.assert_allclose(state.history[0], evaluations, atol=1e-4)
    rule = [(-accuracy, nll) for accuracy, nll in evaluations]
    best = min(range(len(due)), key=rule.__getitem__)
    assert int(state.best_evaluation[0]) == best
    assert_close(named(state.best, 0), expected.snapshots[due[best] - 1], by=2e-5)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("left_out", "drop_last"), [(0, False), (0, True), (3, True)])
def test_a_single_batch_of_all_images_or_of_all_but_a_few(
    engine: Engine, views: int, left_out: int, drop_last: bool
):
    task = separable_task(views=views, seed=7, noise=2.0)
    support = task.features.shape[1]
    schedule = Schedule(10, support - left_out, 1, drop_last=drop_last)
    assert len(list(batches(task, schedule, 0))) == 1
    hyper = HyperParameters(0.6, 0.0, 3e-3, 0.1)
    expected = TorchRun(Architecture(), schedule, task, hyper).train(schedule.epochs)
    state: RunState = run(engine, Architecture(), schedule, task, hyper).state
    assert_close(named(state.parameters, 0), expected.snapshots[-1], by=2e-5)
    np.testing.assert_allclose(state.history[0], expected.evaluations, atol=1e-4)
    assert np.ptp(state.history[0, :, 1]) > 0.01, "hardly anything moved: nothing is compared"


def test_a_long_warm_up_ends_after_a_hundred_steps(engine: Engine):
    schedule = Schedule(1200, 256, 1200, "sgd", "linear")
    task = separable_task(noise=2.0)
    hyper = HyperParameters(0.6, 0.0, 2e-3, 0.0)
    expected = TorchRun(Architecture(), schedule, task, hyper).train(125)
    state = run(engine, Architecture(), schedule, task, hyper, stop=125).state
    assert_close(named(state.parameters, 0), expected.snapshots[-1], by=1e-5)


def test_advancing_in_pieces_is_advancing_at_once(engine: Engine):
    task = separable_task(seed=3)
    hyper = HyperParameters(0.6, 0.0, 3e-3, 0.1)
    whole = run(engine, Architecture(), SHORT, task, hyper)
    state = run(engine, Architecture(), SHORT, task, hyper, stop=2).row(0)
    for start, stop in ((2, 5), (5, 6), (6, 10)):
        (chunk,) = engine.run(
            Architecture(), SHORT, task, [hyper], start=start, stop=stop, states=[lambda s=state: s]
        )
        state = chunk.row(0)
    for piecewise, at_once in zip(state, whole.row(0), strict=True):
        assert piecewise.tobytes() == at_once.tobytes()


def test_evaluations_not_reached_are_nan(engine: Engine):
    task = separable_task(seed=3)
    hyper = HyperParameters(0.6, 0.0, 3e-3, 0.1)
    history = run(engine, Architecture(), SHORT, task, hyper, stop=8).state.history[0]
    assert np.isfinite(history[:8]).all()
    assert np.isnan(history[8:]).all()


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [(10, 3, [3, 6, 9, 10]), (10, 5, [5, 10]), (3, 5, [3]), (5, 1, [1, 2, 3, 4, 5])],
)
def test_every_so_many_epochs_and_the_last_are_evaluated(
    epochs: int, every: int, expected: list[int]
):
    schedule = Schedule(epochs=epochs, evaluate_every=every)
    assert schedule.evaluated_epochs() == expected
    assert schedule.evaluations == len(expected)


def test_of_equal_evaluations_the_earliest_is_kept(engine: Engine):
    """With α = 0 the adapter changes nothing, so that all evaluations are equal."""
    task = separable_task(seed=3)
    state = run(engine, Architecture(), SHORT, task, HyperParameters(0, 0, 3e-3, 0.1)).state
    assert (np.asarray(state.history[0]) == np.asarray(state.history[0, 0])).all()
    assert int(state.best_evaluation[0]) == 0


def test_accuracy_goes_before_likelihood(engine: Engine):
    """A run that overfits: its most accurate evaluation is not its most likely one."""
    task = separable_task(shots=5, seed=1, noise=3.0, data_seed=8)
    hyper = HyperParameters(0.9, 0.0, 0.2, 0.0)
    state = run(engine, Architecture(), SHORT, task, hyper).state
    accuracy, nll = np.asarray(state.history[0]).T
    candidates = np.flatnonzero(accuracy == accuracy.max())
    best = candidates[nll[candidates].argmin()]
    assert best != nll.argmin(), "both rules choose the same here: nothing is tested"
    assert int(state.best_evaluation[0]) == best


def test_without_validation_images_the_last_parameters_are_kept(engine: Engine):
    task = separable_task(seed=3, validation=0)
    hyper = HyperParameters(0.6, 0.0, 3e-3, 0.1)
    state = run(engine, Architecture(), SHORT, task, hyper).state
    assert_close(named(state.best, 0), named(state.parameters, 0), by=0)


def test_another_seed_starts_and_shuffles_otherwise(engine: Engine):
    hyper = HyperParameters(0.6, 0.0, 3e-3, 0.1)
    first, second = (separable_task(seed=seed) for seed in (1, 2))
    starts = [start_arrays(Architecture(), SHORT, task, hyper)[0] for task in (first, second)]
    one, other = (start["image/bottleneck/down/kernel"] for start in starts)
    assert np.abs(one - other).max() > 0.1
    orders = [
        [rows.tolist() for _, rows in batches(task, SHORT, epoch)]
        for task, epoch in ((first, 0), (first, 1), (second, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    ("support", "batch_size", "equal", "dropping"),
    [(37, 32, (2, 19), (1, 32)), (592, 32, (19, 32), (18, 32)), (20, 32, (1, 20), (1, 20))],
)
def test_steps_and_batches_of_an_epoch(support, batch_size, equal, dropping):
    """Dassl's loader drops an incomplete last batch where there is a complete one."""
    schedule = Schedule(batch_size=batch_size)
    assert steps_and_batch(support, schedule) == equal
    assert steps_and_batch(support, replace(schedule, drop_last=True)) == dropping
