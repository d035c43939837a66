"""Where prompts come from, and what is stored of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.extract.text.encode_text import TextPlan
from clip_adapter.extract.text.prompts import (
    descriptions_in_order,
    random_templates,
    read_descriptions,
    resolve_templates,
)
from clip_adapter.pipelines.console.terminal import Terminal
from tests.extract.image_folders import make_folder, photograph

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_templates_from_the_command_line_a_file_and_the_ensemble(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a sketch of {}.\n\n  {} in the wild \n", encoding="utf-8")
    found = resolve_templates(["a {}", str(file)])
    assert found == ("a {}", "a sketch of {}.", "{} in the wild")
    ensemble = resolve_templates(["ensemble"])
    assert len(ensemble) == 7
    assert ensemble[0] == "itap of a {}."
    assert resolve_templates([]) == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "has no templates"), ("no place", "needs exactly one {}"), ("a {}\na {}", "given twice")],
)
def test_files_that_are_no_templates(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        resolve_templates([str(tmp_path / "t.txt")])
    (tmp_path / "t.txt").write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="not UTF-8"):
        resolve_templates([str(tmp_path / "t.txt")])


CODE = ("[", "templates = [", "'a photo of a {}.',", '"a {}"', "f'the {}',  # best")
CODE += ('["a {}", "the {}"]', "lambda c: f'a {c}'", "],")


@pytest.mark.parametrize("line", CODE)
def test_code_is_no_list_of_templates(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.py").write_text(f"a {{}}\n{line}\n")
    with pytest.raises(UserError, match=r"t\.py holds code or JSON \(.*\), not templates; write"):
        resolve_templates([str(tmp_path / "t.py")])
    legal = ["'{}' on a wall", "(a photo of a {})", "[{}]", "art = {}", "a {}'s"]
    (tmp_path / "t.py").write_text("\ufeff" + "\n".join(legal), encoding="utf-8")
    assert resolve_templates([str(tmp_path / "t.py")]) == tuple(legal)


@pytest.mark.parametrize("name", ["prompts.txt", "no/such/file", "a photo"])
def test_neither_a_template_nor_a_file(name: str) -> None:
    words = rf"'{name}' needs exactly one {{}} .*, and there is no file of that name either"
    with pytest.raises(UserError, match=words):
        resolve_templates(["a {}", name])


def test_a_long_file_of_templates_is_held_against_itself_once(tmp_path: Path) -> None:
    lines = [f"picture {number} of a {{}}" for number in range(100_000)]  # in pairs: half an hour
    (tmp_path / "t.txt").write_text("\n".join(lines))
    assert len(resolve_templates([str(tmp_path / "t.txt")])) == 100_000
    (tmp_path / "t.txt").write_text("\n".join([*lines, lines[7]]))
    with pytest.raises(UserError, match=r"'picture 7 of a {}' is given twice"):
        resolve_templates([str(tmp_path / "t.txt")])


def described(folder: Path, content: object) -> Path:
    path = folder / "descriptions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_names_are_matched_without_case_and_underscores() -> None:
    stored = {"Forest Path": ["trees"], "RIVER": ["water", "a bank"], "cafe\u0301": ["tea"]}
    rows = descriptions_in_order(stored, ["river", "forest_path", "caf\u00e9"])
    assert rows == [["water", "a bank"], ["trees"], ["tea"]]
    assert descriptions_in_order({"cat": ["a"], "Cat": ["b"]}, ["Cat", "cat"]) == [["b"], ["a"]]


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"a": ["x"]}, r"There are no descriptions of 'b'; add them"),
        ({"a": ["x"], "c": ["x"]}, r"no descriptions of 'b' \(there are some of 'c'"),
        ({"a": ["x"], "b": ["x"], "c": ["x"]}, r"descriptions of 'c', which is no class; remove"),
        ({"a": ["x"], "b": ["x"], "A": ["y"]}, r"the class 'A' twice"),
    ],
)
def test_missing_and_extra_classes(stored: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        descriptions_in_order(stored, ["a", "b"])


@pytest.mark.parametrize(
    "inner", ['"cat": ["a"], "dog": ["b"], "cat": ["c"]', '"x": {"cat": 1, "cat": 2}']
)
def test_a_name_twice_in_a_file_is_refused(tmp_path: Path, inner: str) -> None:
    path = described(tmp_path, f"{{{inner}}}")
    with pytest.raises(UserError, match=r"it names 'cat' twice in one object; join"):
        read_descriptions(path)


def test_marks_and_pointers_in_place_of_a_file(tmp_path: Path) -> None:
    path = described(tmp_path, '\ufeff{"cat": ["a"]}')
    assert read_descriptions(path) == {"cat": ["a"]}
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"is the pointer that Git LFS left in the file's place"):
        read_descriptions(path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": "x"}', '{"a": []}', '{"a": [1]}', '{"a": [" "]}', "[" * 100_000]
)
def test_files_that_are_no_descriptions(tmp_path: Path, content: str) -> None:
    path = described(tmp_path, content)
    with pytest.raises(UserError, match=r"descriptions\.json is not (JSON|a JSON object with)"):
        read_descriptions(path)
    with pytest.raises(UserError, match=r"Cannot read .*missing\.json: No such file"):
        read_descriptions(tmp_path / "missing.json")


def test_rows_are_named() -> None:
    plan = TextPlan(["a_b", "c"], ["the {}"], [["x"], ["y", "z"]])
    assert plan.stored_templates == ["the {}", "description 1", "description 2"]
    assert plan.prompts(0) == ["the a b", "x"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set with a training image and a test image of each class."""
    return f"folder:{make_folder(tmp_path_factory.mktemp('data'), {'train': 1, 'test': 1}, NAMES)}"


