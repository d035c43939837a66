"""One engine for all tests of this room, so that equal programs are compiled once.

What is compiled is kept between test runs, in the cache that the commands use.
"""

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.pipelines.console.jax_setup import set_up_jax

set_up_jax()


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On arrays this small, the references lose more by waking threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)
