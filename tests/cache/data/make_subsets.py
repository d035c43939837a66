"""Make few_shot_subsets.json.gz: published subsets as row numbers instead of file names.

usage: python make_subsets.py FOLDER_OF_SPLIT_FILES FOLDER_OF_SUBSETS
"""

import gzip
import json
import sys
from pathlib import Path

SPLIT_FILES = {
    "oxford_pets": "split_zhou_OxfordPets.json",
    "dtd": "split_zhou_DescribableTextures.json",
}
PARTS = ("train", "val")


def data_set(name: str, splits: Path, subsets: Path) -> dict:
    split = json.loads((splits / SPLIT_FILES[name]).read_text())
    rows = {part: {item[0]: row for row, item in enumerate(split[part])} for part in PARTS}
    for part in PARTS:
        assert len(rows[part]) == len(split[part]), f"{name} {part}: a file name twice"
    assert not rows["train"].keys() & rows["val"].keys()
    drawn = json.loads((subsets / f"{name}.json").read_text())
    return {
        "labels": {part: [item[1] for item in split[part]] for part in PARTS},
        "subsets": {
            task: {part: [rows[part][file] for file in files[part]] for part in PARTS}
            for task, files in drawn.items()
        },
    }


if __name__ == "__main__":
    splits, subsets = map(Path, sys.argv[1:])
    text = json.dumps(
        {name: data_set(name, splits, subsets) for name in SPLIT_FILES}, separators=(",", ":")
    )
    target = Path(__file__).with_name("few_shot_subsets.json.gz")
    target.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{target.name}: {target.stat().st_size} bytes")
