"""The engine: how often it compiles, and that the layout changes no result."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest

from clip_adapter.adapters import training
from clip_adapter.adapters.clip_adapter import Architecture, Branch
from clip_adapter.adapters.engine import Engine, Layout
from clip_adapter.adapters.training import HyperParameters, Task
from tests.adapters.tasks import SHORT, separable_task

ROOT = Path(__file__).parents[2]
HYPERS = [
    HyperParameters(alpha, 0.0, rate, 0.01) for alpha in (0.2, 0.5, 0.8) for rate in (1e-3, 1e-2)
]
# Weights beyond float32 after one step.
DIVERGING = HyperParameters(0.6, 0.0, 1e30, 0.01)


def histories(
    engine: Engine,
    hypers: list[HyperParameters],
    task: Task | None = None,
    reduction: int = 4,
) -> np.ndarray:
    """(K, E, 2): what validation said of each setting, in the order asked for."""
    task = task or separable_task(noise=2.0)
    chunks = list(engine.run(Architecture(reduction=reduction), SHORT, task, hypers))
    assert [index for chunk in chunks for index in chunk.indices] == list(range(len(hypers)))
    return np.concatenate(
        [np.asarray(chunk.state.history)[: len(chunk.indices)] for chunk in chunks]
    )


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Every program that XLA compiles inside the block."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_program_is_compiled_per_static_signature_and_not_per_setting(engine: Engine):
    histories(engine, HYPERS[:1])
    before = engine.compilations
    with compilations() as compiled:
        histories(engine, HYPERS)
        histories(engine, HYPERS[:3], separable_task(seed=5, data_seed=5))
    assert (engine.compilations, compiled) == (before, [])
    with compilations() as compiled:
        for _ in range(2):
            histories(engine, HYPERS, reduction=2)
    assert engine.compilations == before + 1
    assert compiled, "the listener hears nothing"


@pytest.fixture(scope="module")
def vectorised() -> Engine:
    return Engine("vectorised")


@pytest.mark.parametrize(("branch", "adapters"), [("image", 1), ("text", 1), ("both", 2)])
def test_kernels_are_updated_in_place(
    branch: Branch, adapters: int, monkeypatch: pytest.MonkeyPatch
):
    """Without `_together` XLA copies a kernel of each adapter at every step."""

    def copies() -> int:
        program = Engine("sequential")._program(Architecture(branch), SHORT, separable_task(), 1)
        return len(re.findall(r"= f32\[\d+,\d+\]\S* copy\(", program.as_text()))

    together = copies()
    monkeypatch.setattr(training, "_together", lambda gradient: gradient)
    assert copies() == together + adapters


def test_chunks_are_as_equal_as_can_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clip_adapter.adapters.engine.LARGEST_CHUNK", 4)
    engine = Engine("vectorised")
    hypers = [HyperParameters(alpha, 0.0, 1e-3, 0.01) for alpha in (0.2, 0.3, 0.4, 0.5, 0.6)]
    chunks = list(engine.run(Architecture(), SHORT, separable_task(), hypers))
    assert [len(chunk.state.history) for chunk in chunks] == [3, 3]
    assert [chunk.indices for chunk in chunks] == [[0, 1, 2], [3, 4]]


def test_layouts_agree(engine: Engine, vectorised: Engine):
    expected = histories(engine, HYPERS)
    assert np.ptp(expected[:, -1, 1]) > 0.01, "the settings hardly differ: nothing is compared"
    np.testing.assert_allclose(histories(vectorised, HYPERS), expected, atol=2e-5)


@pytest.mark.parametrize("layout", ["sequential", "vectorised"])
def test_a_setting_that_diverges_harms_no_other(layout: Layout, engine: Engine, vectorised: Engine):
    runs = {"sequential": engine, "vectorised": vectorised}[layout]
    sound = histories(runs, HYPERS)
    broken = histories(runs, [HYPERS[0], DIVERGING, *HYPERS[2:]])
    assert not np.isfinite(broken[1, -1, 1])
    others = [0, *range(2, len(HYPERS))]
    assert broken[others].tobytes() == sound[others].tobytes()


SHARDED = """
import sys
import jax, numpy as np
from clip_adapter.adapters.engine import Engine
from clip_adapter.pipelines.jax_setup import set_up_jax
from tests.adapters.test_engine import HYPERS, histories

set_up_jax()

assert jax.device_count() == 4
found = {}
for layout in ("sequential", "vectorised"):
    engine = Engine(layout)
    found[layout] = histories(engine, HYPERS)
    assert engine.compilations == 1
np.savez(sys.argv[1], **found)
"""


def test_four_devices_agree_with_one(engine: Engine, tmp_path: Path):
    """Six settings on four devices: the last chunk is not full."""
    assert len(HYPERS) % 4
    subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path / "histories.npz"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
    )
    found = np.load(tmp_path / "histories.npz")
    expected = histories(engine, HYPERS)
    for layout in ("sequential", "vectorised"):
        np.testing.assert_allclose(found[layout], expected, atol=2e-5, err_msg=layout)
