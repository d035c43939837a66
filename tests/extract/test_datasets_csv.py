"""Tables of images: columns, order, and sentences with line numbers."""

import unicodedata
from pathlib import Path

import pytest

from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from tests.extract.data_set_archives import grey, opened, refused, sizes, write_image

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


def test_rows_keep_their_order_and_labels_are_class_names(tmp_path: Path) -> None:
    data = opened(f"csv:{table(tmp_path, ROWS)}")
    assert data.class_names == ["ant", "zebra"]
    assert list(data.splits["train"].ids) == ["c.jpg", "sub/b.jpg"]
    assert data.splits["train"].labels.tolist() == [1, 0]
    assert [grey(data.splits["train"].read(row)) for row in (0, 1)] == [2, 1]
    assert list(data.splits["val"].ids) == ["a.jpg"]
    assert data.splits["val"].origin == "rows of labels.csv"


def test_paths_start_from_image_root_or_are_absolute(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables", ROWS, images=tmp_path / "images")
    refused(r"lacks 4 of 4 images, .* c.jpg; .*--image-root", f"csv:{path}")
    for last in ("d.jpg", str(tmp_path / "images" / "d.jpg")):
        path.write_text(ROWS.replace("d.jpg", last))
        data = opened(f"csv:{path}", image_root=tmp_path / "images")
        assert grey(data.splits["test"].read(0)) == 3


def test_without_split_column_it_is_divided(tmp_path: Path) -> None:
    lines = ["\ufefflabel,remark,path"]
    for number in range(20):
        write_image(tmp_path / f"{number}.png", number)
        lines.append(f'{number % 2},"a, b",{number}.png')
    path = tmp_path / "spreadsheet.csv"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    data = opened(f"csv:{path}")
    (remark,) = data.remarks
    assert "has 1 column that no one reads: 'remark'; --columns path=NAME" in remark
    assert data.class_names == ["0", "1"]
    assert sizes(data) == {"train": 10, "val": 4, "test": 6}
    train = data.splits["train"]
    assert [f"{grey(train.read(row))}.png" for row in range(10)] == list(train.ids)


@pytest.mark.parametrize(
    ("header", "mark", "columns"),
    [
        ("Path,LABEL,Split", ",", ()),
        (" path , label , split ", ",", ()),
        ("path;label;SPLIT", ";", ()),
        ("path\tlabel\tsplit", "\t", ()),
        ("image,choice,set", ",", ("path=image,label=choice", "split=set")),
        ("Image;Choice;Set", ";", ("path=image,label=choice,split=set",)),
        ("path,a b,split", ",", ("label=a b",)),
    ],
)
def test_columns_by_any_spelling_separator_and_name(
    header: str, mark: str, columns: tuple[str, ...], tmp_path: Path
) -> None:
    ant = "ant" if mark == "," else "ant, big"
    placed = (("a", ant, "Training"), ("c", "zebra", " train "), ("d", "zebra", "dev"))
    rows = [(f"{name}.jpg", *rest) for name, *rest in (*placed, ("sub/b", ant, "TEST"))]
    path = table(tmp_path, "\n".join([header, *(mark.join(row) for row in rows)]))
    options = ExtractConfig(dataset=f"csv:{path}", columns=columns).source_options()
    data = open_dataset(f"csv:{path}", options)
    assert {name: list(split.ids) for name, split in data.splits.items()} == {
        "train": ["a.jpg", "c.jpg"], "val": ["d.jpg"], "test": ["sub/b.jpg"],
    }  # fmt: skip
    assert data.class_names == [ant, "zebra"]
    assert not data.remarks


@pytest.mark.parametrize(
    "columns", ["image", "path", "image=path", "path=", "path=a,path=b", "path=a,b=c,label=", ""]
)
def test_columns_that_say_nothing_are_refused(columns: str) -> None:
    with pytest.raises(UserError, match=r"^--columns .* does not say what columns are called; wri"):
        ExtractConfig(dataset="csv:x", columns=columns).identity()  # type: ignore[arg-type]


def test_columns_belong_to_tables(tmp_path: Path) -> None:
    own = {"path": "picture"}
    refused(r"^--columns is for csv: and hf:, which have columns", "digits", columns=own)
    refused(r"has no column picture in its", f"csv:{table(tmp_path, ROWS)}", columns=own)


def test_labels_in_two_spellings_of_their_accents_are_one_class(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    rows = [
        f"a.jpg,{names[0]},train",
        f"c.jpg,{names[1]},test",
        "d.jpg,b,train",
        "sub/b.jpg,b,test",
    ]
    path = table(tmp_path, "\n".join(["path,label,split", *rows]))
    data = opened(f"csv:{path}", val=0.0)
    assert data.class_names == ["b", "caf\u00e9"]


def test_rows_without_a_label_are_a_split_of_their_own_and_counted(tmp_path: Path) -> None:
    rows = ROWS.replace("a.jpg,ant,Val", "a.jpg,,Val").replace("d.jpg,zebra,test", "d.jpg, ,")
    data = opened(f"csv:{table(tmp_path, rows + './c.jpg,ant,test')}", val=0.0)
    assert data.class_names == ["ant", "zebra"]
    assert sizes(data) == {"train": 2, "test": 1, "unlabelled": 2}
    unlabelled = data.splits["unlabelled"]
    assert list(unlabelled.ids) == ["a.jpg", "d.jpg"]
    assert [grey(unlabelled.read(row)) for row in (0, 1)] == [0, 3]
    (remark,) = data.remarks
    assert "labels.csv has 2 rows without a label, the first of them a.jpg: taken as" in remark


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,class\na.jpg,x\n",
            r"no column path and no column label in its first row \('file', 'cl.*--columns path=",
        ),
        ("", r"is empty; name the columns path and label"),
        ("path,label\n", r"labels.csv has no rows"),
        ("path,label\na.jpg,x\nd.jpg\n", r"line 3: label is empty"),
        ("path,label\na.jpg,\nd.jpg,\n", r"has no label in any row; .*--dataset images:FOLDER"),
        ("path,label,split\na.jpg,x,train\nd.jpg,,fun\n", r"line 3: unknown split 'fun'"),
        ("path,label\n,x\n", r"line 2: path is empty"),
        ("path,label\na.jpg,x\nd.jpg,y\na.jpg,y\n", r"line 4: 'a.jpg' stands in line 2 already"),
        ("path,label,split\na.jpg,x,fun\n", r"line 2: unknown split 'fun'; write train, val or"),
        ("path,label\na.jpg,cat, tabby\n", r"line 2 has 3 fields where the first row names 2; put"),
        ("path,label,Label\na.jpg,x,y\n", r"has the column label twice; keep one"),
        ("path,label,split\na.jpg,x,\n", r"line 2: unknown split ''"),
        ("path,label\ngone.jpg,x\nd.jpg,y\n", r"lacks 1 of 2 images, .* is gone.jpg"),
    ],
)
def test_bad_tables_are_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    refused(message, f"csv:{table(tmp_path, text)}")


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    refused(r"Cannot read .*none.csv: No such file", f"csv:{tmp_path}/none.csv")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"path,label\ncaf\xe9.jpg,x\n")
    refused(r"latin.csv is not UTF-8 text; save it as UTF-8", f"csv:{latin}")
