"""What has to be true of every method: a new record in METHODS is tested here as it stands."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine.evaluation import Evaluation
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.hyper import Hyper, Value
from clip_adapter.adapters.method import Head, Method, Task
from clip_adapter.adapters.registry import METHODS, check_record
from tests.adapters.tasks import (
    CLASSES,
    DIM,
    Notes,
    compilations,
    exact,
    needed,
    separable_task,
    setting_of,
    validation_accuracy,
    validation_nll,
    zero_shot,
)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
trained_methods = pytest.mark.parametrize(
    "method", [method for method in METHODS.values() if method.is_trained], ids=lambda m: m.name
)
SHORT: dict[str, Value] = {"epochs": 10, "batch_size": 8}
"""Where a method has them; else nothing."""
GRID_AXES = 2
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def alternatives(hyper: Hyper, name: str) -> list[Value]:
    """Numbers that are allowed, the default first where it is one."""
    base = hyper.default if not isinstance(hyper.default, str) else 0.2
    wanted = [hyper.default, *(base * factor for factor in (0.5, 0.75)), 0.3, 0.6]
    found: list[Value] = []
    for value in wanted:
        try:
            checked = hyper.checked(name, value)
        except ValueError:
            continue
        if not isinstance(checked, str) and checked not in found:
            found.append(checked)
    return found


def numbers_of(method: Method) -> list[str]:
    """Its hyper-parameters that a compiled program takes as numbers."""
    chosen = setting_of(method)
    return [
        name
        for name in chosen
        if method.hyper[name].is_numeric and not method.hyper[name].static and name in chosen
    ]


def short_values(method: Method, *, axes: int = GRID_AXES) -> dict[str, tuple[Value, ...]]:
    """A small grid: three values along each of the first axes, few epochs."""
    given: dict[str, tuple[Value, ...]] = {
        name: (value,) for name, value in SHORT.items() if name in method.hyper
    }
    for name in numbers_of(method)[:axes]:
        given[name] = tuple(alternatives(method.hyper[name], name)[:3])
    return method.values(given, one=True)


def short_setting(method: Method) -> dict[str, Any]:
    return method.default_setting(short_values(method))


def task_for(method: Method, **given: Any) -> Task:
    return needed(method, separable_task(noise=2.0, views=3 if method.uses_views else 1, **given))


@cache
def searched(method: Method, engine: Engine) -> list[Evaluation]:
    return list(search(method, short_values(method), [task_for(method)], engine, Notes()))


@cache
def fitted(method: Method, engine: Engine) -> Mapping[str, np.ndarray]:
    return fit(method, short_setting(method), None, task_for(method), engine)


# The table


@every_method
def test_the_table_is_sane(method: Method):
    assert METHODS[method.name] is method and method.source
    check_record(method)
    for name, hyper in method.hyper.items():
        assert len(hyper.help) > 5 and hyper.help.endswith("."), f"{name}: {hyper.help!r}"
        assert hyper.checked(name, hyper.default) == hyper.default
        assert hyper.checked_values(name, hyper.tried) == hyper.tried
        for earlier, values in hyper.when.items():
            assert all(method.hyper[earlier].checked(earlier, v) == v for v in values)
    for preset, values in method.presets.items():
        assert values and method.default_setting(method.values({}, preset)), preset
        assert all(method.hyper[name].checked(name, v) == v for name, v in values.items())


TRAINED = "epochs batch_size drop_last epoch evaluate_every"
OPTIMISED = f"learning_rate weight_decay {TRAINED} optimizer warmup adam_epsilon"
RATIOS = "alpha alpha_init beta beta_init ratio_learning_rate"
FIRST_ROWS = {
    "linear-probe": "C",
    "clip-adapter": f"branch {RATIOS} reduction {OPTIMISED}",
    "tip-adapter": "beta alpha",
    "tip-adapter-f": f"beta alpha beta_init alpha_init {OPTIMISED}",
    "taskres": f"alpha {OPTIMISED}",
    "lp++": TRAINED,
    **dict.fromkeys(("clap", "zs-lp", "cross-modal"), OPTIMISED),
    **dict.fromkeys(("rla", "prolip"), f"strength {OPTIMISED}"),
    "coop": f"initialisation context_length class_specific position {OPTIMISED}",
    "gda": "alpha",
    "proker": "beta ridge",
    "ridge": "ridge prior",
    **dict.fromkeys(("timo", "timo-s"), "beta gamma alpha"),
}
"""What the first files of each method state."""


@every_method
def test_a_row_that_came_after_the_first_files_says_what_they_were(method: Method):
    first = FIRST_ROWS.get(method.name, " ".join(method.hyper)).split()
    assert {*first} <= {*method.hyper}, "files state a hyper-parameter that the method has not"
    for name, hyper in method.hyper.items():
        known = name in first or hyper.absent is not None or hyper.needs
        assert known, f"{name}: Hyper(…, absent=…)"


@every_method
def test_the_page_of_methods_links_to_the_source(method: Method):
    (line,) = re.findall(rf"^\| `{re.escape(method.name)}` \| \[.*", PAGE.read_text(), re.MULTILINE)
    number = method.source.removeprefix("arXiv ")
    assert f"[{number}](https://arxiv.org/abs/{number})" in line


@every_method
def test_settings_are_plain_values_that_survive_json(method: Method):
    values = method.values({})
    settings = method.settings(values)
    for setting in (settings[0], settings[-1], setting_of(method), method.default_setting(values)):
        assert json.loads(json.dumps(setting, allow_nan=False)) == setting
        assert method.checked(setting) == setting
        static, numbers = method.split(setting)
        assert {*static, *numbers} == {*setting}
        hash(tuple(static.items()))
    assert [*method.settings(method.values({}, one=True))] == [setting_of(method)]


def test_the_records_import_no_array_library():
    program = """
