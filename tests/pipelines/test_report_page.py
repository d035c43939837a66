"""The report's page: what is on it, that it is whole by itself, and how a browser shows it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.fitting.run import FitResult
from clip_adapter.pipelines.reporting.beside_the_mean import beside_the_mean
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import load_runs
from clip_adapter.pipelines.reporting.verdict import judge
from tests.pipelines import browser
from tests.pipelines.tiny_cache import tiny_data, write_cache

HOSTILE = "<script>alert(1)</script>"
NAMES = [HOSTILE, "$x_{$ & '\"><img src=x onerror=alert(2)>", "a" * 90, "猫 --> ]]>"]
FIGURES = {"accuracy", "classes", "features-after", "features-before", "reliability-after"}
FIGURES |= {"reliability-before", "selection-0", "selection-0-2", "selection-0-4", "selection-1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its page, on classes whose names are as bad as names can be."""
    folder = tmp_path_factory.mktemp("page")
    cache = write_cache(folder / "features.h5", tiny_data(), NAMES)
    grid = {"alpha": (0.2, 0.8), "learning_rate": (0.001, 0.01)}
    grid = {f"clip-adapter.{name}": values for name, values in grid.items()} | {"epochs": 5}
    method = {"method": ("clip-adapter", "taskres"), "baselines": ("zero-shot",)}
    tasks = {"shots": (2, 4), "seeds": (1, 2)}
    fit(FitConfig(cache=cache, out=folder / "run", hyper=grid, **method, **tasks))
    report(ReportConfig((folder / "run",)))
    return folder / "run"


