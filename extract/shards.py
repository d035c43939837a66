"""Dividing the work of one `extract` among several processes."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from clip_adapter.errors import UserError


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
    """`2/4` is the second of four; None is everything.

    Raises UserError for anything else.
    """
    if text is None:
        return Shard()
    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"--shard {text} is no part of anything; write 1/4, 2/4, 3/4 or 4/4.")
    return Shard(int(numbers[1]), int(numbers[2]))


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
