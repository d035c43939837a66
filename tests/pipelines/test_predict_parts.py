"""`clip-adapter predict` divided among processes, and into parts that survive being killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from clip_adapter.cache.staging import StagingFolder
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict, print_predictions
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from tests.pipelines.test_predict_caches import DATA, names_in, new_images
from tests.pipelines.tiny_cache import write_cache

ABOUT = "_answers.json"
PARTS = {f"part-{start:010}.parquet" for start in (0, 8192, 16384)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, a cache of 140 images in three splits, and one of 20,000: five blocks of rows."""
    folder = tmp_path_factory.mktemp("parts")
    cache = write_cache(folder / "f.h5", DATA)
    fit(FitConfig(cache, folder / "run", ("gda",), (), shots=(4,), select="none"))
    new_images(folder / "new.h5", 20_000)
    return folder


@pytest.fixture
def config(place: Path) -> PredictConfig:
    return PredictConfig((place / "new.h5",), place / "run", top=2)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images each block has that is classified."""
    sizes: list[int] = []
    logits = SavedAdapter.logits

    def noting(self: SavedAdapter, features: np.ndarray) -> np.ndarray:
        sizes.append(len(features))
        return logits(self, features)

    monkeypatch.setattr(SavedAdapter, "logits", noting)
    return sizes


@pytest.mark.parametrize("of", [1, 2, 3, 11])
def test_shards_one_behind_the_other_are_an_undivided_run(
    config: PredictConfig, place: Path, tmp_path: Path, of: int
) -> None:
    """Of several caches; of more shards than blocks some have no image."""
    config = replace(config, paths=(place / "f.h5", place / "new.h5", place / "f.h5"))
    whole = tmp_path / "whole.jsonl"
    print_predictions(replace(config, out=whole))
    parts = []
    for index in range(1, of + 1):
        parts.append(tmp_path / f"{index}.jsonl")
        print_predictions(replace(config, out=parts[-1], shard=f"{index}/{of}"))
    assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
    assert len(whole.read_text().splitlines()) == 20_280


def test_shards_of_files_meet_at_batches(
    tmp_path: Path, image_folder: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(FitConfig(digits_cache, tmp_path / "run", ("gda",), (), shots=(4,), select="none"))
    (image_folder / "05.png").write_bytes(b"no image")
    config = PredictConfig((image_folder,), tmp_path / "run", format="jsonl", batch_size=5)
    assert print_predictions(config) == 1
    whole = capsys.readouterr().out
    found = []
    for index, code in ((1, 0), (2, 1), (3, 0)):
        assert print_predictions(replace(config, shard=f"{index}/3")) == code
        found.append(capsys.readouterr())
    assert "".join(one.out for one in found) == whole
    assert [len(one.out.splitlines()) for one in found] == [5, 4, 2]
    assert "part 2 of 3: 5 of 12 images" in found[1].err
    assert "1 of 5 images cannot be read" in found[1].err
    # Of a folder of parts an image that cannot be read is known when the parts are there already.
    config = replace(config, format=None, out=tmp_path / "answers")
    for said in ("11 images in 1 part", "11 images in 1 part, 1 of them there already"):
        assert print_predictions(config) == 1
        printed = capsys.readouterr()
        assert printed.out == f"{tmp_path / 'answers'}: {said}\n"
        assert printed.err.endswith("1 of 12 images cannot be read\n")


def test_a_folder_of_parts_is_what_one_file_would_be(
    config: PredictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: list[int]
) -> None:
    """Whoever writes them, in any order; what is there is not made again."""
    print_predictions(replace(config, out=tmp_path / "whole.parquet"))
    print_predictions(replace(config, out=tmp_path / "undivided"))
    for index in (3, 1, 2):
        print_predictions(replace(config, out=tmp_path / "shared", shard=f"{index}/3"))
    assert names_in(tmp_path / "undivided") == PARTS | {ABOUT}
    whole = parquet.read_table(tmp_path / "whole.parquet")
    assert whole.num_rows == 20_000
    for name in ("undivided", "shared"):
        assert parquet.read_table(tmp_path / name).equals(whole)
    del blocks[:]
    capsys.readouterr()
    assert print_predictions(replace(config, out=tmp_path / "undivided")) == 0
    assert not blocks
    assert capsys.readouterr().out == (
        f"{tmp_path / 'undivided'}: 20,000 images in 3 parts, 3 of them there already\n"
    )


def test_a_killed_run_goes_on_behind_its_finished_parts(
    config: PredictConfig, place: Path, tmp_path: Path, blocks: list[int]
) -> None:
    program = (
        "import os; from itertools import count; numbers = count(1);"
        "from clip_adapter.pipelines.saved.adapter_file import SavedAdapter as A; own = A.logits;"
        "from clip_adapter.adapters.methods.gda import GDA;"
        "A.logits = lambda self, f: own(self, f) if next(numbers) < 4 else os.kill(os.getpid(), 9);"
        "from clip_adapter.pipelines.console.entry import main; main()"
    )
    command = ["predict", "--adapter", place / "run", place / "new.h5", "--top", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", program, *command, "--out", "answers"], cwd=tmp_path, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    out, finished = tmp_path / "answers", tmp_path / "answers" / min(PARTS)
    assert {name for name in names_in(out) if not name.startswith("_")} == {finished.name}
    assert parquet.read_table(out).num_rows == 8192  # as a reader sees it in the meantime
    before = finished.stat()
    assert print_predictions(replace(config, out=out)) == 0
    assert blocks == [4096, 4096, 20_000 - 4 * 4096]
    assert finished.stat().st_mtime_ns == before.st_mtime_ns
    assert names_in(out) == PARTS | {ABOUT}
    print_predictions(replace(config, out=tmp_path / "whole.parquet"))
    assert parquet.read_table(out).equals(parquet.read_table(tmp_path / "whole.parquet"))


def test_an_interruption_says_what_is_kept(
    config: PredictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, left = SavedAdapter.logits, [1, 2, 3]

    def interrupted(self: SavedAdapter, features: np.ndarray) -> np.ndarray:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return logits(self, features)

    monkeypatch.setattr(SavedAdapter, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt, match="finished parts are kept, and the same command"):
        print_predictions(replace(config, out=tmp_path / "answers"))
    assert names_in(tmp_path / "answers") == {min(PARTS), ABOUT}


def test_only_the_same_answers_go_on(config: PredictConfig, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    config = replace(config, out=out, shard="1/2")
    print_predictions(config)
    before = {path: path.read_bytes() for path in out.iterdir()}
    fit(FitConfig(place / "f.h5", tmp_path / "other", ("gda",), (), shots=(2,), select="none"))
    changed = new_images(tmp_path / "new.h5", 19_999)
    for other, named in (
        (replace(config, top=3), "top"),
        (replace(config, reject=0.2), "reject"),
        (replace(config, adapter=tmp_path / "other"), "adapter"),
        (replace(config, paths=(changed,)), "images"),
        (replace(config, paths=(*config.paths, changed)), "images"),
        (replace(config, shard="2/3"), "number of shards"),
    ):
        with pytest.raises(UserError, match=rf"other arguments \({named} differ\); repeat those"):
            print_predictions(other)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    stated = parquet.read_metadata(out / min(PARTS)).metadata[b"clip_adapter"]
    assert json.loads(stated)["number of shards"] == 2


def test_processes_agree_before_the_first_part(
    config: PredictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which one would not see the other's parts, begun in one moment as they are."""
    out = tmp_path / "answers"
    others = [replace(config, out=out, shard=shard) for shard in ("1/2", "2/3")]
    logits = SavedAdapter.logits

    def meanwhile(self: SavedAdapter, features: np.ndarray) -> np.ndarray:
        if others:
            with pytest.raises(UserError, match="number of shards differ"):
                print_predictions(others.pop())
        return logits(self, features)

    monkeypatch.setattr(SavedAdapter, "logits", meanwhile)
    print_predictions(others.pop(0))
    assert not others
    (out / "_answers.json").write_text("[")
    with pytest.raises(UserError, match=r"_answers\.json is damaged; name another folder"):
        print_predictions(replace(config, out=out, shard="2/2"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("notes.txt", "answers holds notes.txt, which is no part of answers; name another folder"),
        (min(PARTS), "part-0000000000.parquet is damaged or no part of answers; move it away"),
        ("_1-of-1.partial", "Another process is writing .*answers/_1-of-1; wait for it"),
    ],
)
def test_what_else_lies_there_stays(
    config: PredictConfig, tmp_path: Path, name: str, sentence: str
) -> None:
    out = tmp_path / "answers"
    out.mkdir()
    if name.startswith("_"):
        with StagingFolder(out / "_1-of-1"), pytest.raises(UserError, match=sentence):
            print_predictions(replace(config, out=out))
        return
    for content in (b"", b"PAR1" * 9):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            print_predictions(replace(config, out=out))
        assert names_in(out) == {name} and (out / name).read_bytes() == content


