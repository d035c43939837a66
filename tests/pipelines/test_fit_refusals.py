"""Bad input to `fit`: one sentence, exit code 2, nothing written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from clip_adapter.pipelines.commands.fit import main
from tests.cache.rewriting import rewrite
from tests.pipelines.tiny_cache import TinyData, run_fit, tiny_data, write_cache

DATA = tiny_data()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "features.h5").write_bytes(whole)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which `fit` refuses these arguments."""
    before = contents(Path.cwd())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("fit: ")
    assert captured.err.count("\n") == 1, captured.err
    assert contents(Path.cwd()) == before, "something was written"
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--alpha 1.5", "alpha is 1.5, not a number in [0, 1] or `learned` or `hypernet`"),
        ("--branch image text", "branch takes one value, which holds for all settings."),
        ("--alpha learned --alpha-init 7", "alpha_init is 7.0, not a number in [0, 1]"),
        ("--lr 0", "learning_rate is 0.0, not a number > 0"),
        ("--lr inf", "learning_rate is inf, more than a float32 holds"),
        ("--weight-decay -0.1", "weight_decay is -0.1, not a number ≥ 0"),
        ("--epochs 99999999999999", "epochs is 99999999999999, not an integer in [1, 1000000]"),
        ("--batch-size 0", "batch_size is 0, not"),
        ("--reduction 4 0", "reduction is 0, not"),
        ("--reduction", "--reduction needs at least one value"),
        ("--reduction 4 17", "17 leaves no hidden unit"),
        ("--shots 0", "--shots 0 is no number of images"),
        (
            "--shots 10",
            "the largest class has 9 training images; choose between 1 and 9, or `--shots all`",
        ),
        ("--shots 2 10", "--shots 10 cannot be drawn"),
        ("--shots", "--shots needs at least one value"),
        ("--seeds 2147483648", "--seeds must be whole numbers between 0 and 2147483647"),
        ("--alpha 0.2 0.2", "alpha names a value twice"),
        ("--shots 2 2", "--shots names a value twice"),
        ("--seeds 1 1", "--seeds names a value twice"),
        ("--method clip-adapter clip-adapter", "names a method twice"),
        ("--method all zero-shot", "--method all takes every method; name no other"),
        ("--method", "--method needs at least one value"),
        ("--select none --alpha 0.2 0.4", "--select none cannot choose"),
        ("--select none --branch text --beta 0.1 0.2", "--select none cannot choose"),
        ("--train-classes base --method linear-probe", "linear-probe cannot classify new classes"),
        ("--augment", "no augmented views to draw from"),
        ("--cache nowhere.h5", "There is no feature cache at nowhere.h5"),
        ("--cache .", "cannot be read"),
        ("--out features.h5", "features.h5 is a file; a run is kept in a folder"),
        ("--out .", ". is not empty; choose another --out"),
        ("--out features.h5/run", "Cannot write to features.h5/run"),
        (f"--out {'x' * 300}", "Cannot write to"),
        ("--resume nowhere", "nowhere holds no run"),
        ("--resume nowhere --out there", "--resume takes no --out: a run goes on as it was begun."),
    ],
)
def test_arguments_that_make_no_sense(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
):
    stated = arguments.split()
    if "--shots" not in stated and "--resume" not in stated:
        stated += ["--shots", "2"]
    assert words in refused(capsys, *stated)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_text("features,labels\n1,2\n")


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = [1, 2, 3]


def newer(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 3


def incomplete(path: Path) -> None:
    rewrite(path, lambda file, document: document.update(complete=False))


def trainless(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["images/train"]


def valless(path: Path) -> None:
    path.unlink()
    write_cache(path, DATA.with_split("val", None))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (shorten, "damaged, truncated or something else"),
        (overwrite, "damaged, truncated or something else"),
        (foreign, "not a CLIP feature cache"),
        (newer, "format version 3"),
        (incomplete, "incomplete"),
        (trainless, "has no train split"),
        (valless, "use --select cv, which divides the support set, or none"),
        (Path.unlink, "`extract` makes one"),
    ],
)
def test_caches_that_cannot_be_used(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    words: str,
):
    harm(folder / "features.h5")
    asked = ("--out", "run", "--shots", 2, "--select", "few-shot-val")
    assert words in refused(capsys, *asked)


