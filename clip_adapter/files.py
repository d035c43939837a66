"""Files: whole or absent, written by one process, and files at all; and those that people name and
write, of which every flaw is a sentence."""

import fcntl
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from clip_adapter.errors import Contradiction, UserError
from clip_adapter.words import quoted, size

LARGEST = 2**28  # bytes that are read into memory: of results.csv a million rows
DEEPEST = 32  # levels of a JSON document; our own have five
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is the pointer that Git LFS left in the file's place; get the file with git lfs pull"
FOLDER = "a folder"
KINDS = {
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write `content` beside `path` and rename it there, so that nobody sees half of it.

    sync: not even after a power cut, for which the disk is waited for.
    """
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a link to another file
    with temporary.open("xb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The path of a file that gets the name `path` when all of it is written; of a process that is
    killed it stays behind, and goes when the same is written again."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError where one of these folders in it, or one within them, is a link: what is
    written, removed or read there would be in a folder that somebody else has named."""
    for name in names:
        inner = (Path(at, one) for at, folders, _ in os.walk(folder / name) for one in folders)
        for place in chain([folder / name], inner):
            if place.is_symlink():
                raise UserError(f"{place} is a link; put the folder itself there, or remove it.")


def take_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder until it is closed; False where another process has it.

    path: what the lock guards. Where the file system knows no locks, as on some clusters, this
    says so on standard error and returns True: that is no reason to refuse the work.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # ENOSYS, ENOLCK or EOPNOTSUPP; of NFS EBADF for a folder, which is not open for writing.
    except OSError as error:
        print(
            f"warning: {path} cannot be locked ({error.strerror}); let no other process write it "
            "at the same time.",
            file=sys.stderr,
        )
    return True


def other_kind(path: Path) -> str | None:
    """What `path` is if it is no regular file, such as `a named pipe`; found without opening it,
    since that may wait for ever. Raises OSError where there is nothing."""
    mode = path.stat().st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no file")


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder at `path`, found without opening it.

    Raises UserError for a pipe, a socket or a device, where reading might never end, and for a path
    that cannot be looked up.
    """
    try:
        kind = other_kind(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from error
    if kind not in (None, FOLDER):
        raise UserError(f"{path} is {kind}; name a file.")
    return True


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a file that somebody else may have made.

    Raises OSError where there is none, and UserError as `is_there` does, and for more than
    `largest` bytes.
    """
    is_there(path)
    if (length := path.stat().st_size) > largest:
        raise UserError(f"{path} is too large, {size(length)}; at most {size(largest)} are read.")
    return path.read_bytes()


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The content as UTF-8; see `read_bytes`. Raises ValueError where it is none."""
    return read_bytes(path, largest).decode("utf-8")


def user_path(text: str) -> Path:
    """The path that `text` means, with ~ for home.

    Raises UserError where there is no such home, for a NUL, and for an empty name.
    """
    if not text:
        raise UserError("An empty name names no file; write . for the folder you are in.")
    if "\0" in text:
        raise UserError(f"The path {text!r} holds a NUL, which no path can; write it again.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"The path {text} means no folder: {error}; write it out.") from None


def is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one. Names too long for any file are none."""
    return os.path.isfile(path)  # noqa: PTH113 - which raises nothing


def is_folder(path: Path) -> bool:
    """The same for a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def check_folder(flag: str, path: str | Path) -> None:
    """Raises UserError where the folder that an option names is not there."""
    if not is_folder(Path(path)):
        raise UserError(f"{flag}: there is no folder {path}.")


def check_writable(path: Path) -> None:
    """Raises UserError where no file can get this name."""
    if is_folder(path) or not is_folder(path.absolute().parent):
        raise UserError(f"{path} cannot be written: there is no such folder, or it is one itself.")


def check_new(path: Path, force: bool) -> None:
    """Raises UserError where a file or folder has this name, which is not to be overwritten."""
    if is_there(path) and not force:
        raise UserError(f"{path} exists; choose another name, or --force to overwrite it.")


def unreadable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be read."""
    reason = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    return UserError(f"Cannot read {path}: {reason}; check the path and its rights.")


def is_lfs_pointer(source: Path | bytes) -> bool:
    """Whether a file, or what begins with these bytes, is none but says where Git LFS has it; not
    where it cannot be read."""
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                source = file.read(len(LFS_POINTER))
        except OSError:
            return False
    return source.startswith(LFS_POINTER)


def read_users_text(path: Path) -> str:
    """All of a text file, line ends as they are, without the mark (BOM) that some programs put at
    its beginning.

    Raises UserError where it is no regular file, cannot be read, is larger than a list could be,
    not UTF-8, or the pointer that Git LFS left in a file's place.
    """
    try:
        if kind := other_kind(path):
            raise UserError(f"{path} is {kind}; name a text file.")
        content = read_bytes(path)
        if is_lfs_pointer(content):
            raise UserError(f"{path} {LFS_ADVICE}.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of a JSON reader for what people write. Raises Contradiction for a name
    that stands twice in one object, of which a dictionary would forget the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Contradiction(f"it names {quoted(twice)} twice in one object; join the two")
    return values


def parse_json(text: str | bytes, **how: Any) -> Any:
    """What `json.loads` makes of a document that somebody else may have made.

    how: as `json.loads` takes it. Raises ValueError for anything else, and for one that is nested
    so deep that whatever walks it would end in a RecursionError.
    """
    try:
        content = json.loads(text, **how)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [[content]]
    for _ in range(DEEPEST + 1):
        if not (level := [inner for outer in level for inner in _containers(outer)]):
            return content
    raise ValueError("it is nested too deep")


def _containers(values: Any) -> list[Any]:
    """The objects and lists among what an object or a list holds."""
    several = values.values() if isinstance(values, dict) else values
    return [value for value in several if isinstance(value, dict | list)]
