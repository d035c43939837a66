"""`clip-adapter study`: many caches as one experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.listener import Listener
from clip_adapter.cache.words import some
from clip_adapter.pipelines.fitting.config import FitConfig

OPTIONS = """
clip-adapter study --caches CACHE [CACHE …] --out FOLDER [options of fit]

Fit the same methods on every cache, each in a run folder of its own under --out, and compare them
over all data sets. The same command goes on where an interrupted one stopped. All other options are
those of `fit`, but for --cache and --resume; `fit --help` lists them.
"""

# A run that was begun goes on only where it was asked for the same, also by what is left out: data
# sets are compared by numbers of one kind.
EVERYTHING = frozenset(option.name for option in fields(FitConfig))


@dataclass(frozen=True)
class StudyConfig:
    """caches: feature caches, one for each data set; out: the folder of the study; fit: what to do
    on each of them."""

    caches: tuple[Path, ...]
    out: Path
    fit: FitConfig


@dataclass(frozen=True)
class Study:
    """What a study found.

    folder: where it lies. runs: the run folder of each data set that was fitted, by name.
    failed: a sentence for each of the others, by name.
    """

    folder: Path
    runs: dict[str, Path]
    failed: dict[str, str]


def study(config: StudyConfig, listener: Listener | None = None) -> Study:
    """Fit on every cache and write the comparison (study.md, study.csv, study.png) to the folder.

    A data set that cannot be fitted, or not to the end, is named and leaves the others whole.
    Raises UserError for bad arguments, and where no data set can be fitted.
    """
    from clip_adapter.pipelines.fit import fit

    listener = listener or Listener()
    names = [cache.stem for cache in config.caches]
    if not names:
        raise UserError("--caches needs at least one cache.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--caches names several files {some(twice)}; a data set is called by its file's name."
        )
    runs: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name, cache in zip(names, config.caches, strict=True):
        listener.note(f"{name} ({len(runs) + len(failed) + 1} of {len(names)})")
        folder = config.out / name
        begun = (folder / "run.json").exists()
        own = replace(
            config.fit,
            cache=cache,
            out=None if begun else folder,
            resume=folder if begun else None,
            stated=EVERYTHING,
        )
        try:
            result = fit(own, listener)
        except UserError as error:
            failed[name] = str(error)
        except KeyboardInterrupt:
            message = "what is finished is kept, and the same command goes on from there"
            raise KeyboardInterrupt(message) from None
        else:
            if len(result.results) == len(result.tasks) * len(result.plan.methods):
                runs[name] = folder
            if result.problem:
                failed[name] = result.problem
        if name in failed:
            listener.warn(f"{name}: {failed[name]}")
    if not runs:
        raise UserError("No data set could be fitted; see the sentences above.")
    from clip_adapter.pipelines.comparison import write_comparison

    write_comparison(config.out, runs)
    return Study(config.out, runs, failed)


def parse(arguments: Sequence[str] | None = None) -> StudyConfig:
    """What the command line asks for; options that are not the study's own are `fit`'s.

    Raises UserError where it does not parse, and SystemExit after --help.
    """
    import argparse
    import sys

    from clip_adapter.pipelines.command_line import Parser
    from clip_adapter.pipelines.fitting import flags

    parser = Parser(prog="clip-adapter study", add_help=False, allow_abbrev=False)
    parser.add_argument("--caches", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--help", "-h", action="store_true", default=argparse.SUPPRESS)
    given, others = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if hasattr(given, "help"):
        print(OPTIONS.strip())
        raise SystemExit(0)
    config = flags.parse(others)
    for name in ("cache", "resume"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name} is for `fit`; a study takes --caches and --out.")
    return StudyConfig(tuple(given.caches), given.out, config)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter study`."""
    from clip_adapter.pipelines.command import EXIT_PARTIAL, run

    def parse_and_study() -> int:
        config = parse(arguments)

        from clip_adapter.pipelines.jax_setup import set_up_jax
        from clip_adapter.pipelines.spoken import Spoken

        set_up_jax()
        found = study(config, Spoken("study"))
        print((found.folder / "study.md").read_text(encoding="utf-8"))
        return EXIT_PARTIAL if found.failed else 0

    run("clip-adapter study", parse_and_study)