class Page(HTMLParser):
    """Elements with their attributes, and what can be read, as a browser would take them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def test_the_first_screen_says_by_how_much_and_how_sure(run: Path, page: Page):
    loaded = load_runs((run,))
    verdict = judge(pool(loaded))
    assert verdict is not None and verdict.zero_shot is not None and verdict.next_best is not None
    validation = {
        name: fmean(
            r.val_accuracy or 0 for r in loaded[0].results if (r.method, r.shots) == (name, 4)
        )
        for name in ("clip-adapter", "taskres")
    }
    assert validation[verdict.entry.method.name] == max(validation.values())
    name = verdict.entry.method.name
    own = [read_predictions(run, name, 4, seed) for seed in (1, 2)]
    zero = [read_predictions(run, "zero-shot", 4, seed) for seed in (1, 2)]
    difference = fmean(np.mean(a.right) - np.mean(b.right) for a, b in zip(own, zero, strict=True))
    assert verdict.zero_shot.images.mean == pytest.approx(difference)
    assert verdict.zero_shot.images.low <= difference <= verdict.zero_shot.images.high
    first = page.text[: page.text.index("Where these numbers come from")]
    assert f"{100 * difference:+.2f}".replace("-", "−") in first
    assert f"{100 * fmean(p.accuracy for p in own):.2f} %" in first
    noise = "within" if verdict.zero_shot.sign == 0 else "beyond"
    assert f"points against zero-shot {noise} noise" in first
    assert "no test image chose it" in first
    assert f"chosen settings of {name} at 4 shots" in first


def test_what_the_mean_hides_is_there(run: Path, page: Page):
    """As `fit --verbose` prints it; and identities stand below the first picture."""
    (loaded,) = load_runs((run,))
    for sentence in beside_the_mean(pool([loaded])):
        assert f"{sentence[:1].upper()}{sentence[1:]}." in page.text
    for method in ("clip-adapter", "taskres"):
        assert f"chosen settings of {method} shots seed" in page.text
    html = (run / "report.html").read_text()
    assert html.index("<svg") < html.index("SHA-256") < html.index("Beside the mean")


def test_methods_at_one_number_of_shots_are_a_sorted_chart(tmp_path: Path):
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    methods = {"method": ("gda", "tip-adapter", "proker"), "hyper": {"tip-adapter.alpha": 2.0}}
    given = {"baselines": ("zero-shot",), "shots": 2, "select": "none", **methods}
    result = fit(FitConfig(cache=cache, out=tmp_path / "run", **given))
    report(ReportConfig((result.run,)))
    root = ElementTree.parse(result.run / "figures" / "accuracy.svg").getroot()
    names = [row.method for row in sorted(result.results, key=lambda r: r.test_accuracy or 0)]
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    shown = [word for word in words if word in names]
    assert [result_of(result, name) for name in shown] == sorted(
        result_of(result, name) for name in names
    )
    assert not [e for e in root.iter() if e.get("id", "").startswith("legend")]


def result_of(result: FitResult, method: str) -> float:
    return next(row.test_accuracy or 0.0 for row in result.results if row.method == method)


def test_the_provenance_is_there(run: Path, page: Page):
    for words in (
        *("0" * 64, "made up", "4, with 2 prompts each", "seeds 1, 2", "jax"),
        *(json.loads((run / "run.json").read_text())["cache_sha256"], "as in CoOp"),
        "fit --method clip-adapter taskres --baselines zero-shot --shots 2 4 --seeds 1 2",
        "selected on min(shots, 4) validation images per class",
    ):
        assert words in page.text, words
    assert str(run.parent) not in (run / "report.html").read_text(), "where it was made"


def test_every_figure_has_files_a_text_and_its_numbers(run: Path, page: Page):
    files = {path.name for path in (run / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    for name in FIGURES:
        assert ElementTree.parse(run / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert image.width > 600
    drawings = [own for tag, own in page.elements if tag == "svg"]
    assert len(drawings) == len(FIGURES)
    assert all(own["role"] == "img" and len(own["aria-label"] or "") > 30 for own in drawings)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("figure") == tags.count("figcaption") == len(FIGURES)
    assert tags.count("details") == len(FIGURES) + 1, "numbers of each, and the plan"


def test_the_numbers_of_figures_are_those_of_the_run(run: Path, page: Page):
    (loaded,) = load_runs((run,))
    for method in ("zero-shot", "clip-adapter", "taskres"):
        for shots in (2, 4):
            rows = [r for r in loaded.results if (r.method, r.shots) == (method, shots)]
            mean = fmean(r.test_accuracy or 0 for r in rows)
            assert f"{100 * mean:.2f} ±" in page.text
    zero = [r for r in loaded.results if (r.method, r.shots) == ("zero-shot", 2)]
    validation = f"{100 * fmean(r.val_accuracy or 0 for r in zero):.2f}"
    assert re.search(rf"2 0 \(zero-shot\) {validation} ±", page.text), "α = 0 is zero-shot"


def test_names_are_nothing_but_text(page: Page):
    """Neither in the page nor in the drawings, and the policy would stop what came through."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "foreignobject",
    }
    for tag, own in page.elements:
        assert not [name for name in own if name.startswith("on")], (tag, own)
        for name, value in own.items():
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/")), (tag, name, value)
    assert HOSTILE in page.text
    assert NAMES[1] in page.text
    policies = [own["content"] for tag, own in page.elements if own.get("http-equiv")]
    assert policies and "default-src 'none'" in (policies[0] or "")
    ids = [own["id"] for _, own in page.elements if "id" in own]
    assert len(ids) == len(set(ids))


