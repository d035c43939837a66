"""The command `extract`."""

import os
from collections.abc import Sequence
from typing import NoReturn

from clip_adapter.cores import limit_openmp
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.run import extract
from clip_adapter.extract.shards import find_launch
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `extract` and say on the terminal what happens."""
    # PyTorch's threads would wait for each other spinning, on cores that the decoding threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    limit_openmp()
    run_command(ExtractConfig, _extract, "extract", arguments)


def _extract(config: ExtractConfig) -> None:
    terminal = Terminal("extract")
    path = extract(config, terminal)
    if config.shard is None and find_launch() is None:
        from clip_adapter.pipelines.deciding.twins import warn_of_near_equal

        warn_of_near_equal(path, terminal)
