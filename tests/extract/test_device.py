"""Devices and launches that cannot work are found out at once."""

import pytest

from clip_adapter.errors import UserError
from clip_adapter.extract.encoding.device import find_device
from clip_adapter.extract.shards import Launch, find_launch

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "", "cpu:x"])
def test_devices_that_cannot_be_used(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name} ") as refused:
        find_device(name)
    assert "\n" not in str(refused.value)


def launched(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> Launch | None:
    for name, value in {**TORCHRUN, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return find_launch()


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch) == Launch(1, 2, 1)
    assert launched(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR=None) is None
    assert launched(monkeypatch, RANK=None) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not set; start them with torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "2"}, "but RANK is out of range"),
        ({"RANK": "-1"}, "but RANK is out of range"),
    ],
)
def test_a_launch_that_says_too_little(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        launched(monkeypatch, **changes)
