"""`clip-adapter evaluate`: a saved adapter and zero-shot on caches and folders."""

import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate, main
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter, save_adapter
from clip_adapter.pipelines.scoring.images import images_of_folder
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache

DATA = tiny_data(test=60)
CLASSES = [f"class {n}" for n in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and a run of two methods on it, with zero-shot beside them."""
    folder = tmp_path_factory.mktemp("evaluate")
    cache = write_cache(folder / "features.h5", DATA)
    methods = ("clip-adapter", "tip-adapter")
    config = short(cache, folder / "run", method=methods, baselines=("zero-shot",), select="none")
    fit(config)
    return folder


def adapter_of(place: Path, method: str) -> Path:
    return place / "run" / "adapters" / method / "shots-4-seed-1"


def write_renamed(path: Path, names: list[str], order: list[int], split: str = "test") -> Path:
    """A cache of the test images alone, whose class `n` is DATA's `order[n]`, called `names[n]`."""
    features, labels = DATA.splits["test"]
    place = {old: new for new, old in enumerate(order)}
    kept = np.isin(labels, order)
    own = np.array([place[label] for label in labels[kept].tolist()])
    sister = TinyData({split: (features[:, kept], own)}, DATA.text[order], "sister")
    return write_cache(path, sister, names, ids=[f"={row}.png" for row in np.flatnonzero(kept)])


@pytest.mark.parametrize("method", ["clip-adapter", "tip-adapter"])
def test_it_gives_the_accuracies_of_fit(place: Path, method: str) -> None:
    run = place / "run"
    scores = evaluate(EvaluateConfig(place / "features.h5", adapter_of(place, method)))
    of_fit = read_predictions(run, method, 4, 1)
    assert scores.accuracy == of_fit.accuracy
    assert np.array_equal(scores.predicted, of_fit.predicted)
    zero_shot = read_predictions(run, "zero-shot", 4, 1)
    assert np.array_equal(scores.zero_shot, zero_shot.predicted)
    assert scores.zero_shot_accuracy == zero_shot.accuracy != scores.accuracy


def test_a_cache_for_testing_only_whose_classes_stand_in_another_order(
    place: Path, tmp_path: Path
) -> None:
    whole = evaluate(EvaluateConfig(place / "features.h5", adapter_of(place, "clip-adapter")))
    order = [2, 0, 3, 1]
    cache = write_renamed(tmp_path / "sister.h5", [CLASSES[n] for n in order], order)
    scores = evaluate(EvaluateConfig(cache, adapter_of(place, "clip-adapter")))
    assert np.array_equal(scores.labels, whole.labels)
    assert np.array_equal(scores.predicted, whole.predicted)
    with pytest.raises(UserError, match="no val split, only test"):
        evaluate(EvaluateConfig(cache, adapter_of(place, "clip-adapter"), split="val"))


def test_a_mapping_and_the_classes_that_occur(place: Path, tmp_path: Path) -> None:
    """Two of four classes, by other names: as ImageNet-A has 200 of ImageNet's 1,000."""
    adapter = adapter_of(place, "clip-adapter")
    cache = write_renamed(tmp_path / "sister.h5", ["drei", "eins"], [3, 1])
    with pytest.raises(UserError, match="2 classes that the adapter does not have"):
        evaluate(EvaluateConfig(cache, adapter))
    mapping = tmp_path / "classes.json"
    mapping.write_text(json.dumps({"drei": "class 3", "eins": "class 1"}))
    free = evaluate(EvaluateConfig(cache, adapter, classes=mapping))
    bound = evaluate(EvaluateConfig(cache, adapter, classes=mapping, only_present=True))
    whole = evaluate(EvaluateConfig(place / "features.h5", adapter))
    kept = np.isin(whole.labels, [1, 3])
    assert np.array_equal(free.labels, whole.labels[kept])
    assert np.array_equal(free.predicted, whole.predicted[kept])
    assert set(free.predicted.tolist()) == {0, 1, 2, 3}
    assert bound.candidates.tolist() == [1, 3] == sorted(set(bound.predicted.tolist()))
    stays = np.isin(free.predicted, [1, 3])
    assert np.array_equal(bound.predicted[stays], free.predicted[stays])
    assert bound.accuracy > free.accuracy
    mapping.write_text(json.dumps({"drei": "class 3", "eins": None}))
    left = evaluate(EvaluateConfig(cache, adapter, classes=mapping))
    assert set(left.labels.tolist()) == {3} and len(left.labels) == 60
    # Two classes of the images may be one of the adapter's.
    mapping.write_text(json.dumps({"drei": "class 3", "eins": "class 3"}))
    assert set(evaluate(EvaluateConfig(cache, adapter, classes=mapping)).labels.tolist()) == {3}
    mapping.write_text('\ufeff{"drei": "class 3", "drei": "class 1"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"classes.json is not .* it names 'drei' twice"):
        evaluate(EvaluateConfig(cache, adapter, classes=mapping))


def test_what_is_printed_and_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["=SUM(A1)", *CLASSES[1:]]
    cache = write_renamed(tmp_path / "sister.h5", names, [0, 1, 2, 3])
    adapter = load_adapter(adapter_of(place, "clip-adapter"))
    info = dataclasses.replace(adapter.info, class_names=names)
    save_adapter(tmp_path / "run", dataclasses.replace(adapter, info=info))
    files = ["--confusion", str(tmp_path / "c.csv"), "--predictions", str(tmp_path / "p.csv")]
    with pytest.raises(SystemExit) as ended:
        main(["--adapter", str(tmp_path / "run"), str(cache), *files])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    (warning,) = printed.err.splitlines()  # of both the weights are unknown
    assert "nothing says that" in warning and "the adapter are of one encoder" in warning
    scores = evaluate(EvaluateConfig(cache, tmp_path / "run"))
    right = scores.predicted == scores.labels
    before = scores.zero_shot == scores.labels
    error = np.sqrt(right.mean() * (1 - right.mean()) / 240)
    assert f"adapter     {100 * right.mean():.2f} ± {100 * error:.2f} %" in printed.out
    paired = (right.astype(float) - before).std() / np.sqrt(240)
    gained = f"{100 * (right.mean() - before.mean()):+.2f}"
    assert f"{gained} ± {100 * paired:.2f} points" in printed.out
    rows = [line.split() for line in printed.out.splitlines() if line.strip().startswith("class ")]
    for number, (_, name, images, ours, theirs) in enumerate(rows[1:], 1):
        own = scores.labels == number
        assert (name, images) == (str(number), "60")
        assert (ours, theirs) == tuple(f"{100 * v[own].mean():.1f}" for v in (right, before))
    header, *matrix = csv.reader((tmp_path / "c.csv").open())
    assert header == ["class", "'=SUM(A1)", *CLASSES[1:]] == ["class", *(r[0] for r in matrix)]
    counts = np.array([[int(cell) for cell in row[1:]] for row in matrix])
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (scores.labels, scores.predicted), 1)
    assert np.array_equal(counts, expected)
    header, *lines = csv.reader((tmp_path / "p.csv").open())
    assert header == ["image", "class", "predicted", "probability", "zero_shot", "fitted_on"]
    shown = ["'=SUM(A1)", *CLASSES[1:]]
    assert [line[0] for line in lines] == [f"'={row}.png" for row in range(240)]
    assert [line[2] for line in lines] == [shown[label] for label in scores.predicted]
    assert [line[4] for line in lines] == [shown[label] for label in scores.zero_shot]
    of_fit = read_predictions(place / "run", "clip-adapter", 4, 1)
    np.testing.assert_allclose([float(line[3]) for line in lines], of_fit.confidence, rtol=1e-5)


SEEN = "on which the adapter was fitted or chosen: right answers there are no accuracy"


def run_main(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 0


@pytest.mark.parametrize("same", [True, False], ids=["features", "pixels"])
@pytest.mark.parametrize(("split", "part"), [("train", "support"), ("val", "validation")])
def test_images_that_fitted_or_chose_it_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, part: str, same: bool
) -> None:
    """By their features, or, where another device made those, by their pixels. An adapter of
    before, which does not say what it has seen, is scored on all."""
    cache = write_cache(tmp_path / "features.h5", DATA, digests=not same)
    run = fit(short(cache, tmp_path / "run", alpha=(0.2, 0.6))).run
    taken = json.loads((run / "tasks.json").read_text())[0][part]
    if not same:
        near = {name: (np.float32(1 + 1e-6) * f, y) for name, (f, y) in DATA.splits.items()}
        other = dataclasses.replace(DATA, splits=near)
        cache = write_cache(tmp_path / "other.h5", other, digests=True)
    table = tmp_path / "p.csv"
    run_main("--adapter", run, cache, "--split", split, "--predictions", table)
    assert f"left out 16 images {SEEN}\n" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert sorted(r["image"] for r in rows if r["fitted_on"] == "yes") == sorted(taken)
    right = [row["class"] == row["predicted"] for row in rows if row["fitted_on"] == "no"]
    scores = evaluate(EvaluateConfig(cache, run, split))
    assert (scores.seen, scores.accuracy) == (16, np.mean(right))
    save_adapter(run, dataclasses.replace(load_adapter(run), seen=None))
    scores = evaluate(EvaluateConfig(cache, run, split))
    assert (scores.seen, len(scores.labels)) == (0, len(rows))


def test_after_a_refit_there_is_no_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But on images that came since, and of zero-shot, which saw none."""
    cache = write_cache(tmp_path / "features.h5", DATA)
    run = fit(short(cache, tmp_path / "run", refit=True)).run
    for split, count in (("train", 36), ("val", 24), ("test", 240)):
        sentence = f"all of the {count} images of tiny {split}: right .*; `fit` printed the one of"
        with pytest.raises(UserError, match=sentence):
            evaluate(EvaluateConfig(cache, run, split))
        table = tmp_path / f"{split}.csv"
        run_main("--adapter", run, cache, "--split", split, "--predictions", table)
        assert capsys.readouterr().out == f"left out {count} images {SEEN}\n"
        assert len(table.read_text().splitlines()) == 1 + count
    new, labels = tiny_data(test=20, seed=1).splits["test"]
    old, known = DATA.splits["test"]
    grown = np.concatenate([old, new], axis=1), np.concatenate([known, labels])
    cache = write_cache(tmp_path / "grown.h5", DATA.with_split("test", grown))
    scores = evaluate(EvaluateConfig(cache, run))
    assert scores.seen == 240 and np.array_equal(scores.labels, labels)
    config = FitConfig(cache, tmp_path / "plain", ("zero-shot",), (), shots=4, refit=True)
    assert evaluate(EvaluateConfig(cache, fit(config).run)).seen == 0


def bad_cache(place: Path, tmp_path: Path, **changes: object) -> Path:
    adapter = load_adapter(adapter_of(place, "clip-adapter"))
    info = dataclasses.replace(adapter.info, **changes)
    save_adapter(tmp_path / "other", dataclasses.replace(adapter, info=info))
    return tmp_path / "other"


def test_what_says_how_files_are_encoded_is_not_dropped(place: Path) -> None:
    for given in ({"backbone": "RN50"}, {"on_error": "skip"}, {"also_pretrained": "x"}):
        name = next(iter(given)).replace("_", "-")
        with pytest.raises(UserError, match=f"--{name} is for image files"):
            evaluate(
                EvaluateConfig(place / "features.h5", adapter_of(place, "clip-adapter"), **given)
            )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": {"name": "x", "weights_sha256": "1" * 64}}, "other weights of x"),
        ({"class_names": [*CLASSES[:3], "other"]}, "shows 1 class that the adapter does not have"),
        (
            {"class_names": list("abcd")},
            r"4 classes .*'class 0', 'class 1', 'class 2' and 1 more",
        ),
    ],
)
def test_an_adapter_of_something_else_is_refused(
    place: Path, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate(EvaluateConfig(place / "features.h5", bad_cache(place, tmp_path, **changes)))


def test_features_of_another_width_are_refused(place: Path, tmp_path: Path) -> None:
    wide = write_cache(tmp_path / "wide.h5", tiny_data(dim=20))
    with pytest.raises(UserError, match=r"features 16 wide, those of .*wide\.h5 are 20 wide"):
        evaluate(EvaluateConfig(wide, adapter_of(place, "clip-adapter")))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.h5"], "nowhere.h5 does not exist"),
        (["features.h5", "--confusion", "features.h5"], "name that ends in .csv"),
        (["features.h5", "--predictions", "nowhere/p.csv"], "cannot be written"),
        (
            ["features.h5", "--confusion", "old.csv"],
            "old.csv exists; choose another name, or --force",
        ),
        (
            ["features.h5", "--features", "old.npz"],
            "old.npz exists; choose another name, or --force",
        ),
        (["features.h5", "--classes", "nowhere.json"], "Cannot read nowhere.json: No such file"),
        (["features.h5", "--classes", "list.json"], "is not a JSON file {class of"),
        (["features.h5", "--classes", "deep.json"], "is not JSON: it is nested too deep"),
        (["features.h5", "--classes", "strange.json"], "names 'x', which tiny test does not have"),
        (["features.h5", "--classes", "wrong.json"], "names 'x', which the adapter does not"),
        (["features.h5", "--classes", "none.json"], "No image of tiny test is left to score"),
        (["features.h5", "--split", "dev"], "--split: invalid choice"),
        (["features.h5", "--confusion", "c.csv", "--predictions", "./c.csv"], "both name c.csv"),
        (["features.h5", "--batch-size", "0"], "must be at least 1"),
        (["features.h5", "--workers", str(10**30)], "--workers must be at least 1 and at most"),
        (["two.npy"], "two.npy is a NumPy array, not a feature cache; `extract` makes one"),
        (["features.h5", "--method", "nowhere:METHOD"], "cannot be imported"),
        (["list.json"], "cannot be read as HDF5"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    Path("list.json").write_text("[1]")
    for name in ("old.csv", "old.npz"):
        Path(name).touch()
    Path("deep.json").write_text("[" * 100_000)
    Path("strange.json").write_text('{"x": "class 1"}')
    Path("wrong.json").write_text('{"class 1": "x"}')
    Path("none.json").write_text(json.dumps(dict.fromkeys(CLASSES)))
    np.save("two.npy", np.zeros(2))
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["--adapter", str(adapter_of(place, "clip-adapter")), *arguments])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert sentence in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_refusal_on_the_way_leaves_no_file(place: Path, tmp_path: Path) -> None:
    """The images' chunk is damaged: what was written until then goes."""
    cache = tmp_path / "cut.h5"
    content = bytearray((place / "features.h5").read_bytes())
    import h5py

    with h5py.File(place / "features.h5") as file:
        chunk = file["images/test/features"].id.get_chunk_info(0)
    content[chunk.byte_offset] ^= 1
    cache.write_bytes(content)
    config = EvaluateConfig(
        cache, adapter_of(place, "clip-adapter"), predictions=tmp_path / "p.csv"
    )
    with pytest.raises(UserError):
        evaluate(config)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.h5"]


def test_images_of_a_folder_are_encoded_on_the_way(
    tmp_path: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    digits: object,
    flax_logits: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = saved_adapters["image-fixed"]
    save_adapter(tmp_path / "run", adapter)
    folder = tmp_path / "images"
    for index, picture in enumerate(digits.pictures[40:80], 40):
        own = folder / adapter.info.class_names[digits.labels[index]]
        own.mkdir(parents=True, exist_ok=True)
        picture.save(own / f"{index}.png")
    config = EvaluateConfig(folder, tmp_path / "run", batch_size=16, predictions=tmp_path / "p.csv")
    scores = evaluate(config)
    order = [int(Path(row["image"]).stem) for row in csv.DictReader((tmp_path / "p.csv").open())]
    assert sorted(order) == list(range(40, 80))
    expected = flax_logits(adapter, digits.features[order])
    assert np.array_equal(scores.predicted, expected.argmax(axis=1))
    assert np.array_equal(scores.labels, digits.labels[order])
    plain = digits.features[order] @ digits.weights.T
    assert np.array_equal(scores.zero_shot, plain.argmax(axis=1))
    how = EvaluateConfig(folder, tmp_path / "run", batch_size=8, workers=1, device="cpu")
    first = next(images_of_folder(folder, "test", adapter, how, Listener()).blocks())
    knowing = dataclasses.replace(adapter, seen=first.digests)
    save_adapter(tmp_path / "knowing", knowing)
    scores = evaluate(EvaluateConfig(folder, tmp_path / "knowing", batch_size=16))
    assert (scores.seen, len(scores.labels)) == (8, 32)
    # In folders for splits, the one that is asked for.
    (tmp_path / "splits").mkdir()
    folder.rename(tmp_path / "splits" / "val")
    assert len(evaluate(EvaluateConfig(tmp_path / "splits", tmp_path / "run", "val")).labels) == 40
    with pytest.raises(UserError, match="has no test folder, only val"):
        evaluate(EvaluateConfig(tmp_path / "splits", tmp_path / "run"))
    broken = next((tmp_path / "splits" / "val").rglob("*.png"))
    broken.write_bytes(b"no image")
    digits.pictures[0].save(tmp_path / "splits" / "loose.png")
    arguments = ["--adapter", str(tmp_path / "run"), str(tmp_path / "splits"), "--split", "val"]
    for more, code in (([], 2), (["--on-error", "skip"], 1)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == code
    said = capsys.readouterr().err
    assert "1 image cannot be decoded and are left out" in said
    assert "left out 1 image beside the class folders" in said


def test_a_folder_needs_the_adapters_backbone(tmp_path: Path, place: Path, digits: object) -> None:
    for number in range(2):
        (tmp_path / "images" / f"class {number}").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"class {number}" / "1.png")
    adapter = adapter_of(place, "clip-adapter")
    with pytest.raises(UserError, match="no model and tag of open_clip's; name the backbone"):
        evaluate(EvaluateConfig(tmp_path / "images", adapter))
    with pytest.raises(UserError, match="other weights of tiny-clip"):
        evaluate(EvaluateConfig(tmp_path / "images", adapter, backbone="glyph-clip"))


def test_features_are_those_that_the_logits_compare_with_the_classes(
    place: Path, tmp_path: Path
) -> None:
    """Their cosines with the classifier give the predictions; and by the paper's formula."""
    adapter = load_adapter(adapter_of(place, "clip-adapter"))
    path = tmp_path / "features.npz"
    cache = write_renamed(tmp_path / "sister.h5", ["class 3", "class 1"], [3, 1])
    scores = evaluate(EvaluateConfig(cache, adapter_of(place, "clip-adapter"), features=path))
    with np.load(path, allow_pickle=False) as found:
        ids, labels, features = found["ids"], found["labels"], found["features"]
        assert found["class_names"].tolist() == CLASSES
    stored, own = DATA.splits["test"]
    rows = np.flatnonzero(np.isin(own, [1, 3]))
    assert ids.tolist() == [f"={row}.png" for row in rows]
    assert np.array_equal(labels, own[rows])
    assert features.dtype == np.float32
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.array_equal((unit @ adapter.weights.T).argmax(axis=1), scores.predicted)
    inputs = stored[0, rows].astype(np.float64)
    names = [f"image/bottleneck/{name}/kernel" for name in ("down", "up")]
    down, up = (adapter.arrays[name].astype(np.float64) for name in names)
    ratio = adapter.info.setting["alpha"]
    bottleneck = np.maximum(np.maximum(inputs @ down, 0) @ up, 0)
    assert np.allclose(features, ratio * bottleneck + (1 - ratio) * inputs, atol=1e-5)


def test_features_of_a_method_that_moves_none(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    data, adapter = place / "features.h5", adapter_of(place, "tip-adapter")
    with pytest.raises(UserError, match=r"tip-adapter moves no image features.* clip-adapter"):
        evaluate(EvaluateConfig(data, adapter, features=path))
    with pytest.raises(UserError, match=r"written as NPZ; give it a name that ends in \.npz"):
        evaluate(EvaluateConfig(data, adapter, features=tmp_path / "features.csv"))
    assert list(tmp_path.iterdir()) == []
