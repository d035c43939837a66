"""`--ray`: tasks on several nodes, of which workers, nodes and the driver may be lost."""

import importlib.util
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError
from clip_adapter.extract import ray_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from tests import processes
from tests.cache.rewriting import datasets
from tests.extract.test_extract_command import refused

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs pip install 'clip-adapter[ray]'"
    ),
]
# Of nodes that share one small machine; Ray reads them as it is imported.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_grpc_client_keepalive_time_ms": "3000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
TRIES = 5  # a raylet gives up where a loaded machine does not start its agents within 15 s
COUNT = 40


class Nodes:
    """A head without cores and nodes with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.head = self.add(0)

    def add(self, cores: int = 1) -> Any:
        for left in reversed(range(TRIES)):
            try:
                return self.cluster.add_node(
                    num_cpus=cores, object_store_memory=80 << 20, include_dashboard=False
                )
            except Exception:
                if not left:
                    raise

    def workers(self, node: Any) -> list[int]:
        """The processes of a node that have taken tasks."""
        raylet = node.all_processes["raylet"][0].process.pid
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if int(parent) == raylet and title.startswith(b"ray::"):
                found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """As on up to four cores: each pass of images has one thread, as in a task."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take some 0.2 s to decode, links to three; their views differ by their names.
    Two are damaged."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
        large = np.kron(coarse, np.ones((100, 100, 1), np.uint8))
        Image.fromarray(large).save(root / f"{number}.png", compress_level=1)
    for number in range(COUNT):
        split, kind = ("test", "train")[number % 4 > 0], ("cat", "eel")[number % 2]
        path = root / "images" / split / kind / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number in (5, 22):
            path.write_bytes(b"\x89PNG")
        else:
            path.symlink_to(root / f"{number % 3}.png")
    return root / "images"


def options(photographs: Path, out: Path) -> dict[str, Any]:
    return {
        "dataset": f"folder:{photographs}", "out": str(out), "on_error": "skip", "views": 1,
        "val": 0.0, "batch_size": 2, "templates": ("a {}", "the {}"),
    }  # fmt: skip


def line(photographs: Path, out: Path) -> list[str]:
    return [
        word
        for name, value in options(photographs, out).items()
        for word in (f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else
                     map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]  # fmt: skip


def staged(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.partial").glob("*.batch")))


def test_worker_node_and_driver_are_lost_and_the_file_is_the_undivided_one(
    nodes: Nodes, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = extract(ExtractConfig(**options(photographs, tmp_path / "whole.h5")))
    first, second = nodes.add(), nodes.add()
    out = tmp_path / "features.h5"
    command = ["extract", *line(photographs, out), "--ray", nodes.cluster.address]
    child = processes.start(command, tmp_path, err=tmp_path / "err")

    def wait_for(batches: int) -> None:
        deadline = time.monotonic() + 120
        while staged(out) < batches:
            assert child.exitcode is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        wait_for(4)
        for pid in nodes.workers(first):
            os.kill(pid, signal.SIGKILL)
        wait_for(8)
        nodes.cluster.remove_node(second, allow_graceful=False)
        wait_for(12)
        child.kill()
        child.join()
    finally:
        child.kill()
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    nodes.add()
    finished = processes.run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    (gone_on,) = re.findall(r"goes on from image (\d+) of 40, where", finished.stderr)
    assert 20 <= int(gone_on) < 40
    assert "2 images skipped (2 train), the first: train/" in finished.stdout
    assert datasets(out) == datasets(whole)
    again = processes.run(["extract", *line(photographs, out)], tmp_path)
    assert "nothing to do" in again.stdout, "how it was made is no part of what it is"