def test_nothing_changes_when_it_is_written_again(run: Path, tmp_path: Path, capsys):
    report(ReportConfig((run,), html=tmp_path / "again" / "page.html"))
    assert f"the page is {tmp_path / 'again' / 'page.html'}" in capsys.readouterr().err
    assert (tmp_path / "again" / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_without_a_page_nothing_is_written(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "figures"))
    report(ReportConfig((tmp_path / "run",), html="none"))
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_cache_may_have_moved(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    plan = json.loads((run / "run.json").read_text())
    moved = write_cache(tmp_path / "moved.h5", tiny_data(), NAMES)
    other = write_cache(tmp_path / "other.h5", tiny_data(seed=1), NAMES)
    away = Path(plan["cache"]).with_name("away.h5")
    Path(plan["cache"]).rename(away)
    try:
        report(ReportConfig((tmp_path / "run",)))
        without = Page(tmp_path / "run" / "report.html").text
        report(ReportConfig((tmp_path / "run",), cache=moved))
        with_it = Page(tmp_path / "run" / "report.html").text
        with pytest.raises(UserError, match="is not the cache that"):
            report(ReportConfig((tmp_path / "run",), cache=other))
    finally:
        away.rename(plan["cache"])
    assert "name it with --cache" in without and "silhouette" not in without
    assert "name it with --cache" not in with_it and "silhouette is" in with_it


def test_damaged_parts_are_named(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.csv").write_text("method,shots\nclip-adapter,2\n")
    with pytest.raises(UserError, match=r"results\.csv cannot be read"):
        report(ReportConfig((tmp_path / "run",)))
    for path in (tmp_path / "run" / "predictions" / "zero-shot").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"safetensors cannot be read"):
        report(ReportConfig((tmp_path / "run",)))


MISSING = (
    "no Chromium is installed; this test would show the page in a browser at 360 and 1,400 pixels "
    "in both themes: no complaint on its console, nothing wider than the window, names that run "
    "nothing"
)
WIDER = """
[...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .filter(e => !e.closest(".scroll, pre, svg"))
  .map(e => e.outerHTML.slice(0, 200))
"""
COLORS = "[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e))"
COLORS = f"(([b, t]) => [b.backgroundColor, b.color, t.fill])({COLORS})"


@pytest.mark.skipif(browser.installed() is None, reason=MISSING)
def test_in_a_browser(run: Path, tmp_path: Path):
    program = browser.installed()
    assert program
    seen = {}
    with browser.browser(program, tmp_path / "profile") as shown:
        for width in (360, 1400):
            for dark in (False, True):
                shown.show(run / "report.html", width, dark=dark)
                shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert shown.evaluate("innerWidth") == width
                assert shown.evaluate("document.documentElement.scrollWidth") <= width
                assert shown.evaluate(WIDER) == []
                assert shown.evaluate("document.scripts.length") == 0
                assert shown.complaints == []
                seen[width, dark] = shown.evaluate(COLORS)
        heights = "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
        assert min(shown.evaluate(heights)) > 100
    ground, ink, drawn = seen[360, False]
    assert (ground, ink) == ("rgb(255, 255, 255)", drawn)
    dark_ground, dark_ink, dark_drawn = seen[1400, True]
    assert dark_ground != ground and dark_ink == dark_drawn != ink


@pytest.mark.skipif(browser.installed() is None, reason=MISSING)
def test_the_browser_test_would_see_what_it_looks_for(tmp_path: Path):
    program = browser.installed()
    assert program
    (tmp_path / "bad.html").write_text(
        "<meta name=viewport content='width=device-width'><body>"
        "<p style='width: 900px'>wide</p><script>console.log('said'); missing()</script>"
    )
    with browser.browser(program, tmp_path / "profile") as shown:
        shown.show(tmp_path / "bad.html", 360, dark=False)
        assert len(shown.complaints) == 2
        assert shown.evaluate("document.documentElement.scrollWidth") > 360
        assert len(shown.evaluate(WIDER)) == 1


def test_published_figures_stand_beside_ours(run: Path, tmp_path: Path):
    """On a data set and a backbone that they are of, with where they come from."""
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((run / "provenance.json").read_text())
    about["backbone"] |= {"name": "RN50", "pretrained": "openai"}
    about["dataset"]["name"] = "dtd"
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(about))
    report(ReportConfig((tmp_path / "run",)))
    text = Page(tmp_path / "run" / "report.html").text
    assert "clip-adapter 45.80 51.48 56.86 61.00 65.96 the residual ratio was searched" in text
    assert "exp.log" in text and "clip-adapter, published" in text
    assert "published" not in Page(run / "report.html").text


def test_images_of_base_classes_are_those_that_were_predicted(tmp_path: Path):
    """Under base-to-new the predictions are of some rows of the test split, not of its first."""
    data = tiny_data()
    cache = write_cache(tmp_path / "features.h5", data)
    given = {"method": ("clip-adapter",), "baselines": ("zero-shot",), "hyper": {"alpha": (0.8,)}}
    config = FitConfig(cache=cache, out=tmp_path / "run", shots=(2,), train_classes="base", **given)
    fit(config)
    report(ReportConfig((tmp_path / "run",)))
    text = Page(tmp_path / "run" / "report.html").text
    labels = data.splits["test"][1]
    found = re.findall(r"(class \d) zero-shot: class \d clip-adapter: class \d test/(\d+)", text)
    assert found
    for name, row in found:
        assert name == f"class {labels[int(row)]}"


