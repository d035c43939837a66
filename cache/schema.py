"""What is in a cache, format version 2: the tables of FORMAT.md for the program."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

FORMAT = "clip-feature-cache"
PART_FORMAT = "clip-feature-cache-part"
FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
TEXT = "text"
METADATA = "metadata"
METADATA_SHA256 = "metadata_sha256"

# Between which the largest number of a feature lies, by magnitude: far from where squares and sums
# of products leave float32, and from the smallest norm that normalising divides by.
SMALLEST_FEATURE, LARGEST_FEATURE = 1e-6, 1e6
# Beyond these losses or slopes may leave float32, or a bias leaves a logit no digits for the rest.
# CLIP's scale is 100 and SigLIP's bias −17 at most.
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e10
LARGEST_BIAS = 1e4

CHUNK_BYTES = 1 << 20
LARGEST_CHUNK_BYTES = 64 << 20
CHUNKS_AT_LEAST = 1000  # that a dataset may have, whatever its size
BYTES_PER_CHUNK = 4096  # of which it may have one more each


class Kind(Enum):
    """What the elements of a dataset are; numbers are little-endian."""

    FEATURES = "float32 or float16"
    FLOAT32 = "float32"
    INT32 = "int32"
    UINT64 = "uint64"
    STRING = "fixed-length UTF-8, padded with NUL"
    BYTES = "uint8"


@dataclass(frozen=True)
class Element:
    """A dataset of the format.

    axes: a letter for each axis. A letter means the same length everywhere, but V, N and S (images
        that were skipped) mean one in each split.
    required: whether every cache has it. since: the format version that introduced it.
    whole: whether readers read all of it, so that the metadata can state its SHA-256.
    """

    name: str
    kind: Kind
    axes: str
    required: bool = False
    since: int = 1
    whole: bool = True


IMAGES = (
    Element("features", Kind.FEATURES, "VND", required=True, whole=False),
    Element("labels", Kind.INT32, "N", required=True),
    Element("ids", Kind.STRING, "N", required=True),
    Element("skipped", Kind.STRING, "S"),
    Element("skipped_labels", Kind.INT32, "S"),
    Element("digests", Kind.UINT64, "N"),
    Element("stamps", Kind.UINT64, "N", since=2),
    Element("contents", Kind.UINT64, "N", since=2),
    Element("skipped_stamps", Kind.UINT64, "S", since=2),
    Element("pre_projection", Kind.FEATURES, "VNF", since=2, whole=False),
    Element("features_hashes", Kind.UINT64, "VN", since=2),
    Element("pre_projection_hashes", Kind.UINT64, "VN", since=2),
)
OTHERS = (
    Element("text/features", Kind.FEATURES, "CPD", required=True),
    Element("text/class_names", Kind.STRING, "C", required=True),
    Element("text/templates", Kind.STRING, "P", required=True),
    Element("text/prompts", Kind.STRING, "CP"),
    Element("text/tokens", Kind.INT32, "CPL", since=2),
    Element("projection/weights", Kind.FLOAT32, "FD", since=2),
    Element("projection/bias", Kind.FLOAT32, "D", since=2),
)
ELEMENTS: Mapping[str, Element] = {
    **{f"images/{split}/{element.name}": element for split in SPLITS for element in IMAGES},
    **{element.name: element for element in OTHERS},
}
HASHES = "_hashes"  # behind the name of what is not read whole: of each row
# In the order in which the content hash reads them; the second half where they are there.
HASHED = (
    *(f"images/{split}/{name}" for split in SPLITS for name in ("features", "labels", "ids")),
    *("text/features", "text/class_names", "text/templates"),
    *(f"images/{split}/pre_projection" for split in SPLITS),
    *("text/tokens", "projection/weights", "projection/bias"),
)


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows per HDF5 chunk, so that a chunk holds about 1 MiB."""
    return max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))
