"""How many processors this process may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """The processors of this process's affinity, or fewer where a control group grants less time.

    A quota of 1.5 processors is 2: threads that wait for their share are better than an idle one.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [-(-quota // period) for quota, period in _quotas() if quota > 0 and period > 0]
    return max(1, min([cores, *quotas]))


def limit_openmp() -> None:
    """Have OpenMP, which knows the affinity, keep to the limit of a control group too.

    For commands, before they load PyTorch. What the user has set stays.
    """
    if (cores := available_cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _quotas() -> Iterator[tuple[int, int]]:
    """(µs granted, µs of a period) of every control group that this process is in.

    The limit of a group holds for the groups below it too. Inside a container its own group often
    is the root of what is mounted, whatever path the kernel names.
    """
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                for folder in _upwards(CGROUPS, path):
                    yield from _numbers(folder / "cpu.max")
            elif "cpu" in controllers.split(","):
                for folder in _upwards(CGROUPS / "cpu", path):
                    yield from _numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _numbers(*files: Path) -> Iterator[tuple[int, int]]:
    """Quota and period, where there are such files and the quota is a number."""
    with suppress(OSError, ValueError):
        quota, period = " ".join(file.read_text() for file in files).split()
        yield int(quota), int(period)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group and those of the groups that it is in, up to the root."""
    folder = root / path.lstrip("/")
    yield folder
    for parent in folder.parents:
        if not parent.is_relative_to(root):
            break
        yield parent
