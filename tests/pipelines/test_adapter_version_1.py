"""Adapters of format version 1 are read, and give the logits that they gave then.

version_1/NAME are adapters that the program of that version fitted and wrote (three classes, 16
numbers wide, no real data); expected.safetensors has features and the logits it computed of them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter
from clip_adapter.pipelines.saved.fitted_head import FittedHead

FOLDER = Path(__file__).parent / "version_1"
EXPECTED = load_file(FOLDER / "expected.safetensors")
NAMES = sorted(set(EXPECTED) - {"features"})


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_the_logits_of_then(
    name: str, tmp_path: Path, flax_logits: Callable[[SavedAdapter, np.ndarray], np.ndarray]
) -> None:
    adapter = load_adapter(FOLDER / name)
    info, features = adapter.info, EXPECTED["features"]
    assert (info.logit_scale, info.logit_bias) == (20.0, 0.5)
    np.testing.assert_allclose(flax_logits(adapter, features), EXPECTED[name], atol=2e-5)
    with torch.inference_mode():
        logits = FittedHead(adapter)(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(logits, EXPECTED[name], atol=2e-5)
    head = Head(adapter.weights, np.float32(20), np.float32(0.5))
    logits = METHODS[info.method].logits(np, adapter.arrays, info.setting, features, head)
    np.testing.assert_allclose(logits, EXPECTED[name], atol=2e-5)
    facts = dict(inspect(InspectConfig(FOLDER / name)))
    assert facts["what"].startswith(f"adapter of {info.method}")


def test_all_kinds_differ_and_a_fixed_ratio_stands_in_the_setting_alone() -> None:
    assert len({EXPECTED[name].tobytes() for name in NAMES}) == len(NAMES) == 6
    both = load_adapter(FOLDER / "both-fixed")
    assert both.info.setting["alpha"] == 0.6
    assert "image/ratio/value" in load_file(FOLDER / "both-fixed" / "adapter.safetensors")
    assert "image/ratio/value" not in both.arrays
