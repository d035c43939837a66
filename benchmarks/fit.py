"""Time fitting against PyTorch: python benchmarks/fit.py --help

Both sides run in one process (`process`: a new one each), alternating, on the same arrays and the
same work: as many settings and steps, and validation after the last epoch, as `fit` does by
default. A first round, which compiles, is left out. A figure is the median of the rounds, with the
smallest and the largest behind it; a ratio above 1 means that ours is faster.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from idle import machine, require_idle
from ours import KeepsNothing, task_of
from synthetic import LOGIT_SCALE, SyntheticTask, synthetic_task
from torch_opponents import Setting, Tensors, Work, train_eager, train_ensemble

from clip_adapter.adapters.engine.evaluation import Evaluation
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import search
from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
from clip_adapter.pipelines.console.jax_setup import set_up_jax

DIM, CLASSES, REDUCTION = 1024, 64, 4
GRID = {
    "alpha": (0.2, 0.4, 0.6, 0.8),
    "learning_rate": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "weight_decay": (0.0, 1e-2, 1e-1),
}
# What is timed on a GPU, where settings are trained side by side.
GPU_GRID = GRID | {
    "alpha": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "weight_decay": (0.0, 1e-3, 1e-2, 1e-1),
}
Side = Callable[[list[Setting]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    works = {"one": one_fit, "grid": grid, "side-by-side": side_by_side, "process": whole_process}
    parser.add_argument("work", nargs="*", choices=[*works, []], help="by default all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of a run")
    arguments = parser.parse_args()
    require_idle()
    # As JAX does: late in a run the moments of AdamW underflow, which slowed PyTorch down by half.
    torch.set_flush_denormal(True)
    set_up_jax()
    print(machine(), f"| JAX on {jax.devices()[0].device_kind}", f"| {torch_device()} in PyTorch\n")
    peak = gemm_peak()
    print(f"matrix product, best of JAX and PyTorch: {peak / 1e9:.0f} GFLOP/s")
    for name in arguments.work or works:
        works[name](arguments.rounds, arguments.epochs, peak)
    require_idle()


def one_fit(rounds: int, epochs: int, peak: float) -> None:
    """One setting on 1,024 images."""
    task = synthetic_task(DIM, CLASSES, 16, 4)
    for batch_size in (256, 32):
        work = Work(epochs, batch_size)
        setting = Setting(0.6, 1e-3, 1e-2)
        tensors = Tensors(task, torch_device())
        sides: dict[str, Side] = {"ours": ours(task, work)} | opponents(tensors, work)
        print(f"\none fit, batch {batch_size}, {epochs} epochs of {len(task.labels)} images")
        medians = alternate(sides, [setting], rounds)
        steps = epochs * len(task.labels) // batch_size
        flops = 10 * batch_size * DIM * (DIM // REDUCTION) * steps
        share = flops / medians["ours"] / peak
        print(f"  the adapter's products alone are {share:.0%} of the matrix product's rate")


def grid(rounds: int, epochs: int, peak: float) -> None:
    """96 settings, on a GPU 256, on 256 images (one step an epoch), in full and by halving."""
    task = synthetic_task(DIM, CLASSES, 4, 4)
    work = Work(epochs, 256)
    values = (GPU_GRID if torch.cuda.is_available() else GRID).values()
    settings = [Setting(*some) for some in product(*values)]
    full, halving = ours(task, work), ours(task, work, halving=True)
    print(f"\na grid of {len(settings)}, batch 256, {epochs} epochs of {len(task.labels)} images")
    sides: dict[str, Side] = {"ours": full, "ours, halving": halving}
    sides |= opponents(Tensors(task, torch_device()), work)
    # It takes longer than with all cores (one_fit shows it), which is minutes here.
    sides.pop("PyTorch eager, 1 thread", None)
    alternate(sides, settings, rounds)
    for name, side in (("full", full), ("halving", halving)):
        accuracy = max(e.accuracy for e in side(settings) if e.epochs_run == epochs)
        print(f"  validation accuracy of the setting chosen by {name}: {accuracy:.2%}")


def side_by_side(rounds: int, epochs: int, peak: float) -> None:
    """The 96 settings for a fifth of the epochs, against PyTorch training all at once."""
    task = synthetic_task(DIM, CLASSES, 4, 4)
    work = Work(max(1, epochs // 5), 256)
    settings = [Setting(*values) for values in product(*GRID.values())]
    tensors = Tensors(task, torch_device())
    print(f"\na grid of {len(settings)}, batch 256, {work.epochs} epochs of 256 images")
    sides: dict[str, Side] = {"ours": ours(task, work)}
    sides["PyTorch torch.func, all at once"] = lambda some: train_ensemble(tensors, some, work)
    alternate(sides, settings, rounds)


def whole_process(rounds: int, epochs: int, peak: float) -> None:
    """`fit` on the embedded cache against a minimal PyTorch script, imports included."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features.h5"
        commands = Path(sys.executable).parent
        subprocess.run([commands / "extract", "--out", cache], check=True, capture_output=True)
        script = Path(__file__).parent / "minimal_torch_fit.py"
        count = iter(range(10**6))

        def fit(_: list[Setting]) -> None:
            options = ["--alpha", "0.6", "--baselines", "--out", Path(folder) / str(next(count))]
            command = [commands / "fit", "--cache", cache, *options]
            subprocess.run(command, check=True, capture_output=True)

        def minimal(_: list[Setting]) -> None:
            subprocess.run([sys.executable, script, cache], check=True, capture_output=True)

        print("\nfit as a whole process on the embedded cache, 200 epochs, 16 shots")
        alternate({"ours": fit, "minimal PyTorch script": minimal}, [], rounds)


