"""Devices and launches that cannot work are found out; passes side by side come in order."""

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.encoding.device import (
    find_device,
    forward_passes,
    passes_at_once,
    shared_cores,
    text_passes,
)
from clip_adapter.extract.encoding.encoder import Encoder
from clip_adapter.extract.shards import Launch, find_launch

CPU = torch.device("cpu")
TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
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


@pytest.fixture(autouse=True)
def threads_are_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("cores", "passes", "threads"),
    [
        (1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1), (5, 4, 1), (6, 3, 2), (7, 3, 2), (8, 4, 2),
        (9, 3, 3), (10, 2, 5), (11, 2, 5), (12, 4, 3), (13, 4, 3), (16, 4, 4), (25, 4, 6),
    ],
)  # fmt: skip
def test_passes_share_the_cores(cores: int, passes: int, threads: int) -> None:
    assert passes_at_once(cores) == passes
    torch.set_num_threads(cores)
    with pytest.raises(KeyError), shared_cores(CPU) as at_once:
        assert (at_once, torch.get_num_threads()) == (passes, threads)
        raise KeyError
    assert torch.get_num_threads() == cores


def test_at_most_one_core_idles() -> None:
    assert all(cores % passes_at_once(cores) <= 1 for cores in range(1, 257))


def test_a_gpu_leaves_the_threads_alone() -> None:
    torch.set_num_threads(3)
    with shared_cores(torch.device("cuda")) as at_once:
        assert (at_once, torch.get_num_threads()) == (1, 3)


class Slow:
    """Doubles pixels; early batches take longest."""

    device = CPU

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.threads.add(torch.get_num_threads())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.04 / (1 + float(pixels[0]) % 4))
        with self._lock:
            self.at_once -= 1
        return pixels * 2


@pytest.mark.parametrize(("cores", "passes", "threads"), [(1, 1, 1), (4, 4, 1), (6, 3, 2)])
def test_features_come_in_order(cores: int, passes: int, threads: int) -> None:
    torch.set_num_threads(cores)
    encoder = Slow()
    batches = [torch.full((2,), float(index)) for index in range(12)]
    waiting: deque = deque()
    found = []
    with forward_passes(encoder) as (start, ahead):
        for batch in batches:
            waiting.append(start(batch))
            if len(waiting) > ahead:
                found.append(waiting.popleft()())
        found += [result() for result in waiting]
    assert torch.equal(torch.stack(found), torch.stack(batches) * 2)
    assert (encoder.most_at_once, encoder.threads) == (passes, {threads})
    assert torch.get_num_threads() == cores


@pytest.mark.parametrize(("cores", "passes"), [(1, 1), (3, 3), (20, 8)])
def test_texts_have_one_thread_each_whatever_the_cores(cores: int, passes: int) -> None:
    torch.set_num_threads(cores)
    together = threading.Barrier(passes, timeout=20)

    def threads() -> int:
        together.wait()
        return torch.get_num_threads()

    with text_passes(CPU) as pool:
        assert [one.result() for one in [pool.submit(threads) for _ in range(passes)]] == [
            1
        ] * passes
    assert torch.get_num_threads() == cores


def test_text_of_an_encoder_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("glyph-clip", None, "fp32")
    encode, seen = backbone.model.encode_text, []

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return encode(tokens)

    monkeypatch.setattr(backbone.model, "encode_text", watched)
    encoder = Encoder(backbone, CPU, 4)
    torch.set_num_threads(6)
    batches = [[f"a photo of a {number}"] for number in range(20)]
    with torch.inference_mode():
        wanted = [encode(backbone.tokenizer(own)).numpy() for own in batches]
    for own, features in zip(wanted, encoder.texts(batches), strict=True):
        np.testing.assert_allclose(features, own, rtol=1e-4, atol=1e-5)
    assert seen == [1] * 20
