"""A dataclass is a command line; what does not parse is one sentence."""

import argparse
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.argument_types import Positional, number_or
from clip_adapter.pipelines.console.parser import config_from, parse, parser_for


@dataclass(frozen=True)
class Config:
    """Do something.

    100 % of it is
    described here.

    Attributes:
        out: Where the result goes.
        parts: What is
            joined.
        count: How often, 5 % of the time.
        ratio: How much; `learned` trains it.
        shots: How many.
        names: Whom.
        quick: In a hurry.
        mode: Which way.
        folder: Where.
        share: Some of it.
    """

    out: Positional[Path]
    parts: Positional[tuple[Path, ...]]
    count: int = 1
    ratio: float | Literal["learned", "hypernet"] = 0.5
    shots: tuple[int | Literal["all"], ...] = (16,)
    names: tuple[str, ...] = ("a", "b")
    quick: bool = False
    mode: Literal["one", "two"] = "one"
    folder: Path | None = None
    share: float | None = None


@dataclass(frozen=True)
class Needing:
    """Need something.

    Attributes:
        adapter: What is needed.
    """

    adapter: Path
    batch_size: int = 64


def parsed(*arguments: str) -> Config:
    return parse(Config, "something", ["o", "p", *arguments])


def sentence(config_type: type, *arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        parse(config_type, "something", arguments)
    said = str(refused.value)
    assert said.endswith("; see something --help.")
    assert "\n" not in said
    assert len(said) < 500
    return said.removesuffix("; see something --help.")


def test_every_kind_of_field() -> None:
    assert parsed() == Config(Path("o"), (Path("p"),))
    given = parsed(
        *("--count", "-3", "--ratio", "learned", "--shots", "1", "all", "--names", "--quick"),
        *("--mode", "two", "--folder", "x/y", "--share", "1e-3"),
    )
    assert given == Config(
        *(Path("o"), (Path("p"),), -3, "learned", (1, "all"), (), True, "two", Path("x/y"), 1e-3)
    )
    assert parsed("--ratio", "1").ratio == 1.0
    assert isinstance(parsed("--ratio", "1").ratio, float)


@pytest.mark.parametrize(
    "arguments",
    [
        ["o", "--quick", "p", "q"],
        ["--quick", "o", "p", "q"],
        ["o", "p", "--count", "1", "q", "--quick"],
    ],
)
def test_options_may_stand_between_what_goes_by_position(arguments: list[str]) -> None:
    config = parse(Config, "something", arguments)
    assert (config.out, config.parts, config.quick) == (Path("o"), (Path("p"), Path("q")), True)


def test_what_goes_by_position_may_be_nothing() -> None:
    assert parse(Config, "something", ["o"]).parts == ()
    assert parse(Config, "something", ["--count", "2", "o", "--quick"]).parts == ()


def test_only_what_was_given_is_in_the_namespace() -> None:
    parser = parser_for(Needing, "something")
    parser.add_argument(
        "--clap.lr", type=number_or("auto"), nargs="*", default=argparse.SUPPRESS, help="Rate."
    )
    given = parser.parse(["--adapter", "a", "--clap.lr", "0.5", "auto"])
    assert vars(given) == {"adapter": Path("a"), "clap.lr": [0.5, "auto"]}
    assert config_from(Needing, given) == Needing(Path("a"))


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert parsed("--folder", "~/data").folder == Path("/somewhere/data")
    said = sentence(Config, "~nosuchuser/out")
    assert said == "OUT: '~nosuchuser/out' names a home that is unknown"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--folder", ""], "--folder: an empty name names no file; write . for this folder"),
        (["--count", "many"], "--count: 'many' is no whole number"),
        (["--count", "1.5"], "--count: '1.5' is no whole number"),
        (["--count", "9" * 5000], r"--count: '9{150,}… is no whole number"),
        (["--share", "half"], "--share: 'half' is no number"),
        (["--ratio", "learnt"], "--ratio: 'learnt' is no number and not learned or hypernet"),
        (["--shots", "1", "al"], "--shots: 'al' is no number and not all"),
        (["--count"], "--count: expected one argument"),
        (["--cuont", "3"], "Unknown option --cuont; perhaps you meant --count"),
        (["--coun", "3"], "Unknown option --coun; perhaps you meant --count"),
        (["--cuont=3"], "Unknown option --cuont; perhaps you meant --count"),
        (["--xyzzy"], "Unknown option --xyzzy"),
        (["--quik", "--nams"], "Unknown option --quik, --nams; perhaps .* --quick or --names"),
        (["--mode", "none"], "--mode: invalid choice: 'none' .*one.*two.*"),
        (["--mode", "\x1b[2J\n"], r"--mode: invalid choice: '\\x1b\[2J\\n' .*"),
        (["--" + "x" * 5000], r"Unknown option --x{100,}…"),
        (["--count", "1", "--count", "2"], "--count is given twice; give it once"),
        (["--count", "1", "--count=1"], "--count is given twice; give it once"),
        (["--shots", "1", "--shots", "4"], "--shots is given twice; .* all its values behind it"),
    ],
)
def test_what_does_not_parse_is_a_sentence(arguments: list[str], words: str) -> None:
    said = sentence(Config, "o", "p", *arguments)
    assert re.fullmatch(words, said), said


def test_what_is_missing_is_named() -> None:
    assert "--adapter" in sentence(Needing)
    assert "out" in sentence(Config).lower()
    assert sentence(Needing, "--adapter", "a", "stray") == "Unknown argument stray"


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Config, "something", ["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: something ",
        "Do something. 100 % of it is described here.",
        "What is joined.",
        "How often, 5 % of the time. (default: 1)",
        "--ratio X|learned|hypernet",
        "--names [TEXT ...]",
        "Whom. (default: a b)",
        "In a hurry. --mode",
        "{one,two}",
    ):
        assert words in shown, words


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Needing, "something", ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"clip-adapter {version('clip-adapter')}\n"
