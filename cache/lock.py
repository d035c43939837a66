"""One process at a time, where the file system can tell."""

import fcntl
import sys
from pathlib import Path


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
