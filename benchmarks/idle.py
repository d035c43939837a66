"""Whether a machine is quiet enough to be measured, and what machine it is."""

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

# The share of the cores that others may use while nothing of ours runs.
ALLOWED = 0.1
SECONDS = 2.0


def require_idle() -> None:
    """Exit with a sentence where other processes use more than a tenth of the cores (Linux)."""
    before = _busy_ticks(), time.perf_counter()
    time.sleep(SECONDS)
    ticks, seconds = _busy_ticks() - before[0], time.perf_counter() - before[1]
    share = ticks / os.sysconf("SC_CLK_TCK") / seconds / (os.cpu_count() or 1)
    if share > ALLOWED:
        sys.exit(f"other processes use {share:.0%} of the cores: no figures are quoted")


def machine() -> str:
    """Processor, cores that may be used, and the versions that matter."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    versions = ", ".join(f"{package} {version(package)}" for package in ("jax", "torch"))
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {versions}"


def _busy_ticks() -> int:
    """Clock ticks that the cores spent on anything but idling and waiting for disks."""
    user, nice, system, _, _, interrupts, soft, stolen = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return user + nice + system + interrupts + soft + stolen


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()
