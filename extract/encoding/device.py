"""Where the model runs, in which precision, and how many forward passes are in flight."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, Protocol

import torch

from clip_adapter.errors import UserError, first_line
from clip_adapter.words import printable, shortened

Result = Callable[[], torch.Tensor]
Precision = Literal["fp32", "fp16", "bf16"]
LONGEST_REASON = 200
MOST_AT_ONCE = 4  # forward passes; more would multiply the memory of the activations
MOST_TEXTS = 8  # passes of texts at once; of 64 prompts each takes about 0.2 GB
BFLOAT16_CAPABILITY = (8, 0)  # Ampere: the first GPUs that compute in bfloat16


def find_device(name: str) -> torch.device:
    """The PyTorch device of that name; `auto` is the first GPU where there is one.

    Raises UserError where it is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):
            device = torch.empty(0, device=name).device
    except Exception as error:  # of a kind of device that PyTorch knows by name, nearly anything
        reason = shortened(first_line(error), LONGEST_REASON)
        raise UserError(
            f"--device {shortened(printable(name))} is not available: {reason}."
        ) from None
    if device.type == "meta":
        raise UserError("--device meta has no memory for numbers; name cpu or cuda.")
    return device


def device_of_process(name: str, local_rank: int) -> str:
    """The device of one of several processes on a machine: `auto` and `cuda` mean a GPU each.

    Raises UserError for more processes than GPUs.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"There are more processes than GPUs ({torch.cuda.device_count()}); start as many "
                "with torchrun --nproc-per-node, or use --device cpu."
            )
        return f"cuda:{local_rank}"
    return name


def find_precision(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """`auto` is float32 on a CPU (bf16 is six times slower on those without AVX-512), bf16 on GPUs
    that compute in it, and fp16 on older ones."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY else "fp16"


class Images(Protocol):
    """What an Encoder does: pixels (V, B, height, width, 3) → features (V, B, D) on its device."""

    @property
    def device(self) -> torch.device: ...

    def images(self, pixels: torch.Tensor) -> torch.Tensor: ...


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


def threads_of_a_pass(device: torch.device) -> int:
    """The threads of each forward pass of images on a CPU, on which the last bits of features
    depend; 1 on other devices."""
    cores = torch.get_num_threads()
    return cores // passes_at_once(cores) if device.type == "cpu" else 1


@contextmanager
def text_passes(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Where to run passes of texts. On a CPU each has one thread, so that their bits are the same
    for any number of cores (torchrun starts processes with one), and several run at once."""
    cores = torch.get_num_threads()
    at_once = min(cores, MOST_TEXTS) if device.type == "cpu" else 1
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="text")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
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


def _on_cpu(encoder: Images, pixels: torch.Tensor) -> torch.Tensor:
    return encoder.images(pixels).cpu()


def _on_gpu(encoder: Images, pixels: torch.Tensor) -> Result:
    """The pass and the copy of its features are queued on the device."""
    features = encoder.images(pixels)
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(encoder.device))

    def result() -> torch.Tensor:
        copied.synchronize()
        return host

    return result
