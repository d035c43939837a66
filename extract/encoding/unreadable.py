"""Name all broken images at once, so that they need not be found one by one."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.images import BadImage, naming, read_rgb

NAMED_MAX = 20
LOOKING_SECONDS = 30.0


@dataclass(frozen=True)
class Skipped:
    """An image that cannot be used: its row, its id and a sentence that says why."""

    row: int
    name: str
    reason: str


class BrokenImage(UserError):
    """The first image that cannot be decoded, where none may be left out."""

    def __init__(self, image: Skipped) -> None:
        super().__init__(image)  # what it is made of anew where it is unpickled
        self.image = image

    def __str__(self) -> str:
        return f"{self.image.reason}; repair or remove it, or use --on-error skip."


def name_all(first: Skipped, rest: Sequence[tuple[Split, range]], workers: int) -> UserError:
    """What to say about `first` and those broken images that lie in `rest`, rows of splits.

    They are decoded but not encoded, in threads, for at most half a minute.
    """
    reasons = [first.reason]
    looked_at, total = 0, sum(len(rows) for _, rows in rest)
    deadline = time.monotonic() + LOOKING_SECONDS
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        for chunk in _chunks(rest, 8 * workers):
            if time.monotonic() > deadline:
                break
            reasons += filter(None, pool.map(_reason, *zip(*chunk, strict=True)))
            looked_at += len(chunk)
    limit = ""
    if looked_at < total:
        limit = (
            f" (others were looked for in {looked_at:,} of {total:,} further images, for "
            f"{LOOKING_SECONDS:.0f} s)"
        )
    if len(reasons) == 1:
        return UserError(f"{first.reason}; repair or remove it, or use --on-error skip{limit}.")
    named = f", of which {NAMED_MAX} are named" if len(reasons) > NAMED_MAX else ""
    error = UserError(
        f"{len(reasons):,} images cannot be used{named}; repair or remove them, or use --on-error "
        f"skip{limit}."
    )
    for reason in reasons[:NAMED_MAX]:
        error.add_note(reason)
    return error


def _chunks(
    rest: Sequence[tuple[Split, range]], size: int
) -> Iterator[tuple[tuple[Split, int], ...]]:
    pairs = ((split, row) for split, rows in rest for row in rows)
    while chunk := tuple(islice(pairs, size)):
        yield chunk


def _reason(split: Split, row: int) -> str | None:
    try:
        with naming(split.ids[row]):
            read_rgb(partial(split.read, row))
    except (BadImage, UserError) as error:
        return str(error).rstrip(".")
    return None
