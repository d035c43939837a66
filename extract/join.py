"""Join parts and say so, for `merge` and for the processes of torchrun."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_adapter.cache.parts import merge_parts


def join_parts(parts: Sequence[Path], out: Path) -> str:
    """Join the parts of a cache into `out` and return what to say about it.

    Raises UserError as `merge_parts` does.
    """
    if several := merge_parts(parts, out):
        warn_of_duplicates(several)
    return f"{out}: joined from {len(parts)} parts, {out.stat().st_size / 2**20:.1f} MiB"


def warn_of_duplicates(several: dict[str, Any]) -> None:
    """Say on standard error what `in_several_splits` found."""
    one, other = several["examples"][0]
    print(
        f"warning: {several['images']} images are in more than one split ({one} is {other}); "
        "the cache lists up to twenty",
        file=sys.stderr,
    )
