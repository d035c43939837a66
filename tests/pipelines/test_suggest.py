"""`clip-adapter suggest`: which images without labels to label next."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache as write_content
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.predict import PredictConfig, predict
from clip_adapter.pipelines.commands.suggest import main
from clip_adapter.pipelines.deciding.suggest import SuggestConfig, suggest
from clip_adapter.pipelines.saved.adapter_file import load_adapter, save_adapter
from tests.cache.small_cache import STATED
from tests.extract.image_folders import make_folder, photograph
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache

DATA = tiny_data()
NEW = tiny_data(train=(40, 40, 40, 40), seed=0).splits["train"][0][0]  # (160, 16)


def backbone(sha256: str = "0" * 64) -> dict[str, object]:
    return {
        "name": "tiny-clip", "pretrained": "nothing", "weights_sha256": sha256, "embed_dim": 16,
        "image_size": 8, "quick_gelu": False,
    }  # fmt: skip


def write_new(
    path: Path,
    rows: np.ndarray = NEW,
    data: TinyData = DATA,
    ending: str = ".png",
    **others: object,
) -> Path:
    """A cache of images without labels alone."""
    content = {
        "text/features": data.text,
        "text/class_names": [f"class {number}" for number in range(data.classes)],
        "text/templates": ["a {}", "the {}"],
        "images/unlabelled/features": rows[None].astype(np.float32),
        "images/unlabelled/ids": [f"{row}{ending}" for row in range(len(rows))],
    }
    stated = {"backbone": backbone(), "dataset": STATED["dataset"], "logit_scale": 20.0}
    write_content(path, content, **stated | {"logit_bias": 0.5} | others)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of labelled images, a run on it, and a cache of images without labels."""
    folder = tmp_path_factory.mktemp("suggest")
    cache = write_cache(folder / "labelled.h5", DATA)
    fit(short(cache, folder / "run", select="none"))
    write_new(folder / "new.h5")
    return folder