def test_another_table_is_no_part(config: PredictConfig, tmp_path: Path) -> None:
    print_predictions(replace(config, out=tmp_path / "whole.parquet"))
    (tmp_path / "answers").mkdir()
    (tmp_path / "whole.parquet").rename(tmp_path / "answers" / min(PARTS))
    with pytest.raises(UserError, match="is damaged or no part of answers"):
        print_predictions(replace(config, out=tmp_path / "answers"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard": "3/2"}, "--shard 3/2 is no part of anything"),
        ({"shard": "1/2", "transductive": True}, "all images together; leave out --shard"),
        ({"out": "answers", "transductive": True}, "all images together; let --out name a file"),
        ({"out": "answers", "force": True}, "--force is for a file; remove the folder"),
        ({"out": "there"}, "there is a file; name a folder, or a file by one of"),
        ({"out": "there.csv"}, "there.csv exists; choose another name, or --force to overwrite"),
        ({"force": True}, "--force overwrites the file that --out names; leave it out"),
    ],
)
def test_bad_input_is_one_sentence(
    config: PredictConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there.csv"):
        Path(name).touch()
    if "out" in options:
        options = options | {"out": Path(options["out"])}
    with pytest.raises(UserError, match=sentence):
        print_predictions(replace(config, **options))
    assert names_in(tmp_path) == {"there", "there.csv"}


def test_a_file_is_overwritten_where_that_is_asked_for(
    config: PredictConfig, tmp_path: Path
) -> None:
    out = tmp_path / "a.csv"
    out.write_text("of before")
    with pytest.raises(UserError, match="exists"):
        print_predictions(replace(config, out=out))
    assert out.read_text() == "of before"
    print_predictions(replace(config, out=out, force=True))
    assert len(out.read_text().splitlines()) == 20_001


def test_python_has_the_part(config: PredictConfig) -> None:
    whole, part = predict(config), predict(replace(config, shard="2/2"))
    assert (len(whole), len(part)) == (20_000, 20_000 - 2 * 4096)
    assert list(part) == list(whole)[2 * 4096 :]
