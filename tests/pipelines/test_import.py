"""Features that were made elsewhere become the cache that `extract` would have made of them."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.export import ExportConfig, export
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.import_file import ImportConfig, import_features
from clip_adapter.pipelines.commands.inspect_file import InspectConfig, inspect
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.deciding import feature_table
from tests.pipelines.tiny_cache import DIM, short, tiny_data, write_cache

NAMES = ["ant", "bee", "cat", "dog"]
DATA = tiny_data(train=(12, 12, 12, 12), val=1, test=1)
ROWS, LABELS = DATA.splits["train"][0][0], DATA.splits["train"][1]
PATHS = [f"photos/{row}.jpg" for row in range(len(ROWS))]


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def result(self, text: str) -> None:
        self.said.append(text)

    note = warn = result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the texts of the classes, their names, and a table of labels."""
    monkeypatch.chdir(tmp_path)
    np.save("text.npy", DATA.text)
    Path("names.txt").write_text("\n".join(NAMES))
    write_csv(Path("t.csv"), ["label"], [[NAMES[label]] for label in LABELS])
    return tmp_path


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def made(features: str, **options: Any) -> FeatureCache:
    """The cache of these features, with the texts of `place`."""
    stated = {"text": Path("text.npy"), "classes": Path("names.txt"), "logit_scale": 20.0}
    config = ImportConfig(Path(features), Path("f.h5"), **(stated | options))
    return FeatureCache(import_features(config, Listener()))


def write_npz(path: str) -> None:
    np.savez(path, features=ROWS, labels=np.array(NAMES)[LABELS], path=np.array(PATHS))


def write_parquet(path: str, **columns: Any) -> None:
    lists = pa.array(list(ROWS), pa.list_(pa.float32()))
    parquet.write_table(pa.table({"features": lists, "path": PATHS, **columns}), path)


WRITERS: dict[str, Callable[[str], None]] = {
    "f.npy": lambda path: np.save(path, ROWS),
    "f.npz": write_npz,
    "f.safetensors": lambda path: save_file({"emb": torch.from_numpy(ROWS)}, path),
    "f.pt": lambda path: torch.save(torch.from_numpy(ROWS), path),
    "g.pt": lambda path: torch.save(
        {"image_features": torch.from_numpy(ROWS), "other": torch.zeros(3, 3), "path": PATHS}, path
    ),
    "f.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(place: Path, name: str) -> None:
    WRITERS[name](name)
    labels = None if name.endswith("npz") else Path("t.csv")
    with made(name, labels=labels) as cache:
        images = cache.images("train")
        assert np.array_equal(images.features[0], ROWS)
        assert np.array_equal(images.labels, LABELS)
        assert cache.class_names == NAMES
        assert np.array_equal(cache.text_features(), DATA.text)
        known = name in ("f.npz", "g.pt", "f.parquet")
        assert images.ids == (PATHS if known else [str(row) for row in range(len(ROWS))])
        assert (cache.splits, cache.logit_scale) == (("train",), 20.0)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_of_every_length(place: Path, kind: Callable[..., Any]) -> None:
    """Polars writes large lists."""
    lists = pa.array(list(ROWS), kind(pa.float32()))
    parquet.write_table(pa.table({"embedding": lists}), "f.parquet")
    with made("f.parquet", labels=Path("t.csv")) as cache:
        assert np.array_equal(cache.images("train").features[0], ROWS)


def test_names_in_other_forms_name_the_same_images(place: Path) -> None:
    """Of macOS's decomposed file names, of bytes, and of a table that knows more images."""
    names = [f"caf\u00e9 {row}.jpg" for row in range(len(ROWS))]
    apart = [normalize("NFD", name) for name in names]
    np.savez("f.npz", features=ROWS, path=[name.encode() for name in apart])
    rows = [[name, NAMES[label]] for name, label in zip(names, LABELS, strict=True)]
    write_csv(Path("t.csv"), ["path", "label"], [["no.jpg", "ant"], *reversed(rows), ["0", "bee"]])
    heard = Heard()
    stated = {"text": Path("text.npy"), "classes": Path("names.txt"), "logit_scale": 20.0}
    config = ImportConfig(Path("f.npz"), Path("f.h5"), Path("t.csv"), **stated)
    with FeatureCache(import_features(config, heard)) as cache:
        assert cache.ids("train") == names and np.array_equal(cache.labels("train"), LABELS)
    assert "t.csv: 2 rows are left out, which name no image of f.npz" in heard.said


def test_labels_may_be_bytes(place: Path) -> None:
    np.savez("f.npz", features=ROWS, labels=np.array(NAMES, "S")[LABELS])
    with made("f.npz") as cache:
        assert np.array_equal(cache.labels("train"), LABELS) and cache.class_names == NAMES


def retrieval_folder(shards: int, *, metadata: bool = True) -> None:
    """As clip-retrieval writes it: of eleven files `img_emb_10` comes last, not third."""
    for folder in ("img/img_emb", "img/metadata"):
        Path(folder).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(ROWS)), shards)):
        np.save(f"img/img_emb/img_emb_{number}.npy", ROWS[rows].astype(np.float16))
        if metadata:
            table = pa.table(
                {"image_path": [PATHS[row] for row in rows], "caption": ["?"] * len(rows)}
            )
            parquet.write_table(table, f"img/metadata/metadata_{number}.parquet")


