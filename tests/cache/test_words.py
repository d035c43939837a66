"""Words fit their numbers."""

import pytest

from clip_adapter.words import (
    counted,
    printable,
    quoted,
    readable,
    shortened,
    size,
    some,
)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1_281_167, "1,281,167 images")],
)
def test_one_is_singular(count: int, words: str) -> None:
    assert counted(count, "image") == words


def test_plurals_of_their_own() -> None:
    assert counted(1, "class", "classes") == "1 class"
    assert counted(3, "class", "classes") == "3 classes"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (900, "0.9 KiB"),
        (49_357, "48.2 KiB"),
        (2**20 * 1.5, "1.5 MiB"),
        (2**31, "2.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes_have_the_unit_that_fits(count: float, words: str) -> None:
    assert size(count) == words


def test_long_lists_are_cut() -> None:
    assert some(["a"]) == "'a'"
    assert some(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert some(list("abcdefg")) == "'a', 'b', 'c' and 4 more"


def test_what_comes_from_outside_is_cut_and_quoted() -> None:
    assert quoted("RN5O") == "'RN5O'"
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(quoted("x" * 10_000)) == 160
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"


def test_no_name_commands_a_terminal() -> None:
    assert printable("two\nlines \x1b[2J \udcff 字 ±") == r"two\nlines \x1b[2J \udcff 字 ±"


def test_a_word_that_nobody_would_read_loses_its_middle() -> None:
    sentence = readable(f"Cannot read {'a' * 5000}/{'b' * 200}.png: File name\ntoo long.")
    assert sentence == f"Cannot read {'a' * 80}…{'b' * 75}.png: File name\\ntoo long."
    usual = f"Cannot read {'a' * 200}/{'b' * 98}: no."
    assert readable(usual) == usual
