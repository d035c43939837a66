"""`fit`: train on cached features, select on validation, test once, save the adapter."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting.config import FitConfig

if TYPE_CHECKING:
    from clip_adapter.pipelines.fitting.run import FitResult


def fit(config: FitConfig, listener: Listener | None = None) -> "FitResult":
    """Run `fit`: everything is in the result and in the run folder, nothing is printed.

    listener: is told of progress, and of options without effect.
    Raises UserError for bad input, before anything is written. What could not be done although the
    numbers are there, such as writing a file on a full disk, is the result's `problem`.

    Examples:
        >>> from clip_adapter import FitConfig, fit
        >>> result = fit(FitConfig(cache="features.h5", shots=2, seeds=1, out="runs/first"))
        >>> [summary.method for summary in result.summary]
        ['zero-shot', 'linear-probe', 'clip-adapter']
        >>> 0.5 < result.summary[-1].test_accuracy.mean < 1
        True
    """
    from clip_adapter.pipelines.fitting.run import run_fit

    return run_fit(config, listener or Listener())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script `fit`."""
    from clip_adapter.pipelines.console.running import run

    def parse_and_fit() -> None:
        from clip_adapter.pipelines.fitting.options import parse

        config = parse(arguments)

        from clip_adapter.pipelines.console.jax_setup import set_up_jax

        set_up_jax()

        from clip_adapter.pipelines.console.terminal import Terminal
        from clip_adapter.pipelines.fitting.console_report import print_run

        result = fit(config, Terminal("fit"))
        print_run(result, verbose=config.verbose)
        if result.problem:
            raise UserError(result.problem)

    run("fit", parse_and_fit)