def test_clip_retrievals_folder_with_labels_by_path_and_splits(place: Path) -> None:
    retrieval_folder(11)
    order = np.random.default_rng(0).permutation(len(ROWS))
    split = [("Training", "valid", "testing")[row % 3] for row in range(len(ROWS))]
    own = [[PATHS[row], NAMES[LABELS[row]], split[row]] for row in order]
    nobody = [row for row in range(len(ROWS)) if row % 7 == 0]  # some empty, some not there
    own = [[path, "" if path == PATHS[0] else name, s] for path, name, s in own]
    own = [row for row in own if row[0] == PATHS[0] or int(row[0][7:-4]) not in nobody]
    write_csv(Path("t.csv"), ["path", "label", "split"], own)
    with made("img", labels=Path("t.csv")) as cache:
        assert cache.all_splits == ("train", "val", "test", "unlabelled")
        unlabelled = [PATHS[row] for row in nobody]
        assert cache.ids("unlabelled") == unlabelled
        for number, name in enumerate(("train", "val", "test")):
            rows = [r for r in range(len(ROWS)) if r % 3 == number and r not in nobody]
            images = cache.images(name)
            assert images.ids == [PATHS[row] for row in rows]
            assert images.labels.tolist() == LABELS[rows].tolist()
            assert np.array_equal(images.features[0], ROWS[rows].astype(np.float16))
        assert cache.dtype_of("images/train/features") == np.float16
        assert cache.dataset["splits"]["test"] == "column split"


def test_labels_may_be_numbers_of_the_classes_and_come_as_parquet(place: Path) -> None:
    """pandas makes floating-point numbers of whole ones where some are missing."""
    retrieval_folder(2, metadata=False)
    numbers = [None if row == 5 else float(label) for row, label in enumerate(LABELS)]
    parquet.write_table(pa.table({"class": pa.array(numbers, pa.float64())}), "t.parquet")
    with made("img", labels=Path("t.parquet")) as cache:
        assert cache.labels("train").tolist() == np.delete(LABELS, 5).tolist()
        assert cache.ids("unlabelled") == ["5"]


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "float16"])
def test_types(place: Path, kind: str) -> None:
    tensor = torch.from_numpy(ROWS).to(getattr(torch, kind))
    save_file({"features": tensor}, "f.safetensors")
    with made("f.safetensors", labels=Path("t.csv")) as cache:
        assert cache.dtype_of("images/train/features") == (
            np.float16 if kind == "float16" else np.float32
        )
        assert np.array_equal(cache.images("train").features[0], tensor.float().numpy())


