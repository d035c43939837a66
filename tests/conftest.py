"""What several rooms' tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A process may hold 65,530 memory maps on Linux, and each compiled program takes several; past
# that, LLVM crashes as it loads the next one.
MOST_MAPS = 20_000


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest, and wait for other processes, are begun first."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_ray.py"))


@pytest.fixture(autouse=True)
def _programs_fit_into_a_process() -> Iterator[None]:
    """Compiled programs are let go where a worker's tests together would hold too many."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the embedded default, as `extract` makes it."""
    from clip_adapter.extract.config import ExtractConfig
    from clip_adapter.extract.run import extract

    return extract(ExtractConfig(out=tmp_path_factory.mktemp("digits") / "features.h5"))
