"""Which part a process takes, by what its environment says."""

from pathlib import Path

import pytest

from clip_adapter.errors import UserError
from clip_adapter.extract.shards import Shard, parse_shard
from clip_adapter.pipelines.commands.extract import main

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
STEP = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID")
# Of its shell, where a cluster gives it one on a node (use_interactive_step).
SALLOC = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}


def ranks(rank: object, processes: object) -> dict[str, str]:
    return {"RANK": f"{rank}", "WORLD_SIZE": f"{processes}"}


def array(*numbers: object) -> dict[str, str]:
    """ID, MIN, MAX, STEP, COUNT, as Slurm sets them."""
    return dict(zip(ARRAY, map(str, numbers), strict=True))


def step(place: object, places: object, *, srun: bool = True) -> dict[str, str]:
    """Without srun: what a batch script of so many tasks finds."""
    values = dict(zip(STEP, map(str, (place, places, places, 0)), strict=True))
    return values if srun else {name: values[name] for name in STEP[:2]}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*RANKS, *ARRAY, *STEP):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("asked", "values", "shard"),
    [
        ("auto", array(1, 1, 32, 1, 32), (1, 32)),
        ("auto", array(32, 1, 32, 1, 32), (32, 32)),
        ("auto", array(0, 0, 3, 1, 4), (1, 4)),
        ("auto", array(3, 0, 3, 1, 4), (4, 4)),
        ("auto", array(1, 1, 1, 1, 1), (1, 1)),
        ("auto", step(0, 3), (1, 3)),
        ("auto", step(2, 3), (3, 3)),
        ("auto", array(3, 1, 4, 1, 4) | step(0, 2), (5, 8)),
        ("auto", array(3, 0, 3, 1, 4) | step(1, 2), (8, 8)),
        # A batch script is one process, whatever its job's tasks are.
        ("auto", array(3, 1, 4, 1, 4) | step(0, 2, srun=False), (3, 4)),
        # Nor is one that was submitted from within a step, whose variables it has.
        ("auto", array(3, 1, 4, 1, 4) | step(0, 2) | {"SLURM_STEP_NUM_TASKS": "1"}, (3, 4)),
        ("auto", ranks(1, 2), (2, 2)),
        ("auto", ranks(1, 2) | array(3, 3, 3, 1, 1) | step(0, 2), (2, 2)),
        ("auto", ranks(0, 1) | array(3, 1, 4, 1, 4), (3, 4)),
        # Tasks 3 and 7 submitted again are the parts that they were.
        ("auto/32", array(3, 3, 7, 4, 2), (3, 32)),
        ("auto/32", array(7, 3, 7, 4, 2), (7, 32)),
        ("auto/32", array(4, 4, 4, 1, 1) | step(1, 2), (8, 32)),
        ("auto/2", ranks(1, 2), (2, 2)),
    ],
)
def test_parts_by_the_environment(
    environment: pytest.MonkeyPatch, asked: str, values: dict[str, str], shard: tuple[int, int]
) -> None:
    set_all(environment, values)
    assert parse_shard(asked) == Shard(*shard)


@pytest.mark.parametrize("first", [0, 1])
def test_an_array_of_steps_takes_every_part_once(
    environment: pytest.MonkeyPatch, first: int
) -> None:
    found = []
    for task in range(first, first + 3):
        for place in range(2):
            set_all(environment, array(task, first, first + 2, 1, 3) | step(place, 2))
            found.append(parse_shard("auto"))
    assert found == [Shard(part, 6) for part in range(1, 7)]


@pytest.mark.parametrize(
    ("asked", "values", "words"),
    [
        ("auto", {}, "no task of a Slurm array or step"),
        ("auto/4", {}, "no task of a Slurm array, and"),
        ("auto", step(0, 2, srun=False), "no task of a Slurm array or step"),
        ("auto/4", step(0, 2), "no task of a Slurm array, and"),
        ("auto", array(3, 3, 7, 1, 2), "2 tasks from 3 to 7 are here; .* --shard auto/32"),
        ("auto", array(3, 3, 7, 4, 2), "is for a whole array from 0 or 1"),
        ("auto", array(1, 1, 3, 2, 2), "is for a whole array from 0 or 1"),
        ("auto", array(2, 2, 4, 1, 3), "is for a whole array from 0 or 1"),
        ("auto", array(1, 1, 7, 1, 2), "is for a whole array from 0 or 1"),
        ("auto", array(5, 1, 4, 1, 4), "is for a whole array from 0 or 1"),
        ("auto", array(3, 3, 3, 1, 1), "1 task from 3 to 3 is here"),
        ("auto/32", array(0, 0, 31, 1, 32), "finds part 0 of 32 .* from 1"),
        ("auto/32", array(33, 33, 33, 1, 1), "finds part 33 of 32"),
        ("auto/4", array(3, 1, 4, 1, 4) | step(1, 2), "finds part 6 of 4"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN .* is not set"),
        ("auto", array("x", 1, 4, 1, 4), "SLURM_ARRAY_TASK_ID .* is 'x'"),
        ("auto", array("-1", 1, 4, 1, 4), "SLURM_ARRAY_TASK_ID .* is '-1'"),
        ("auto", array(1, 1, 4, 1, ""), "SLURM_ARRAY_TASK_COUNT .* is ''"),
        # Else each task of the array would make the same two parts.
        ("auto", ranks(1, 2) | array(3, 1, 4, 1, 4), "array, and RANK and WORLD_SIZE name"),
        ("auto", step(0, 2) | SALLOC, "no task of a Slurm array or step"),
        ("auto", {name: "2" for name in STEP[1:]}, "SLURM_PROCID .* is not set"),
        ("auto", step(2, 2), "SLURM_PROCID is 2 and SLURM_NTASKS 2"),
        ("auto", ranks(2, 2), "finds part 3 of 2"),
        ("auto", ranks(0, 0), "finds part 1 of 0"),
        ("auto", {"RANK": "0"}, "WORLD_SIZE .* is not set"),
        ("auto/4", ranks(1, 2), "WORLD_SIZE is 2; write --shard auto"),
        ("auto/0", array(1, 1, 4, 1, 4), "--shard auto/0 is no part of anything"),
        ("auto/", array(1, 1, 4, 1, 4), "--shard auto/ is no part of anything"),
        ("auto", array(10**6, 0, 10**6, 1, 10**6 + 1), "finds part 1000001 of 1000001"),
    ],
)
def test_environments_that_say_no_part(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    values: dict[str, str],
    words: str,
) -> None:
    set_all(environment, values)
    with pytest.raises(UserError, match=words):
        parse_shard(asked)
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "features.h5"), "--shard", asked])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_processes_of_torchrun_take_their_parts_without_it(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(environment, ranks(0, 2) | {"LOCAL_RANK": "0"})
    set_all(environment, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "features.h5"), "--shard", "auto"])
    assert ended.value.code == 2
    assert "takes its part by itself; leave out --shard" in capsys.readouterr().err
