"""`clip-adapter merge`: join the parts that `extract --shard` wrote into one cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.files import is_there


@dataclass(frozen=True)
class MergeConfig:
    """Join the parts of a feature cache into one file, equal to that of an undivided run.

    Attributes:
        out: Where the feature cache goes.
        parts: All parts of one cache, in any order; they are left as they are.
        force: Overwrite an existing file.
    """

    out: tyro.conf.Positional[Path]
    parts: tyro.conf.Positional[tuple[Path, ...]]
    force: bool = False


def merge(config: MergeConfig) -> Path:
    """Run `merge` and return the path of the cache.

    Raises UserError for files that are no parts, do not belong together, or are not all there.
    """
    if not config.parts:
        raise UserError("Name the parts to join: clip-adapter merge OUT PART…")
    if is_there(config.out) and not config.force:
        raise UserError(f"{config.out} exists; choose another name, or --force to overwrite it.")
    from clip_adapter.extract.join import join_parts

    print(join_parts(config.parts, config.out))
    return config.out


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter merge`."""
    from clip_adapter.console.command import run_command

    run_command(MergeConfig, lambda config: merge(config) and None, "clip-adapter merge", arguments)
