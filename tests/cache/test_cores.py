"""Threads follow affinity and control groups."""

import os
from pathlib import Path

import pytest

from clip_adapter import cores
from clip_adapter.cores import available_cores, limit_openmp


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups on a machine that lets this process have 8 cores."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_affinity_of_this_process() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_without_control_groups_it_is_the_affinity(groups: Path) -> None:
    assert available_cores() == 8
    write(groups / "own", "no such form\n")
    assert available_cores() == 8


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 8), ("150000 100000", 2), ("400000 100000", 4), ("5000 100000", 1), ("x", 8)],
)
def test_a_quota_of_version_2(groups: Path, quota: str, count: int) -> None:
    write(groups / "own", "0::/user/session\n")
    write(groups / "cgroup" / "user" / "session" / "cpu.max", f"{quota}\n")
    assert available_cores() == count


def test_the_quota_of_a_group_above_holds_too(groups: Path) -> None:
    write(groups / "own", "0::/user/session\n")
    write(groups / "cgroup" / "user" / "session" / "cpu.max", "700000 100000\n")
    write(groups / "cgroup" / "user" / "cpu.max", "300000 100000\n")
    assert available_cores() == 3


def test_the_root_of_a_container(groups: Path) -> None:
    write(groups / "own", "0::/docker/0123\n")
    write(groups / "cgroup" / "cpu.max", "200000 100000\n")
    assert available_cores() == 2


@pytest.mark.parametrize(("quota", "count"), [(-1, 8), (250_000, 3)])
def test_a_quota_of_version_1(groups: Path, quota: int, count: int) -> None:
    write(groups / "own", "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n")
    write(groups / "cgroup" / "cpu" / "a" / "cpu.cfs_quota_us", f"{quota}\n")
    write(groups / "cgroup" / "cpu" / "a" / "cpu.cfs_period_us", "100000\n")
    assert available_cores() == count


@pytest.mark.parametrize(
    ("quota", "before", "after"), [("max", None, None), ("200000", None, "2"), ("200000", "5", "5")]
)
def test_openmp_keeps_to_a_quota(
    groups: Path, monkeypatch: pytest.MonkeyPatch, quota: str, before: str | None, after: str | None
) -> None:
    environment = {} if before is None else {"OMP_NUM_THREADS": before}
    monkeypatch.setattr(os, "environ", environment)
    write(groups / "own", "0::/\n")
    write(groups / "cgroup" / "cpu.max", f"{quota} 100000\n")
    limit_openmp()
    assert environment.get("OMP_NUM_THREADS") == after
