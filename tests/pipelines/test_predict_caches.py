"""`clip-adapter predict` on feature caches, and the files that it writes."""

import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.special import softmax

from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import (
    PredictConfig,
    main,
    predict,
    print_predictions,
)
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.tiny_cache import DIM, tiny_data, write_cache

DATA = tiny_data(test=20)
NAMES = [f"class {n}" for n in range(4)]


def new_images(path: Path, count: int, **others: Any) -> Path:
    """A cache of images without labels, of the backbone of DATA's cache."""
    rng = np.random.default_rng(count)
    content = {
        "text/features": DATA.text,
        "text/class_names": NAMES,
        "text/templates": ["a {}", "the {}"],
        "images/unlabelled/features": rng.normal(size=(1, count, DIM)).astype(np.float32),
        "images/unlabelled/ids": [f"new//{row}.jpg" for row in range(count)],
    }
    backbone = {"name": "tiny-clip", "pretrained": "nothing", "weights_sha256": "0" * 64}
    backbone |= {"embed_dim": DIM, "image_size": 8, "quick_gelu": False} | others
    dataset = {"name": "new", "source": "made up", "splits": {}}
    write_content(path, content, backbone=backbone, dataset=dataset, logit_scale=20.0)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    cache = write_cache(folder / "f.h5", DATA)
    fit(FitConfig(cache, folder / "run", ("gda",), (), shots=(4,), select="none"))
    new_images(folder / "new.h5", 5000)
    return folder


