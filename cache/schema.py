"""What is in a cache, format version 2: the tables of FORMAT.md for the program.

An entry of `ELEMENTS` is all that the program knows of a dataset: by it the writer stores it, the
reader checks it, `merge` joins it, and a row of it is picked from where it was encoded.
"""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from clip_adapter.errors import Contradiction

FORMAT = "clip-feature-cache"
PART_FORMAT = "clip-feature-cache-part"
FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"  # beside them, images without labels
ALL_SPLITS = (*SPLITS, UNLABELLED)
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
HASHES = "_hashes"  # behind the name of what has a hash of each row
OF_A_SPLIT = "VNS"  # letters that mean a length of their own in each split


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

    axes: a letter for each axis, the same length everywhere, or for V, N and S in each split. What
        has N is one row for each image, S one for each that was skipped: parts are joined along
        them. Part 1 alone has what has neither.
    required: whether every cache has it.
    by_row: readers may read some rows, each of which has a hash in `NAME_hashes`; else they read
        all, and the metadata states the SHA-256.
    content: in which third of `content_sha256` it counts, where it is there; 0: in none.
    """

    name: str
    kind: Kind
    axes: str
    required: bool = False
    by_row: bool = False
    content: int = 0

    @property
    def row_axis(self) -> int:
        """The axis of the rows, which is the first but for views."""
        return 1 if self.axes.startswith("VN") else 0


def of_images(split: str, name: str) -> str:
    """The path of an element of a split."""
    return f"images/{split}/{name}"


_OF_IMAGES = (
    Element("features", Kind.FEATURES, "VND", required=True, by_row=True, content=1),
    Element("features_hashes", Kind.UINT64, "VN"),
    Element("pre_projection", Kind.FEATURES, "VNF", by_row=True, content=2),
    Element("pre_projection_hashes", Kind.UINT64, "VN"),
    Element("features2", Kind.FEATURES, "VNE", by_row=True, content=3),
    Element("features2_hashes", Kind.UINT64, "VN"),
    Element("labels", Kind.INT32, "N", required=True, content=1),
    Element("ids", Kind.STRING, "N", required=True, content=1),
    Element("skipped", Kind.STRING, "S"),
    Element("skipped_labels", Kind.INT32, "S"),
    Element("digests", Kind.UINT64, "N"),
    Element("stamps", Kind.UINT64, "N"),
    Element("contents", Kind.UINT64, "N"),
    Element("skipped_stamps", Kind.UINT64, "S"),
    Element("groups", Kind.STRING, "N"),
)
# What is added to a cache, or taken from it, does not change what others were fitted on.
_OF_UNLABELLED = tuple(
    replace(one, content=0) for one in _OF_IMAGES if not one.name.endswith("labels")
)
_OF_ALL = (
    Element("text/features", Kind.FEATURES, "CPD", required=True, content=1),
    Element("text/tokens", Kind.INT32, "CPL", content=2),
    Element("text/class_names", Kind.STRING, "C", required=True, content=1),
    Element("text/templates", Kind.STRING, "P", required=True, content=1),
    Element("text/prompts", Kind.STRING, "CP"),
    Element("projection/weights", Kind.FLOAT32, "FD", content=2),
    Element("projection/bias", Kind.FLOAT32, "D", content=2),
)
# By path, in the order in which a writer stores them.
ELEMENTS: Mapping[str, Element] = {
    **{of_images(split, one.name): one for split in SPLITS for one in _OF_IMAGES},
    **{of_images(UNLABELLED, one.name): one for one in _OF_UNLABELLED},
    **{one.name: one for one in _OF_ALL},
}
# In the order in which the content hash reads them.
HASHED = tuple(
    path for third in (1, 2, 3) for path, one in ELEMENTS.items() if one.content == third
)


def split_of(path: str) -> str:
    """The split that an element is of; "" for those that are of none."""
    return path.split("/")[1] if path.startswith("images/") else ""


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows per HDF5 chunk, so that a chunk holds about 1 MiB."""
    return max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))


def measure(
    shapes: Mapping[str, tuple[int, ...]], splits: Collection[str], *, part: bool
) -> dict[str, int]:
    """The lengths that the letters stand for, by letter; those of a split as `N train`.

    shapes: of each dataset that is there, by its path. splits: of ALL_SPLITS those that are there.
    part: of a part of a cache, which may lack things.
    Raises Contradiction for what FORMAT.md does not allow.
    """
    lengths: dict[str, int] = {}
    for path, shape in shapes.items():
        split = split_of(path)
        if len(shape) != len(ELEMENTS[path].axes) or not (prod(shape) or (part and split)):
            raise Contradiction(f"{path} has the shape {shape}")
        for axis, length in zip(ELEMENTS[path].axes, shape, strict=True):
            letter = f"{axis} {split}" if axis in OF_A_SPLIT else axis
            if lengths.setdefault(letter, length) != length:
                raise Contradiction(
                    f"{path} has the shape {shape}, which disagrees with the others "
                    f"({letter} is {lengths[letter]})"
                )
        if split not in ("", "train") and lengths.get(f"V {split}", 1) != 1:
            raise Contradiction(f"{path} has several views, which only train may have")
    if missing := _missing(shapes.keys(), splits, part):
        raise Contradiction(f"it lacks {', '.join(missing)}")
    return lengths


def _missing(there: Set[str], splits: Collection[str], part: bool) -> list[str]:
    text = not part or any(path.startswith("text/") for path in there)
    required = [path for path, element in ELEMENTS.items() if element.required]
    wanted = [
        path for path in required if (split_of(path) in splits or (not split_of(path) and text))
    ]
    for name, others in (("pre_projection", ["projection/weights"]), ("features2", [])):
        of_splits = [of_images(split, name) for split in splits]
        if not part and there & set(of_splits):
            wanted += [*of_splits, *others]
    if "projection/bias" in there:
        wanted.append("projection/weights")
    missing = [path for path in dict.fromkeys(wanted) if path not in there]
    return missing if part or splits else ["images", *missing]
