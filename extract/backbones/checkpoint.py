"""The weights in a checkpoint, whatever the training script wrapped them in."""

import re
from typing import Any

import torch
from safetensors.torch import load_file

# Under which a checkpoint may hold the weights, and what wrappers of PyTorch put into names.
NESTED = ("state_dict", "model", "model_state_dict", "module")
DEEPEST = 4  # of such; a pickle may hold itself
WRAPPERS = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def read_state(path: str, device: str = "cpu", **_: Any) -> Any:
    """In place of open_clip's reader, which knows one wrapper; whatever it is asked for, nothing of
    a file is executed."""
    if str(path).endswith(".safetensors"):
        return unwrapped(load_file(path, device=device))
    return unwrapped(torch.load(path, map_location=device, weights_only=True))


def unwrapped(state: Any) -> Any:
    """Weights under the names that the model has, of a checkpoint that holds them beside other
    things, or with what wrapped the model in training before each name.

    Every CLIP has a `logit_scale`: what stands before it is the prefix. Names without the prefix
    stay, for the model to refuse.
    """
    for _ in range(DEEPEST):
        if isinstance(state, dict):
            state = next((state[n] for n in NESTED if isinstance(state.get(n), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return state
    named = {re.sub(WRAPPERS, "", name): value for name, value in state.items()}
    before = [name.removesuffix("logit_scale") for name in named if name.endswith(".logit_scale")]
    if "logit_scale" in named or len(before) != 1:
        return named
    return {name.removeprefix(before[0]): value for name, value in named.items()}
