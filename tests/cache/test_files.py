"""What comes in as a file is read with care, and what goes out goes where it was meant to."""

import pytest

from clip_adapter import files


@pytest.mark.parametrize("opened", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("depth", [33, 500, 100_000])
def test_json_that_nothing_could_walk_is_refused(opened: str, depth: int) -> None:
    closed = "".join({"[": "]", "{": "}"}[char] for char in reversed(opened) if char in "[{")
    with pytest.raises(ValueError, match="nested too deep"):
        files.parse_json(opened * depth + "1" + closed * depth)


def test_json_as_deep_as_anybody_needs_is_read() -> None:
    assert files.parse_json("[" * 32 + "]" * 32) == eval("[" * 32 + "]" * 32)
    assert files.parse_json("7") == 7
