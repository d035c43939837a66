"""`validation.png`: what validation saw, as the report draws it, read back from what is drawn."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.run import PLOT
from tests.pipelines.run_files import results
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

GRID = {"alpha": (0.2, 0.8), "learning_rate": (0.003, 0.01)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", tiny_data())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def ticks(axis: object) -> list[list[str]]:
    own = (axis.get_xticklabels(), axis.get_yticklabels())  # type: ignore[attr-defined]
    return [[label.get_text() for label in labels] for labels in own]


def test_a_cell_is_the_mean_over_seeds_of_the_best(
    cache: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    """Of the most shots, empty where all diverged; and the same numbers give the same picture."""
    grid = GRID | {"learning_rate": (0.003, 1e30), "weight_decay": (0.0, 0.1)}
    asked = {"shots": (2, 4), "seeds": (1, 2), "method": ("zero-shot", "clip-adapter")}
    run, again = (fit(short(cache, tmp_path / n, **grid | asked)).run for n in ("run", "again"))
    axis = drawn[0].axes[0]
    rows = [row for row in results(run) if (row["shots"], row["learning_rate"]) == ("4", "0.003")]
    cells = {
        alpha: np.mean([max(own(rows, alpha, seed)) for seed in ("1", "2")])
        for alpha in ("0.2", "0.8")
    }
    words = [f"{100 * mean:.1f}" for mean in cells.values()]
    assert sorted(text.get_text() for text in axis.texts) == sorted([*words, "–", "–"])
    assert ticks(axis) == [["0.2", "0.8"], ["0.003", "1e+30"]]
    assert axis.get_title() == "clip-adapter, 4 shots"
    assert (run / PLOT).read_bytes().startswith(b"\x89PNG")
    assert (run / PLOT).read_bytes() == (again / PLOT).read_bytes()


def own(rows: list[dict[str, str]], alpha: str, seed: str) -> list[float]:
    return [float(r["val_accuracy"]) for r in rows if (r["alpha"], r["seed"]) == (alpha, seed)]


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": (0.2,), "learning_rate": (0.01,)},
        {"alpha": (0.2, 0.8), "learning_rate": (1e30, 1e31)},
        {"method": "zero-shot", "hyper": {}},
    ],
)
def test_where_there_is_nothing_to_see_nothing_is_drawn(cache: Path, tmp_path: Path, values: dict):
    if values.get("method") != "zero-shot":
        values = {"epochs": 10, **values}
    config = short(cache, tmp_path / "run", **values)
    if values.get("method") == "zero-shot":
        object.__setattr__(config, "hyper", {})
    assert not (fit(config).run / PLOT).exists()


def test_one_hyper_parameter_makes_a_curve_and_a_fine_grid_few_ticks(
    cache: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    """The grid of a closed form, which no row of results.csv has."""
    probe = {"method": "linear-probe", "hyper": {"C": (0.1, 1.0, 10.0)}}
    fine = {
        "method": "tip-adapter",
        "hyper": {"alpha": [n / 10 for n in range(1, 41)], "beta": [1.0, 2.0, 3.0]},
    }
    for name, asked in (("probe", probe), ("fine", fine)):
        config = short(cache, tmp_path / name)
        for field, value in asked.items():
            object.__setattr__(config, field, (value,) if field == "method" else value)
        run = fit(config).run
        assert (run / "grids").exists() == (name == "fine")
    curve, grid = (figure.axes[0] for figure in drawn)
    assert ticks(curve)[0] == ["0.1", "1", "10"] and curve.get_ylabel() == "validation accuracy (%)"
    assert list(grid.texts) == [] and len(ticks(grid)[0]) == 7
    assert grid.images[0].get_array().shape == (3, 40)