def test_base_to_new_needs_two_classes(folder: Path, capsys: pytest.CaptureFixture[str]):
    write_cache(folder / "one.h5", tiny_data(train=(9,)))
    arguments = ["--cache", "one.h5", "--train-classes", "base", "--shots", 2]
    assert "at least two classes" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("split", "kept", "words"),
    [
        ("train", (2, 3), "train images of the first half"),
        ("val", (2, 3), "val images of the first half"),
        ("test", (0, 1), "test images of the second half"),
    ],
)
def test_base_to_new_needs_images_of_both_halves(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    split: str,
    kept: tuple[int, ...],
    words: str,
):
    features, labels = DATA.splits[split]
    there = np.isin(labels, kept)
    write_cache(folder / "half.h5", DATA.with_split(split, (features[:, there], labels[there])))
    arguments = ["--cache", "half.h5", "--train-classes", "base", "--shots", 2]
    assert words in refused(capsys, *arguments)


def test_a_folder_with_a_run_is_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--out", "run", "--shots", 2, "--method", "zero-shot", "--baselines"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 0
    assert "already holds a run" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"cache": "features.h5"}', "[" * 100_000, '{"a": ' * 100_000]
)
def test_a_run_whose_arguments_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str
):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(content)
    assert "start a new run" in refused(capsys, "--resume", "run")


def test_base_to_new_refuses_what_cannot_tell_new_classes_before_it_writes(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    """As a baseline such a method has a base accuracy all the same."""
    arguments = [
        "--train-classes",
        "base",
        "--method",
        "clip-adapter",
        "linear-probe",
        "--shots",
        "2",
    ]
    assert "linear-probe cannot classify new classes" in refused(capsys, *arguments)


LR, DECAY = "try a smaller --lr", "try a smaller --weight-decay"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ("--lr 1e30", LR),
        ("--lr 1e30 --select cv", LR),
        ("--lr 1e30 --select none", LR),
        ("--weight-decay 1e30", DECAY),
        ("--weight-decay 1e30 1e31", DECAY),
        ("--lr 1e30 --weight-decay 1e30", "try a smaller --lr or --weight-decay"),
        ("--lr 1e-3 1e30 --weight-decay 1e30", DECAY),
        ("--lr 1e30 --search halving", LR),
    ],
)
def test_settings_that_all_diverge(
    folder: Path, capsys: pytest.CaptureFixture[str], options: str, advice: str
):
    """The run is recorded, the baselines are shown, and the advice fits the cause; but there is no
    adapter to use."""
    line = f"--out run --shots 4 --alpha 0.5 --epochs 10 --baselines zero-shot {options}"
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    sentence = captured.err.splitlines()[-1]
    assert sentence == (
        "fit: Every setting of clip-adapter diverged at the most shots; see the notes above."
    )
    assert f"every setting diverged; {advice}" in " ".join(captured.out.split())
    assert advice + " or" not in captured.out
    assert "zero-shot" in captured.out
    assert not (folder / "run" / "adapter.json").exists()
    with pytest.raises(SystemExit) as ended:
        main(["--resume", "run"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [sentence]


def test_the_process_refuses_as_the_function_does(folder: Path):
    for arguments, words in (
        ("--alpha 1.5", "alpha is 1.5, not"),
        ("--cache nowhere.h5", "There is no feature cache"),
    ):
        done = run_fit(folder, *arguments.split())
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(contents(folder)) == ["features.h5"]


@pytest.mark.parametrize("arguments", ["--shots many", "--method svm", "--colour red"])
def test_arguments_that_do_not_parse(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str
):
    refused(capsys, *arguments.split())


def test_prompts_that_cancel_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a class would have no direction, and no image of its own or all of them."""
    monkeypatch.chdir(tmp_path)
    text = DATA.text.copy()
    text[2, 1] = -3 * text[2, 0]
    write_cache(tmp_path / "features.h5", TinyData(DATA.splits, text))
    said = refused(capsys, "--shots", 1, "--method", "zero-shot")
    assert "The text features of 'class 2' cancel" in said


@pytest.mark.parametrize(
    "named", ["JAX_PLATFORMS=cuda", "JAX_PLATFORMS=rubbish", "JAX_ENABLE_X64=?"]
)
def test_jax_that_cannot_begin_is_one_sentence(folder: Path, named: str) -> None:
    before = contents(folder)
    command = [
        sys.executable,
        "-c",
        "from clip_adapter.pipelines.commands.fit import main; main([])",
    ]
    environment = os.environ | dict([named.split("=")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fit: JAX ") and done.stderr.count("\n") == 1, done.stderr
    assert contents(folder) == before
