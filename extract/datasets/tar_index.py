"""Where the files of a tar lie, by its headers alone: POSIX ustar with pax and GNU long names.

Nothing is unpacked, no link is followed: of a member only the bytes that lie in the tar are read.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clip_adapter.errors import UserError
from clip_adapter.files import LFS_ADVICE, is_lfs_pointer, other_kind, unreadable
from clip_adapter.words import printable, shortened

BLOCK = 512
LONGEST_NAMES = 2**16  # bytes of what states long names
TRAILER = 2**20  # bytes behind the end that are looked at
FILES = b"0\0007"
FOLDER = b"5"
OTHER = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "pipe"}
COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}


@dataclass(frozen=True)
class TarIndex:
    """The regular files of a tar in its order, (name, offset, bytes); and how many members of other
    kinds it has, by kind."""

    members: list[tuple[str, int, int]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def tar_index(path: Path) -> tuple[TarIndex, int, int]:
    """The index of a tar, its size and the time of its last change (ns).

    Raises UserError for what is no tar, is compressed, cut, or has something behind its end.
    """
    index = TarIndex()
    try:
        if kind := other_kind(path):
            raise UserError(f"{path} is {kind}; name a tar.")
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            for of, name, offset, length in _members(path, file.fileno(), status.st_size):
                if of in FILES and not name.endswith("/"):  # so older tars write folders
                    index.members.append((name, offset, length))
                elif of not in FOLDER + FILES:
                    index.others[OTHER.get(of, "sparse or split file")] += 1
    except OSError as error:
        raise unreadable(path, error) from error
    return index, status.st_size, status.st_mtime_ns


def _members(path: Path, descriptor: int, size: int) -> Iterator[tuple[bytes, str, int, int]]:
    """Type, name, offset and bytes of each member that is no statement on the next one."""
    at = 0
    stated: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if header == bytes(BLOCK):
            break
        if len(header) < BLOCK:
            raise _cut(path) if at else _no_tar(path, header)
        if _checksum(header) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise _no_tar(path, header) if not at else _damaged(path, at)
        kind, length = header[156:157], _number(path, header[124:136], at)
        start, more = at + BLOCK, kind == b"S" and header[482]
        while more:  # of a sparse file of GNU's, blocks that its size does not count
            more, start = os.pread(descriptor, BLOCK, start)[504:505] > b"\0", start + BLOCK
        if kind in b"xL":
            if length > LONGEST_NAMES:
                raise _damaged(path, at)
            stated |= _stated(path, kind, os.pread(descriptor, length, start), at)
        elif kind not in b"gK":
            length = int(stated.get("size", length))
        # A link's size is that of its target, which lies elsewhere.
        at = start if kind in OTHER else start + -(-length // BLOCK) * BLOCK
        if at > size:
            raise _cut(path)
        if kind in b"xLKg":
            continue
        sparse = any(name.startswith("GNU.sparse") for name in stated)
        name = stated.get("path") or _name(header)
        yield b"S" if sparse else kind, name, start, length
        stated = {}
    if os.pread(descriptor, TRAILER, at).strip(b"\0"):
        raise UserError(
            f"{path} has something behind its end, as of two tars in one file; pack it anew."
        )


def _checksum(header: bytes) -> int:
    try:
        return int(header[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return -1


def _number(path: Path, octal: bytes, at: int) -> int:
    """Octal digits, or from 8 GiB on the bytes of a number behind one with the highest bit set."""
    if octal[0] == 0x80:
        return int.from_bytes(octal[1:])
    digits = octal.strip(b"\0 ") or b"0"
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise _damaged(path, at)
    return int(digits, 8)


def _name(header: bytes) -> str:
    """The name within the header; what ustar has in front of it is something else in GNU's."""
    name, prefix = (part.partition(b"\0")[0] for part in (header[:100], header[345:500]))
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return os.fsdecode(whole)


def _stated(path: Path, kind: bytes, content: bytes, at: int) -> dict[str, str]:
    """What a header states of the next member: pax records `LENGTH NAME=VALUE\\n`, a GNU name."""
    if kind == b"L":
        return {"path": os.fsdecode(content.partition(b"\0")[0])}
    stated = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 7 else 0
        name, sign, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not sign or not len(digits) < length <= len(content):
            raise _damaged(path, at)
        stated[os.fsdecode(name)] = os.fsdecode(value)
        content = content[length:]
    size = stated.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise _damaged(path, at)
    return stated


def _cut(path: Path) -> UserError:
    return UserError(f"{path} is cut: it ends before its last member does; get it again.")


def _damaged(path: Path, at: int) -> UserError:
    return UserError(f"{path} is damaged: at byte {at:,} there is no header; get it again.")


def _no_tar(path: Path, header: bytes) -> UserError:
    for magic, program in COMPRESSED.items():
        if header.startswith(magic):
            return UserError(
                f"{path} is compressed, so that no image in it can be found; unpack it: {program}."
            )
    if is_lfs_pointer(header):
        return UserError(f"{path} {LFS_ADVICE}.")
    named = printable(shortened(str(path)))
    return UserError(f"{named} is no tar; name a folder of tars, or one like train-0000.tar.")
