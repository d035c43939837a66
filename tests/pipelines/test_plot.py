"""The picture of a grid, read back from what is drawn."""

import csv
from pathlib import Path

import matplotlib.figure
import pytest

from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.planning import make_plan
from clip_adapter.pipelines.fitting.plot import PLOT, plotted, write_plot
from clip_adapter.pipelines.fitting.run_folder import RunFolder
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

COLUMNS = ("method", "shots", "seed", "alpha", "learning_rate", "val_accuracy", "status")
ROWS = [
    "clip-adapter,4,1,0.2,0.001,0.5,ok",
    "clip-adapter,4,1,0.2,0.001,0.7,ok",
    "clip-adapter,4,2,0.2,0.001,0.9,ok",
    "clip-adapter,4,1,0.2,1e+30,nan,failed",
    "clip-adapter,4,1,learned,0.001,1.0,ok",
    "linear-probe,4,1,0.2,0.001,1.0,ok",
]


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


def plan(**hyper: tuple) -> Plan:
    return make_plan(FitConfig(shots=4, seeds=(1, 2), hyper=hyper), "0" * 64)


def plotted_rows(folder: Path, rows: list[str], **hyper: tuple) -> None:
    planned = plan(**hyper)
    run = RunFolder(folder / "run", planned, resume=False)
    (folder / "run" / "results.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    write_plot(run, planned)
    run.close()


GRID = {"alpha": (0.2, "learned"), "learning_rate": (0.001, 1e30)}


def test_a_cell_is_the_mean_over_seeds_of_the_best(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    plotted_rows(tmp_path, ROWS, **GRID)
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["80.0", "–"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.001", "1e+30"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.2"]
    assert axis.get_title() == "4 shots"


def test_the_same_numbers_give_the_same_picture(tmp_path: Path):
    """So that a run that was interrupted ends with the files of one that was not."""
    for name in ("one", "other"):
        plotted_rows(tmp_path / name, ROWS, **GRID)
    one, other = ((tmp_path / name / "run" / PLOT).read_bytes() for name in ("one", "other"))
    assert one == other


def test_where_everything_diverged_nothing_is_drawn(tmp_path: Path):
    plotted_rows(tmp_path, [row.replace(",ok", ",failed") for row in ROWS], **GRID)
    assert not (tmp_path / "run" / PLOT).exists()


ONE_RATE = {"learning_rate": (1e-3,)}


@pytest.mark.parametrize(
    ("hyper", "axes"),
    [
        ({}, ("alpha", "learning_rate")),
        ({"alpha": (0.2,), "learning_rate": (0.1, 0.2)}, ("alpha", "learning_rate")),
        ({"alpha": (0.2,), "weight_decay": (0.1, 0.2)}, ("weight_decay", "learning_rate")),
        ({**ONE_RATE, "alpha": (0.2,)}, None),
        ({**ONE_RATE, "alpha": ("learned", "hypernet")}, None),
        ({**ONE_RATE, "alpha": tuple(i / 40 for i in range(40))}, None),
    ],
)
def test_which_hyper_parameters_are_shown(hyper: dict, axes: tuple[str, str] | None):
    assert plotted(plan(**hyper).fitted[0]) == axes


def test_a_method_of_one_number_has_one_row(tmp_path: Path, drawn: list[matplotlib.figure.Figure]):
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    probe = {"method": "linear-probe", "hyper": {"C": (0.1, 1.0, 10.0)}, "shots": 4}
    run = fit(FitConfig(cache=cache, out=tmp_path / "run", baselines=(), **probe)).run
    (axis,) = drawn[0].axes
    rows = csv.DictReader((run / "results.csv").open())
    shown = [f"{100 * float(row['val_accuracy']):.1f}" for row in rows]
    assert [text.get_text() for text in axis.texts] == shown and len(shown) == 3
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "1", "10"]
    assert list(axis.get_yticklabels()) == []


def test_a_panel_for_each_number_of_shots(tmp_path: Path, drawn: list[matplotlib.figure.Figure]):
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    grid = {"alpha": (0.2, 0.8), "learning_rate": (0.003, 0.01)}
    run = fit(short(cache, tmp_path / "run", shots=(2, 4), **grid)).run
    assert [axis.get_title() for axis in drawn[0].axes] == ["2 shots", "4 shots"]
    assert all(len(axis.texts) == 4 for axis in drawn[0].axes)
    assert (run / PLOT).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_fine_grid_has_colours_and_few_ticks(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    rates = [0.001 * (1 + step) for step in range(29)]
    values = [(alpha, rate) for alpha in (0.2, 0.4, 0.6) for rate in rates]
    rows = [f"clip-adapter,4,1,{alpha},{rate},0.5,ok" for alpha, rate in values]
    plotted_rows(tmp_path, rows, alpha=(0.2, 0.4, 0.6), learning_rate=tuple(rates))
    axis, bar = drawn[0].axes
    assert len(axis.texts) == 0 and len(bar.get_yticks()) > 1
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.2", "0.4", "0.6"]
    upwards = [label.get_text() for label in axis.get_yticklabels()]
    assert upwards == [f"{rate:g}" for rate in rates[::4]]
