"""Time the search of each closed form, and one fit of each trained method: python
benchmarks/methods.py --help

Both sides run in one process, alternating, on the same arrays and the same grid: 16 shots in 1,024
dimensions, validated on 4 images a class. A first round, which compiles, is left out, and printed
beside ours. A figure is the median of the rounds, with the smallest and the largest behind it, of
the number of threads that suits a side best; a ratio above 1 means that ours is faster. The loops
of the official code are timed on a tenth of their outer axis, and multiplied.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import torch
from idle import machine, require_idle
from synthetic import LOGIT_SCALE, SyntheticTask, synthetic_task
from threadpoolctl import threadpool_limits
from torch_closed_forms import Grid, Rows, gda_with, proker_with, tip_hoisted, tip_in_loops
from torch_methods import TRAINED, Support

from clip_adapter.adapters.engine.evaluation import Evaluation, rounds_of
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import search
from clip_adapter.adapters.method import Head, Method, Setting, Task
from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.console.jax_setup import set_up_jax

DIM, SHOTS, VALIDATION_SHOTS = 1024, 16, 4
TENTH = 10

Search = Callable[[Rows, Grid], float]
Sides = dict[tuple[str, int], tuple[Callable[[], float], int]]
"""(name, threads) → what to time, and what its time is multiplied by."""
OPPONENTS: Mapping[str, Mapping[str, Search]] = {
    "tip-adapter": {
        "PyTorch, as in the official code": tip_in_loops,
        "PyTorch, hoisted": tip_hoisted,
    },
    "gda": {
        "PyTorch, pinv as in the official code": partial(gda_with, inverse="torch pinv"),
        "PyTorch, Hermitian pinv": partial(gda_with, inverse="torch pinv, Hermitian"),
        "SciPy pinvh": partial(gda_with, inverse="scipy"),
    },
    "proker": {
        "PyTorch, as in the official code": partial(proker_with, solve="torch solve"),
        "NumPy, a solve a point": partial(proker_with, solve="numpy"),
        "PyTorch, hoisted": partial(proker_with, solve="torch eigh"),
    },
    "ridge": {},
}
NAMES = [*OPPONENTS, *TRAINED]
CUT = {
    ("tip-adapter", "PyTorch, as in the official code"),
    ("proker", "PyTorch, as in the official code"),
    ("proker", "NumPy, a solve a point"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", choices=[*NAMES, []], help="by default all")
    parser.add_argument("--classes", nargs="*", type=int, default=[37, 100])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    arguments = parser.parse_args()
    require_idle()
    set_up_jax()
    print(machine(), f"| JAX on {jax.devices()[0].device_kind}")
    for classes in arguments.classes:
        task = synthetic_task(DIM, classes, SHOTS, VALIDATION_SHOTS)
        for name in arguments.methods or NAMES:
            one = compare if name in OPPONENTS else compare_trained
            one(METHODS[name], task, arguments.rounds)
    require_idle()


class NoJournal:
    """Nothing is known of a search that starts."""

    states: Mapping = {}

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        return None


def compare(method: Method, data: SyntheticTask, rounds: int) -> None:
    """The whole search over the method's grid; ours also with rounds of the support set left out,
    which judges four times as many images."""
    values = method.values({})
    rows = Rows.of(
        data.features,
        data.labels,
        data.validation_features,
        data.validation_labels,
        data.weights,
        LOGIT_SCALE,
    )
    task, engine = task_of(data), Engine()

    def ours() -> float:
        found = search(method, values, [task], engine, NoJournal())
        return max(evaluation.accuracy for evaluation in found)

    left = rounds_of(data.labels)
    assert left is not None
    within = (own[own >= 0] for own in left.members)
    folds = [task._replace(validation_labels=task.labels[own]) for own in within]

    def left_out() -> float:
        found = search(method, values, folds, engine, NoJournal(), rounds=(task, left))
        return max(evaluation.accuracy for evaluation in found)

    cores = len(os.sched_getaffinity(0))
    sides: Sides = {("ours", 0): (ours, 1), ("ours, rounds left out", 0): (left_out, 1)}
    for name, opponent in OPPONENTS[method.name].items():
        cut = TENTH if (method.name, name) in CUT else 1
        outer, *others = values
        grid = {outer: values[outer][::cut], **{other: values[other] for other in others}}
        for threads in {1, cores}:
            sides[name, threads] = (partial(limited, opponent, rows, grid, threads), cut)
    points = len(method.settings(values))
    print(f"\n{method.name}, {points} points, {len(data.weights)} classes, {SHOTS} shots")
    alternate(sides, rounds)


def compare_trained(method: Method, data: SyntheticTask, rounds: int) -> None:
    """One fit with the method's defaults, as its official code trains it."""
    values = method.values({}, one=True)
    task, engine = task_of(data), Engine()
    labels, judged = (torch.as_tensor(own).long() for own in (data.labels, data.validation_labels))
    features, weights, validation = map(
        torch.as_tensor, (data.features, data.weights, data.validation_features)
    )
    support = Support(features, labels, weights, weights[:, None], validation, judged, LOGIT_SCALE)

    def ours() -> float:
        (found,) = search(method, values, [task], engine, NoJournal())
        return found.accuracy

    def theirs(threads: int) -> float:
        with threadpool_limits(threads):
            torch.set_num_threads(threads)
            return TRAINED[method.name](support)

    sides: Sides = {("ours", 0): (ours, 1)}
    for threads in {1, len(os.sched_getaffinity(0))}:
        sides["PyTorch, as in the official code", threads] = (partial(theirs, threads), 1)
    print(f"\n{method.name}, one fit, {len(data.weights)} classes, {SHOTS} shots")
    alternate(sides, rounds)


