"""`--ray`: tasks on several nodes, of which workers, nodes and the driver may be lost."""

import importlib.util
import os
import re
import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_adapter import cluster
from clip_adapter.errors import UserError
from clip_adapter.extract import ray_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.local_encoding import packages
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.extract import main
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.study import parse, study
from tests import processes
from tests.cache.rewriting import datasets
from tests.pipelines.run_files import assert_same_end, killed_after
from tests.pipelines.test_study import WORDS as STUDY
from tests.pipelines.tiny_cache import tiny_data, write_cache

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
}
TRIES = 5  # a raylet gives up where a loaded machine does not start its agents within 15 s
COUNT = 24


class Nodes:
    """A head without cores and nodes with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self._add(0)
        self.nodes: list[Any] = []

    def ready(self, count: int) -> list[Any]:
        """So many nodes, new ones where there are fewer."""
        while len(self.nodes) < count:
            self.nodes.append(self._add(1))
        return self.nodes

    def lose(self, node: Any) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def _add(self, cores: int) -> Any:
        for left in reversed(range(TRIES)):
            try:
                return self.cluster.add_node(
                    num_cpus=cores, object_store_memory=80 << 20, include_dashboard=False
                )
            except Exception:
                if not left:
                    raise

    def workers(self, node: Any) -> list[int]:
        """The processes of a node that have taken tasks, not its agents."""
        raylet = node.all_processes["raylet"][0].process.pid
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            ours = title.startswith(b"ray::") and b"Agent" not in title
            if int(parent) == raylet and ours:
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
    """Images that take some 0.1 s to decode, links to three; their views differ by their names.
    Two are damaged."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
        large = np.kron(coarse, np.ones((60, 60, 1), np.uint8))
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


def test_a_cluster_without_a_node_for_tasks(nodes: Nodes, tmp_path: Path) -> None:
    assert nodes.nodes == [], "this test comes first"
    with pytest.raises(UserError, match="no node of the cluster has a core for tasks; start some"):
        extract(ExtractConfig(out=tmp_path / "a.h5", ray=nodes.cluster.address))
    assert not list(tmp_path.iterdir())


def test_a_node_that_would_give_other_numbers_is_named(
    nodes: Nodes, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sentence comes from: a worker, which sees what this process sees not."""
    nodes.ready(1)
    stated = {**packages(), "pillow": "1.0"}
    monkeypatch.setattr(ray_encoding, "packages", lambda: stated)
    config = ExtractConfig(**options(photographs, tmp_path / "a.h5"), ray=nodes.cluster.address)
    own = f"pillow {packages()['pillow']}"
    words = rf"^Node \S+ \(\S+\): it has other packages \('{own}'\) than where the run began"
    with pytest.raises(UserError, match=words):
        extract(config)
    with pytest.raises(UserError, match="no node of the Ray cluster has a GPU"):
        extract(replace(config, device="cuda"))
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_worker_node_and_driver_are_lost_and_the_file_is_the_undivided_one(
    nodes: Nodes, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = extract(ExtractConfig(**options(photographs, tmp_path / "whole.h5")))
    both = tuple(nodes.ready(2))
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
        wait_for(3)
        node = next(node for node in both if nodes.workers(node))  # the other may still begin
        for pid in nodes.workers(node):
            os.kill(pid, signal.SIGKILL)
        wait_for(6)
        nodes.lose(next(other for other in both if other is not node))
        wait_for(10)
        child.kill()
        child.join()
    finally:
        child.kill()
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    nodes.ready(2)
    finished = processes.run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    (gone_on,) = re.findall(r"goes on from image (\d+) of 24, where", finished.stderr)
    assert 12 <= int(gone_on) < 24
    assert "2 images skipped (2 train), the first: train/" in finished.stdout
    assert datasets(out) == datasets(whole)
    again = processes.run(["extract", *line(photographs, out)], tmp_path)
    assert "nothing to do" in again.stdout, "how it was made is no part of what it is"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)


@pytest.fixture
def port() -> Iterator[int]:
    """Where something answers that is no Ray."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socketserver.TCPServer(("", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("everywhere", "--ray takes auto, local or HOST:PORT, not 'everywhere'."),
        ("localhost:99999", "--ray takes auto, local or HOST:PORT, not 'localhost:99999'."),
        ("ray://a:10001", "--ray takes auto, local or HOST:PORT, not 'ray://a:10001'."),
        ("auto --shard 1/2", "--ray divides the work by itself; leave out --shard, and torchrun."),
        ("local --device cuda:1", "--device takes auto, cpu or cuda."),
        ("127.0.0.1:1", r"there is no Ray cluster at \S+:1 \(Connection refused\); start its head"),
        ("127.0.0.1:PORT", r"there is no Ray cluster at \S+ \(what answers there is no Ray\)"),
    ],
)
def test_bad_arguments_are_a_sentence_soon(
    words: str, sentence: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["--ray", *words.replace("PORT", str(port)).split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(sentence, said) and said.count("\n") == 1
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--caches a.h5 --ray everywhere", "takes auto, local or HOST:PORT, not 'everywhere'."),
        ("--runs a --ray local", "--ray has no effect without --caches."),
        ("--caches a.h5 --ray 127.0.0.1:1", "there is no Ray cluster at "),
    ],
)
def test_bad_arguments_of_a_study_are_a_sentence(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        study(parse(words.split()))
    assert not list(tmp_path.iterdir())


def test_without_the_package_and_under_torchrun(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"needs the package ray: pip install 'clip-adapter\[ray"):
        extract(ExtractConfig(out=tmp_path / "a.h5", ray="local"))
    monkeypatch.undo()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="leave out --shard, and torchrun"):
        extract(ExtractConfig(out=tmp_path / "a.h5", ray="local"))
    assert not list(tmp_path.iterdir())


def test_a_study_of_tasks_is_the_local_one_and_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    """It goes on with a run that was fitted here and interrupted; a second call fits nothing."""
    names = ("apples", "boats")
    for seed, name in enumerate(names):
        write_cache(tmp_path / f"{name}.h5", tiny_data(train=(5,) * 3, seed=seed))
    caches = ["--caches", *(f"{name}.h5" for name in names), *STUDY]
    local = processes.run(["clip-adapter", "study", *caches, "--out", "whole"], tmp_path)
    assert local.returncode == 0, local.stderr
    config = parse([*caches, "--out", "out"]).fit
    begun = replace(config, cache=tmp_path / "apples.h5", out=tmp_path / "out" / "apples")
    with killed_after(3, "add_result"):
        fit(begun)
    command = ["clip-adapter", "study", *caches, "--out", "out", "--ray", "local"]
    done = processes.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == local.stdout
    for name in ("study.csv", "study.md", "study.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in names:
        assert_same_end(tmp_path / "out" / name, tmp_path / "whole" / name)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/results.csv")}
    nodes.ready(1)
    again = processes.run([*command[:-1], nodes.cluster.address], tmp_path)
    assert again.stdout == local.stdout
    assert times == {path: path.stat().st_mtime_ns for path in times}