import sys
import clip_adapter.adapters.registry
heavy = {"numpy", "jax", "jaxlib", "flax", "optax", "torch", "scipy", "sklearn", "jaxtyping"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


# The formula


def rows(count: int = 9) -> np.ndarray:
    return 2 * np.random.default_rng(3).normal(size=(count, DIM)).astype(np.float32)


def in_library(
    method: Method, asarray: Callable[[np.ndarray], Any], xp: Any, arrays: Any, task: Task
) -> np.ndarray:
    head = Head(*(asarray(np.asarray(part)) for part in task.head[:3]))
    moved = {name: asarray(np.asarray(array)) for name, array in arrays.items()}
    setting, images = short_setting(method), asarray(rows())
    if xp is jnp:  # one program instead of one for each operation
        compiled = jax.jit(lambda *given: method.logits(jnp, given[0], setting, *given[1:]))
        return np.asarray(compiled(moved, images, head))
    return np.asarray(method.logits(xp, moved, setting, images, head))


@every_method
def test_three_libraries_give_the_same_logits(method: Method, engine: Engine):
    arrays, task = fitted(method, engine), task_for(method)
    exact = in_library(method, lambda a: a.astype(np.float64), np, arrays, task)
    assert exact.dtype == np.float64 and exact.shape == (9, CLASSES)
    by_jax = in_library(method, partial(jnp.asarray, dtype=jnp.float32), jnp, arrays, task)
    by_torch = in_library(
        method, lambda a: torch.tensor(a, dtype=torch.float32), torch, arrays, task
    )
    for found in (by_jax, by_torch):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@every_method
def test_the_formula_may_be_compiled_batched_and_differentiated(method: Method, engine: Engine):
    arrays, head = dict(fitted(method, engine)), task_for(method).head
    settings = method.settings(short_values(method))
    alike = [s for s in settings if method.split(s)[0] == method.split(settings[0])[0]]
    static = method.split(alike[0])[0]
    numbers = [method.split(setting)[1] for setting in alike]
    features = jnp.asarray(np.concatenate([rows(), np.zeros((1, DIM), np.float32)]))

    def logits(arrays: Any, features: Any, numbers: Any) -> jax.Array:
        return method.logits(jnp, arrays, {**static, **numbers}, features, head)

    stacked = {name: jnp.array([n[name] for n in numbers], jnp.float32) for name in numbers[0]}
    if stacked:
        batched = jax.jit(jax.vmap(logits, (None, None, 0)))(arrays, features, stacked)
        compiled = jax.jit(logits)
        for row, chosen in zip(batched, numbers, strict=True):
            alone = compiled(arrays, features, chosen)
            np.testing.assert_allclose(row, alone, atol=1e-5 * float(jnp.abs(alone).max()))
    squared = jax.jit(jax.grad(lambda *given: jnp.sum(logits(*given, numbers[0]) ** 2), (0, 1)))
    gradients = squared(arrays, features)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.adapt], ids=lambda m: m.name)
