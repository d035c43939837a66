"""The engine: how often it compiles, that placements change no result, and how it is stopped."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from clip_adapter.adapters.engine.evaluation import Leaves
from clip_adapter.adapters.engine.process import one_blas_thread
from clip_adapter.adapters.engine.runner import Engine, Placement
from clip_adapter.adapters.method import Setting, Task
from tests.adapters.tasks import (
    CLIP_ADAPTER,
    EACH_EPOCH,
    compilations,
    separable_task,
    setting_of,
)

ROOT = Path(__file__).parents[2]
SETTINGS = [
    setting_of(alpha=alpha, learning_rate=rate, **EACH_EPOCH)
    for alpha in (0.2, 0.5, 0.8)
    for rate in (1e-3, 1e-2)
]
# Weights beyond float32 after one step.
DIVERGING = setting_of(alpha=0.6, learning_rate=1e30, **EACH_EPOCH)


def histories(
    engine: Engine, settings: Sequence[Setting], task: Task | None = None, **span: Any
) -> np.ndarray:
    """(K, E, 2): what validation said of each setting, in the order asked for."""
    task = task or separable_task(noise=2.0)
    chunks = list(engine.run(CLIP_ADAPTER, settings, task, **span))
    assert [index for chunk in chunks for index in chunk.indices] == list(range(len(settings)))
    return np.concatenate(
        [np.asarray(chunk.state.history)[: len(chunk.indices)] for chunk in chunks]
    )


def test_a_program_is_compiled_per_static_signature_and_not_per_setting(engine: Engine):
    histories(engine, SETTINGS[:1])
    before = engine.compilations
    with compilations() as compiled:
        histories(engine, SETTINGS)
        histories(engine, SETTINGS[:3], separable_task(seed=5, data_seed=5))
    assert (engine.compilations, compiled) == (before, [])
    narrow = [setting | {"reduction": 2} for setting in SETTINGS]
    with compilations() as compiled:
        for _ in range(2):
            histories(engine, narrow)
    assert engine.compilations == before + 1
    assert compiled, "the listener hears nothing"


@pytest.fixture
def vectorised(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Of the six settings it runs three at a time."""
    monkeypatch.setattr("clip_adapter.adapters.engine.runner.LARGEST_CHUNK", 4)
    return Engine("vectorised")


def test_chunks_are_as_equal_as_can_be(vectorised: Engine):
    chunks = list(vectorised.run(CLIP_ADAPTER, SETTINGS[:5], separable_task()))
    assert [len(chunk.state.history) for chunk in chunks] == [3, 3]
    assert [chunk.indices for chunk in chunks] == [[0, 1, 2], [3, 4]]


def test_placements_agree(engine: Engine, vectorised: Engine):
    expected = histories(engine, SETTINGS)
    assert np.ptp(expected[:, -1, 1]) > 0.01, "the settings hardly differ: nothing is compared"
    np.testing.assert_allclose(histories(vectorised, SETTINGS), expected, atol=2e-5)


@pytest.mark.parametrize("placement", ["sequential", "vectorised"])
def test_a_setting_that_diverges_harms_no_other(
    placement: Placement, engine: Engine, vectorised: Engine
):
    runs = {"sequential": engine, "vectorised": vectorised}[placement]
    sound = histories(runs, SETTINGS)
    broken = histories(runs, [SETTINGS[0], DIVERGING, *SETTINGS[2:]])
    assert not np.isfinite(broken[1, -1, 1])
    others = [0, *range(2, len(SETTINGS))]
    assert broken[others].tobytes() == sound[others].tobytes()


def lost() -> Leaves:
    raise KeyError("lost")


@pytest.mark.parametrize("placement", ["sequential", "vectorised"])
def test_a_state_that_was_lost_or_damaged_is_had_again(
    placement: Placement, engine: Engine, vectorised: Engine
):
    runs = {"sequential": engine, "vectorised": vectorised}[placement]
    task = separable_task(noise=2.0)
    chunks = list(runs.run(CLIP_ADAPTER, SETTINGS, task, stop=3))
    rows = [chunk.row(row) for chunk in chunks for row in range(len(chunk.indices))]
    whole = histories(runs, SETTINGS)
    odd: list[Leaves] = [
        [],
        rows[1][:-1],
        [leaf[None] for leaf in rows[2]],
        [leaf.astype(np.float64) for leaf in rows[3]],
    ]
    states = [lost, *(lambda leaves=leaves: leaves for leaves in [*odd, rows[5]])]
    found = histories(runs, SETTINGS, task, first=3, states=states)
    # In a chunk of its own a setting is trained to the same bits; side by side to rounding.
    np.testing.assert_allclose(found, whole, atol=2e-5)
    assert found[5].tobytes() == whole[5].tobytes()
    if placement == "sequential":
        assert found.tobytes() == whole.tobytes()


SLOW = [
    {name: value for name, value in setting.items() if name != "evaluate_every"}
    | {"epochs": 20_000, "epoch": "last"}
    for setting in SETTINGS
]


def test_nobody_trains_on_after_the_last_chunk_was_taken():
    """The caller leaves after the first setting: what runs beside it ends between two calls."""
    trained: list[float] = []
    engine = Engine("sequential", trained.append)
    chunks = engine.run(CLIP_ADAPTER, SLOW, separable_task(), stop=200)
    next(chunks)
    chunks.close()
    list(engine.run(CLIP_ADAPTER, SLOW[:1], separable_task(), stop=1))
    assert sum(trained) * 20_000 < 200 * len(SLOW)


def test_progress_adds_up_to_the_settings():
    trained: list[float] = []
    list(Engine("sequential", trained.append).run(CLIP_ADAPTER, SLOW, separable_task(), stop=200))
    assert sum(trained) * 20_000 == pytest.approx(200 * len(SLOW))
    assert len(trained) > len(SLOW), "it moves within a setting"


SHARDED = """
import sys
import jax, numpy as np
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.pipelines.console.jax_setup import set_up_jax
from tests.adapters.test_engine import SETTINGS, histories

set_up_jax()

assert jax.device_count() == 4
found = {}
for placement in ("sequential", "vectorised"):
    engine = Engine(placement)
    found[placement] = histories(engine, SETTINGS)
    assert engine.compilations == 1
np.savez(sys.argv[1], **found)
"""


def test_four_devices_agree_with_one(engine: Engine, tmp_path: Path):
    """Six settings on four devices: the last chunk is not full."""
    assert len(SETTINGS) % 4
    subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path / "histories.npz"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
    )
    found = np.load(tmp_path / "histories.npz")
    expected = histories(engine, SETTINGS)
    for placement in ("sequential", "vectorised"):
        np.testing.assert_allclose(found[placement], expected, atol=2e-5, err_msg=placement)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_times_with_one_blas_thread_that_overlap_leave_the_number_as_it_was():
    with threadpool_limits(2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert blas_threads() == {1}
        first.__exit__(None, None, None)
        assert blas_threads() == {1}, "the other one is still in there"
        second.__exit__(None, None, None)
        assert blas_threads() == {2}
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {2}
