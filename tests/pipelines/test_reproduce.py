"""`clip-adapter reproduce`: raw data in CoOp's layout to a page beside the published numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.catalogue import CatalogueEntry, load_catalogue
from clip_adapter.pipelines.commands import reproduce as reproduction
from clip_adapter.pipelines.commands.reproduce import ReproduceConfig, main, reproduce
from clip_adapter.pipelines.reporting.published import published_datasets, published_of
from tests.pipelines.run_files import summary

HERE = ("oxford_pets", "eurosat")
METHODS = ["zero-shot", "linear-probe", "coop", "clip-adapter"]
PER_CLASS = {"train": 2, "val": 1, "test": 2}


def write_images(root: Path, entry: CatalogueEntry) -> None:
    """A class is a colour, disturbed in every image; the split file is as the published ones."""
    rng = np.random.default_rng(0)
    folder = root / entry.coop_dir
    split: dict[str, list[tuple[str, int, str]]] = {name: [] for name in PER_CLASS}
    for label, name in enumerate(entry.class_names):
        colour = rng.integers(40, 215, 3)
        for part, count in PER_CLASS.items():
            for number in range(count):
                path = f"{name}/{part}_{number}.png".replace(" ", "_")
                pixels = np.clip(colour + rng.integers(-40, 40, (16, 16, 3)), 0, 255)
                place = folder / entry.coop_images / path
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(place)
                split[part].append((path, label, name))
    (folder / str(entry.coop_split_file)).write_text(json.dumps(split))


def words(root: Path, out: Path) -> list[str]:
    options = "--backbone glyph-clip --shots 1 --seeds 1 --epochs 2 --context 4 --device cpu"
    return ["--data-root", str(root), *options.split(), "--out", str(out)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in HERE:
        write_images(folder, load_catalogue()[name])
    return folder


@pytest.fixture(scope="module")
def out(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "out"
    with pytest.raises(SystemExit) as ended:
        main(words(root, folder))
    assert ended.value.code == 0
    return folder


def table(page: str, preset: str) -> list[list[str]]:
    """The rows under the heading of a preset, without Markdown's escapes."""
    section = page[page.index(f"## --preset {preset}\n") :].replace("\\", "").split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_each_published_number_stands_beside_ours(out: Path, preset: str) -> None:
    rows = table((out / "reproduction.md").read_text(), preset)
    assert sorted((row[0], row[1]) for row in rows) == sorted(
        (name, method) for name in HERE for method in METHODS
    )
    for name, method, shots, wanted, ours, difference, agrees in rows:
        (line,) = (ln for ln in summary(out / preset / name) if ln["method"] == method)
        accuracy = 100 * float(line["test_accuracy_mean"])
        assert (shots, ours) == ("1", f"{accuracy:.2f}")
        published = published_of(name)
        assert published
        if method not in published.accuracies:
            assert (wanted, difference, agrees) == ("–", "–", "–")
            continue
        number = published.accuracies[method][1]
        assert wanted == f"{number:.2f}"
        assert difference == f"{accuracy - number:+.2f}"
        assert agrees == ("yes" if abs(round(accuracy - number, 2)) <= 1 else "no")
    compared = {(row[0], row[1]) for row in rows if row[3] != "–"}
    assert compared == {(n, m) for n in HERE for m in ("zero-shot", "clip-adapter")}


def test_the_page_says_where_its_numbers_come_from(out: Path) -> None:
    page = (out / "reproduction.md").read_text()
    assert "Ours: glyph-clip, mean over seeds 1" in page
    assert "Published: github.com/gaopengcuhk/Tip-Adapter" in page
    assert "The published numbers are RN50's: no agreement is meant." in page
    for preset in ("paper", "default"):
        assert (out / preset / "study.md").exists()
        plan = json.loads((out / preset / "oxford_pets" / "run.json").read_text())
        assert plan["preset"] == preset