def test_its_logits_are_cosines_of_the_features_that_it_adapts(method: Method, engine: Engine):
    given = fitted(method, engine), short_setting(method), rows(), exact(task_for(method)).head
    adapted = method.adapt(np, *given)
    assert np.abs(adapted - rows()).max() > 1e-3
    expected = zero_shot(task_for(method), adapted)
    np.testing.assert_allclose(method.logits(np, *given), expected, rtol=1e-5, atol=1e-5)


# What is fitted


@every_method
def test_arrays_have_the_shapes_that_the_record_states(method: Method, engine: Engine):
    arrays = fitted(method, engine)
    of_second = {n for n in method.shapes if n == "centre" or n.startswith("second")}
    assert bool(of_second) == method.takes_second
    assert {*arrays} <= {*method.shapes} - of_second
    assert {*arrays} == {*method.shapes} - of_second or method.network
    sizes = {"C": CLASSES, "D": DIM}
    for name, array in arrays.items():
        letters = method.shapes[name].split()
        assert array.dtype == np.float32 and array.ndim == len(letters), name
        for letter, size in zip(letters, array.shape, strict=True):
            assert sizes.setdefault(letter, size) == size, f"{name}: {letter}"
        assert np.isfinite(array).all()


@every_method
def test_fitting_again_gives_what_the_search_judged(method: Method, engine: Engine):
    task = task_for(method)
    found = searched(method, engine)
    assert [e.setting for e in found] == method.settings(short_values(method)) or method.propose
    for evaluation in (found[0], found[-1]):
        again = fit(method, evaluation.setting, evaluation.epoch or None, task, engine)
        if evaluation.arrays is not None:
            kept = evaluation.arrays()
            assert kept.keys() == again.keys()
            assert all(kept[name].tobytes() == again[name].tobytes() for name in kept)
        classify = make_classify(method, evaluation.setting, again, task.head)
        logits = classify(task.validation_features)
        assert validation_accuracy(logits, task) == pytest.approx(evaluation.accuracy)
        assert validation_nll(logits, task) == pytest.approx(evaluation.nll, rel=1e-3, abs=1e-4)


def odd_task(method: Method) -> Task:
    """12, 7, 1 and no images of the classes, one of them the zero vector."""
    task = task_for(method)
    labels = jnp.repeat(jnp.arange(CLASSES), jnp.array([12, 7, 1, 0])).astype(jnp.int32)
    return task._replace(features=task.features.at[:, 3].set(0), labels=labels)


@every_method
@pytest.mark.parametrize("kind", ["unequal", "one-shot-without-validation"])
def test_odd_support_sets_give_finite_logits(method: Method, kind: str, engine: Engine):
    task = odd_task(method) if kind == "unequal" else task_for(method, shots=1, validation=0)
    setting = short_setting(method)
    arrays = fit(method, setting, None, task, engine)
    assert all(np.isfinite(array).all() for array in arrays.values())
    logits = make_classify(method, setting, arrays, task.head)(rows())
    assert logits.shape == (9, CLASSES) and np.isfinite(logits).all()


@every_method
def test_classes_never_seen_are_classified_or_it_says_so(method: Method, engine: Engine):
    arrays, task, setting = fitted(method, engine), task_for(method), short_setting(method)
    other = jax.tree.map(np.asarray, separable_task(data_seed=8).head)
    weights, text = (np.concatenate([a, a[:2] + 1]) for a in (other.weights, other.text))
    six = other._replace(weights=weights, text=text)

    if "tower" in task.extra:  # what a cache of the six classes holds
        tower = task.extra["tower"].of_classes((0, 1, 2, 3, 0, 1))
        task = task._replace(extra={**task.extra, "tower": tower})

    def classified() -> bool:
        moved = method.for_classes(arrays, setting, task, six) if method.for_classes else arrays
        try:
            logits = make_classify(method, setting, moved, six)(rows())
        except (TypeError, ValueError):
            return False
        return logits.shape == (9, 6) and bool(np.isfinite(logits).all())

    knows = method.unseen_classes or method.for_classes is not None
    # Nothing of a method's shapes may tie it to its classes; its record says that labels do.
    assert classified() == knows or (not knows and "labels" in arrays)


