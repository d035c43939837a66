"""The weights in a file, whatever wrote it, without running anything of it.

OpenAI published CLIP's weights as TorchScript programs, which `torch.jit.load` compiles. But such
a file is a zip archive with the values of all tensors (`data/0`, `data/1` …) and a pickle
(`data.pkl`) that says which module has which. This reader unpickles with a list of what may occur:
tensors, lists, and classes of the program, in whose place inert objects stand. Anything else is
refused; the program's code is not looked at.
"""

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Under which a checkpoint may hold the weights, and what wrappers of PyTorch put into names.
NESTED = ("state_dict", "model", "model_state_dict", "module")
DEEPEST = 4  # of such; a pickle may hold itself
WRAPPERS = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# In OpenAI's archives beside the weights: numbers of the architecture, and the causal mask.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
PROGRAM = "__torch__"
MAXIMUM_MODULES = 100_000
# What zipfile raises besides for directories that are damaged.
DAMAGED = (struct.error, ValueError, NotImplementedError, OverflowError, EOFError, IndexError)
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


class UnsafeArchive(ValueError):
    """The archive holds something other than weights, or is damaged."""


def read_state(path: str, device: str = "cpu", **_: Any) -> Any:
    """In place of open_clip's reader, which knows one wrapper and runs TorchScript; whatever it is
    asked for, nothing of a file is executed."""
    if is_torchscript(Path(path)):
        weights = read_weights(Path(path))
        kept = {n: t for n, t in weights.items() if n.rpartition(".")[2] not in NO_WEIGHTS}
        return _unwrapped(kept)
    if str(path).endswith(".safetensors"):
        return _unwrapped(load_file(path, device=device))
    return _unwrapped(torch.load(path, map_location=device, weights_only=True))


def _unwrapped(state: Any) -> Any:
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


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with constants beside the data."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, *DAMAGED):
        return False


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the archived module by its dotted name, in the dtype of the file.

    Raises UnsafeArchive for an archive that is damaged or holds anything but weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            module = _Unpickler(archive).load()
        if not isinstance(module, _Module):
            raise UnsafeArchive("its data is no module")
        return dict(_tensors(module))
    except UnsafeArchive:
        raise
    except Exception as error:  # a pickle can be broken in as many ways as it has instructions
        raise UnsafeArchive(f"its data cannot be read ({error!r:.100})") from error


class _Module:
    """Stands in for an object of the program: keeps its attributes and does nothing."""

    attributes: dict[str, Any]

    def __new__(cls) -> "_Module":
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise UnsafeArchive("a module's attributes are no dictionary")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile) -> None:
        (data,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        super().__init__(archive.open(data))
        self._archive = archive
        self._root = data.removesuffix("data.pkl")
        if f"{self._root}byteorder" in archive.namelist() and self._read("byteorder") != b"little":
            raise UnsafeArchive("its numbers are not little-endian")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == PROGRAM:
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafeArchive(f"it names {module}.{name}, which weights do not need") from None

    def persistent_load(self, identity: Any) -> torch.Tensor:
        """The values of one storage, as a tensor of one dimension."""
        _, dtype, key, _, count = identity
        content = self._read(f"data/{key}")
        if len(content) != count * dtype.itemsize:
            raise UnsafeArchive(f"storage {key} holds {len(content)} bytes, not {count} {dtype}")
        return torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0)

    def _read(self, name: str) -> bytes:
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnsafeArchive(f"{name} is compressed, which PyTorch does not do")
        return self._archive.read(entry)


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    """As torch._utils._rebuild_tensor_v2; PyTorch checks that it lies within the storage."""
    if math.prod(size) > storage.numel():
        raise UnsafeArchive("a tensor repeats its values, which weights do not")
    return storage.as_strided(size, stride, offset).clone()


def _hooks() -> None:
    """In place of the ordered dictionary of a tensor's hooks, which is empty."""


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): _hooks,
    ("torch.jit._pickle", "build_intlist"): _as_it_is,
    ("torch.jit._pickle", "build_doublelist"): _as_it_is,
    ("torch.jit._pickle", "build_boollist"): _as_it_is,
    ("torch.jit._pickle", "build_tensorlist"): _as_it_is,
    ("torch.jit._pickle", "restore_type_tag"): _as_it_is,
}


def _tensors(root: _Module) -> Iterator[tuple[str, torch.Tensor]]:
    pending = [("", root)]
    for _ in range(MAXIMUM_MODULES):
        if not pending:
            return
        prefix, module = pending.pop()
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                pending.append((f"{prefix}{name}.", value))
    raise UnsafeArchive(f"it has more than {MAXIMUM_MODULES} modules")
