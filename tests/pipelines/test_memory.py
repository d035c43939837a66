"""What a run needs does not grow with the number of its settings, nor with the cache."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np

from tests.cache.rewriting import put, store_metadata
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

PEAK = """
def peak() -> float:
    # In MiB, of this program alone: getrusage counts what the parent had, too.
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
"""
SETTINGS = (
    PEAK
    + """
import sys
import numpy as np
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig

def peak_mebibytes(settings: int, search: str) -> float:
    rates = np.linspace(1e-3, 1e-2, settings)
    fit(FitConfig(
        cache=sys.argv[1], out=f"{sys.argv[2]}/{search}-{settings}", baselines=(), shots=1,
        search=search, hyper={"alpha": 0.5, "learning_rate": rates, "epochs": 3},
    ))
    return peak()

before = [peak_mebibytes(10, search) for search in ("full", "halving")]
print("MiB:", *(peak_mebibytes(110, search) - before[-1] for search in ("full", "halving")))
"""
)


def measured(script: str, *arguments: object) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MiB:"))
    return [float(number) for number in line.split()[1:]]


def test_a_hundred_settings_more_take_no_more_memory(tmp_path: Path):
    """Kept, the states of 100 settings would be 4 × 2 × 512 × 128 float32 each: 200 MiB."""
    cache = write_cache(tmp_path / "features.h5", tiny_data(dim=512, val=1, test=1))
    assert max(measured(SETTINGS, cache, tmp_path)) < 100


LARGE = (
    PEAK
    + """
import sys
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig

result = fit(FitConfig(
    cache=sys.argv[1], out=sys.argv[2], shots=16, baselines="zero-shot",
    hyper={"alpha": 0.5, "epochs": 2},
))
assert result.results[-1].test_images == 20_000
print("MiB:", peak())
"""
)
CLASSES, ROWS, DIM, BLOCK = 50, 300_000, 1024, 1000
UTF8 = h5py.string_dtype("utf-8", 16)


def large_cache(path: Path) -> Path:
    """300,000 × 1,024 training rows in float16, 614 MB, and 20,000 test images: the same thousand
    rows again and again."""
    rng = np.random.default_rng(0)
    labels = np.arange(BLOCK, dtype=np.int32) % CLASSES
    rows = rng.normal(size=(1, BLOCK, DIM)).astype(np.float32)
    text = rng.normal(size=(CLASSES, 2, DIM)).astype(np.float32)
    write_cache(path, TinyData({"train": (rows, labels), "val": (rows, labels)}, text))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        document = json.loads(file["metadata"][...].tobytes())
        for split, count in (("train", ROWS), ("test", 20_000)):
            where = f"images/{split}"
            if f"{where}/features" in file:
                del file[f"{where}/features"], file[f"{where}/features_hashes"]
            features = file.create_dataset(
                f"{where}/features",
                (1, count, DIM),
                np.float16,
                chunks=(1, 500, DIM),
                fletcher32=True,
            )
            for start in range(0, count, BLOCK):
                features[:, start : start + BLOCK] = rows
            ids = np.array([f"{split}/{row}".encode() for row in range(count)], UTF8)
            put(file, f"{where}/labels", np.resize(labels, count))
            put(file, f"{where}/ids", ids)
            for name in ("labels", "ids"):
                values = np.ascontiguousarray(file[f"{where}/{name}"][...])
                digest = hashlib.sha256(values.tobytes()).hexdigest()
                document["datasets_sha256"][f"{where}/{name}"] = digest
        store_metadata(file, json.dumps(document).encode())
    return path


def test_a_run_does_not_take_the_whole_cache_into_memory(tmp_path: Path):
    """Its training rows alone would be 1,172 MiB in float32, and 586 as they are stored; the rest
    of the run takes about 570."""
    (peak,) = measured(LARGE, large_cache(tmp_path / "features.h5"), tmp_path / "run")
    assert peak < 900
