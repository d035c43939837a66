"""Forward passes in flight: several at once on a CPU, one ahead of its copy on a GPU."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch

# More would multiply the memory of the activations.
MOST_AT_ONCE = 4

Features = torch.Tensor
Result = Callable[[], Features]


class Images(Protocol):
    """What an Encoder does: pixels (V, B, height, width, 3) → features (V, B, D) on its device."""

    @property
    def device(self) -> torch.device: ...

    def images(self, pixels: torch.Tensor) -> Features: ...


def passes_at_once(cores: int) -> int:
    """How many passes share the cores best: as few idle as can be, then as many passes as can be.

    A prime number of cores leaves one idle rather than go to one pass. Shares of different sizes
    would occupy it, but features then depended on which share a batch got: threads change rounding.
    """
    several = range(min(cores, 2), min(cores, MOST_AT_ONCE) + 1)
    return max(several, key=lambda passes: (cores - cores % passes, passes))


@contextmanager
def shared_cores(device: torch.device) -> Iterator[int]:
    """How many forward passes to run at once; PyTorch gives each its share of a CPU's cores.

    A pass of its own occupies a core better than half of the operations of a common one: on two
    cores 15.0 instead of 13.8 images/s for RN50, 5,800 instead of 3,300 for glyph-clip.
    """
    cores = torch.get_num_threads()
    at_once = passes_at_once(cores) if device.type == "cpu" else 1
    torch.set_num_threads(cores // at_once)
    try:
        yield at_once
    finally:
        torch.set_num_threads(cores)


@contextmanager
def forward_passes(encoder: Images) -> Iterator[tuple[Callable[[torch.Tensor], Result], int]]:
    """A function that starts the pass of a batch and returns what waits for its features, on the
    host; and how many passes to start before waiting for the first of them."""
    if encoder.device.type == "cuda":
        yield lambda pixels: _on_gpu(encoder, pixels), 1
        return
    with shared_cores(encoder.device) as at_once:
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="forward")
        try:
            yield lambda pixels: pool.submit(_on_cpu, encoder, pixels).result, at_once
        finally:
            pool.shutdown(cancel_futures=True)


def _on_cpu(encoder: Images, pixels: torch.Tensor) -> Features:
    return encoder.images(pixels).cpu()


def _on_gpu(encoder: Images, pixels: torch.Tensor) -> Result:
    """The pass and the copy of its features are queued on the device."""
    features = encoder.images(pixels)
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(encoder.device))

    def result() -> Features:
        copied.synchronize()
        return host

    return result
