"""Dividing the work of one `extract` among several processes."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from clip_adapter.cache.metadata import MOST_PARTS
from clip_adapter.errors import UserError
from clip_adapter.words import counted, quoted


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `of`."""

    index: int = 1
    of: int = 1

    def rows(self, total: int, batch_size: int) -> range:
        """Its rows of a split.

        Shards meet at multiples of the batch size, so that all of them together make the same
        batches as one process would, and the same features to the last bit.
        """
        batches = -(-total // batch_size)
        first, last = (batches * part // self.of for part in (self.index - 1, self.index))
        return range(min(total, first * batch_size), min(total, last * batch_size))


@dataclass(frozen=True)
class Launch:
    """This process among those that `torchrun` started."""

    rank: int
    processes: int
    local_rank: int

    @property
    def shard(self) -> Shard:
        return Shard(self.rank + 1, self.processes)


def parse_shard(text: str | None) -> Shard:
    """`2/4` is the second of four; None is everything; `auto` is what the environment says of this
    process, and `auto/4` the part of four that a Slurm array's task id says.

    Raises UserError for anything else, and where the environment says too little.
    """
    if text is None:
        return Shard()
    auto = re.fullmatch(r"auto(?:/([1-9][0-9]{0,5}))?", text)
    if auto:
        index, of = _place_in_environment(f"--shard {text}", int(auto[1]) if auto[1] else None)
        if not 0 <= index < of <= MOST_PARTS:
            raise UserError(
                f"--shard {text} finds part {index + 1} of {of} in the environment, which is none; "
                "number the tasks of an array from 1, or write --shard 1/4."
            )
        return Shard(index + 1, of)
    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"--shard {text} is no part of anything; write 1/4, 2/4, 3/4 or 4/4.")
    return Shard(int(numbers[1]), int(numbers[2]))


def _place_in_environment(asked: str, stated: int | None) -> tuple[int, int]:
    """The place of this process, from 0, among how many: RANK of WORLD_SIZE where these name
    several; else that of the task in Slurm's array, times the tasks of a step, plus that in the
    step. A batch script has SLURM_PROCID and SLURM_NTASKS as well and is one process all the same,
    as the shell of `salloc` is: they count in a step of `srun` only. Not everything that has a
    SLURM_STEP_ID is one: that shell has one, and a job submitted from a step has the step's. Of
    both the step's number of tasks is another than SLURM_NTASKS.

    stated: how many parts there are, of which the array need not be whole.
    """
    processes = _number("WORLD_SIZE") if os.environ.get("RANK") else 1
    in_array = "SLURM_ARRAY_TASK_ID" in os.environ
    if processes != 1:
        if in_array and os.environ.get("SLURM_ARRAY_TASK_COUNT") != "1":
            raise UserError(
                f"{asked}: this is a task of a Slurm array, and RANK and WORLD_SIZE name processes "
                "beside it; unset these, or write --shard 1/4."
            )
        if stated not in (None, processes):
            raise UserError(f"{asked}: WORLD_SIZE is {processes}; write --shard auto.")
        return _number("RANK"), processes
    in_step = os.environ.get("SLURM_STEP_NUM_TASKS", "") == os.environ.get("SLURM_NTASKS")
    if not in_array and (stated or not in_step):
        raise UserError(
            f"{asked}: this is no task of a Slurm array{'' if stated else ' or step'}, and RANK "
            "and WORLD_SIZE name no other process; write --shard 1/4."
        )
    index, tasks = 0, 1
    if in_array:
        index, tasks = _number("SLURM_ARRAY_TASK_ID") - 1, stated or 0
        if stated is None:
            index, tasks = _place_in_array(asked, index + 1)
    if not in_step:
        return index, tasks
    place, places = _number("SLURM_PROCID"), _number("SLURM_NTASKS")
    if place >= places:
        raise UserError(f"{asked}: SLURM_PROCID is {place} and SLURM_NTASKS {places}; unset both.")
    return index * places + place, stated or tasks * places


def _place_in_array(asked: str, task: int) -> tuple[int, int]:
    """Of a whole array. Of tasks that were submitted again it would be another than at first."""
    first, last, step, count = (
        _number(f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "STEP", "COUNT")
    )
    if first > 1 or step != 1 or count != last - first + 1 or not first <= task <= last:
        raise UserError(
            f"{asked} is for a whole array from 0 or 1, and of this one {counted(count, 'task')} "
            f"from {first} to {last} {'is' if count == 1 else 'are'} here; say how many parts "
            "there are, as in --shard auto/32."
        )
    return task - first, count


def _number(name: str) -> int:
    """Raises UserError where the variable is no natural number."""
    text = os.environ.get(name)
    if text is None or not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(
            f"--shard auto reads {name} in the environment, which is "
            f"{'not set' if text is None else quoted(text)}; write --shard 1/4."
        )
    return int(text)


def find_launch() -> Launch | None:
    """What `torchrun` says about this process; None where it started none or only one.

    Raises UserError where it says too little for the processes to find each other.
    """
    try:
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        launch = Launch(rank, processes, int(os.environ["LOCAL_RANK"]))
    except (KeyError, ValueError):
        return None
    if processes <= 1:
        return None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not 0 <= rank < processes:
        raise UserError(
            f"RANK {rank} and WORLD_SIZE {processes} say that this is one of several processes, "
            f"but {' and '.join(missing) or 'RANK'} {'is' if len(missing) < 2 else 'are'} "
            f"{'not set' if missing else 'out of range'}; start them with torchrun, or unset both."
        )
    return launch


def part_path(out: Path, shard: Shard) -> Path:
    """Where a process of `torchrun` puts its part of `out`."""
    return out.with_name(f"{out.name}.part-{shard.index}-of-{shard.of}")


def wait_for_all() -> None:
    """Return when every process that `torchrun` started has come here.

    Parts may take very different times; a process that fails makes torchrun end the others.
    """
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    dist.barrier()
    dist.destroy_process_group()
