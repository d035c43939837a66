"""What docs/cluster.md says of Slurm, on a Slurm of two nodes that runs on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.pipelines.commands.predict import PredictConfig, print_predictions
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter, save_adapter
from clip_adapter.pipelines.scoring.zero_shot import zero_shot_weights
from tests.cache.rewriting import datasets
from tests.extract.image_folders import make_folder
from tests.pipelines.test_predict_caches import new_images

NOT_WHOLE = (
    "--shard auto is for a whole array from 0 or 1, and of this one 2 tasks from 3 to 7 are here"
)
NO_TASK = "--shard auto: this is no task of a Slurm array or step, and"
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
UP_WITHIN, DONE_WITHIN = 15, 120  # seconds
LAUNCHERS = ("SLURM", "RANK", "WORLD_SIZE", "MUNGE")
CLUSTER = """
ClusterName=one-machine
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
DependencyParameters=kill_invalid_depend
PlugStackConfig={folder}/no-plugins
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname=localhost Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
SHOW = f"""#!{sys.executable}
import sys
from clip_adapter.errors import UserError
from clip_adapter.extract.shards import parse_shard
try:
    shard = parse_shard(sys.argv[1])
    print(shard.index, "of", shard.of)
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment in which sbatch and srun find the cluster."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if not shutil.which(name, path=PATH)]
    if missing or os.geteuid():
        pytest.skip(f"needs {', '.join(missing) or 'to be root'} to run a Slurm on this machine")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config.write_text(CLUSTER.format(folder=folder, ports=free_ports(3)))
    kept = {name: own for name, own in os.environ.items() if not name.startswith(LAUNCHERS)}
    # One thread in each process, as in this one: with others rounding differs.
    own = {"PATH": PATH, "SLURM_CONF": str(config), "OMP_NUM_THREADS": "1"}
    environment = kept | own
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{kind}={folder}/munge.{kind[:-5]}" for kind in ("pid-file", "log-file")]
    munged += [f"--seed-file={folder}/munge.seed", f"--socket={folder}/munge.socket"]
    nodes = [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
    daemons: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(end_all, str(config), daemons)
        for number, command in enumerate([munged, ["slurmctld", "-D"], *nodes]):
            log = stack.enter_context((folder / f"{number}.log").open("w"))
            # They end with this process, too.
            tied = ["setpriv", "--pdeathsig", "KILL", *command]
            daemons.append(subprocess.Popen(tied, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + UP_WITHIN
        while (up := ask(environment, "sinfo", "-hN", "-o", "%t").split()) != ["idle", "idle"]:
            if time.monotonic() > deadline:
                pytest.skip(f"no Slurm is up on this machine after {UP_WITHIN} s: {up}")
            time.sleep(0.1)
        yield environment


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def end_all(config: str, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """The daemons and whatever they started, known by the file in their environment."""
    stated = f"SLURM_CONF={config}\0".encode()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if stated in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    for daemon in daemons:
        daemon.wait()


def ask(environment: Mapping[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout


def shell(lines: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run the lines and wait until every job that they submitted is done."""
    subprocess.run(
        ["bash", "-ec", lines], cwd=folder, env=environment, check=True, capture_output=True
    )
    deadline = time.monotonic() + DONE_WITHIN
    while jobs := ask(environment, "squeue", "-h"):
        assert time.monotonic() < deadline, jobs
        time.sleep(0.1)


def documented(command: str, own: Mapping[str, str]) -> str:
    """The lines of docs/cluster.md that submit the command, with one's own names in them."""
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console network\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (lines,) = (block for block in blocks if f"--wrap '{command} " in block)
    for old, new in own.items():
        assert old in lines
        lines = lines.replace(old, new)
    return re.sub(r"^\$ ", "", lines, flags=re.MULTILINE)


def test_an_array_and_its_merge_make_the_undivided_cache(
    slurm: Mapping[str, str], tmp_path: Path
) -> None:
    data = make_folder(tmp_path / "data", {"train": 6, "val": 2, "test": 3}, ("cat", "dog", "eel"))
    small = f"--dataset folder:{data} --backbone glyph-clip --batch-size 4"
    own = {
        "--dataset imagenet --backbone ViT-B-16": small,
        "1-32": "1-3",
        "imagenet.h5": "whole.h5",
    }
    shell(documented("extract", own), tmp_path, slurm)
    printed = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert {path.name for path in tmp_path.glob("*.h5*")} == {
        "whole.h5", "part-1.h5", "part-2.h5", "part-3.h5"
    }, printed  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undivided = tmp_path / "undivided.h5"
        extract(ExtractConfig(f"folder:{data}", out=undivided, batch_size=4))
    finally:
        torch.set_num_threads(threads)
    assert datasets(tmp_path / "whole.h5") == datasets(undivided)


def test_an_array_makes_one_folder_of_answers(slurm: Mapping[str, str], tmp_path: Path) -> None:
    config = PredictConfig(new_images(tmp_path / "new.h5", 9000), tmp_path / "run")
    with FeatureCache(config.paths) as cache:
        weights = zero_shot_weights(cache)
        info = AdapterInfo(
            *("zero-shot", {}, cache.class_names, cache.templates, cache.logit_scale, 0.0),
            *(cache.backbone, cache.preprocess, cache.dataset, cache.content_sha256, {}),
        )
    save_adapter(config.adapter, SavedAdapter(info, {}, weights))
    own = {"runs/first": "run", "imagenet.h5": "new.h5", "1-32": "1-2"}
    shell(documented("clip-adapter predict", own), tmp_path, slurm)
    whole = tmp_path / "whole.parquet"
    assert print_predictions(replace(config, out=whole)) == 0
    names = [path.name for path in sorted((tmp_path / "answers").glob("part-*"))]
    assert names == ["part-0000000000.parquet", "part-0000004096.parquet"]
    answers = parquet.read_table(tmp_path / "answers")
    assert answers.num_rows == 9000 and answers.equals(parquet.read_table(whole))


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        # Tasks that are submitted again: with the number of parts they are those that they were.
        ("sbatch --array=3,7 --wrap './show auto/8'", ["3 of 8", "7 of 8"]),
        ("sbatch --array=3,7 --wrap './show auto'", [f"{NOT_WHOLE}; say how many parts"] * 2),
        # A batch script of two tasks is one process, though Slurm calls it the first of them.
        ("sbatch --ntasks=2 --wrap './show auto'", [NO_TASK]),
        ("sbatch --ntasks=2 --array=0-1 --wrap './show auto'", ["1 of 2", "2 of 2"]),
        ("sbatch --nodes=2 --wrap 'srun ./show auto'", ["1 of 2", "2 of 2"]),
        (
            "sbatch --ntasks=2 --array=1-2 --wrap 'srun ./show auto'",
            ["1 of 4", "2 of 4", "3 of 4", "4 of 4"],
        ),
        # Submitted from within a step, it finds the step's variables.
        ("srun sbatch --ntasks=2 --wrap './show auto'", [NO_TASK]),
        ("srun --ntasks=2 ./show auto > slurm-1.out", ["1 of 2", "2 of 2"]),
    ],
)
def test_parts_by_what_slurm_says(
    slurm: Mapping[str, str], tmp_path: Path, lines: str, printed: list[str]
) -> None:
    (tmp_path / "show").write_text(SHOW)
    (tmp_path / "show").chmod(0o755)
    shell(lines, tmp_path, slurm)
    found = sorted(
        line for path in tmp_path.glob("slurm-*.out") for line in path.read_text().splitlines()
    )
    assert len(found) == len(printed)
    assert all(line.startswith(start) for line, start in zip(found, printed, strict=True)), found
