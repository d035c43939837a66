"""`clip-adapter merge`: join the parts that `extract --shard` wrote into one cache."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from clip_adapter.errors import UserError
from clip_adapter.files import check_new
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal


@dataclass(frozen=True)
class MergeConfig:
    """Join the parts of a feature cache into one file, equal to that of an undivided run.

    Attributes:
        out: Where the feature cache goes.
        parts: All parts of one cache, in any order; they are left as they are.
        force: Overwrite an existing file.
    """

    out: Positional[Path]
    parts: Positional[tuple[Path, ...]]
    force: bool = False


def merge(config: MergeConfig) -> Path:
    """Run `merge` and return the path of the cache.

    Raises UserError for files that are no parts, do not belong together, or are not all there.
    """
    if not config.parts:
        raise UserError("Name the parts to join: clip-adapter merge OUT PART…")
    check_new(config.out, config.force)
    # Not Path.resolve, which ends at a link that leads to itself.
    if os.path.realpath(config.out) in map(os.path.realpath, config.parts):
        raise UserError(f"{config.out} is one of the parts; name the cache otherwise.")
    from clip_adapter.extract.outcome import join_parts

    join_parts(config.parts, config.out, Terminal("merge"))
    return config.out


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter merge`."""
    run_command(MergeConfig, lambda config: merge(config) and None, "clip-adapter merge", arguments)
