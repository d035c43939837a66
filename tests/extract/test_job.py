"""Whole runs: interrupted, divided, with bad images, on a full disk."""

import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract import job, local_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.run import extract
from clip_adapter.extract.shards import Shard, parse_shard
from clip_adapter.pipelines.commands.merge import MergeConfig, merge
from clip_adapter.pipelines.console.terminal import Terminal
from tests import processes
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder, photograph

BIN = Path(sys.executable).parent
THREADS = 4  # as many passes at once, each on one thread
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
WITH_THREADS = f"""
import torch
from clip_adapter.pipelines.console.entry import extract
torch.set_num_threads({THREADS})
extract()
"""
CLASSES = ("cat", "dog", "eel")
SMALL = {"batch_size": 4, "workers": 2}


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """As in the processes that the tests start: with other threads rounding differs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def record(path: Path) -> dict[str, Any]:
    with FeatureCache(path) as cache:
        return cache.dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 + 9 + 15 images, one of them in train and in test, one of train and one of val damaged."""
    root = tmp_path_factory.mktemp("photographs")
    make_folder(root, {"train": 9, "val": 3, "test": 5}, CLASSES)
    for path in (root / "train" / "dog" / "03.png", root / "val" / "cat" / "00.png"):
        path.write_bytes(path.read_bytes()[:150])
    (root / "test" / "eel" / "01.png").write_bytes((root / "train/cat/02.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(folder, tmp_path_factory.mktemp("whole") / "features.h5")


def run(folder: Path, out: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"on_error": "skip", "views": 2, **SMALL, **options}
    return extract(
        ExtractConfig(dataset=f"folder:{folder}", out=out, **values), Terminal("extract")
    )


def arguments(folder: Path, out: Path) -> list[str]:
    return [
        "--dataset", f"folder:{folder}", "--out", str(out), "--on-error", "skip", "--views", "2",
        "--batch-size", "4", "--workers", "2",
    ]  # fmt: skip


def test_skipped_images_and_images_in_two_splits_are_listed(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(folder, tmp_path / "again.h5")
    output = capsys.readouterr()
    size = f"{out.stat().st_size / 1024:.1f} KiB"
    assert output.out.startswith(
        f"{out}: 26 train, 8 val, 15 test images, 3 classes, {size}\n"
        "2 images skipped (1 train, 1 val), the first: train/dog/03.png cannot be decoded: "
    )
    assert "\n49 images in " in output.out
    found = "warning: found 1 image in more than one split (train/train/cat/02.png is test/"
    assert output.err.startswith(found)
    assert output.err.count("\n") == 1
    with h5py.File(whole) as file:
        assert file["images/train/features"].shape == (3, 26, 128)
        assert file["images/val/features"].shape == (1, 8, 128)
        assert file["images/train/skipped"].asstr()[...].tolist() == ["train/dog/03.png"]
        assert file["images/val/skipped"].asstr()[...].tolist() == ["val/cat/00.png"]
        assert file["images/train/skipped_labels"][...].tolist() == [1]
        assert file["images/val/skipped_labels"][...].tolist() == [0]
        assert not {"skipped", "skipped_labels"} & set(file["images/test"])
    assert record(whole)["in_several_splits"] == {
        "images": 1,
        "examples": [["train/train/cat/02.png", "test/test/eel/01.png"]],
    }


def test_classes_that_skipping_emptied_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"train": 2, "val": 1, "test": 1}, CLASSES)
    for name in ("train/cat/00", "train/eel/00", "train/eel/01", "test/cat/00", "test/dog/00"):
        (root / f"{name}.png").write_bytes(b"nothing")
    warning = (
        "warning: skipping left no train image of 'eel' and no test image of 'cat', 'dog'; "
        "repair some or leave the class out everywhere.\n"
    )
    run(root, tmp_path / "whole.h5")
    assert capsys.readouterr().err == warning
    parts = tuple(run(root, tmp_path / f"{i}.h5", shard=f"{i}/2", batch_size=1) for i in (1, 2))
    assert capsys.readouterr().err == ""  # each part misses classes that the other may have
    out = merge(MergeConfig(out=tmp_path / "features.h5", parts=parts))
    printed = capsys.readouterr()
    assert printed.err == warning
    assert printed.out.startswith(
        f"{out} (joined from 2 parts): 3 train, 3 val, 1 test images, 3 classes, "
    )
    assert "5 images skipped (3 train, 2 test), the first: train/cat/00.png\n" in printed.out


def test_a_bad_image_stops_the_run_which_then_goes_on(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features.h5"
    broken = "^2 images cannot be used; repair or remove them, or use --on-error skip"
    with pytest.raises(UserError, match=broken) as refused:
        run(folder, out, on_error="fail")
    named = [note.partition(" cannot be decoded: ")[0] for note in refused.value.__notes__]
    assert named == ["train/dog/03.png", "val/cat/00.png"]
    assert staged(out) == 1 + 12 // 4  # the text and the batches before it are kept
    run(folder, out)
    assert datasets(out) == datasets(whole)


def staged(out: Path) -> int:
    """How many batches are staged."""
    return len(list(out.with_name(f"{out.name}.partial").glob("*.batch")))


def test_killed_or_interrupted_anywhere_it_ends_with_the_same_bytes(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(5)
    out = tmp_path / "features.h5"
    said: list[str] = []
    for batches, stop in ((rng.randrange(2, 8), signal.SIGKILL), (12, signal.SIGINT)):
        command = ["python", "-c", WITH_THREADS, *arguments(folder, out)]
        child = processes.start(command, tmp_path, err=tmp_path / "err")
        try:
            while staged(out) < batches:
                assert child.exitcode is None, "it ended before it was killed"
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.01)
            assert child.pid
            os.kill(child.pid, stop)
            child.join(300)
        finally:
            child.kill()
        lines = (tmp_path / "err").read_text().splitlines()
        said += [line for line in lines if not line.startswith("warning: found 1 image in")]
        assert child.exitcode == (130 if stop == signal.SIGINT else -stop)
        assert not out.exists()
    goes_on = r"extract: goes on from image \d+ of 51, where an earlier run stopped"
    assert re.fullmatch(goes_on, said[0])
    kept = "what is encoded is kept, and the same command goes on from there"
    assert said[1:] == [f"extract: interrupted; {kept}"]
    run(folder, out)
    printed = capsys.readouterr()
    assert re.match(goes_on, printed.err)
    assert "26 train, 8 val, 15 test images" in printed.out
    assert "2 images skipped (1 train, 1 val), the first: train/dog/03.png\n" in printed.out
    assert datasets(out) == datasets(whole)


def test_text_goes_on_behind_its_last_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = local_encoding.encode_classes
    starts: list[int] = []

    def stopping(*arguments: Any, start: int, **how: Any) -> Iterator[Any]:
        starts.append(start)
        for number, batch in enumerate(encode(*arguments, start=start, **how)):
            if len(starts) == number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(local_encoding, "encode_classes", stopping)
    out, templates = tmp_path / "features.h5", ("a {}", "the {}", "my {}")
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, templates=templates)
    run(folder, out, templates=templates)
    fresh = run(folder, tmp_path / "fresh.h5", templates=templates)
    assert starts == [0, 1, 0]
    assert datasets(out) == datasets(fresh)


@pytest.mark.parametrize("where", ["open_dataset", "encode_images", "in_several_splits"])
def test_an_interruption_promises_what_is_true(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:  # fmt: skip
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def said(out: Path, **options: Any) -> tuple[object, ...]:
        with pytest.raises(KeyboardInterrupt) as interruption:
            run(folder, out, **options)
        return interruption.value.args

    out = tmp_path / "features.h5"
    with pytest.raises(UserError):
        run(folder, out, on_error="fail")
    capsys.readouterr()
    monkeypatch.setattr(local_encoding if where == "encode_images" else job, where, interrupt)
    assert said(out) == ("what is encoded is kept, and the same command goes on from there",)
    loaded = where != "open_dataset"
    assert ("goes on from image 12 of 51" in capsys.readouterr().err) is loaded
    assert bool(said(tmp_path / "other.h5")) is loaded
    assert said(out, force=True) == ()
    assert "goes on" not in capsys.readouterr().err


def test_batches_and_workers_change_no_feature(whole: Path, folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "features.h5", batch_size=7, workers=5)
    with FeatureCache(out) as ours, FeatureCache(whole) as wanted:
        for split in ("train", "val", "test"):
            some, other = ours.images(split), wanted.images(split)
            np.testing.assert_allclose(some.features, other.features, atol=1e-5)
            assert some.ids == other.ids
            assert some.labels.tolist() == other.labels.tolist()


def test_other_arguments_do_not_go_on_with_a_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.h5"
    with pytest.raises(UserError):
        run(folder, out, on_error="fail")
    with pytest.raises(UserError, match=r"other arguments \(augment_seed, views differ\)"):
        run(folder, out, views=1, augment_seed=4)
    with pytest.raises(UserError, match=r"other arguments \(precision differ\)"):
        run(folder, out, precision="bf16")


@pytest.mark.parametrize(
    ("first", "then", "differing"),
    [
        ({"shard": "1/2"}, {"shard": "2/2"}, "shard"),
        ({"shard": "1/2"}, {"shard": "1/3"}, "shard"),
        ({"shard": "1/2"}, {}, "shard"),
        ({}, {"shard": "1/2"}, "batch_size, shard"),
        ({"shard": "1/2"}, {"shard": "1/2", "batch_size": 5}, "batch_size"),
    ],
)
def test_another_shard_does_not_go_on_with_a_run(
    folder: Path, tmp_path: Path,
    first: dict[str, Any], then: dict[str, Any], differing: str,
) -> None:  # fmt: skip
    out = tmp_path / "features.h5"
    with pytest.raises(UserError, match="cannot be decoded"):
        run(folder, out, on_error="fail", **first)
    with pytest.raises(UserError, match=rf"other arguments \({differing} differ\); repeat those"):
        run(folder, out, **then)
    run(folder, out, **first)
    (stated,) = datasets(out)["metadata"]
    assert not {"shard", "batch_size"} & stated["arguments"].keys()


def test_what_a_killed_merge_left_is_in_nobodys_way(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = tuple(run(folder, tmp_path / f"{i}.h5", shard=f"{i}/2") for i in (1, 2))
    out = tmp_path / "features.h5"
    (tmp_path / "features.h5.partial").mkdir()
    (tmp_path / "features.h5.partial" / "assembled.h5").write_bytes(b"\x89HDF\r\n\x1a\n half")
    merge(MergeConfig(out=out, parts=ways))
    assert datasets(out) == datasets(whole)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_parts_join_into_the_undivided_cache(
    whole: Path, folder: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        run(folder, tmp_path / f"{index}.h5", shard=f"{index}/{count}")
        for index in range(1, count + 1)
    ]
    with pytest.raises(UserError, match=r"2\.h5 is one part of a cache; join the parts"):
        FeatureCache(parts[1])
    again = capsys.readouterr().out and run(folder, parts[0], shard=f"1/{count}")
    assert again == parts[0]
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"is part 1 of {count} of a cache"):
        run(folder, parts[0], shard=f"2/{count}")
    random.Random(count).shuffle(parts)
    out = merge(MergeConfig(out=tmp_path / "features.h5", parts=tuple(parts)))
    assert "found 1 image in more than one split" in capsys.readouterr().err
    assert datasets(out) == datasets(whole)
    assert record(out) == record(whole)
    run(folder, out)
    assert "nothing to do" in capsys.readouterr().out


def test_images_that_were_skipped_stay_skipped_only_where_that_is_asked_for(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = run(folder, tmp_path / "1.h5", shard="1/2")
    begun = tmp_path / "features.h5"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "in_several_splits", interrupt)
        run(folder, begun)
    for out, count, shard in ((whole, "2 images", None), (part, "1 image", "1/2")):
        words = rf"^An earlier run skipped {count} of {out}; repeat --on-error skip .*--force"
        with pytest.raises(UserError, match=words):
            run(folder, out, on_error="fail", shard=shard)
    with pytest.raises(UserError, match=r"^An earlier run skipped 2 images of"):
        run(folder, begun, on_error="fail")


def test_parts_of_other_runs_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    def part(name: str, **options: Any) -> Path:
        return run(folder, tmp_path / name, **options)

    one, out = part("1.h5", shard="1/2"), tmp_path / "features.h5"
    for other, words in (
        (part("2of3.h5", shard="2/3"), "number of parts differ"),
        (part("other.h5", shard="2/2", augment_seed=1), r"together: augment_seed differ;"),
        (part("big.h5", shard="2/2", batch_size=5), "do not meet in the train split"),
    ):
        with pytest.raises(UserError, match=words):
            merge(MergeConfig(out=out, parts=(one, other)))
        assert not out.exists()
    with pytest.raises(UserError, match="Name the parts"):
        merge(MergeConfig(out=out, parts=()))
    out.write_text("mine")
    with pytest.raises(UserError, match="exists; choose another name"):
        merge(MergeConfig(out=out, parts=(one,)))


def with_threads(count: int, folder: Path, out: Path, **options: Any) -> Path:
    torch.set_num_threads(count)
    try:
        return run(folder, out, **options)
    finally:
        torch.set_num_threads(THREADS)


def test_parts_of_other_threads_are_not_joined(whole: Path, folder: Path, tmp_path: Path) -> None:
    """Up to four cores a pass has one thread; six make three passes of two each."""
    one = run(folder, tmp_path / "1.h5", shard="1/2")
    two = with_threads(6, folder, tmp_path / "2.h5", shard="2/2")
    out = tmp_path / "features.h5"
    with pytest.raises(UserError, match=r"together: threads of a forward pass \(.*\) differ;"):
        merge(MergeConfig(out=out, parts=(one, two)))
    assert not out.exists()
    with_threads(1, folder, two, shard="2/2", force=True)
    merge(MergeConfig(out=out, parts=(one, two)))
    assert datasets(out) == datasets(whole)
    assert "threads" not in record(out)
    assert record(with_threads(6, folder, out, force=True))["threads"] == 2


def test_a_part_goes_on_with_the_threads_that_it_began_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.h5"
    with pytest.raises(UserError, match="cannot be decoded"):
        with_threads(6, folder, out, on_error="fail", shard="1/2")
    with pytest.raises(UserError, match=r"other arguments \(threads differ\)"):
        run(folder, out, shard="1/2")


def test_shards_cover_every_row_once_and_end_with_batches() -> None:
    for total in (0, 1, 4, 27, 100):
        for of in (1, 2, 3, 7, 40):
            shards = [Shard(i + 1, of).rows(total, 4) for i in range(of)]
            assert [row for rows in shards for row in rows] == list(range(total))
            assert all(rows.start % 4 == 0 or not rows for rows in shards)
    assert parse_shard("2/4") == Shard(2, 4)
    for bad in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", ""):
        with pytest.raises(UserError, match=f"--shard {bad} is no part"):
            parse_shard(bad)


def test_torchrun_over_two_nodes_divides_and_joins_by_itself(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    """With the one thread that it gives each of its processes, and texts all the same."""
    out = tmp_path / "features.h5"
    torchrun = "from torch.distributed.run import main; main()"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        host = f"localhost:{free.getsockname()[1]}"
    command = [
        "python", "-c", torchrun, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}", "--rdzv-id=1", "--no-python",
        BIN / "extract", *arguments(folder, out),
    ]  # fmt: skip
    environment = {name: own for name, own in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    with ThreadPoolExecutor() as nodes:
        both = list(nodes.map(lambda _: processes.run(command, tmp_path, environment), range(2)))
    assert [each.returncode for each in both] == [0, 0], [each.stderr for each in both]
    size = f"{out.stat().st_size / 1024:.1f} KiB"
    assert sorted(each.stdout for each in both) == [
        "",
        f"{out} (joined from 2 parts): 26 train, 8 val, 15 test images, 3 classes, {size}\n"
        "2 images skipped (1 train, 1 val), the first: train/dog/03.png\n",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5"]
    assert datasets(out) == datasets(whole)


def test_an_unreadable_file_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "data", {"train": 2, "test": 1}, CLASSES)

    def then_lose_one(*arguments: Any) -> ImageDataset:
        found = open_dataset(*arguments)
        (tmp_path / "data" / "train" / "dog" / "01.png").unlink()
        return found

    monkeypatch.setattr(job, "open_dataset", then_lose_one)
    with pytest.raises(UserError, match=r"dog/01\.png cannot be read: No such file"):
        run(tmp_path / "data", tmp_path / "features.h5", val=0.0)


def test_links_that_lead_nowhere_and_pipes_are_bad_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = make_folder(tmp_path / "data", {"train": 3, "test": 1}, CLASSES) / "train"
    for name, target in (("dog/dead.png", "nowhere"), ("cat/loop.png", "loop.png")):
        (train / name).symlink_to(target)
    os.mkfifo(train / "eel" / "pipe.png")
    (train / "eel" / "loop").symlink_to("loop")
    for name in ("a.jxl", "b.CR2", "c.JXL", "d.txt"):
        (train / "eel" / name).touch()
    out = tmp_path / "features.h5"
    run(tmp_path / "data", out, val=0.0)
    said = capsys.readouterr()
    assert "3 images skipped (3 train)" in said.out
    assert "warning: passed over 3 images of kinds not read: 2 .jxl, 1 .cr2.\n" in said.err
    with h5py.File(out) as file:
        skipped = file["images/train/skipped"].asstr()[...].tolist()
    assert skipped == ["train/cat/loop.png", "train/dog/dead.png", "train/eel/pipe.png"]


def test_a_split_without_a_readable_image(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train": 2, "val": 1, "test": 1}, CLASSES)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="val split has no image that could be read"):
        run(root, tmp_path / "features.h5")


def test_training_draws_views_only_when_asked(whole: Path, digits_cache: Path) -> None:
    from clip_adapter.adapters.registry import find_method
    from clip_adapter.pipelines.fitting.data import open_data
    from clip_adapter.pipelines.fitting.tasks import TaskRows

    method = find_method("taskres")
    rows = TaskRows(2, 1, np.array([9, 2, 5]), np.arange(0))
    with FeatureCache(whole) as cache:
        every = cache.images("train").features
        assert len(every) > 1
        for augment, views in ((False, every[:1]), (True, every)):
            task = open_data(cache, [rows], augment=augment).task(method, rows)
            np.testing.assert_array_equal(task.features, views[:, rows.support])
    with (
        FeatureCache(digits_cache) as cache,
        pytest.raises(UserError, match=r"no augmented views to draw from; .*--views"),
    ):
        open_data(cache, [rows], augment=True)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """The real loop and writer, with an encoder that costs nothing. An image has 3 KB of pixels, 2
    of features and 2 in its name: keeping any of them for all shows as 36 MB and more, keeping none
    as 13 (buffers, and what is freed late)."""
    command = ["python", "-c", GROWING, tmp_path, "4000", "20000"]
    finished = processes.run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    few, many = map(int, finished.stdout.split())
    assert many - few < 22_000  # KiB


GROWING = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from clip_adapter.cache.content import in_several_splits, tally
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.writer import write_cache
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.encoder import Encoder, Stopwatch, encode_images
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.extract.known import Known, KnownRows
from clip_adapter.extract.stage import stage_images

class Free(Encoder):
    def __init__(self):
        self.device, self.dim, self.stored_dtype = torch.device("cpu"), 512, torch.float32
        self.projection = None
        self.preprocess = Preprocess(dict(size=32, mean=(.5,)*3, std=(.5,)*3))
    def images(self, pixels):
        return pixels.flatten(2)[..., :512].float() + 1

class Ids:
    def __init__(self, rows): self.rows = rows
    def __getitem__(self, row): return f"some/folder/of/images/{row:02000d}.jpg"
    def __len__(self): return self.rows

image = Image.new("RGB", (32, 32))
for rows in map(int, sys.argv[2:]):  # in one process: its peak after few is part of that after many
    labels, encoder = np.zeros(rows, np.int32), Free()
    split = Split(Ids(rows), labels, lambda row: image.copy(), "made up")
    train = KnownRows(split, np.zeros(rows, np.uint64), encoder.rows(1), range(rows))
    known = Known({"train": train})
    with StagingFolder(Path(sys.argv[1]) / f"{rows}.h5") as place:
        plan = Plan(np.arange(rows), 128, 1)
        batches = encode_images(encoder, split, plan, Stopwatch())
        for _ in stage_images(batches, train, known, place, Stopwatch()):
            pass
        text = {"features": np.ones((2, 1, 512), np.float32), "class_names": ["a", "b"]}
        text = {f"text/{name}": values for name, values in text.items()}
        content = {**known.content(), **text, "text/templates": ["{}"]}
        in_several_splits(content), tally(content)
        backbone = {"name": "b", "pretrained": "p", "weights_sha256": "0" * 64, "embed_dim": 512,
                    "image_size": 32, "quick_gelu": False}
        dataset = {"name": "d", "source": "s", "splits": {}}
        write_cache(place, content, backbone=backbone, dataset=dataset, logit_scale=1)
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_photographs_differ() -> None:
    """Else the test of equal images above would find more of them."""
    assert len({photograph(seed).tobytes() for seed in range(51)}) == 51
