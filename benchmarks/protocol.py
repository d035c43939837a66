"""Measure what `fit`'s defaults rest on: python benchmarks/protocol.py --help

Test accuracy is looked at here to judge rules, which is why this is a benchmark and no part of
`fit`; nothing that is chosen here goes into a product except a default. Whole pipelines run through
the public `fit`; only what it does not report, how each setting of a grid does on test, is trained
here. Tables hold means over seeds ± their standard error; differences are paired by seed. Real
features (`--caches`) and made-up ones stand under headings of their own.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from protocol_runs import PARTS, SEARCHED, SEARCHED_SEEDS, Study
from protocol_sets import SETS, DataSet, caches_in
from protocol_tables import over_sets, table

from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.console.jax_setup import set_up_jax


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--caches", nargs="+", type=Path, help="feature caches, or folders of them")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), help="made-up data sets")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="of the part `methods`")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help=f"tables to make; halving takes {SEARCHED_SEEDS} seeds of {SEARCHED} shots",
    )
    parser.add_argument("--epochs", type=int, help="for a trial run")
    given = parser.parse_args(arguments)
    set_up_jax()
    real = caches_in(given.caches or [])
    if given.caches and not real:
        parser.error(f"there is no *.h5 in {', '.join(map(str, given.caches))}")
    names = given.sets or ([] if given.caches else list(SETS))
    with tempfile.TemporaryDirectory() as folder:
        made_up = [DataSet(name, SETS[name](Path(folder))) for name in names]
        for family, sets in (
            ("Real features", real),
            ("Made-up features", made_up),
        ):
            if sets:
                print(f"## {family}\n", flush=True)
                measure(sets, given)
    print(f"{process_time():.0f} CPU seconds")


def measure(sets: Sequence[DataSet], given: argparse.Namespace) -> None:
    """Print the tables of each set as it is finished, then those over all of them."""
    found = {}
    for data in sets:
        print(f"### {data.name}: {data.words()}\n")
        if too_many := [str(shots) for shots in given.shots if shots > data.largest_class]:
            print(
                f"Left out: {', '.join(too_many)} shots; the largest class has "
                f"{data.largest_class} training images.\n"
            )
        shots = tuple(shots for shots in given.shots if shots <= data.largest_class)
        study = Study(data, shots, tuple(given.seeds), given.methods, given.epochs)
        for part in given.parts if shots else ():
            if rows := PARTS[part](study):
                found[data.name, part] = rows
                print(table(f"{data.name}, {part}", rows), flush=True)
    for part in given.parts:
        own = [rows for (_, name), rows in found.items() if name == part]
        if len(own) > 1:
            print(
                over_sets(f"{part}, mean over those of {len(own)} sets with so many shots", own),
                flush=True,
            )


if __name__ == "__main__":
    main()
