"""What a grid needs does not grow with the number of its settings."""

import subprocess
import sys
from pathlib import Path

from tests.pipelines.tiny_cache import tiny_data, write_cache

SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from clip_adapter.pipelines.fit import FitConfig, fit

def peak() -> float:
    # In MiB, of this program alone: getrusage counts what the parent had, too.
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

def peak_mebibytes(settings: int, search: str) -> float:
    rates = tuple(float(rate) for rate in np.linspace(1e-3, 1e-2, settings))
    fit(FitConfig(
        cache=Path(sys.argv[1]), out=Path(sys.argv[2]) / f"{search}-{settings}", lr=rates,
        alpha=(0.5,), baselines=(), shots=(1,), epochs=3, evaluate_every=1, search=search,
    ))
    return peak()

before = [peak_mebibytes(10, search) for search in ("full", "halving")]
print("MiB:", *(peak_mebibytes(110, search) - before[-1] for search in ("full", "halving")))
"""


def test_a_hundred_settings_more_take_no_more_memory(tmp_path: Path):
    """Kept, the states of 100 settings would be 4 × 2 × 512 × 128 float32 each: 200 MiB."""
    cache = write_cache(tmp_path / "features.h5", tiny_data(dim=512, val=1, test=1))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, cache, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    (grown,) = (line for line in done.stdout.splitlines() if line.startswith("MiB:"))
    assert max(map(float, grown.split()[1:])) < 100
