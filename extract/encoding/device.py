"""Where the model runs, and in which precision."""

import warnings
from typing import Literal

import torch

from clip_adapter.errors import UserError
from clip_adapter.words import printable, shortened

Precision = Literal["fp32", "fp16", "bf16"]
LONGEST_REASON = 200
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
        reason = shortened((str(error).splitlines() or [""])[0], LONGEST_REASON)
        raise UserError(
            f"--device {shortened(printable(name))} is not available: {reason}"
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