# The search


@every_method
def test_numbers_compile_nothing(method: Method, engine: Engine):
    task, setting = task_for(method), short_setting(method)
    names = numbers_of(method)

    def run(chosen: Mapping[str, Value]) -> None:
        values = method.values({name: (value,) for name, value in chosen.items()}, one=True)
        list(search(method, values, [task], engine, Notes()))
        arrays = fit(method, chosen, None, task, engine)
        make_classify(method, chosen, arrays, task.head)(task.validation_features)

    run(setting)
    others = {name: alternatives(method.hyper[name], name)[-1] for name in names}
    before = engine.compilations
    with compilations() as compiled:
        run(setting | others if all(not isinstance(setting[n], str) for n in names) else setting)
    assert (engine.compilations, compiled) == (before, [])


def interrupted(evaluations: Iterator[Evaluation], after: int, notes: Notes) -> None:
    """Take some, and note them as the caller of a search does."""
    for _, evaluation in zip(range(after), evaluations, strict=False):
        notes.found.append(evaluation)


def told(evaluations: Sequence[Evaluation]) -> list[tuple[Any, ...]]:
    return [(e.setting, e.epochs_run, e.epoch, e.accuracy, e.nll) for e in evaluations]


@pytest.mark.parametrize(
    ("method", "halving"),
    [
        pytest.param(method, halving, id=f"{name}-{'halving' if halving else 'full'}")
        for name, method in METHODS.items()
        for halving in ((False, True) if method.is_trained else (False,))
    ],
)
def test_an_interrupted_search_goes_on_as_if_nothing_had_been(
    method: Method, halving: bool, engine: Engine
):
    run = partial(search, method, short_values(method), [task_for(method)], engine, halving=halving)
    whole = list(run(Notes()))
    for after in (1, len(whole) // 2, len(whole) - 1):
        notes = Notes()
        interrupted(run(notes), after, notes)
        again = list(run(notes))
        assert told(again) == told(whole)


@trained_methods
def test_survivors_of_halving_end_as_the_full_run(method: Method, engine: Engine):
    run = partial(search, method, short_values(method), [task_for(method)], engine)
    full, halved = (list(run(Notes(), halving=halving)) for halving in (False, True))
    (twin,) = (e for e in full if e.setting == halved[-1].setting)
    assert told([halved[-1]]) == told([twin])
    arrays, expected = halved[-1].arrays(), twin.arrays()
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)


@trained_methods
def test_training_in_pieces_is_training_at_once(method: Method, engine: Engine):
    setting, task = short_setting(method), task_for(method)
    run = partial(engine.run, method, [method.of_the_run(setting)], task)
    (whole,) = run()
    (piece,) = run(stop=4)
    (piece,) = run(first=4, states=[partial(piece.row, 0)])
    for one, other in zip(piece.row(0), whole.row(0), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "method",
    [method for method in METHODS.values() if method.network or method.after_training],
    ids=lambda method: method.name,
)
def test_the_best_epoch_can_be_kept(method: Method, engine: Engine):
    """It is as good on validation as the run was at its best. The engine keeps it alike for all
    methods but these, which are judged by other means."""
    values = {name: (value,) for name, value in short_setting(method).items()}
    values |= {"epoch": ("best",), "evaluate_every": (1,)}
    task = task_for(method)
    (evaluation,) = search(method, values, [task], engine, Notes())
    classify = make_classify(method, evaluation.setting, evaluation.arrays(), task.head)
    found = validation_accuracy(classify(task.validation_features), task)
    assert found == pytest.approx(evaluation.accuracy)
    (last,) = search(method, values | {"epoch": ("last",)}, [task], engine, Notes())
    assert evaluation.score >= last.score
