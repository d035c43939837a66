"""No array of a saved adapter can be exchanged for one that its method does not state."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_check import check_usable
from clip_adapter.pipelines.saved.adapter_file import (
    SavedAdapter,
    document_sha256,
    load_adapter,
    save_adapter,
)

Arrays = dict[str, np.ndarray]
# What broadcasts, what is cut, turned or grown, and what holds other numbers.
DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one number": lambda a: a.reshape(-1)[:1],
    "a scalar": lambda a: a.reshape(-1)[0],
    "one column": lambda a: a[..., :1],
    "one row": lambda a: a[:1],
    "a row less": lambda a: a[:-1],
    "a column more": lambda a: np.concatenate([a, a[..., :1]], axis=-1),
    "turned": lambda a: a.T,
    "flat": lambda a: a.reshape(-1),
    "an axis more": lambda a: a[None],
    "empty": lambda a: a[:0],
    "float64": lambda a: a.astype(np.float64),
    "float16": lambda a: a.astype(np.float16),
    "integers": lambda a: a.astype(np.int32),
    "not a number": lambda a: _with_last(a, np.nan),
    "infinite": lambda a: _with_last(a, np.inf),
}
# And where the numbers are those of classes.
NO_CLASSES = {"a class too many": 10.0, "a class before the first": -1.0, "half a class": 0.5}


def _with_last(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[-1:] = value
    return changed


def damaged(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Arrays]]:
    """Every array in every way that changes it, each missing, and one too many of each kind."""
    for name, array in arrays.items():
        for kind, damage in DAMAGES.items():
            if array.ndim == 0 and kind not in ("an axis more", "float64", "not a number"):
                continue
            if not array.size:
                continue
            changed = damage(array)
            # A square array turned is one of the same shape, with other numbers that are legal.
            same = changed.dtype == array.dtype and changed.shape == array.shape
            if not same or not np.isfinite(changed).all():
                yield f"{name}: {kind}", {**arrays, name: changed}
        yield f"{name} missing", {key: a for key, a in arrays.items() if key != name}
    if "labels" in arrays:
        for kind, number in NO_CLASSES.items():
            yield kind, {**arrays, "labels": _with_last(arrays["labels"], number)}
    for extra in ("extra", "keys", "kernel", "image/ratio/logit", "projection"):
        if extra not in arrays:
            yield f"{extra} too many", {**arrays, extra: np.ones((2, 2), np.float32)}


def test_every_damaged_array_of_every_method_is_refused(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    count, accepted = 0, []
    for name, adapter in saved_adapters.items():
        run = tmp_path / name
        save_adapter(run, adapter)
        document = json.loads((run / "adapter.json").read_text())
        for what, arrays in damaged(adapter.arrays):
            tensors = {f"fitted/{key}": a for key, a in arrays.items()}
            tensors["weights"] = adapter.weights
            content = save({key: np.asarray(array, order="C") for key, array in tensors.items()})
            (run / "adapter.safetensors").write_bytes(content)
            document["safetensors_sha256"] = hashlib.sha256(content).hexdigest()
            document["sha256"] = document_sha256(document)
            (run / "adapter.json").write_text(json.dumps(document))
            count += 1
            try:
                load_adapter(run)
            except UserError as error:
                assert str(error).endswith("fit the adapter again."), what
            else:
                accepted.append(f"{name}, {what}")
    # Every letter of a shape that nothing else fixes may be any size: a shorter support set is one.
    assert accepted == []
    assert count > 500


@pytest.mark.parametrize("seen", [np.zeros((2, 2), np.uint64), np.zeros(2, np.int64)])
def test_hashes_of_images_that_are_none_are_refused(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], seen: np.ndarray
) -> None:
    save_adapter(tmp_path, replace(saved_adapters["zero-shot"], seen=seen))
    with pytest.raises(UserError, match="seen holds no hashes of images; fit the adapter again"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", ["zero-shot", "linear-probe", "both-hypernet", "tip-adapter"])
def test_an_adapter_of_other_classes_is_refused(
    saved_adapters: Mapping[str, SavedAdapter], name: str
) -> None:
    """The classifier weights are of one class less than the arrays."""
    adapter = saved_adapters[name]
    method = METHODS[adapter.info.method]
    fewer = Head(adapter.weights[1:], np.float32(20), np.float32(0))
    if not any("C" in shape.split() for shape in method.shapes.values()) and "labels" not in (
        adapter.arrays
    ):
        check_usable(method, adapter.info.setting, adapter.arrays, fewer)
        return
    with pytest.raises(ValueError, match=r"has the shape|than numbers of 9 classes"):
        check_usable(method, adapter.info.setting, adapter.arrays, fewer)


def test_logits_that_depend_on_other_images_are_refused(
    saved_adapters: Mapping[str, SavedAdapter],
) -> None:
    method = METHODS["zero-shot"]
    adapter = saved_adapters["zero-shot"]
    head = Head(adapter.weights, np.float32(20), np.float32(0))

    def centred(xp, arrays, setting, features, head):
        return method.logits(xp, arrays, setting, features - features.mean(axis=0), head)

    with pytest.raises(ValueError, match="depend on the other images"):
        check_usable(replace(method, logits=centred), {}, {}, head)
    transposed = replace(method, logits=lambda *given: method.logits(*given).T)
    with pytest.raises(ValueError, match="come out as"):
        check_usable(transposed, {}, {}, head)