def test_what_is_missing_is_named_with_what_to_put_where(root: Path, out: Path) -> None:
    page = (out / "reproduction.md").read_text()
    lines = page[page.index("## Not there") :].splitlines()
    for name in published_datasets():
        said = [line for line in lines if line.startswith(f"- {name}: ")]
        if name in HERE:
            assert said == []
            continue
        entry = load_catalogue()[name]
        assert len(said) == 1
        for images in entry.coop_folders.values() or [entry.coop_images]:
            assert str(root / entry.coop_dir / images) in said[0]
        assert "None" not in said[0]
        if entry.coop_split_file:
            assert entry.coop_split_file in said[0]


def test_the_same_command_goes_on(root: Path, out: Path) -> None:
    """Nothing is encoded or fitted again: the files stay."""
    watched = [*out.glob("caches/*.h5"), *out.glob("*/*/results.csv")]
    assert len(watched) == 2 + 4
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in watched]
    page = (out / "reproduction.md").read_bytes()
    (out / "reproduction.md").unlink()
    with pytest.raises(SystemExit) as ended:
        main(words(root, out))
    assert ended.value.code == 0
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in watched] == before
    assert (out / "reproduction.md").read_bytes() == page


def test_a_data_set_that_cannot_be_read_leaves_the_others(root: Path, out: Path) -> None:
    split = root / "eurosat" / "split_zhou_EuroSAT.json"
    content = split.read_bytes()
    split.unlink()
    again = out.parent / "again"
    try:
        with pytest.raises(SystemExit) as ended:
            main([*words(root, again), "--tolerance", "100"])
    finally:
        split.write_bytes(content)
    assert ended.value.code == 1
    page = (again / "reproduction.md").read_text()
    (failed,) = page[page.index("## Failed") :].splitlines()[2:]
    assert failed.startswith("- eurosat: ") and "split_zhou_EuroSAT.json" in failed
    rows = table(page, "paper")
    whole, lost = ([r for r in rows if r[0] == name] for name in HERE)
    assert {row[6] for row in whole if row[3] != "–"} == {"yes"}
    own = [row[:6] for row in table((out / "reproduction.md").read_text(), "paper")]
    assert [row[:6] for row in whole] == [row for row in own if row[0] == "oxford_pets"]
    # Its published numbers stand there without ours.
    assert [row[:4] for row in lost] == [row[:4] for row in own if row[0] == "eurosat"]
    assert {tuple(row[4:]) for row in lost} == {("–", "–", "–")}


def test_where_nothing_can_be_fitted(root: Path, out: Path) -> None:
    config = ReproduceConfig(root, "glyph-clip", out=out, shots=(1,), seeds=(1,), device="cpu")
    with pytest.raises(UserError, match="No data set could be fitted"):
        reproduce(dataclasses.replace(config, epochs=3, context=4))  # begun with 2 epochs


@pytest.mark.parametrize(
    ("ours", "tolerance", "wanted"),
    [
        (62.4, 1.0, ["61.40", "62.40", "+1.00", "yes"]),
        (62.5, 1.0, ["61.40", "62.50", "+1.10", "no"]),
        (60.0, 1.0, ["61.40", "60.00", "-1.40", "no"]),
        (60.0, 1.5, ["61.40", "60.00", "-1.40", "yes"]),
        (float("nan"), 1.0, ["61.40", "–", "–", "–"]),
    ],
)
def test_a_row(ours: float, tolerance: float, wanted: list[str]) -> None:
    """EuroSAT, CLIP-Adapter at one shot: 61.40 are published."""
    config = ReproduceConfig(Path("data"), tolerance=tolerance)
    row = reproduction._row(config, "eurosat", "clip-adapter", 1, ours, float("nan"))
    assert row == ["eurosat", "clip-adapter", "1", *wanted]


def test_where_there_is_nothing_to_run_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder; --data-root holds"):
        reproduce(ReproduceConfig(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"None of the data sets lies under"):
        reproduce(ReproduceConfig(tmp_path))
