"""`clip-adapter study`: many caches as one experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from clip_adapter import files
from clip_adapter.cluster import check_address, connected
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.run_folder import PLAN, read_plan
from clip_adapter.words import some

OPTIONS = """
clip-adapter study --caches CACHE [CACHE …] --out FOLDER [options of fit]
clip-adapter study --runs RUN [RUN …] --out FOLDER

Fit the same methods on every cache, each in a run folder of its own under --out, and compare them
over all data sets. The same command goes on where an interrupted one stopped. All other options are
those of `fit`, but for --cache and --resume; `fit --help` lists them.

--ray auto, HOST:PORT or local fits on the nodes of a Ray cluster, in tasks of a method at a number
of shots. The working folder, caches and --out lie under one path on all nodes.

--runs pools finished runs, such as those of jobs on a cluster: run folders of `fit`, or folders of
studies. What is fitted here, too, is pooled with them; runs on one cache are one data set.
"""

# A data set's name is that of its run's folder, beside which these files lie.
FILES = ("study.md", "study.csv", "study.png")
NO_NAMES = {"", ".", "..", *FILES, *(f"{name}.new" for name in FILES)}


@dataclass(frozen=True)
class StudyConfig:
    """caches: feature caches, one for each data set; out: the folder of the study; fit: what to do
    on each of them; runs: finished runs, or folders of them, that count as well; ray: the cluster
    whose nodes fit, as in ExtractConfig."""

    caches: tuple[Path, ...]
    out: Path
    fit: FitConfig
    runs: tuple[Path, ...] = ()
    ray: str | None = None


@dataclass(frozen=True)
class Study:
    """What a study found.

    folder: where it lies. runs: the run folders of each data set, by name. failed: a sentence for
    each data set that could not be fitted, or not to the end.
    """

    folder: Path
    runs: dict[str, list[Path]]
    failed: dict[str, str]


def study(config: StudyConfig, listener: Listener | None = None) -> Study:
    """Fit on every cache and write the comparison (study.md, study.csv, study.png) to the folder.

    A data set that cannot be fitted, or not to the end, is named and leaves the others whole.
    Raises UserError for bad arguments, and where there is no run to compare.
    """
    listener = listener or Listener()
    names = [cache.stem for cache in config.caches]
    if not names and not config.runs:
        raise UserError("A study needs --caches to fit on, or --runs that are finished.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--caches names several files {some(twice)}; a data set is called by its file's name."
        )
    if taken := sorted(NO_NAMES.intersection(names)):
        raise UserError(
            f"--caches: {some(taken)} cannot be the name of a data set's folder; rename the file."
        )
    if config.ray is not None:
        check_address(config.ray)
        if not names:
            raise UserError("--ray has no effect without --caches.")
    finished = [read for folder in config.runs for read in _finished(folder)]
    fitted, failed = _fitted(config, listener)
    runs = _by_dataset(fitted, finished)
    if not runs:
        raise UserError("No data set could be fitted; see the sentences above.")
    from clip_adapter.pipelines.reporting.comparison import write_comparison

    write_comparison(config.out, runs)
    return Study(config.out, runs, failed)


def _finished(folder: Path) -> list[Path]:
    """This run, or the runs of this study."""
    if files.is_there(folder / PLAN):
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{PLAN}"))
    if not runs:
        raise UserError(f"{folder} holds no run of `fit`, nor a study (there is no {PLAN}).")
    return runs


def _by_dataset(fitted: Mapping[str, Path], finished: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs on one cache together, by the name of the first one's cache."""
    runs: dict[str, list[Path]] = {}
    caches: dict[str, str] = {}
    named = [*fitted.items(), *((None, path) for path in finished)]
    for given, path in named:
        plan = read_plan(path)
        name = caches.get(plan.cache_sha256) or given or Path(plan.cache).stem
        if name in runs and caches.get(plan.cache_sha256) != name:
            raise UserError(
                f"{runs[name][0]} and {path} were made on different caches of one name; a data set "
                "is called by its file's name."
            )
        caches[plan.cache_sha256] = name
        own = runs.setdefault(name, [])
        if path.resolve() not in {other.resolve() for other in own}:
            own.append(path)
    return runs


def _fitted(config: StudyConfig, listener: Listener) -> tuple[dict[str, Path], dict[str, str]]:
    """The run of each cache that was fitted, and a sentence for each other, by name."""
    from clip_adapter.pipelines.fitting.run import run_fit

    runs: dict[str, Path] = {}
    failed: dict[str, str] = {}
    each = [replace(config.fit, cache=path, out=config.out / path.stem) for path in config.caches]
    if config.ray is not None:
        from clip_adapter.pipelines.fitting.parts import fit_parts

        with _said_to_go_on(), connected(config.ray, listener) as cluster:
            fit_parts(each, cluster, listener)
    for own in each:
        assert own.cache and own.out
        name = own.cache.stem
        listener.note(f"{name} ({len(runs) + len(failed) + 1} of {len(each)})")
        try:
            # Data sets are compared by numbers of one kind: a run that was begun goes on only where
            # it was asked for the same.
            with _said_to_go_on():
                result = run_fit(own, listener, may_go_on=True)
        except UserError as error:
            failed[name] = str(error)
        else:
            if len(result.results) == len(result.tasks) * len(result.plan.methods):
                runs[name] = own.out
            if result.problem:
                failed[name] = result.problem
        if name in failed:
            listener.warn(f"{name}: {failed[name]}")
    return runs, failed


@contextmanager
def _said_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        message = "what is finished is kept, and the same command goes on from there"
        raise KeyboardInterrupt(message) from None


def parse(arguments: Sequence[str] | None = None) -> StudyConfig:
    """What the command line asks for; options that are not the study's own are `fit`'s.

    Raises UserError where it does not parse, and SystemExit after --help.
    """
    import argparse
    import sys

    from clip_adapter.pipelines.console.parser import Parser
    from clip_adapter.pipelines.fitting import options

    parser = Parser(prog="clip-adapter study", add_help=False, allow_abbrev=False)
    parser.add_argument("--caches", nargs="*", type=Path, default=[])
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--ray")
    parser.add_argument("--help", "-h", action="store_true", default=argparse.SUPPRESS)
    given, others = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if hasattr(given, "help"):
        print(OPTIONS.strip())
        raise SystemExit(0)
    config = options.parse(others, "clip-adapter study")
    if config.stated - {"method"} and not given.caches:
        raise UserError("--caches needs at least one cache.")
    for name in ("cache", "unlabelled", "from_run", "resume", "verbose"):
        if getattr(config, name):
            raise UserError(
                f"--{name.removesuffix('_run')} is for `fit`; a study takes --caches and --out."
            )
    return StudyConfig(tuple(given.caches), given.out, config, tuple(given.runs), given.ray)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter study`."""
    from clip_adapter.pipelines.console.running import EXIT_PARTIAL, run

    def parse_and_study() -> int:
        config = parse(arguments)

        from clip_adapter.pipelines.console.jax_setup import set_up_jax
        from clip_adapter.pipelines.console.terminal import Terminal

        set_up_jax()
        result = study(config, Terminal("study"))
        print((result.folder / "study.md").read_text(encoding="utf-8"))
        return EXIT_PARTIAL if result.failed else 0

    run("clip-adapter study", parse_and_study)
