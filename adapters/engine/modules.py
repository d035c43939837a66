"""Arrays by name ↔ Flax modules: the only place where the engine meets NNX."""

from importlib import import_module

import jax
from flax import nnx

from clip_adapter.adapters.method import Arrays, Method, Setting, Task


def make(method: Method, setting: Setting, task: Task, rngs: nnx.Rngs) -> nnx.Module:
    """The method's module, with parameters drawn from `rngs`."""
    module, name = method.network.split(":")
    return getattr(import_module(module), name)(setting, task, rngs=rngs)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """What is trained, by path, such as `image/bottleneck/down/kernel`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): variable[...] for path, variable in flat}


def filled(module: nnx.Module, arrays: Arrays) -> nnx.Module:
    """The module with these parameters; inside `jit` the drawing of its own falls away unused."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    state = {path: variable.replace(arrays[_name(path)]) for path, variable in flat}
    nnx.update(module, nnx.from_flat_state(state))
    return module


def _name(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path))
