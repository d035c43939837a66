"""What glyph-clip is: its architecture, its preprocessing and its table of tokens."""

import gzip
import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import default_bpe

CONTEXT_LENGTH = 24
MERGES = 4000  # the full table has 48,894; its embeddings alone would be 6 MB at this width

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 128,
        "head_width": 32,
        "layers": 4,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 512 + MERGES + 2,  # bytes, bytes that end a word, merges, start and end
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS_CFG: dict[str, Any] = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def write_merges(path: Path) -> None:
    """Write the header and the first `MERGES` lines of open_clip's own byte-pair table, gzipped.

    Without a newline at the end, which SimpleTokenizer would take for one more (empty) merge.
    """
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    # No file name and no time in the gzip header, so that the same table gives the same bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write("\n".join(lines[: 1 + MERGES]).encode())


def write_config(path: Path) -> None:
    """Write the file in which open_clip's ``local-dir:`` finds architecture and preprocessing."""
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