@pytest.mark.parametrize(
    "change",
    [
        {"labels": lambda x: x + 50},
        {"predicted": lambda x: x - 50},
        {"predicted": lambda x: x[::-1].copy()},
        {"labels": lambda x: x.astype(np.float32)},
        {"confidence": lambda x: x * np.nan},
        dict.fromkeys(("labels", "predicted", "confidence"), lambda x: x[:0]),
        dict.fromkeys(("labels", "predicted", "confidence"), lambda x: x[:-1]),
    ],
)
def test_predictions_that_are_not_those_of_the_accuracy(run: Path, tmp_path: Path, change):
    shutil.copytree(run, tmp_path / "run")
    path = next((tmp_path / "run" / "predictions" / "taskres").glob("shots-4-*"))
    arrays = load_file(path)
    save_file(arrays | {name: edit(arrays[name]) for name, edit in change.items()}, path)
    with pytest.raises(UserError, match=f"{path} is not what selected.jsonl counts"):
        judge(pool(load_runs([tmp_path / "run"])))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"method": ("zero-shot",), "baselines": ()},
            "Nothing was adapted: this is zero-shot CLIP.",
        ),
        (
            {"select": "none"},
            "clip-adapter is the first of the methods that were asked for, without",
        ),
        (
            {"train_classes": "base"},
            "30 test images of the base classes, the ones it was fitted on.",
        ),
        ({"shots": ("all",)}, "clip-adapter at all training images is right on"),
        ({"shots": (1,)}, "chosen settings of clip-adapter at 1 shot "),
    ],
)
def test_the_first_screen_says_what_kind_of_run_it_was(tmp_path: Path, options, wanted: str):
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    grid = {"alpha": (0.2, 0.8) if options.get("select") != "none" else (0.2,)}
    usual = {"method": ("clip-adapter",), "baselines": ("zero-shot",), "shots": (2,)}
    hyper = {} if "zero-shot" in options.get("method", ()) else {"hyper": grid}
    fit(FitConfig(cache=cache, out=tmp_path / "run", **usual | hyper | options))
    report(ReportConfig((tmp_path / "run",)))
    assert wanted in Page(tmp_path / "run" / "report.html").text


def test_new_classes_are_drawn_beside_base_classes(tmp_path: Path):
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    given = {"method": "clip-adapter", "baselines": (), "shots": (1, 2), "train_classes": "base"}
    fit(FitConfig(cache=cache, out=tmp_path / "run", hyper={"epochs": 2, "alpha": 0.2}, **given))
    report(ReportConfig((tmp_path / "run",), html=tmp_path / "page.html"))
    drawn = (tmp_path / "figures" / "accuracy.svg").read_text()
    for words in ("clip-adapter base", "clip-adapter new", "accuracy on base or new classes (%)"):
        assert drawn.count(f">{words}<") == 1
    assert ">test accuracy (%)<" not in drawn


@pytest.mark.parametrize("classes", [4, 14])
def test_many_classes_are_named_in_a_legend(tmp_path: Path, classes: int):
    cache = write_cache(tmp_path / "features.h5", tiny_data(train=(3,) * classes, test=4))
    given = {"method": "clip-adapter", "baselines": ("zero-shot",), "shots": 1}
    fit(FitConfig(cache=cache, out=tmp_path / "run", hyper={"epochs": 2, "alpha": 0.2}, **given))
    report(ReportConfig((tmp_path / "run",), html=tmp_path / "page.html"))
    drawn = ElementTree.parse(tmp_path / "figures" / "features-after.svg").getroot()
    ids = [e.get("id", "") for e in drawn.iter()]
    assert any(name.startswith("legend") for name in ids) == (classes > 12)
    page = (tmp_path / "page.html").read_text()
    assert "1 shots" not in page and "clip-adapter, 1 shot, seed 1" in page
    assert 'id="features-after-image' in page, "what the dark theme's rule brightens"
