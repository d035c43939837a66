"""A method is one file and one line: a new one runs through all that is derived from its record."""

import csv
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import METHODS, find_method
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Advance, Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from clip_adapter.pipelines.console import entry as commands
from clip_adapter.pipelines.console.jax_setup import set_up_jax
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.saved.adapter_file import document_sha256, load_adapter
from clip_adapter.pipelines.saved.pytorch import FittedHead
from clip_adapter.pipelines.saved.sklearn import FewShotClassifier
from tests.pipelines.tiny_cache import tiny_data, write_cache

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
FILES = {
    code.split("\n")[0].removeprefix("# "): code
    for kind, code in BLOCKS
    if kind == "python" and code.startswith("# ")
}
DATA = tiny_data()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with the page's files; methods that become known are forgotten after."""
    set_up_jax()
    known = dict(METHODS)
    (tmp_path / "mine").mkdir()
    for name, code in FILES.items():
        (tmp_path / "mine" / name).write_text(code)
    monkeypatch.chdir(tmp_path / "mine")
    yield tmp_path / "mine"
    METHODS.clear()
    METHODS.update(known)
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.fixture
def registered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and the line."""
    monkeypatch.syspath_prepend(place)
    for module, name in (("nearest_mean", "NEAREST_MEAN"), ("moved_weights", "MOVED_WEIGHTS")):
        method = getattr(importlib.import_module(module), name)
        METHODS[method.name] = method


def called(*words: str) -> int:
    """A command in this process, and its exit code."""
    name, *rest = words
    module = dict(commands.COMMANDS)[name][0]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"clip_adapter.pipelines.commands.{module}").main(rest)
    assert isinstance(ended.value.code, int)
    return ended.value.code


class Interrupting(Listener):
    """Ctrl-C when progress is told for the `after`th time."""

    def __init__(self, after: int) -> None:
        self.left = after

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        @contextmanager
        def shown() -> Iterator[Advance]:
            def advance(count: float, note: str) -> None:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

            yield advance

        return shown()


def same_adapters(one: Path, other: Path) -> None:
    """Both runs saved the same bytes."""
    names = sorted(path.relative_to(one) for path in (one / "adapters").rglob("*.safetensors"))
    assert names == sorted(
        p.relative_to(other) for p in (other / "adapters").rglob("*.safetensors")
    )
    assert names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def class_means(cache: Path, support: list[str]) -> np.ndarray:
    """The unit means of the support set's unit rows, (C, D) float64."""
    with FeatureCache(cache) as opened:
        images, classes = opened.images("train", views=1), len(opened.class_names)
    rows = images.features[0].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    taken = np.isin(images.ids, support)
    means = np.stack([rows[taken & (images.labels == c)].mean(axis=0) for c in range(classes)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.usefixtures("registered")
def test_means_of_some_classes_say_nothing_of_others(place: Path) -> None:
    """Half of four classes are as many as the other half: only the record tells them apart."""
    cache = write_cache(place / "tiny.h5", DATA)
    with pytest.raises(UserError, match="nearest-mean cannot classify new classes"):
        fit(FitConfig(cache, place / "new", "nearest-mean", (), shots=4, train_classes="base"))


@pytest.mark.parametrize("select", ["few-shot-val", "cv"])
@pytest.mark.usefixtures("registered")
def test_a_closed_form_runs_through_everything(place: Path, select: str) -> None:
    cache = write_cache(place / "tiny.h5", DATA)
    run = place / "run"
    config = FitConfig(cache, run, "nearest-mean", (), shots=4, seeds=(1, 2), select=select)
    result = fit(config)
    assert [row.tried for row in result.results] == [4, 4]
    with pytest.raises(KeyboardInterrupt):
        stopped = FitConfig(**{**vars(config), "out": place / "stopped"})
        fit(stopped, Interrupting(3))
    fit(FitConfig(resume=place / "stopped"))
    same_adapters(run, place / "stopped")

    folder = run / "adapters" / "nearest-mean" / "shots-4-seed-1"
    adapter = load_adapter(folder)
    alpha = adapter.info.setting["alpha"]
    assert alpha in (0.25, 0.5, 0.75, 1.0)
    with FeatureCache(cache) as opened:
        names = opened.ids("train", result.tasks[0].support)
    means = class_means(cache, names)
    np.testing.assert_allclose(adapter.arrays["means"], means, atol=1e-6)

    test, labels = DATA.splits["test"]
    weights = alpha * means + (1 - alpha) * adapter.weights
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    rows = test[0] / np.linalg.norm(test[0], axis=1, keepdims=True)
    expected = 20.0 * rows @ weights.T + 0.5
    predicted = expected.argmax(axis=1)
    assert result.results[0].test_accuracy == np.mean(predicted == labels)
    assert np.array_equal(
        read_predictions(place / "run", "nearest-mean", 4, 1).predicted, predicted
    )
    scores = evaluate(EvaluateConfig(cache, folder))
    assert np.array_equal(scores.predicted, predicted)

    facts = dict(inspect(InspectConfig(folder)))
    assert facts["what"] == "adapter of nearest-mean, 64 fitted numbers"
    assert facts["setting"] == f"alpha {alpha:g}"
    check_head(FittedHead(adapter), test[0], expected)


def check_head(head: FittedHead, features: np.ndarray, expected: np.ndarray) -> None:
    """The torch module, as it is, exported and compiled."""
    rows = torch.from_numpy(features)
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(head, (rows[:3],), dynamic_shapes=({0: batch},)).module()
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    for module in (head, exported, compiled):
        np.testing.assert_allclose(module(rows).numpy(), expected, atol=2e-4)
    state = head.state_dict()
    assert {"weights"} < state.keys()


@pytest.mark.usefixtures("registered")
def test_a_trained_method_is_halved_interrupted_and_saved(place: Path) -> None:
    cache = write_cache(place / "tiny.h5", DATA)
    rates, decays = (1e-4, 1e-3, 1e-2), (0.0, 1e-2, 1.0)
    config = FitConfig(
        cache,
        place / "run",
        "moved-weights",
        (),
        shots=4,
        search="halving",
        hyper={"learning_rate": rates, "weight_decay": decays, "epochs": 30},
    )
    (row,) = fit(config).results
    assert row.tried == 9 and row.setting["learning_rate"] in rates
    with pytest.raises(KeyboardInterrupt):
        fit(FitConfig(**{**vars(config), "out": place / "stopped"}), Interrupting(7))
    fit(FitConfig(resume=place / "stopped"))
    same_adapters(place / "run", place / "stopped")
    # What halving chose ends as the same setting alone does.
    alone = {name: (value,) for name, value in row.setting.items()}
    fit(FitConfig(cache, place / "alone", "moved-weights", (), shots=4, hyper=alone))
    one, other = (load_adapter(place / name).arrays["moved"] for name in ("run", "alone"))
    np.testing.assert_allclose(one, other, atol=1e-6)
    adapter = load_adapter(place / "run")
    assert not np.allclose(one, adapter.weights, atol=1e-3)
    test, _ = DATA.splits["test"]
    rows = test[0] / np.linalg.norm(test[0], axis=1, keepdims=True)
    weights = one / np.linalg.norm(one, axis=1, keepdims=True)
    check_head(FittedHead(adapter), test[0], 20.0 * rows @ weights.T + 0.5)
    with pytest.raises(UserError, match="moved-weights cannot classify new classes"):
        fit(FitConfig(cache, place / "new", "moved-weights", (), shots=4, train_classes="base"))


def with_a_row_more(method: Method) -> Method:
    """As its author may go on: a factor before the logits, which were what they are at 1."""
    row = Hyper(3.0, "Factor.", (1.0, 3.0), above=0, when={"optimizer": ("adamw",)}, absent=1.0)

    def logits(xp: Any, arrays: Any, setting: Any, features: Any, head: Any) -> Any:
        return setting["sharpness"] * method.logits(xp, arrays, setting, features, head)

    return replace(method, hyper={**method.hyper, "sharpness": row}, logits=logits)


@pytest.mark.usefixtures("registered")
def test_what_was_saved_before_a_table_grew_stays_what_it_was(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = write_cache(place / "tiny.h5", DATA)
    method, test = METHODS["moved-weights"], DATA.splits["test"][0]
    hyper = {"learning_rate": (1e-3, 1e-2), "epochs": 10}
    config = FitConfig(cache, place / "run", method.name, (), shots=2, seeds=(1, 2), hyper=hyper)
    row = fit(config).results[0]
    # As if it had been killed after its first fit.
    shutil.copytree(place / "run", place / "stopped")
    (place / "stopped" / "selected.jsonl").unlink()
    table = place / "stopped" / "results.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    (stopped,) = csv.DictReader(table.open())
    before = FittedHead(load_adapter(place / "run/adapters/moved-weights/shots-2-seed-1"))

    METHODS[method.name] = with_a_row_more(method)
    adapter = load_adapter(place / "run/adapters/moved-weights/shots-2-seed-1")
    assert adapter.info.setting == {**row.setting, "sharpness": 1.0}
    rows = torch.from_numpy(test)
    assert torch.equal(FittedHead(adapter)(rows), before(rows))
    scores = evaluate(EvaluateConfig(cache, place / "run/adapters/moved-weights/shots-2-seed-1"))
    assert scores.accuracy == row.test_accuracy
    assert called("report", "run", "stopped") == 2
    assert "has not finished" in capsys.readouterr().err
    fit(FitConfig(resume=place / "stopped"))
    same_adapters(place / "run", place / "stopped")
    first, *others = csv.DictReader(table.open())
    assert first == {**stopped, "sharpness": "1.0"}, "it was fitted again"
    assert {fitted["sharpness"] for fitted in others} == {"1.0"} and len(others) == 3
    assert called("report", "run", "stopped") == 0
    # Without `absent` nobody knows what the files were.
    silent = replace(METHODS[method.name].hyper["sharpness"], absent=None)
    METHODS[method.name] = replace(method, hyper={**method.hyper, "sharpness": silent})
    with pytest.raises(UserError, match="sharpness is missing"):
        load_adapter(place / "run/adapters/moved-weights/shots-2-seed-1")
    with pytest.raises(UserError, match="sharpness is missing"):
        fit(FitConfig(resume=place / "stopped"))


@pytest.mark.usefixtures("registered")
def test_the_estimator_takes_it() -> None:
    (features, labels), text = DATA.splits["train"], DATA.text
    model = FewShotClassifier("nearest-mean", text, alpha=1.0).fit(features[0], labels)
    unit = features[0] / np.linalg.norm(features[0], axis=1, keepdims=True)
    means = np.stack([unit[labels == label].mean(axis=0) for label in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.array_equal(model.predict(features[0]), (unit @ means.T).argmax(axis=1))
    assert model.get_params()["alpha"] == 1.0
    trained = FewShotClassifier("moved-weights", text, epochs=5, random_state=0)
    assert trained.fit(features[0], labels).score(features[0], labels) > 0.5
    with pytest.raises(ValueError, match="nearest-mean has no learning_rate"):
        FewShotClassifier("nearest-mean", text, learning_rate=1.0).fit(features[0], labels)


@pytest.mark.usefixtures("registered")
def test_its_options_are_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(place / "features.h5", DATA)
    both = ["--method", "nearest-mean", "moved-weights", "--baselines", "--shots", "2"]
    assert called("fit", *both, "--out", "run", "--alpha", "0.7", "--lr", "0.01") == 0
    printed = capsys.readouterr().out
    assert "nearest-mean" in printed and "moved-weights" in printed
    folder = place / "run" / "adapters"
    assert load_adapter(folder / "nearest-mean/shots-2-seed-1").info.setting == {"alpha": 0.7}
    assert load_adapter(folder / "moved-weights/shots-2-seed-1").info.setting["epochs"] == 20
    assert called("fit", "--method", "nearest-mean", "--lr", "1") == 2
    assert "nearest-mean has no --lr" in capsys.readouterr().err
    assert called("fit", "--method", "nearest-mean", "--alpha", "1.5") == 2
    assert "alpha is 1.5, not a number in [0, 1]" in capsys.readouterr().err
    assert called("fit", "--method", "nearest-mean", "--help") == 0
    assert "Weight of the class means. [0.25 0.5 0.75 1; --select none: 0.5]" in re.sub(
        r"\s+", " ", capsys.readouterr().out
    )


def test_the_page_runs_as_it_stands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray((load_digits().images[0] * 15).astype(np.uint8)).save("photo.png")
    ran = []
    for kind, code in BLOCKS:
        if kind == "sh":
            for line in code.strip().split("\n"):
                words = shlex.split(line)
                words = words[1:] if words[0] == "clip-adapter" else words
                assert called(*words) == 0, (line, capsys.readouterr())
                ran.append(words[0])
        elif kind == "python" and not code.startswith("# "):
            scope: dict[str, object] = {}
            exec(compile(code, str(PAGE), "exec"), scope)
            assert scope["accuracy"] > 0.9
            with FeatureCache("digits.h5") as cache:
                features = cache.features("test", [0, 1], views=1)[0]
            logits = scope["exported"].module()(torch.from_numpy(features))
            assert torch.equal(logits, scope["head"](torch.from_numpy(features)))
            ran.append("python")
    told = ["inspect", "evaluate", "predict", "report"]
    assert ran == ["extract", "fit", "fit", *told, "python", "fit"]
    printed = capsys.readouterr().out
    assert "adapter of nearest-mean, 1280 fitted numbers" in printed
    row = next(line for line in printed.splitlines() if line.startswith("photo.png"))
    assert row.split()[1] == "zero"


def adapter_of_mine(place: Path) -> Path:
    write_cache(place / "tiny.h5", DATA)
    fit(FitConfig("tiny.h5", "run", "nearest_mean:NEAREST_MEAN", (), shots=2, select="none"))
    return place / "run" / "adapters" / "nearest-mean" / "shots-2-seed-1"


def forgotten() -> None:
    """As in another process."""
    del METHODS["nearest-mean"]
    del sys.modules["nearest_mean"]


def test_a_method_of_a_folder_has_to_be_named_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of_mine(place)
    forgotten()
    Image.new("L", (8, 8)).save("photo.png")
    asked: list[tuple[list[str], Callable[[str], bool]]] = [
        (["inspect", str(adapter)], lambda out: "adapter of nearest-mean" in out),
        (["evaluate", "tiny.h5", "--adapter", str(adapter)], lambda out: "difference" in out),
    ]
    for words, right in asked:
        assert called(*words) == 2
        assert "there is no method 'nearest-mean'" in capsys.readouterr().err
        assert "nearest_mean" not in sys.modules
        assert called(*words, "--method", "nearest_mean:NEAREST_MEAN") == 0
        assert right(capsys.readouterr().out)
        forgotten()
    assert called("predict", "photo.png", "--adapter", str(adapter)) == 2
    assert "there is no method 'nearest-mean'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trap:METHOD", "trap", "trap:", ":trap", "nearest-mean"])
def test_an_adapter_imports_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Neither a module that it names, nor one that stands where the user stands."""
    adapter = adapter_of_mine(place)
    forgotten()
    for module in ("trap", "nearest-mean", "nearest_mean"):
        Path(f"{module}.py").write_text("open('ran', 'w').close()")
    document = json.loads((adapter / "adapter.json").read_text())
    document["method"] = name
    document["sha256"] = document_sha256(document)
    (adapter / "adapter.json").write_text(json.dumps(document))
    Image.new("L", (8, 8)).save("photo.png")
    for words in (
        ["inspect", str(adapter)],
        ["evaluate", "tiny.h5", "--adapter", str(adapter)],
        ["predict", "photo.png", "--adapter", str(adapter)],
        ["export", "--adapter", str(adapter), "--out", "classifier.pt2"],
    ):
        assert called(*words) == 2
        assert re.search("no method|no name of a method", capsys.readouterr().err)
    assert not Path("ran").exists() and "trap" not in sys.modules


def test_an_installed_package_offers_its_method(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = place.parent / "site"
    about = site / "their_package-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (entry,) = (code for kind, code in BLOCKS if kind == "toml")
    group, line = entry.strip().split("\n")
    assert group == '[project.entry-points."clip_adapter.methods"]'
    (about / "entry_points.txt").write_text("[clip_adapter.methods]\n" + line.replace('"', ""))
    (place / "nearest_mean.py").rename(site / "nearest_mean.py")
    with pytest.raises(LookupError, match="no method 'nearest-mean'"):
        find_method("nearest-mean")
    monkeypatch.syspath_prepend(site)
    with pytest.raises(LookupError, match=r"moved-weights.*the methods are .*nearest-mean"):
        find_method("moved-weights")
    cache = write_cache(place / "tiny.h5", DATA)
    fit(FitConfig(cache, "run", "nearest-mean", (), shots=2, select="none"))
    forgotten()
    assert load_adapter(place / "run").info.method == "nearest-mean"
