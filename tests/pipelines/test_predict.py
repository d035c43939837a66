"""`clip-adapter predict` on image files."""

import csv
import dataclasses
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.special import softmax

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.predict import PredictConfig, main, predict, print_predictions
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, save_adapter
from tests import processes

LogitsOf = Callable[[SavedAdapter, np.ndarray], np.ndarray]


@pytest.fixture
def run(tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]) -> Path:
    save_adapter(tmp_path / "run", saved_adapters["both-learned"])
    return tmp_path / "run"


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_module_and_the_command_need_no_jax(run: Path, image_folder: Path, digits: Any) -> None:
    program = (
        "import sys, atexit, torch;"
        "from clip_adapter.pipelines.saved.pytorch import AdaptedClip;"
        "print(tuple(AdaptedClip.from_run(sys.argv[3])(torch.zeros(2, 3, 32, 32)).shape));"
        "assert 'h5py' not in sys.modules;"
        "from clip_adapter.pipelines.console.entry import main;"
        "atexit.register(lambda: print({'jax', 'flax'} & {*sys.modules}, file=sys.stderr)); main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "predict", "--adapter", run, image_folder, "--top", "2"],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "set()\n")
    shape, *rows = result.stdout.splitlines()
    assert shape == "(2, 10)"
    assert [row.split()[0] for row in rows] == [
        str(image_folder / name)
        for name in (*(f"{n:02}.png" for n in range(10)), "more/10.png", "more/11.png")
    ]
    assert all(row.count("%") == 2 for row in rows)


def test_probabilities_are_the_softmax_of_the_adapters_logits(
    run: Path,
    image_folder: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: Any,
    flax_logits: LogitsOf,
) -> None:
    adapter = saved_adapters["both-learned"]
    expected = softmax(flax_logits(adapter, digits.features[:12]).astype(np.float64), axis=1)
    found = list(predict(PredictConfig((image_folder,), run, top=10)))
    assert len(found) == 12
    for prediction, probabilities in zip(found, expected, strict=True):
        order = np.argsort(-probabilities)
        assert [name for name, _ in prediction.top] == [adapter.info.class_names[c] for c in order]
        np.testing.assert_allclose([p for _, p in prediction.top], probabilities[order], atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_order_and_results_do_not_depend_on_batches(
    run: Path, image_folder: Path, batch_size: int
) -> None:
    (image_folder / "05.png").write_bytes(b"no image")
    whole = list(predict(PredictConfig((image_folder,), run)))
    parts = list(predict(PredictConfig((image_folder,), run, batch_size=batch_size, workers=3)))
    assert [p.path for p in parts] == [p.path for p in whole]
    assert [p.path.name for p in parts if p.unreadable] == ["05.png"]
    for part, one in zip(parts, whole, strict=True):
        assert [name for name, _ in part.top] == [name for name, _ in one.top]
        np.testing.assert_allclose([p for _, p in part.top], [p for _, p in one.top], atol=1e-4)


def test_images_are_decoded_as_extract_decodes_them(run: Path, tmp_path: Path, digits: Any) -> None:
    """Transparent over white and 16 bits scaled to 8, where Pillow alone does neither."""
    grey = np.asarray(digits.pictures[3])
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "2.png")
    alpha = Image.fromarray(255 - grey)  # black ink, the paper white only beneath
    Image.merge("LA", (Image.new("L", alpha.size), alpha)).save(tmp_path / "3.png")
    found = list(predict(PredictConfig(tuple(sorted(tmp_path.glob("*.png"))), run)))
    assert len(found) == 3
    assert found[0].top == found[1].top == found[2].top


def test_a_table_of_no_readable_image_has_its_columns(run: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    for form in ("csv", "parquet"):
        out = tmp_path / f"out.{form}"
        assert print_predictions(PredictConfig((tmp_path / "1.png",), run, out=out)) == 1
    columns = ["image", *(f"{what}_{n}" for n in (1, 2, 3) for what in ("class", "probability"))]
    assert (tmp_path / "out.csv").read_text() == ",".join(columns) + "\n"
    assert parquet.read_table(tmp_path / "out.parquet").column_names == columns


def test_images_are_read_as_they_are_needed(run: Path, image_folder: Path) -> None:
    predictions = predict(PredictConfig((image_folder,), run, batch_size=1, workers=1))
    first, *others = iter_removing_last(predictions, image_folder / "more" / "11.png")
    assert first.top
    assert [p.unreadable is None for p in others] == [True] * 10 + [False]


def iter_removing_last(predictions: Any, last: Path) -> Any:
    iterator = iter(predictions)
    yield next(iterator)
    last.unlink()
    yield from iterator


def test_unreadable_images_are_named_and_the_rest_is_predicted(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (image_folder / "00.png").read_bytes()
    (image_folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "03.png").write_bytes(b"")
    notes = image_folder / "notes.txt"
    notes.write_text("not an image, and not looked at unless it is named")
    lacking = image_folder.parent / "nowhere.png", image_folder.parent / "nor-here"
    paths = (lacking[0], image_folder, notes, lacking[1], lacking[0])
    assert exit_code("--adapter", run, *paths, "--format", "json") == 1
    printed = capsys.readouterr()
    names = [Path(row["image"]).name for row in json.loads(printed.out)]
    assert names == [f"{n:02}.png" for n in range(12) if n not in (2, 3)]
    named = printed.err.splitlines()
    inside = (image_folder / "02.png", image_folder / "03.png", notes)
    skipped = (lacking[0], *inside, lacking[1], lacking[0])
    for path, line in zip(skipped, named[:-1], strict=True):
        assert line.startswith(f"{path} skipped: ")
        assert ("No such file or directory; check" in line) is (path in lacking)
    assert named[-1] == "clip-adapter predict: 6 of 16 images cannot be read"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.png"], "Cannot read nowhere.png: No such file"),
        ([], "Name the images to classify"),
        (["empty"], "no image file in empty"),
        (["nowhere.png", "nor-here"], "Cannot read nowhere.png: No such file"),
        (["picture.png", ""], "an empty name names no file; write . for this folder"),
        (["picture.png", "--top", "0"], "--top must be at least 1"),
        (["picture.png", "--top", str(10**30)], "--top must be at least 1 and at most 100,000"),
        (["picture.png", "--batch-size", str(10**30)], "--batch-size must be at least 1 and at"),
        (["picture.png", "--device", "abacus"], "--device abacus is not available"),
        (["picture.png", "--adapter", "empty"], "There is no adapter at empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    adapter = [] if "--adapter" in arguments else ["--adapter", str(run)]
    assert exit_code(*adapter, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("\n") == 1


def test_another_backbone_is_refused_with_exit_code_2(
    tmp_path: Path,
    image_folder: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = saved_adapters["image-fixed"].info
    other = dataclasses.replace(info, backbone={**info.backbone, "weights_sha256": "f" * 64})
    save_adapter(tmp_path, dataclasses.replace(saved_adapters["image-fixed"], info=other))
    assert exit_code("--adapter", tmp_path, image_folder) == 2
    assert "fitted for other weights of glyph-clip" in capsys.readouterr().err


def test_the_formats_say_the_same(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PredictConfig((image_folder,), run, top=2)
    expected = [(str(p.path), *p.top) for p in predict(config)]
    output = {}
    for form in ("table", "csv", "json"):
        assert print_predictions(dataclasses.replace(config, format=form)) == 0
        output[form] = capsys.readouterr().out

    rows = json.loads(output["json"])
    for row, (path, *top) in zip(rows, expected, strict=True):
        assert row["image"] == path
        assert [(t["class"], t["probability"]) for t in row["top"]] == [
            (name, pytest.approx(p, rel=1e-5)) for name, p in top
        ]
    header, *lines = csv.reader(StringIO(output["csv"]))
    assert header == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    for line, row in zip(lines, rows, strict=True):
        one, two = row["top"]
        values = [one["class"], one["probability"], two["class"], two["probability"]]
        assert line == [row["image"], *map(str, values)]
    for line, row in zip(output["table"].splitlines(), rows, strict=True):
        words = line.split()
        shares = [f"{100 * t['probability']:.1f}" for t in row["top"]]
        assert words[1::3] == [t["class"] for t in row["top"]]
        assert words[2::3] == shares
    assert len({len(line) for line in output["table"].splitlines()}) == 1


def test_strange_names_are_escaped_on_the_way_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    names = ["two\nlines.png", os.fsdecode(b"\xff.png"), "\x1b[2J.png", "字.png"]
    for name in names:
        Image.new("L", (8, 8)).save(folder / name)
    config = PredictConfig((folder,), run, top=1)
    for form in ("table", "csv"):
        print_predictions(dataclasses.replace(config, format=form))
        text = capsys.readouterr().out
        assert text.count("\n") == len(names) + (form == "csv")
        assert all(shown in text for shown in ("two\\nlines", "\\udcff.png", "\\x1b[2J", "字"))
        text.encode()
    print_predictions(dataclasses.replace(config, format="json"))
    images = {Path(row["image"]).name for row in json.loads(capsys.readouterr().out)}
    assert images == set(names)
    print_predictions(dataclasses.replace(config, paths=str(folder), out=tmp_path / "o.parquet"))
    images = {
        Path(name).name for name in parquet.read_table(tmp_path / "o.parquet")["image"].to_pylist()
    }
    assert images == {name.encode("utf-8", "backslashreplace").decode() for name in names}


def test_a_progress_bar_leaves_standard_output_alone(
    run: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the bar on a terminal, rich takes sys.stdout over: rows must still reach the pipe."""
    read, write = pty.openpty()
    with os.fdopen(write, "w") as terminal, os.fdopen(read, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert print_predictions(PredictConfig((image_folder,), run, format="csv")) == 0
        terminal.flush()
        assert b"predict" in screen.read(4096)
    assert len(capsys.readouterr().out.splitlines()) == 13


def test_the_python_interface_raises(run: Path) -> None:
    with pytest.raises(UserError, match="Cannot read"):
        predict(PredictConfig((Path("nowhere"),), run))


def test_a_pipe_and_a_device_among_the_images_are_skipped(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "00.png").unlink()
    os.mkfifo(image_folder / "00.png")
    found = {image_folder / "00.png": "a named pipe", Path("/dev/zero"): "a device"}
    assert exit_code("--adapter", run, image_folder, "/dev/zero", "--format", "json") == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 11
    assert printed.err.splitlines() == [
        *(f"{path} skipped: it is {kind}, not a file" for path, kind in found.items()),
        "clip-adapter predict: 2 of 13 images cannot be read",
    ]


def test_a_spreadsheet_takes_no_name_for_a_formula(
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = saved_adapters["image-fixed"].info
    names = ["=1+1", "+a", "-b", "@c", "\td", "a=b", *map(str, range(4))]
    adapter = dataclasses.replace(
        saved_adapters["image-fixed"], info=dataclasses.replace(info, class_names=names)
    )
    save_adapter(tmp_path / "run", adapter)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("=HYPERLINK.png")
    config = PredictConfig((Path("=HYPERLINK.png"),), Path("run"), top=10)
    assert print_predictions(dataclasses.replace(config, format="csv")) == 0
    _, (image, *cells) = csv.reader(StringIO(capsys.readouterr().out))
    assert image == "'=HYPERLINK.png"
    assert {"'=1+1", "'+a", "'-b", "'@c", r"\td", "a=b", "0"} < set(cells[::2])
    assert print_predictions(dataclasses.replace(config, format="json")) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == "=HYPERLINK.png"
    assert {top["class"] for top in row["top"]} == set(names)


def test_a_full_device_is_a_sentence(run: Path, image_folder: Path, tmp_path: Path) -> None:
    finished = processes.start(
        ["clip-adapter", "predict", "--adapter", run, image_folder],
        tmp_path,
        out=Path("/dev/full"),
        err=tmp_path / "err",
    )
    finished.join(60)
    assert finished.exitcode == 2
    assert (tmp_path / "err").read_text() == "clip-adapter predict: No space left on device.\n"


def test_the_backbone_can_be_named(
    tmp_path: Path,
    image_folder: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = saved_adapters["image-fixed"].info
    mine = {**info.backbone, "name": "local-dir:mine", "pretrained": "local-dir:mine"}
    adapter = dataclasses.replace(
        saved_adapters["image-fixed"], info=dataclasses.replace(info, backbone=mine)
    )
    save_adapter(tmp_path, adapter)
    assert exit_code("--adapter", tmp_path, image_folder) == 2
    assert "name the backbone with --backbone" in capsys.readouterr().err
    assert exit_code("--adapter", tmp_path, image_folder, "--backbone", "glyph-clip") == 0
