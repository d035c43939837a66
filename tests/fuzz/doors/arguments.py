"""Argument vectors of every command: random options with hostile values, and odd places for what
is printed."""

import os
import random
import re
import shutil
from functools import cache
from pathlib import Path

from clip_adapter.pipelines.console.entry import COMMANDS
from tests.cache.small_cache import make_cache
from tests.extract.image_folders import photograph
from tests.fuzz.attempt import Attempt
from tests.fuzz.command import OUTPUTS, run_command
from tests.fuzz.doors import images

ODD = (
    *("", " ", "-1", "0", "1", "2", "3", "0.5", "nan", "-inf", "1e400", "1e-320", "9" * 5000),
    *("99999999999999999999", "0x10", "1_0", "\N{ARABIC-INDIC DIGIT THREE}", "all", "cv", "none"),
    *("-", "--", "---", "--help", "=", "a=b", "x" * 300, "x" * 100_000, "\0", "a\nb", "\x1b[2J"),
    *("\udcff", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}x", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    *("~nosuchuser/x", "~", ".", "..", "nowhere", "nowhere/nowhere", "file", "file/x", "pipe"),
    *("loop", "full", "zero", "folder", "features.h5", "run", "image.png", "%s%n", "{}", "a:b"),
    *("os:system", "json:loads", "tests.fuzz.nothing:X", "1/0", "2/1", "1/2", "-1/4", "9" * 30),
    *("cuda", "cuda:99", "meta", "cpu", "mps", "glyph-clip", "local-dir:", "local-dir:folder"),
    *("csv:file", "csv:pipe", "folder:folder", "folder:loop", "coop:folder", "digits", "hf:"),
    *("clip-adapter", "zero-shot", "linear-probe", "tip-adapter"),
)
# What a command needs to get further, on something small.
ENOUGH = {
    "extract": "--dataset folder:folder --out out.h5 --val 0 --test 0",
    "fit": "--cache features.h5 --out out --method zero-shot --baselines --shots 1",
    "predict": "--adapter run image.png",
    "evaluate": "--adapter run features.h5",
    "inspect": "features.h5",
    "audit": "features.h5",
    "suggest": "features.h5",
    "merge": "out.h5 features.h5",
    "report": "run",
}
OPTION = re.compile(r"^  (?:-\w, )?(--[\w.+-]+)", re.MULTILINE)


def prepare(folder: Path) -> None:
    images.prepare(folder)
    make_cache(folder / "features.h5")
    (folder / "file").write_text("path,label\nimage.png,cat\n")
    (folder / "folder").mkdir()
    for name in ("image.png", "folder/image.png"):
        photograph(0).save(folder / name)


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    os.mkfifo(folder / "pipe")
    for name, target in (("loop", "loop"), ("full", "/dev/full"), ("zero", "/dev/zero")):
        (folder / name).symlink_to(target)
    name = rng.choice(list(COMMANDS))
    words = [_word(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        option, values = rng.choice(_options(name)), [_word(rng), _word(rng)]
        values = values[: rng.choice((0, 1, 1, 1, 2))]
        words += [f"{option}={values[0]}"] if values and rng.random() < 0.2 else [option, *values]
    if rng.random() < 0.7:
        enough = ENOUGH.get(name, "").split()
        words = [*enough, *words] if rng.random() < 0.5 else [*words, *enough]
    output = rng.choice(list(OUTPUTS))
    found = Attempt(f"{name} {' '.join(f'{word!r:.80}' for word in words)} to {output}")
    found.command(run_command(name, words, output))
    return found


@cache
def _options(name: str) -> list[str]:
    """All that --help names."""
    return sorted({*OPTION.findall(run_command(name, ["--help"]).out), "--nothing"})


def _word(rng: random.Random) -> str:
    return rng.choice(ODD) if rng.random() < 0.95 else chr(rng.randrange(1, 0x110000)) * 3