def config(images: str, folder: Path, **own: Any) -> ExtractConfig:
    return ExtractConfig(dataset=images, out=folder / "features.h5", val=0.0, **own)


def test_prompts_that_are_cut_off_are_counted(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " word" * 30
    templates = ("a {}", f"{words}{{}}", f"a {{}}{words}")
    extract(config(images, tmp_path, templates=templates, batch_size=7), Terminal("extract"))
    assert capsys.readouterr().err == (
        "warning: the text tower reads only the beginning of 20 prompts, the first of them "
        f"'{words}eight'; shorten what is to count.\n"
    )


def test_classes_with_one_text_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the text was encoded before; and all, where only the end of a prompt differs."""
    names = ("Cat", "cat", "eel", "sea lion", "sea_lion")
    data = f"folder:{make_folder(tmp_path / 'data', {'train': 1, 'test': 1}, names)}"
    whole = config(data, tmp_path, batch_size=2)
    said = "these classes have the same text: 'Cat', 'cat'; 'sea lion', 'sea_lion'; by it, all"
    extract(whole, Terminal("extract"))
    assert said in capsys.readouterr().err
    photograph(9).save(tmp_path / "data" / "train" / "eel" / "9.png")
    extract(replace(whole, update=True), Terminal("extract"))
    assert said in capsys.readouterr().err
    sentences = {name: [f"{number} {name}"] for number, name in enumerate(names)}
    files = {"descriptions": described(tmp_path, sentences), "force": True}
    extract(replace(whole, **files), Terminal("extract"))
    assert "same text" not in capsys.readouterr().err
    extract(replace(whole, templates=(f"{'word ' * 30}{{}}",), force=True), Terminal("extract"))
    words = "these classes have the same text: 'Cat', 'cat', 'eel' and 2 more; by it"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [64, 3])
def test_weights_of_classes_with_different_numbers_of_sentences(
    images: str, tmp_path: Path, batch_size: int
) -> None:
    """The mean of every class is over its own sentences alone."""
    sentences = {
        name: [f"{name} number {i}." for i in range(1 + i % 4)] for i, name in enumerate(NAMES)
    }
    own = {"descriptions": described(tmp_path, sentences), "batch_size": batch_size}
    out = extract(config(images, tmp_path, templates=("a photo of the digit {}.",), **own))
    with FeatureCache(out) as cache, h5py.File(out) as file:
        text = cache.text_features()
        stored = file["text/prompts"].asstr()[...]
        described_rows = [f"description {i}" for i in (1, 2, 3, 4)]
        assert cache.templates == ["a photo of the digit {}.", *described_rows]
    assert text.shape == (10, 5, 128)
    weights = np.asarray(classifier_weights(np, text))
    for c, name in enumerate(sorted(NAMES)):
        own = [f"a photo of the digit {name}.", *sentences[name]]
        assert stored[c].tolist() == own + [""] * (5 - len(own))
        wanted = unit(unit(text[c, : len(own)]).mean(axis=0))
        np.testing.assert_allclose(weights[c], wanted, atol=1e-6)
    other = described(tmp_path, {**sentences, "one": ["other"]})
    with pytest.raises(UserError, match=r"other arguments \(descriptions, templates differ\)"):
        extract(config(images, tmp_path, descriptions=other))


def test_random_words_are_drawn_by_their_seed_and_tell_no_class_apart() -> None:
    names = ["cat", "sea_lion"]
    drawn = random_templates(7, names)
    assert drawn == random_templates(7, names) != random_templates(8, names)
    assert len(set(drawn)) == 30 and resolve_templates(drawn) == drawn
    said = [t.removeprefix("a photo of a {}, which has ").removesuffix(".").split() for t in drawn]
    assert {len(words) for words in said} == {1, 2}
    lengths = {tuple(map(len, letters)) for letters in said[15:]}
    assert lengths == {(3,), (3, 4)}, "letters are as many as those of a class name's words"
    tokens = SimpleTokenizer().encoder
    assert all(f"{word}</w>" in tokens for words in said[:15] for word in words)


@pytest.mark.parametrize("other", [{"templates": ("a {}",)}, {"descriptions": Path("d.json")}])
def test_random_words_are_all_there_is(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--prompt-control makes all prompts itself; leave out"):
        ExtractConfig(prompt_control=7, **other).check()
    with pytest.raises(UserError, match=r"--prompt-control must be at least 0"):
        ExtractConfig(prompt_control=-1).check()
    assert "prompt_control" not in ExtractConfig().identity()