def ours(
    task: SyntheticTask, work: Work, *, halving: bool = False
) -> Callable[[list[Setting]], list[Evaluation]]:
    """The engine behind `fit`, on settings that make up a product."""
    arrays = task_of(
        (task.features, task.labels),
        (task.validation_features, task.validation_labels),
        task.weights,
        LOGIT_SCALE,
    )
    engine = Engine()

    def side(settings: list[Setting]) -> list[Evaluation]:
        given: dict[str, Any] = {
            name: tuple(dict.fromkeys(getattr(s, name) for s in settings)) for name in GRID
        }
        given |= {"epochs": (work.epochs,), "batch_size": (work.batch_size,)}
        values = CLIP_ADAPTER.values(given)
        found = search(CLIP_ADAPTER, values, [arrays], engine, KeepsNothing(), halving=halving)
        # As `fit` does, which does not keep what was fitted for every setting.
        return [replace(evaluation, arrays=None) for evaluation in found]

    return side


def opponents(tensors: Tensors, work: Work) -> dict[str, Side]:
    """Eager with as many threads as cores and, on a CPU, with one; and torch.compile."""
    cores = torch.get_num_threads()

    def run(threads: int, compiled: bool) -> Side:
        def side(settings: list[Setting]) -> None:
            torch.set_num_threads(threads)
            for setting in settings:
                train_eager(tensors, setting, work, compiled=compiled)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            torch.set_num_threads(cores)

        return side

    sides = {"PyTorch eager": run(cores, False), "PyTorch compiled": run(cores, True)}
    if not torch.cuda.is_available():
        sides["PyTorch eager, 1 thread"] = run(1, False)
    return sides


def alternate(sides: dict[str, Side], settings: list[Setting], rounds: int) -> dict[str, float]:
    """Run the sides in turn, print medians, spreads and ratios.

    A first call is not counted: it compiles what there is to compile, which on a CPU one setting
    shows as well as all.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(settings if torch.cuda.is_available() else settings[:1])
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side(settings)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        spread = f"({min(values):.3f} … {max(values):.3f})"
        ratio = medians[name] / medians["ours"]
        print(f"  {name:32} {medians[name]:8.3f} s {spread:22} {ratio:6.2f}")
    return medians


def gemm_peak() -> float:
    """FLOP/s of a 1024³ product in float32, the better of the two libraries."""
    size, best = 1024, float("inf")
    a, b = jnp.ones((2, size, size)), torch.ones(2, size, size, device=torch_device())
    product_of = jax.jit(lambda x: x[0] @ x[1])
    for side in (lambda: product_of(a).block_until_ready(), lambda: (b[0] @ b[1]).sum().item()):
        side()
        for _ in range(20):
            started = time.perf_counter()
            side()
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
