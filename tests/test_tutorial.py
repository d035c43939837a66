"""The notebook of docs/, run from its first cell to its last."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each cell of code shows, as HTML where it is."""
    place = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", programs)
        run = {"metadata": {"path": str(place)}}
        NotebookClient(notebook, timeout=300, resources=run).execute()
    return [
        "".join(
            output.get("text") or output.data.get("text/html", "")
            for output in cell.outputs
            if output.output_type != "error"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def cell(shown: list[str], *words: str) -> str:
    (found,) = [text for text in shown if all(word in text for word in words)]
    return found


def test_the_loop_ends_where_its_text_says(shown: list[str]) -> None:
    first, second = [text for text in shown if "<p>runs/" in text]
    assert "gda" in first and "gda" in second

    audit = cell(shown, "likelier_probability")
    planted = audit.split(" as ")[0]
    assert audit.split("<td>")[1].startswith(planted), "the label that is wrong comes first"

    answers = cell(shown, "new/stripes.png").split("<tr>")
    assert "none of these" in answers[-1] and "data:image/jpeg" in answers[-1]
    assert "none of these" not in answers[2]
    assert "digits.md: model card" in cell(shown, "# digits.pt2")


def test_the_notebook_is_stored_without_what_a_run_left() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000
