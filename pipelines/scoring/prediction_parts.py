"""Answers for any number of images: a folder of Parquet files, of which those that are there are
not made again, however many processes write it."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_adapter.errors import UserError
from clip_adapter.extract.shards import Shard
from clip_adapter.files import parse_json, read_text
from clip_adapter.listener import Advance
from clip_adapter.pipelines.deciding.feature_table import STATED
from clip_adapter.pipelines.scoring.predicted_images import PredictedImages
from clip_adapter.pipelines.scoring.prediction_formats import Prediction, write_parquet
from clip_adapter.words import counted

PART_ROWS = 8192  # images of a part, as far as whole batches go into it
ABOUT = "_answers.json"  # what all parts are made with, from before the first one on
NAME = re.compile(r"part-[0-9]{10,}\.parquet")


@dataclass(frozen=True)
class Written:
    """How many parts there are now, how many of them were there before, and how many images of
    these could not be read."""

    parts: int
    kept: int
    unreadable: int

    def __str__(self) -> str:
        there = f", {self.kept:,} of them there already" if self.kept else ""
        return f" in {counted(self.parts, 'part')}{there}"


def write_parts(
    folder: Path,
    shard: Shard,
    predictions: PredictedImages,
    readable: Callable[[PredictedImages], Iterator[Prediction]],
    advance: Advance,
) -> Written:
    """Write `part-N.parquet` for some thousand images from image N of all on, with the columns of
    a single file; those of other shards may lie in the folder. What the part was made with stands
    in its schema's metadata, so that it is taken for no other.

    readable: the predictions of a part that get a row.
    Raises UserError where another process writes this shard, and where something else lies there or
    a part that was made with other arguments.
    """
    from clip_adapter.cache.staging import StagingFolder

    identity = {**predictions.identity, "part_rows": PART_ROWS}
    parts = kept = unreadable = 0
    # Readers of Parquet pass over names that begin so.
    with StagingFolder(folder / f"_{shard.index}-of-{shard.of}") as place:
        there = _rows_of_parts(folder, identity)
        _agree(folder, place.folder / ABOUT, identity)
        try:
            for rows, part in predictions.pieces(PART_ROWS):
                parts += 1
                name = f"part-{rows.start:010}.parquet"
                if name in there:
                    kept += 1
                    unreadable += len(rows) - there[name]
                    advance(len(rows), "")
                    continue
                temporary = place.folder / name
                write_parquet(temporary, part, readable(part), {STATED: json.dumps(identity)})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(folder / name)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "finished parts are kept, and the same command goes on from there"
            ) from None
        finally:
            place.remove()
    return Written(parts, kept, unreadable)


def _agree(folder: Path, own: Path, identity: Mapping[str, Any]) -> None:
    """Whoever comes first says what the answers are made with; the others have to agree, though no
    part is there yet. own: a place for what this process would say."""
    about = folder / ABOUT
    own.write_text(json.dumps(identity), encoding="utf-8")
    try:
        os.link(own, about)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not about.exists():
            own.replace(about)
    try:
        earlier = parse_json(read_text(about))
    except ValueError as error:
        raise UserError(f"{about} is damaged; name another folder.") from error
    _refuse_other(folder, earlier, identity)


def _refuse_other(folder: Path, stated: Any, identity: Mapping[str, Any]) -> None:
    earlier = stated if isinstance(stated, dict) else {}
    names = identity.keys() | earlier.keys()
    if differing := sorted(n for n in names if earlier.get(n) != identity.get(n)):
        raise UserError(
            f"{folder} holds answers that were made with other arguments "
            f"({', '.join(differing)} differ); repeat those arguments to go on, or name "
            "another folder."
        )


def _rows_of_parts(folder: Path, identity: Mapping[str, Any]) -> dict[str, int]:
    """The names of the parts that are there, and how many rows each has."""
    from pyarrow import parquet

    there = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("_", ".")):
            continue
        if not NAME.fullmatch(path.name):
            raise UserError(
                f"{folder} holds {path.name}, which is no part of answers; name another folder."
            )
        try:
            found = parquet.read_metadata(path)
            earlier = parse_json(found.metadata[STATED])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged or no part of answers; move it away, or name another folder."
            ) from error
        _refuse_other(folder, earlier, identity)
        there[path.name] = found.num_rows
    return there
