"""What several rooms' tests share."""

from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands, which take longest and are one test, are begun first."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the embedded default, as `extract` makes it."""
    from clip_adapter.extract.config import ExtractConfig
    from clip_adapter.extract.run import extract

    return extract(ExtractConfig(out=tmp_path_factory.mktemp("digits") / "features.h5"))
