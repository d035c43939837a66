"""Measure what `fit`'s defaults rest on: python benchmarks/protocol.py --help

Test accuracy is looked at here to judge rules, on data sets made for that; nothing that is chosen
here goes into a product except a default. Every row of a table is a mean over tasks (a data set, a
number of shots, a seed), ± its standard error; differences are paired within tasks. Accuracies are
in percent, differences in points. Tasks of one data set share their test images. The figures do not
depend on what else the machine does.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from protocol_runs import Asked, measure
from protocol_sets import SETS
from protocol_tables import alpha_table, epoch_tables, halving_table, learned_tables


def main(arguments: Sequence[str] | None = None) -> None:
    usual = Asked()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--shots", nargs="+", type=int, default=usual.shots)
    parser.add_argument("--seeds", nargs="+", type=int, default=usual.seeds)
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument(
        "--searched-shots",
        nargs="*",
        type=int,
        default=usual.searched_shots,
        help="shots at which halving is compared with the full search",
    )
    given = parser.parse_args(arguments)
    asked = Asked(given.shots, given.seeds, given.epochs, given.searched_shots)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sets:
            measured += list(measure(SETS[name](Path(folder)), asked))
    print(f"{len(measured)} tasks, {asked.epochs} epochs, {process_time():.0f} CPU seconds\n")
    for tables in (epoch_tables, alpha_table, learned_tables, halving_table):
        print(tables(measured))


if __name__ == "__main__":
    main()
