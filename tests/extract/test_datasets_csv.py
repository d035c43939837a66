"""Tables of images: columns, order, and sentences with line numbers."""

from pathlib import Path

import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset, SourceOptions
from tests.extract.data_set_archives import grey, write_image

ROWS = """path,label,split
c.jpg,zebra,train
sub/b.jpg,ant,train
a.jpg,ant,Validation
d.jpg,zebra,test
"""


def table(folder: Path, text: str, *, images: Path | None = None) -> Path:
    for value, name in enumerate(("a.jpg", "sub/b.jpg", "c.jpg", "d.jpg")):
        write_image((images or folder) / name, value)
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def open_table(path: Path, image_root: Path | None = None) -> ImageDataset:
    return open_dataset(f"csv:{path}", SourceOptions(image_root=image_root))


def test_rows_keep_their_order_and_labels_are_class_names(tmp_path: Path) -> None:
    data = open_table(table(tmp_path, ROWS))
    assert data.class_names == ["ant", "zebra"]
    assert list(data.splits["train"].ids) == ["c.jpg", "sub/b.jpg"]
    assert data.splits["train"].labels.tolist() == [1, 0]
    assert [grey(data.splits["train"].read(row)) for row in (0, 1)] == [2, 1]
    assert list(data.splits["val"].ids) == ["a.jpg"]
    assert data.splits["val"].origin == "rows of labels.csv"


def test_paths_start_from_image_root_or_are_absolute(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables", ROWS, images=tmp_path / "images")
    with pytest.raises(UserError, match=r"lacks 4 of 4 images, .* c.jpg; .*--image-root"):
        open_table(path)
    assert grey(open_table(path, tmp_path / "images").splits["test"].read(0)) == 3
    path.write_text(ROWS.replace("d.jpg", str(tmp_path / "images" / "d.jpg")))
    assert grey(open_table(path, tmp_path / "images").splits["test"].read(0)) == 3


def test_without_split_column_it_is_divided(tmp_path: Path) -> None:
    lines = ["\ufefflabel,remark,path"]
    for number in range(20):
        write_image(tmp_path / f"{number}.png", number)
        lines.append(f'{number % 2},"a, b",{number}.png')
    path = tmp_path / "spreadsheet.csv"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    data = open_table(path)
    assert data.class_names == ["0", "1"]
    assert {name: len(split.ids) for name, split in data.splits.items()} == {
        "train": 10,
        "val": 4,
        "test": 6,
    }
    train = data.splits["train"]
    assert [f"{grey(train.read(row))}.png" for row in range(10)] == list(train.ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,class\na.jpg,x\n",
            r"no column path and no column label in its first row \('file', 'cl",
        ),
        ("", r"is empty; name the columns path and label"),
        ("path,label\n", r"labels.csv has no rows"),
        ("path,label\na.jpg,x\nd.jpg\n", r"line 3: label is empty"),
        ("path,label\n,x\n", r"line 2: path is empty"),
        ("path,label\na.jpg,x\nd.jpg,y\na.jpg,y\n", r"line 4: 'a.jpg' stands in line 2 already"),
        ("path,label,split\na.jpg,x,dev\n", r"line 2: unknown split 'dev'; write train, val or"),
        ("path,label,split\na.jpg,x,\n", r"line 2: unknown split ''"),
        ("path,label\ngone.jpg,x\nd.jpg,y\n", r"lacks 1 of 2 images, .* is gone.jpg"),
    ],
)
def test_bad_tables_are_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_table(table(tmp_path, text))


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*none.csv: No such file"):
        open_table(tmp_path / "none.csv")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"path,label\ncaf\xe9.jpg,x\n")
    with pytest.raises(UserError, match=r"latin.csv is not UTF-8 text; save it as UTF-8"):
        open_table(latin)