def test_a_table_of_ours_comes_back_as_the_same_cache(
    digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written and read in blocks; classes keep their order; the model's own texts and
    weights are found again, so that images can be classified."""
    monkeypatch.setattr(feature_table, "BLOCK_ROWS", 100)
    table, out = tmp_path / "photos.parquet", tmp_path / "f.h5"
    assert export(ExportConfig((digits_cache,), table)) == 0
    assert parquet.ParquetFile(table).num_row_groups == 8 + 2 + 9
    frame = parquet.read_table(table).to_pandas()
    assert frame.columns.tolist() == ["id", "label", "split", "features"]
    heard = Heard()
    template = "a photo of the digit {}."
    config = ImportConfig(table, out, backbone="glyph-clip", templates=(template,))
    import_features(config, heard)
    with FeatureCache(digits_cache) as before, FeatureCache(out) as after:
        assert after.content_sha256 == before.content_sha256
        assert after.backbone == {n: before.backbone[n] for n in after.backbone}
        assert (after.preprocess, after.logit_scale) == (before.preprocess, before.logit_scale)
        labels = np.concatenate([before.labels(split) for split in before.splits])
        assert frame["label"].tolist() == [before.class_names[label] for label in labels]
        weights = before.text_features()[:, 0]
        rows = np.concatenate([before.images(split).features[0] for split in before.splits])
    assert np.array_equal(np.stack(frame["features"].to_list()), rows)
    right = np.mean(
        (rows @ (weights / np.linalg.norm(weights, axis=1)[:, None]).T).argmax(1) == labels
    )
    assert heard.said[0].startswith(f"{table}: 1,797 rows of 128 numbers, float32, of lengths from")
    assert heard.said[1].startswith(f"{out}: 719 train, 179 val, 899 test images, 10 classes")
    assert heard.said[2].startswith(f"zero-shot: {100 * right:.1f} % of 1,797 labelled images")
    assert len(heard.said) == 3


def test_a_cache_of_unknown_weights_is_fitted_on_and_takes_no_images(place: Path) -> None:
    np.save("f.npy", ROWS)
    rows = [[NAMES[label], ("train", "val", "test")[row % 3]] for row, label in enumerate(LABELS)]
    write_csv(Path("t.csv"), ["label", "split"], rows)
    made("f.npy", labels=Path("t.csv")).close()
    facts = dict(inspect(InspectConfig(Path("f.h5"))))
    assert "weights_sha256 " + "0" * 64 in facts["backbone"]
    result = fit(replace(short(Path("f.h5"), Path("run")), shots=2))
    (row,) = [row for row in result.results if row.method == "clip-adapter"]
    scores = evaluate(EvaluateConfig(Path("f.h5"), Path("run")))
    assert scores.accuracy == row.test_accuracy
    Image.new("RGB", (32, 32)).save("photo.png")
    with pytest.raises(UserError, match=r"'unknown' with the weights 'f\.npy', which is no model"):
        predict(PredictConfig((Path("photo.png"),), Path("run")))
    with pytest.raises(UserError, match="fitted for other weights of unknown"):
        predict(PredictConfig((Path("photo.png"),), Path("run"), backbone="glyph-clip"))


def test_what_is_found_is_said(place: Path) -> None:
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    np.save("f.npy", unit)
    write_csv(Path("t.csv"), ["label"], [[NAMES[(label + 1) % 4]] for label in LABELS])
    heard = Heard()
    stated = (Path("names.txt"), None, None, (), Path("text.npy"), 20.0)
    import_features(ImportConfig(Path("f.npy"), Path("f.h5"), Path("t.csv"), *stated), heard)
    assert heard.said[0].startswith(f"f.npy: 48 rows of {DIM} numbers, float32, all of length 1:")
    assert "no better than by guessing" in heard.said[-1]


def damaged(name: str, value: float) -> None:
    rows = ROWS.copy()
    rows[7] = value
    np.save(name, rows)


def pickled(_: str) -> None:
    np.save("f.npy", np.array([{"a": 1}, ROWS], object), allow_pickle=True)


def code(_: str) -> None:
    torch.save({"features": torch.from_numpy(ROWS), "more": Path("x")}, "f.pt")


def unequal(_: str) -> None:
    retrieval_folder(2)
    np.save("img/img_emb/img_emb_1.npy", ROWS[:3])


def ragged(_: str) -> None:
    parquet.write_table(pa.table({"features": [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]]}), "f.parquet")


def labelled(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Callable[[str], None]:
    def write(_: str) -> None:
        write_parquet("f.parquet")
        write_csv(Path("t.csv"), header, rows)

    return write


PAIR = ["path", "label"]
ALL = [[path, "ant"] for path in PATHS]
REFUSED: dict[str, tuple[Callable[[str], None], str, str]] = {
    "NaN": (
        lambda _: damaged("f.npy", np.nan),
        "f.npy",
        "of '7' are not finite numbers; leave it out",
    ),
    "zero": (lambda _: damaged("f.npy", 0), "f.npy", "of '7' are zero; leave it out"),
    "pickle": (pickled, "f.npy", "holds Python objects, which are not run"),
    "code": (code, "f.pt", "holds Python objects, which are not run"),
    "narrow": (
        lambda _: np.save("f.npy", ROWS[:, :9]),
        "f.npy",
        "16 wide; there are 4",
    ),
    "one axis": (
        lambda _: np.save("f.npy", ROWS[0]),
        "f.npy",
        "no table of floating",
    ),
    "whole": (lambda _: np.save("f.npy", LABELS[:, None]), "f.npy", "no table of floating"),
    "two": (lambda _: np.savez("f.npz", a=ROWS, b=ROWS), "f.npz", r"holds 'a \(48, 16\)', 'b"),
    "empty": (lambda _: np.save("f.npy", ROWS[:0]), "f.npy", "holds no rows"),
    "cut off": (
        lambda _: Path("f.npy").write_bytes(b"\x93NUMPY\x01"),
        "f.npy",
        "cannot be read as",
    ),
    "text": (lambda _: Path("f.safetensors").write_text("{"), "f.safetensors", "cannot be read as"),
    "junk": (
        lambda _: Path("f.pt").write_text("hello, junk"),
        "f.pt",
        "it is damaged, or a file of",
    ),
    "elephant": (lambda _: Path("f.pt").write_text("elephant"), "f.pt", "it is damaged, or a file"),
    "nothing": (lambda _: None, "f.npy", "f.npy does not exist"),
    "kind": (lambda _: Path("f.csv").write_text("1"), "f.csv", "is none of what is read: .npy"),
    "bare folder": (lambda _: Path("img").mkdir(), "img", "0 file"),
    "unequal": (unequal, "img", r"metadata_1.parquet has not as many rows as .*img_emb_1.npy, 3"),
    "ragged": (ragged, "f.parquet", "'features' are of different lengths"),
    "fewer labels": (
        lambda _: np.save("f.npy", ROWS[1:]),
        "f.npy",
        "48 rows and f.npy 47",
    ),
    "unknown label": (
        labelled(PAIR, [*ALL[1:], [PATHS[0], "emu"]]),
        "f.parquet",
        "'emu'",
    ),
    "number": (
        labelled(PAIR, [*ALL[1:], [PATHS[0], 4]]),
        "f.parquet",
        "'4' are",
    ),
    "twice": (labelled(PAIR, [*ALL, ALL[3]]), "f.parquet", "names an image twice"),
    "others": (
        labelled(PAIR, [["a", "ant"]]),
        "f.parquet",
        "none of f.parquet's",
    ),
    "no label": (labelled(["path"], ALL), "f.parquet", "no column label"),
    "split": (
        labelled(["path", "label", "split"], [[*row, "holdout"] for row in ALL]),
        "f.parquet",
        "column split says 'holdout'; write train",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(place: Path, case: str) -> None:
    write, name, sentence = REFUSED[case]
    write(name)
    with pytest.raises(UserError, match=sentence):
        made(name, labels=Path("t.csv"))
    assert not [path for path in place.iterdir() if path.name.startswith("f.h5")]


TEXT = {"text": Path("text.npy"), "classes": Path("names.txt")}
BY_BACKBONE = {"backbone": "glyph-clip"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Say once what the classes' texts are"),
        (TEXT | BY_BACKBONE, "Say once what the classes' texts are"),
        (TEXT, "give all three"),
        (TEXT | {"logit_scale": 9.0, "pretrained": "x"}, "are of a --backbone"),
        (TEXT | {"logit_scale": float("nan")}, "--logit-scale nan is no multiplier from 1e-06"),
        (TEXT | {"logit_scale": 0.0}, "--logit-scale 0 is no multiplier"),
        (BY_BACKBONE, "No image has a label; say with --classes"),
        (BY_BACKBONE | {"classes": Path("names.txt")}, "128 wide; .* and features 16 wide"),
    ],
)
def test_what_does_not_go_together(place: Path, options: dict[str, Any], sentence: str) -> None:
    np.save("f.npy", ROWS)
    with pytest.raises(UserError, match=sentence):
        import_features(ImportConfig(Path("f.npy"), Path("f.h5"), **options), Listener())


def test_numbers_alone_name_no_classes(place: Path) -> None:
    np.savez("f.npz", features=ROWS, labels=LABELS)
    config = ImportConfig(Path("f.npz"), Path("f.h5"), backbone="glyph-clip")
    with pytest.raises(UserError, match="The labels are numbers; say with --classes FILE"):
        import_features(config, Listener())


def test_groups_come_along(place: Path) -> None:
    """A burst stays together wherever its images went."""
    np.save("f.npy", ROWS)
    groups = [f"burst {row // 4}" for row in range(len(ROWS))]
    splits = [("train", "test")[row % 2] for row in range(len(ROWS))]
    rows = [[NAMES[n], *own] for n, *own in zip(LABELS, splits, groups, strict=True)]
    write_csv(Path("t.csv"), ["label", "split", "group"], rows)
    made("f.npy", labels=Path("t.csv")).close()
    export(ExportConfig((Path("f.h5"),), Path("f.parquet")))
    for features in ("f.npy", "f.parquet"):
        labels = Path("t.csv") if features == "f.npy" else None
        with made(features, labels=labels, force=True) as cache:
            assert cache.groups("train") == groups[::2]
            assert cache.groups("test") == groups[1::2]
    write_csv(Path("t.csv"), ["label", "split", "group"], [*rows[1:], [*rows[0][:2], ""]])
    with pytest.raises(UserError, match="group is empty for some train images; fill it in"):
        made("f.npy", labels=Path("t.csv"), force=True)


def test_groups_of_one_split_alone_go_there_and_back(place: Path) -> None:
    half = {name: (rows[:, :9], labels[:9]) for name, (rows, labels) in DATA.splits.items()}
    bursts = [f"burst {row // 4}" for row in range(len(half["train"][1]))]
    data = replace(DATA, splits={"train": half["train"], "test": half["test"]})
    write_cache(Path("c.h5"), data, NAMES, groups={"train": bursts})
    export(ExportConfig((Path("c.h5"),), Path("f.parquet")))
    with made("f.parquet") as cache:
        assert cache.groups("train") == bursts and cache.groups("test") is None


def test_export_says_what_has_no_place_in_the_table(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = replace(DATA, splits={"train": DATA.splits["train"]})
    two = tiny_data(views=2)
    viewed = replace(two, splits={"train": two.splits["train"]})
    other = {"train": np.ones((1, len(LABELS), 3), np.float32)}
    for data, second, said in (
        (plain, None, ""),
        (viewed, None, "the cache has: augmented views\n"),
        (plain, other, "the cache has: features of the second encoder\n"),
    ):
        write_cache(Path("c.h5"), data, second=second)
        export(ExportConfig((Path("c.h5"),), Path("c.parquet"), force=True))
        told = capsys.readouterr().err
        assert told.endswith(said) and bool(told) is bool(said)
        Path("c.h5").unlink()


def test_what_a_link_names_is_not_written_over(place: Path) -> None:
    Path("victim").write_text("precious")
    Path("c.parquet.new").symlink_to("victim")
    export(ExportConfig((write_cache(Path("c.h5"), DATA, NAMES),), Path("c.parquet")))
    assert Path("victim").read_text() == "precious"
    assert parquet.read_table("c.parquet").num_rows == sum(len(n) for _, n in DATA.splits.values())
    assert not Path("c.parquet.new").is_symlink()


def test_one_class_is_no_question(place: Path) -> None:
    np.savez("f.npz", features=ROWS, labels=np.full(len(ROWS), "ant"))
    config = ImportConfig(Path("f.npz"), Path("f.h5"), backbone="glyph-clip")
    with pytest.raises(UserError, match="There is one class, 'ant'; at least two are needed"):
        import_features(config, Listener())


def test_a_cache_that_is_there_stays(place: Path) -> None:
    write_cache(Path("f.h5"), DATA)
    before = Path("f.h5").read_bytes()
    np.save("f.npy", ROWS)
    with pytest.raises(UserError, match=r"f\.h5 exists; choose another name, or --force"):
        made("f.npy", labels=Path("t.csv"))
    assert Path("f.h5").read_bytes() == before
    with made("f.npy", labels=Path("t.csv"), force=True) as cache:
        assert cache.splits == ("train",)


def test_parquet_needs_its_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet("f.parquet")
    write_cache(Path("c.h5"), DATA)
    monkeypatch.setattr(feature_table, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clip-adapter\[parquet\]'"):
        made("f.parquet", labels=Path("t.csv"))
    with pytest.raises(UserError, match=r"pip install 'clip-adapter\[parquet\]'"):
        export(ExportConfig((Path("c.h5"),), Path("c.parquet")))


def test_a_table_has_rows_without_labels_and_leaves_nothing_half_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("f.npy", ROWS)
    write_csv(
        Path("t.csv"), ["label"], [["" if row < 3 else NAMES[n]] for row, n in enumerate(LABELS)]
    )
    with made("f.npy", labels=Path("t.csv")) as cache:
        assert feature_table.write_table(cache, Path("c.parquet")) == len(ROWS)
    columns = parquet.read_table("c.parquet").to_pydict()
    assert columns["label"][-3:] == [None] * 3
    assert columns["split"][-3:] == ["unlabelled"] * 3
    with made("c.parquet", force=True) as cache:
        assert cache.ids("unlabelled") == ["0", "1", "2"]
        monkeypatch.setattr(cache, "ids", lambda *_: pytest.fail("broken"))
        with pytest.raises(pytest.fail.Exception):
            feature_table.write_table(cache, Path("d.parquet"))
    assert not list(place.glob("d.parquet*"))