def alternate(sides: Sides, rounds: int) -> None:
    """Run the sides in turn; print medians, spreads and ratios, of wall and of CPU time."""
    started = time.perf_counter()
    accuracies = {side: run() for side, (run, _) in sides.items() if side[1] == 0}
    print(f"  the first of ours, which compile, took {time.perf_counter() - started:.2f} s")
    wall: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
    cpu: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (run, factor) in sides.items():
            before, started = time.process_time(), time.perf_counter()
            accuracies[side] = run()
            wall[side].append(factor * (time.perf_counter() - started))
            cpu[side].append(factor * (time.process_time() - before))
    medians = {side: statistics.median(times) for side, times in wall.items()}
    for name in dict.fromkeys(name for name, _ in sides):
        side = min((s for s in sides if s[0] == name), key=medians.__getitem__)
        spread = f"({min(wall[side]):.3f} … {max(wall[side]):.3f})"
        ratio = medians[side] / medians["ours", 0]
        work = statistics.median(cpu[side]) / statistics.median(cpu["ours", 0])
        print(
            f"  {name:38} {medians[side]:9.3f} s {spread:22} {ratio:7.2f}, CPU time {work:7.2f}"
            f" | accuracy {accuracies[side]:.4f}" + f" | {side[1]} threads" * (side[1] > 0)
        )


def limited(opponent: Search, rows: Rows, grid: Grid, threads: int) -> float:
    """The opponent's search with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        found = opponent(rows, grid)
    torch.set_num_threads(before)
    return found


def task_of(data: SyntheticTask) -> Task:
    return Task(
        features=jnp.asarray(data.features[None]),
        labels=jnp.asarray(data.labels),
        validation_features=jnp.asarray(data.validation_features),
        validation_labels=jnp.asarray(data.validation_labels),
        head=Head(
            jnp.asarray(data.weights),
            jnp.float32(LOGIT_SCALE),
            jnp.float32(0),
            jnp.asarray(data.weights[:, None]),
        ),
        seed=jnp.int32(0),
    )


if __name__ == "__main__":
    main()
