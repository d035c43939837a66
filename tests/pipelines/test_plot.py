"""The picture of a grid, read back from what is drawn."""

from pathlib import Path

import matplotlib.figure
import pytest

from clip_adapter.adapters.method import Grid
from clip_adapter.pipelines.plot import PLOT, plot_grid

ROWS = """method,shots,seed,alpha,learning_rate,weight_decay,val_accuracy,status
clip-adapter,4,1,0.2,0.001,0,0.5,ok
clip-adapter,4,1,0.2,0.001,1,0.7,ok
clip-adapter,4,2,0.2,0.001,0,0.9,ok
clip-adapter,4,1,0.2,1e+30,0,0.3,failed
linear-probe,4,1,0.2,0.001,0,1.0,ok
"""


def test_a_cell_is_the_mean_over_seeds_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    (tmp_path / "results.csv").write_text(ROWS)
    plot_grid(tmp_path, "clip-adapter", Grid())
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["80.0", "–"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.001", "1e+30"]


def test_where_everything_diverged_nothing_is_drawn(tmp_path: Path):
    (tmp_path / "results.csv").write_text(ROWS.replace(",ok", ",failed"))
    plot_grid(tmp_path, "clip-adapter", Grid())
    assert not (tmp_path / PLOT).exists()
