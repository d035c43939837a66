"""`clip-adapter suggest`: which images without labels to label next."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

from clip_adapter.cores import limit_openmp
from clip_adapter.files import is_file
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal
from clip_adapter.pipelines.deciding.suggest import SuggestConfig, Suggestions, suggest
from clip_adapter.words import counted, printable, shortened

SHOWN = 5


def print_suggestions(config: SuggestConfig) -> None:
    """Run `suggest` and say what is in the table."""
    terminal = Terminal("clip-adapter suggest")
    found = suggest(config, terminal)
    terminal.result(_sentences(config, found))
    folder = Path(config.out).absolute().parent
    if not any(is_file(folder / path) for path in found.paths):
        terminal.note("the images were not found; name their folder with --images")


def _sentences(config: SuggestConfig, found: Suggestions) -> str:
    count = counted(found.candidates, "image")
    near = f", of which {found.known:,} are near-equal to labelled ones" if found.known else ""
    lines = [f"{count} without a label beside {found.labelled:,} with one{near}"]
    rows = zip(found.paths, found.guesses, found.probabilities, strict=True)
    for path, guess, share in islice(rows, SHOWN):
        lines.append(f"  {shortened(printable(path), 60)}  {printable(guess)}? {100 * share:.1f} %")
    if len(found.ids) < min(config.count, found.candidates):
        lines.append("all others are near-equal to these or to labelled ones")
    lines.append(
        f"{config.out}: {counted(len(found.ids), 'image')} to label, the most telling first; fill "
        f"in the column label, then extract --dataset csv:{config.out}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter suggest`."""
    limit_openmp()
    run_command(SuggestConfig, print_suggestions, "clip-adapter suggest", arguments)
