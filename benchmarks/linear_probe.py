"""Time the linear probe's solver against scikit-learn: python benchmarks/linear_probe.py --help

All sides run in one process, alternating, on the same arrays and the same 15 values of C, those of
CLIP's sweep around C = 10. A first round is left out. A figure is the median of the rounds, with
the smallest and the largest behind it; a ratio above 1 means that ours is faster. CPU seconds are
those of all threads of the process; of one thread they hardly depend on what else the machine does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from idle import machine, require_idle
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from synthetic import SyntheticTask, synthetic_task
from threadpoolctl import threadpool_limits

from clip_adapter.adapters.methods.logistic.path import LogisticRegressionPath

EXPONENTS = (-6, -4, -2, 0, 2, 4, 6, 1, 3, 0.5, 1.5, 0.75, 1.25, 0.875, 1.125)
MAX_ITERATIONS = 1000
Fits = list[tuple[np.ndarray, np.ndarray]]
"""Kernel (D, C) and bias (C,) for each of EXPONENTS."""


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    works = {"sweep": sweep, "small": small, "large": large}
    parser.add_argument("work", nargs="*", choices=[*works, []], help="by default sweep and small")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--all-threads", action="store_true", help="scikit-learn with them, too")
    arguments = parser.parse_args()
    require_idle()
    print(machine(), "\n")
    for name in arguments.work or ("sweep", "small"):
        works[name](arguments.rounds, arguments.all_threads)
    require_idle()


def sweep(rounds: int, all_threads: bool) -> None:
    compare(synthetic_task(1024, 37, 16, 1), rounds, all_threads)


def small(rounds: int, all_threads: bool) -> None:
    compare(synthetic_task(1024, 10, 1, 1), rounds, all_threads)


def large(rounds: int, all_threads: bool) -> None:
    """Ours alone: scikit-learn would take hours."""
    task = synthetic_task(512, 1000, 16, 1)
    print("1000 classes × 16 images, D = 512: ours, one round")
    begin, cpu = time.perf_counter(), time.process_time()
    path = LogisticRegressionPath(task.features, task.labels, 1000)
    solutions = [path.solve(10.0**exponent) for exponent in EXPONENTS]
    print(f"  {time.perf_counter() - begin:.1f} s, {time.process_time() - cpu:.1f} CPU seconds")
    print(f"  all solved: {all(solution.solved for solution in solutions)}\n")


def compare(task: SyntheticTask, rounds: int, all_threads: bool) -> None:
    classes, count = task.labels.max() + 1, len(task.labels)
    print(f"{classes} classes, {count} images, D = {task.features.shape[1]}")
    sides: dict[str, Callable[[], Fits]] = {"ours": partial(ours, task)}
    for tolerance in (1e-4, 1e-8):
        sides[f"scikit-learn, tol {tolerance:.0e}"] = partial(scikit_learn, task, tolerance, 1)
    if all_threads:
        sides["scikit-learn, tol 1e-04, all threads"] = partial(scikit_learn, task, 1e-4, None)
    found = {name: side() for name, side in sides.items()}
    timed: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin, cpu = time.perf_counter(), time.process_time()
            side()
            timed[name].append(Seconds(time.perf_counter() - begin, time.process_time() - cpu))
    for name, seconds in timed.items():
        shares = [one.wall / own.wall for one, own in zip(seconds, timed["ours"], strict=True)]
        cpu_shares = [one.cpu / own.cpu for one, own in zip(seconds, timed["ours"], strict=True)]
        print(f"  {name:42} wall {spread([one.wall for one in seconds])} s, ratio {spread(shares)}")
        print(
            f"  {'':42} CPU  {spread([one.cpu for one in seconds])} s, ratio {spread(cpu_shares)}"
        )
    print_gaps(task, found)


def ours(task: SyntheticTask) -> Fits:
    path = LogisticRegressionPath(task.features, task.labels, int(task.labels.max()) + 1)
    solutions = [path.solve(10.0**exponent) for exponent in EXPONENTS]
    return [(solution.kernel, solution.bias) for solution in solutions]


def scikit_learn(task: SyntheticTask, tolerance: float, threads: int | None) -> Fits:
    features = task.features.astype(np.float64)
    fits = []
    with threadpool_limits(threads, user_api="blas"):
        for exponent in EXPONENTS:
            model = LogisticRegression(C=10.0**exponent, tol=tolerance, max_iter=MAX_ITERATIONS)
            model.fit(features, task.labels)
            fits.append((model.coef_.T, model.intercept_))
    return fits


def print_gaps(task: SyntheticTask, found: dict[str, Fits]) -> None:
    """How far above the smallest objective that anybody reached each side is, relative to it."""
    sides = [name for name in found if "all" not in name]
    print("\n  objective above the best / kernel's distance to ours, relative")
    for at, exponent in sorted(enumerate(EXPONENTS[:7]), key=lambda pair: pair[1]):
        reached = {name: objective(task, 10.0**exponent, *found[name][at]) for name in sides}
        best, own = min(reached.values()), found["ours"][at][0]
        cells = [
            f"{reached[name] / best - 1:.1e} / "
            f"{np.linalg.norm(found[name][at][0] - own) / np.linalg.norm(own):.1e}"
            for name in sides
        ]
        print(f"  C = 1e{exponent:+d}: " + "  ".join(cells))
    print("  in the order:", "; ".join(sides), "\n")


def objective(task: SyntheticTask, c: float, kernel: np.ndarray, bias: np.ndarray) -> float:
    logits = task.features.astype(np.float64) @ kernel + bias
    own = logits[np.arange(len(logits)), task.labels]
    return float(c * logsumexp(logits - own[:, None], axis=1).sum() + 0.5 * (kernel**2).sum())


def spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):.3f} ({min(figures):.3f} … {max(figures):.3f})"


if __name__ == "__main__":
    main()
