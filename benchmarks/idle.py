"""Refuse to quote figures of a machine that does other work as well."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

OTHER_CORES = 0.15  # what an idle machine's housekeeping takes at most, in cores
SAMPLE_SECONDS = 2.0
ANYWAY = "BENCHMARK_ANYWAY"
PACKAGES = ("torch", "jax", "open_clip_torch", "pillow", "numpy")


@dataclass(frozen=True)
class _Snapshot:
    """Seconds since the machine started: wall, and CPU of everybody and of ours."""

    wall: float
    everybody: float
    ours: float


_first: _Snapshot | None = None


def require_idle() -> None:
    """End the program where other processes use the machine: now or since the first call.

    Call it before the first figure is taken and after the last. With the environment variable
    BENCHMARK_ANYWAY set it only says so, for trying a benchmark out.
    """
    global _first
    before = _snapshot()
    time.sleep(SAMPLE_SECONDS)
    now = _snapshot()
    loads = {"now": _other_load(before, now)}
    if _first is not None:
        loads["in between"] = _other_load(_first, now)
    _first = _first or now
    when, load = max(loads.items(), key=lambda item: item[1])
    if load <= OTHER_CORES:
        return
    message = f"other processes use {load:.2f} cores ({when}): figures taken here mean nothing"
    if ANYWAY not in os.environ:
        sys.exit(f"{message}; wait until they end, or set {ANYWAY}=1 to try the benchmark out.")
    print(f"NOT TO BE QUOTED: {message}")


def machine() -> str:
    """The processor, its cores and the versions of what is measured, on one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores | Python {platform.python_version()}, {versions}"


def _snapshot() -> _Snapshot:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    busy = user + nice + system + irq + softirq + steal
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return _Snapshot(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), ours)


def _other_load(before: _Snapshot, after: _Snapshot) -> float:
    """Cores that others kept busy, on average. Children count as others until they have ended."""
    others = (after.everybody - before.everybody) - (after.ours - before.ours)
    return max(0.0, others / (after.wall - before.wall))
