"""Join parts and report it, for `merge` and for the processes of torchrun."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from clip_adapter.cache.parts import PartFile, merge_parts
from clip_adapter.cache.text_tower import tower_path, write_text_tower
from clip_adapter.errors import UserError
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
)
from clip_adapter.listener import Listener


def join_parts(parts: Sequence[Path], out: Path, listener: Listener) -> None:
    """Join the parts of a cache into `out` and tell what is in it.

    Where the cache has a text tower, it is copied from beside the first part.
    Raises UserError as `merge_parts` does, and, before anything is written, where that tower is
    not there.
    """
    with PartFile(parts[0]) as part:  # all name the same backbone, else they are not joined
        sha256 = part.metadata.backbone.get("text_tower_sha256")
    tower = None if sha256 is None else _tower(parts, sha256)
    merged = merge_parts(parts, out)
    if tower is not None:
        write_text_tower(tower_path(out), tower.read_bytes())
    warn_of_duplicates(merged.several, listener)
    warn_of_lost_classes(merged.tallies, merged.class_names, listener)
    joined = f" (joined from {len(parts)} parts)"
    lines = [
        describe(out, merged.tallies, len(merged.class_names), joined),
        describe_skipped(merged.tallies, None),
    ]
    listener.result("\n".join(filter(None, lines)))


def _tower(parts: Sequence[Path], sha256: str) -> Path:
    """The text tower of this hash that lies beside a part."""
    for path in sorted({tower_path(part) for part in parts}):
        if path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256:
                return path
    raise UserError(
        f"The text tower that `extract` wrote beside the first part, {tower_path(parts[0]).name}, "
        "is not there any more; put it back and merge again."
    )
