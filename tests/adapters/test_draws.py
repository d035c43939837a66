"""The drawings of a run, epoch by epoch, against the order as the tests' PyTorch user has it."""

import numpy as np
import pytest

from clip_adapter.adapters.engine import epoch_draws as draws
from clip_adapter.adapters.optimisation import steps_and_batch
from tests.adapters.tasks import separable_task, setting_of
from tests.adapters.test_training import batches


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
