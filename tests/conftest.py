"""What several rooms' tests share."""

from pathlib import Path

import jax
import pytest

# A process that has run some hundred programs has crashed, now and then, as XLA read or wrote one
# more of them on the disk; commands in processes of their own keep theirs as users' do.
jax.config.update("jax_enable_compilation_cache", False)


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