def directions(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def wanted(shares: np.ndarray, known: np.ndarray, count: int) -> list[int]:
    """The rule in a loop over everything; nothing here is near-equal."""
    rows, ordered = directions(NEW), np.sort(shares, axis=1)
    doubts, chosen = 1 - (ordered[:, -1] - ordered[:, -2]), list[int]()
    for _ in range(count):
        others = np.concatenate([known, rows[chosen]])
        distances = 1 - (rows @ others.T).max(axis=1) if len(others) else np.ones(len(rows))
        chosen.append(int((doubts * distances).argmax()))
    return chosen


def labelled_rows() -> np.ndarray:
    return np.concatenate([directions(features[0]) for features, _ in DATA.splits.values()])


def config(place: Path, tmp_path: Path, **options: object) -> SuggestConfig:
    made = SuggestConfig(place / "new.h5", out=tmp_path / "to_label.csv", count=12)
    return replace(made, **options)  # type: ignore[arg-type]


def test_a_cold_start_by_the_texts_of_the_cache(place: Path, tmp_path: Path) -> None:
    found = suggest(config(place, tmp_path))
    text = DATA.text / np.linalg.norm(DATA.text, axis=-1, keepdims=True)
    shares = softmax(20 * directions(NEW) @ directions(text.mean(axis=1)).T, axis=1)
    rows = wanted(shares, np.zeros((0, 16)), 12)
    assert found.ids == [f"{row}.png" for row in rows]
    assert found.guesses == [f"class {label}" for label in shares[rows].argmax(axis=1)]
    np.testing.assert_allclose(found.probabilities, shares[rows].max(axis=1), rtol=1e-4)
    assert (found.candidates, found.labelled, found.known) == (160, 0, 0)
    frame = found.to_frame()
    assert list(frame.columns) == ["path", "label", "split", "guess", "probability"]
    assert set(frame["label"]) == {""} and set(frame["split"]) == {"train"}


def test_an_adapter_at_its_temperature_beside_labelled_images(place: Path, tmp_path: Path) -> None:
    adapter = load_adapter(place / "run")
    chosen = config(place, tmp_path, adapter=place / "run", beside=(place / "labelled.h5",))
    found = suggest(chosen)
    temperature = adapter.decisions.temperature if adapter.decisions else 1.0
    shares = softmax(adapter.logits(NEW).astype(np.float64) / temperature, axis=1)
    rows = wanted(shares, labelled_rows(), 12)
    assert found.ids == [f"{row}.png" for row in rows]
    np.testing.assert_allclose(found.probabilities, shares[rows].max(axis=1), rtol=1e-4)
    assert found.labelled == len(labelled_rows())
    if adapter.decisions:  # another temperature would have chosen others
        hot = replace(adapter, decisions=replace(adapter.decisions, temperature=50.0))
        save_adapter(tmp_path / "hot", hot)
        (tmp_path / "to_label.csv").unlink()
        assert suggest(replace(chosen, adapter=tmp_path / "hot")).ids != found.ids


def test_unknown_encoders_are_not_taken_for_one_in_silence(place: Path, tmp_path: Path) -> None:
    class Heard(Listener):
        def __init__(self) -> None:
            self.said: list[str] = []

        def warn(self, sentence: str) -> None:
            self.said.append(sentence)

    for sha256, said in (("0" * 64, 1), ("1" * 64, 0)):
        stated, heard = {"backbone": backbone(sha256)}, Heard()
        caches = [write_new(tmp_path / f"{name}{sha256[:1]}.h5", **stated) for name in "ab"]
        suggest(
            config(
                place, tmp_path, cache=caches[0], beside=caches[1:], out=tmp_path / f"{said}.csv"
            ),
            heard,
        )
        assert len(heard.said) == said
    heard = Heard()
    for path, said in ((place / "labelled.h5", 0), (place / "new.h5", 1)):
        predict(PredictConfig((path,), place / "run"), heard)
        assert len(heard.said) == said
    suggest(config(place, tmp_path, adapter=place / "run"), heard)
    assert len(heard.said) == 2 and heard.said[1] == heard.said[0]
    assert "nothing says that" in heard.said[0] and "of one encoder" in heard.said[0]


def test_an_id_that_is_too_long_for_a_file(place: Path, tmp_path: Path) -> None:
    write_new(tmp_path / "l.h5", ending="." + 300 * "g")
    chosen = SuggestConfig(tmp_path / "l.h5", out=tmp_path / "l.csv", images=tmp_path)
    assert all(path.endswith(300 * "g") for path in suggest(chosen).paths)


def test_near_equal_images_count_once(tmp_path: Path) -> None:
    """Each image five times, a little changed, and some of the labelled ones."""
    copies = np.concatenate([NEW[:20] + 0.002 * seed for seed in range(5)])
    again = DATA.splits["test"][0][0][:7] * 1.5
    cache = write_new(tmp_path / "new.h5", np.concatenate([copies, again, NEW[20:40]]))
    labelled = write_cache(tmp_path / "labelled.h5", DATA)
    found = suggest(SuggestConfig(cache, beside=(labelled,), out=tmp_path / "l.csv", count=500))
    rows = [int(name.removesuffix(".png")) for name in found.ids]
    assert found.known == 7 and not set(rows) & set(range(100, 107))
    assert sorted(row % 20 for row in rows if row < 100) == list(range(20))
    assert set(range(107, 127)) <= set(rows) and len(rows) == 40


def test_labels_filled_in_make_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is what extract reads, from another folder than the images' too, and names that a
    spreadsheet would take for a formula lead to their images."""
    options = {"batch_size": 4, "workers": 1}
    folder = make_folder(tmp_path / "data", {"train": 4, "test": 2}, ("cat", "dog"))
    like = extract(ExtractConfig(f"folder:{folder}", out=tmp_path / "a.h5", val=0.0, **options))
    new, tables = tmp_path / "new photographs", tmp_path / "tables"
    (new / "of May").mkdir(parents=True)
    tables.mkdir()
    for number in range(6):
        photograph(50 + number).save(new / "of May" / f"{number}, a.png")
    photograph(70).save(new / "=1+1.png")
    cache = extract(ExtractConfig(f"images:{new}", out=tmp_path / "n.h5", like=like, **options))
    for table in (tables / "to_label.csv", new / "to_label.csv"):
        with pytest.raises(SystemExit) as ended:
            main([str(cache), "--beside", str(like), "--out", str(table), "--count", "7"])
        assert ended.value.code == 0
        assert "7 images to label" in capsys.readouterr().out
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 7 and not any(row["label"] for row in rows)
        for number, row in enumerate(rows[:5]):
            row["label"] = ("cat", "dog")[number % 2]
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        asked = ExtractConfig(f"csv:{table}", out=table.with_suffix(".h5"), **options)
        with FeatureCache(extract(replace(asked, val=0.0, test=0.0))) as made:
            assert made.class_names == ["cat", "dog"]
            assert made.labels("train").tolist() == [0, 1, 0, 1, 0]
            assert made.ids("unlabelled") == [row["path"] for row in rows[5:]]
            with FeatureCache(cache) as whole:
                place = {name: row for row, name in enumerate(whole.ids("unlabelled"))}
                keys = ["/".join(Path(row["path"]).parts[-2:]) for row in rows[:5]]
                own = [place.get(key, place.get(key.rpartition("/")[2])) for key in keys]
                np.testing.assert_array_equal(
                    made.features("train", range(5)), whole.features("unlabelled", own)
                )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["labelled.h5"], "labelled.h5 has no images without labels; extract them with"),
        (["new.h5", "--count", "0"], "--count must be at least 1"),
        (["new.h5", "--out", "old.csv"], "old.csv is there, perhaps with labels filled in"),
        (["new.h5", "--out", "table.txt"], "table.txt is written as CSV"),
        (["new.h5", "--method", "a:B"], "--method names the method of an adapter"),
        (["new.h5", "--adapter", "nowhere"], "There is no adapter at nowhere"),
        (["new.h5", "--beside", "foreign.h5"], "other weights of the backbone than new.h5"),
        (["new.h5", "--beside", "wide.h5"], "features of wide.h5 are 24 wide and those of new.h5"),
        (["foreign.h5", "--adapter", "run"], "The adapter was fitted for other weights"),
        (["again.h5", "--beside", "labelled.h5"], "there is nothing to label"),
        (["new.h5", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (["one.h5"], "There is one class, 'class 0': nothing to be unsure of"),
    ],
)
def test_refusals(
    place: Path,
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    if not Path("old.csv").exists():
        Path("old.csv").write_text("path,label\na.png,cat\n")
        write_new(place / "foreign.h5", backbone=backbone("1" * 64))
        write_new(place / "again.h5", DATA.splits["train"][0][0])
        wide = tiny_data(dim=24)
        own = {"backbone": backbone() | {"embed_dim": 24}}
        write_new(place / "wide.h5", wide.splits["train"][0][0], wide, **own)
        write_new(place / "one.h5", data=TinyData({}, DATA.text[:1]))
    before = sorted(place.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
    assert Path("old.csv").read_text().endswith("cat\n")


def test_without_pandas_a_frame_is_refused_with_a_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = suggest(config(place, tmp_path))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"to_frame\(\) needs pandas .*: pip install pandas"):
        found.to_frame()


GROWTH = """
import sys
from pathlib import Path
from clip_adapter.pipelines.deciding.suggest import SuggestConfig, suggest

def peak():
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

folder = Path(sys.argv[1])
def run(name):
    suggest(SuggestConfig(folder / f"{name}.h5", count=20, out=folder / f"{name}.csv"))
    return peak()
print(run("small"), run("large"))
"""


def test_images_without_labels_are_not_in_memory(tmp_path: Path) -> None:
    """Their features alone would be 60,000 × 512 float32: 117 MiB."""
    draw = np.random.default_rng(0).standard_normal
    data = TinyData({}, draw(size=(4, 2, 512)).astype(np.float32))
    wide = {"backbone": backbone() | {"embed_dim": 512}}
    for name, count in (("small", 9000), ("large", 60_000)):
        write_new(tmp_path / f"{name}.h5", draw(size=(count, 512), dtype=np.float32), data, **wide)
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert large - small < 60