def test_rows_of_a_cache_are_classified_by_their_features(place: Path) -> None:
    """By the adapter's own logits; block by block, in the cache's order, with its ids."""
    predictions = predict(PredictConfig((place / "new.h5",), place / "run", top=2))
    found = list(predictions)
    assert len(predictions) == len(found) == 5000
    features = np.random.default_rng(5000).normal(size=(1, 5000, DIM)).astype(np.float32)[0]
    adapter = load_adapter(place / "run")
    assert adapter.decisions is not None
    temperature = adapter.decisions.temperature
    shares = softmax(adapter.logits(features).astype(float) / temperature, axis=1)
    assert [p.path for p in found] == [f"new//{row}.jpg" for row in range(5000)]
    assert list(predictions.names()) == [p.path for p in found]
    for prediction, own in list(zip(found, shares, strict=True))[::97]:
        assert prediction.top[0][0] == NAMES[own.argmax()]
        assert prediction.top[0][1] == pytest.approx(own.max(), rel=1e-6)


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_which_rows_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those without labels, where there are some, else all; or of one split."""
    for paths, options, said in (
        (["new.h5"], [], ["new.h5: 5,000 unlabelled images"]),
        (["f.h5"], [], [f"f.h5: {n} images" for n in ("36 train", "24 val", "80 test")]),
        (["f.h5"], ["--split", "test"], ["f.h5: 80 test images"]),
        (["f.h5", "f.h5"], ["--split", "val"], ["f.h5: 24 val images"] * 2),
    ):
        named = [place / name for name in paths]
        assert exit_code("--adapter", place / "run", *named, *options, "--format", "csv") == 0
        printed = capsys.readouterr()
        told = [line for line in printed.err.splitlines() if line.startswith("predict: ")]
        assert told == [f"predict: {place}/{sentence}" for sentence in said]
        rows = list(csv.DictReader(printed.out.splitlines()))
        counts = [int(sentence.split()[1].replace(",", "")) for sentence in said]
        assert len(rows) == sum(counts)
    _, labels = DATA.splits["test"]
    found = predict(PredictConfig((place / "f.h5",), place / "run", split="test"))
    pairs = zip(found, labels.tolist(), strict=True)
    assert np.mean([one.top[0][0] == f"class {label}" for one, label in pairs]) > 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["new.h5", "--split", "test"], "new.h5 has no test split, only unlabelled"),
        (["picture.png", "--split", "test"], "--split is of feature caches, and none is named"),
        (["new.h5", "--device", "cpu"], "--device is for image files, and there are only images"),
        (["new.h5", "--batch-size", "2"], "--batch-size is for image files"),
        (["other.h5"], "The adapter was fitted for other weights of tiny-clip"),
        (["foreign.h5"], "foreign.h5 is an HDF5 file but not a CLIP feature cache"),
        (["new.h5", "--format", "parquet"], "--format parquet is no text to print; give it a file"),
        (
            ["new.h5", "--out", "a.xlsx"],
            "a.xlsx is not named for what it would hold; let it end in",
        ),
        (["new.h5", "--out", "a.csv", "--format", "json"], "let it end in .json."),
        (["new.h5", "--out", "nowhere/a.csv"], "nowhere/a.csv cannot be written: there is no such"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.h5").symlink_to(place / "new.h5")
    new_images(tmp_path / "other.h5", 3, weights_sha256="1" * 64)
    (tmp_path / "foreign.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    before = names_in(tmp_path)
    assert exit_code("--adapter", place / "run", *arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1) and sentence in printed.err
    assert names_in(tmp_path) == before


def test_the_files_say_what_is_printed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PredictConfig((place / "new.h5",), place / "run", top=2)
    expected = [(p.path, *(part for pair in p.top for part in pair)) for p in predict(config)]
    for form, suffix in (("table", "txt"), ("csv", "csv"), ("json", "json"), ("jsonl", "jsonl")):
        assert print_predictions(replace(config, format=form)) == 0  # type: ignore[arg-type]
        text = capsys.readouterr().out
        out = tmp_path / f"a.{suffix}"
        assert print_predictions(replace(config, out=out)) == 0
        assert capsys.readouterr().out == f"{out}: 5,000 images\n"
        assert out.read_bytes() == text.encode()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == json.loads((tmp_path / "a.json").read_text()) and len(lines) == 5000
    print_predictions(replace(config, out=tmp_path / "a.parquet"))
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    columns = ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert table.column_names == columns and table.num_rows == 5000
    assert table.schema.field("probability_1").type == pyarrow.float64()
    rows = table.to_pylist()
    for row, line, values in zip(rows, lines, expected, strict=True):
        assert [row["image"], row["class_1"], row["class_2"]] == [values[0], values[1], values[3]]
        assert row["probability_2"] == line["top"][1]["probability"]
        assert row["probability_2"] == pytest.approx(values[4], rel=1e-5)
    assert sorted(names_in(tmp_path)) == ["a.csv", "a.json", "a.jsonl", "a.parquet", "a.txt"]


def test_nothing_is_half_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged row late in the cache, and a process that is killed: the old file stays, and the
    same command starts over."""
    cache = new_images(tmp_path / "bad.h5", 9000)
    content = bytearray(cache.read_bytes())
    features = np.random.default_rng(9000).normal(size=(1, 9000, DIM)).astype(np.float32)
    place_of = content.find(features[0, 8990].tobytes())
    assert place_of > 0
    content[place_of] ^= 1
    cache.write_bytes(content)
    for suffix in ("csv", "parquet"):
        out = tmp_path / f"a.{suffix}"
        out.write_text("of before")
        config = PredictConfig((cache,), place / "run", out=out, force=True)
        with pytest.raises(UserError, match=r"bad.h5 cannot be used"):
            print_predictions(config)
        assert out.read_text() == "of before"
    assert sorted(names_in(tmp_path)) == ["a.csv", "a.parquet", "bad.h5"]
    program = (
        "import os, sys, signal; from clip_adapter.pipelines.scoring import cached;"
        "from clip_adapter.adapters.methods.gda import GDA;"
        "from clip_adapter.pipelines.saved.adapter_file import SavedAdapter as A; own = A.logits;"
        "A.logits = lambda self, f: own(self, f) if len(f) == 4096 else os.kill(os.getpid(), 9);"
        "from clip_adapter.pipelines.console.entry import main; main()"
    )
    arguments = ["predict", "--adapter", place / "run", place / "new.h5", "--out", "a.csv"]
    arguments += ["--force"]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a.csv").read_text() == "of before"
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments[1:]) == 0
    with (tmp_path / "a.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5000
    assert not (tmp_path / "a.csv.new").exists()


def test_files_and_caches_together(
    tmp_path: Path, image_folder: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images from both say the same; what cannot be read is named, the rest is done."""
    fit(FitConfig(digits_cache, tmp_path / "run", ("gda",), (), shots=(4,), select="none"))
    new = ExtractConfig(
        dataset=f"images:{image_folder}", like=digits_cache, out=tmp_path / "new.h5"
    )
    extract(new)
    (image_folder / "00.png").write_bytes(b"no image")
    arguments = [
        "--adapter",
        tmp_path / "run",
        tmp_path / "new.h5",
        image_folder,
        "--format",
        "jsonl",
    ]
    assert exit_code(*arguments, "--out", tmp_path / "p.jsonl") == 1
    assert "1 of 24 images cannot be read" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    of_files = {Path(row["image"]).name: row["top"] for row in rows[:11]}
    of_cache = {Path(row["image"]).name: row["top"] for row in rows[11:]}
    assert of_cache.keys() - of_files.keys() == {"00.png"} and len(of_cache) == 12
    for name, top in of_files.items():
        assert [t["class"] for t in top] == [t["class"] for t in of_cache[name]]
        assert top[0]["probability"] == pytest.approx(of_cache[name][0]["probability"], abs=1e-4)


def test_memory_does_not_grow_with_the_rows(place: Path, tmp_path: Path) -> None:
    """The peak of a process that reads 200,000 rows of 64 bytes, beside that of 5,000."""
    new_images(tmp_path / "many.h5", 200_000)
    program = (
        "import resource; from clip_adapter.pipelines.console.entry import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for cache in (place / "new.h5", tmp_path / "many.h5"):
        command = [sys.executable, "-c", program, "predict", "--adapter", place / "run", cache]
        done = subprocess.run(
            [*command, "--out", tmp_path / f"{cache.stem}.csv"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    # Hashes and labels of all rows: 16 bytes each. All features and names would be 26 MB, objects
    # of Python for what is predicted a hundred.
    assert peaks[1] - peaks[0] < 30
