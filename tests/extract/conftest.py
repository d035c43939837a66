"""What several tests of extract share."""

from typing import Any

import pytest

from clip_adapter.extract import local_encoding
from clip_adapter.extract.encoding.decode import Plan


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the images that are encoded."""
    ids: list[str] = []
    encode = local_encoding.encode_images

    def noting(encoder: Any, split: Any, plan: Plan, watch: Any) -> Any:
        ids.extend(split.ids[row] for row in plan.rows)
        return encode(encoder, split, plan, watch)

    monkeypatch.setattr(local_encoding, "encode_images", noting)
    return ids
