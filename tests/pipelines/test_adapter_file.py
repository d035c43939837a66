"""A saved adapter comes back as it was, and nothing else is taken for one."""

import hashlib
import json
import os
import pickle
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_file import (
    SavedAdapter,
    document_sha256,
    load_adapter,
    save_adapter,
)
from tests import processes

Edit = Callable[[dict[str, Any]], object]
LogitsOf = Callable[[SavedAdapter, np.ndarray], np.ndarray]

RELOAD = """
import sys
from pathlib import Path
import numpy as np
from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import METHODS
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.pipelines.saved.adapter_file import load_adapter

folder = Path(sys.argv[1])
features = np.load(folder / "features.npy")
for run in sorted(path for path in folder.iterdir() if path.is_dir()):
    adapter = load_adapter(run)
    info = adapter.info
    head = Head(adapter.weights, np.float32(info.logit_scale), np.float32(info.logit_bias))
    classify = make_classify(METHODS[info.method], info.setting, adapter.arrays, head)
    np.save(run / "logits.npy", classify(features))
"""


@pytest.fixture
def run(tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]) -> Path:
    """A saved adapter with both branches."""
    save_adapter(tmp_path / "run", saved_adapters["both-fixed"])
    return tmp_path / "run"


def edit(run: Path, change: Edit) -> None:
    """Change adapter.json as one who knows how to make its hash anew."""
    document = json.loads((run / "adapter.json").read_text())
    change(document)
    document["sha256"] = document_sha256(document)
    (run / "adapter.json").write_text(json.dumps(document))


def replace_arrays(run: Path, content: bytes) -> None:
    """Put `content` in place of the arrays, with a matching hash."""
    (run / "adapter.safetensors").write_bytes(content)
    edit(run, lambda d: d.update(safetensors_sha256=hashlib.sha256(content).hexdigest()))


def test_a_fresh_process_gives_bit_identical_logits(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], digits: Any, flax_logits: LogitsOf
) -> None:
    np.save(tmp_path / "features.npy", digits.features)
    for name, adapter in saved_adapters.items():
        save_adapter(tmp_path / name, adapter)
    assert processes.run([sys.executable, "-c", RELOAD, tmp_path], tmp_path).returncode == 0
    for name, adapter in saved_adapters.items():
        again = np.load(tmp_path / name / "logits.npy")
        assert np.array_equal(again, flax_logits(adapter, digits.features)), name


def test_the_logits_of_an_image_do_not_depend_on_its_batch(
    saved_adapters: Mapping[str, SavedAdapter], digits: Any, flax_logits: LogitsOf
) -> None:
    mirrored = np.concatenate([np.zeros((450, 128), np.float32), digits.features[::-1]])
    for name, adapter in saved_adapters.items():
        whole = flax_logits(adapter, digits.features)
        assert np.array_equal(whole[7:8], flax_logits(adapter, digits.features[7:8])), name
        assert np.array_equal(whole, flax_logits(adapter, mirrored)[450:][::-1]), name


def test_loading_gives_back_what_was_saved(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    for name, adapter in saved_adapters.items():
        save_adapter(tmp_path / name, adapter)
        for path in ("", "adapter.json", "adapter.safetensors"):
            loaded = load_adapter(tmp_path / name / path)
            assert loaded.info == adapter.info
            assert loaded.arrays.keys() == adapter.arrays.keys()
            assert all(np.array_equal(loaded.arrays[n], a) for n, a in adapter.arrays.items())
            assert np.array_equal(loaded.weights, adapter.weights)


@pytest.mark.parametrize("value", [1.0, 2.0], ids=["one-hot", "others"])
def test_labels_that_were_saved_one_hot_are_read(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter], value: float
) -> None:
    adapter = saved_adapters["tip-adapter"]
    keys, labels = adapter.arrays["keys"], adapter.arrays["labels"]
    values = value * np.eye(10, dtype=np.float32)[labels.astype(int)]
    save_adapter(tmp_path, replace(adapter, arrays={"keys": keys, "values": values}))
    if value != 1:
        with pytest.raises(UserError, match="'values' is no array of tip-adapter"):
            load_adapter(tmp_path)
        return
    assert np.array_equal(load_adapter(tmp_path).arrays["labels"], labels)


def test_a_scale_without_a_point_can_be_used(run: Path, digits: Any, flax_logits: LogitsOf) -> None:
    edit(run, lambda d: d.update(logit_scale=2**31, logit_bias=-3))
    assert np.isfinite(flax_logits(load_adapter(run), digits.features[:3])).all()


def test_a_saved_array_is_one_that_its_method_states(
    saved_adapters: Mapping[str, SavedAdapter],
) -> None:
    assert {adapter.info.method for adapter in saved_adapters.values()} == {
        name for name, method in METHODS.items() if set(method.needs) <= {"text"}
    }
    for adapter in saved_adapters.values():
        method = METHODS[adapter.info.method]
        assert adapter.arrays.keys() <= method.shapes.keys()
        assert method.checked(adapter.info.setting) == adapter.info.setting


@pytest.mark.parametrize("position", [0, 9, 300, -1])
def test_a_flipped_byte_in_the_arrays_is_noticed(run: Path, position: int) -> None:
    content = bytearray((run / "adapter.safetensors").read_bytes())
    content[position] ^= 1
    (run / "adapter.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged or was changed"):
        load_adapter(run)


def test_what_is_too_large_is_refused_without_being_in_memory(run: Path) -> None:
    os.truncate(run / "adapter.safetensors", 1 << 28)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="damaged or was changed"):
            load_adapter(run)
        os.truncate(run / "adapter.json", 1 << 28)
        with pytest.raises(
            UserError, match=r"is too large, 256\.0 MiB; at most 32\.0 MiB are read"
        ):
            load_adapter(run)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_an_edited_json_is_noticed(run: Path) -> None:
    text = (run / "adapter.json").read_text()
    (run / "adapter.json").write_text(text.replace('"zero"', '"nought"'))
    with pytest.raises(UserError, match="changed after it was written"):
        load_adapter(run)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(format="other"), "does not describe an adapter"),
        (lambda d: d.update(format_version=4), "format version 4, .* reads versions 2 and 3"),
        (lambda d: d.update(format_version=3), "lacks decisions"),
        (lambda d: d.update(format_version=True), "format version True"),
        (lambda d: d.update(format_version=None), "format version None"),
        (lambda d: d.pop("class_names"), "lacks class_names"),
        (lambda d: d.update(method="tip"), "no method 'tip'; the methods are .*zero-shot"),
        (lambda d: d.update(method="tip-adapter"), "beta is '?0.3|keys|no array of tip-adapter"),
        (lambda d: d.update(method="antigravity:THIS"), "is no name of a method"),
        (lambda d: d.update(method=["clip-adapter"]), "method is .*, not a string"),
        (lambda d: d.update(setting=[]), "setting is .*, not an object"),
        (lambda d: d.update(class_names="zero"), "class_names is 'zero', not a list"),
        (lambda d: d.update(class_names=[1] * 10), "class_names.0. is 1, not a string"),
        (lambda d: d.update(class_names=["zero"]), "classifier weights of its classes"),
        (lambda d: d.update(templates=[]), "templates is"),
        (lambda d: d.update(logit_scale="100"), "logit_scale is '100', not a number"),
        (lambda d: d.update(logit_scale=0), "logit_scale is 0, not a number"),
        (lambda d: d.update(logit_scale=-17.8), "logit_scale is -17.8, not a number"),
        (lambda d: d.update(logit_scale=1e-60), "logit_scale is 1e-60, not a number"),
        (lambda d: d.update(logit_scale=10**400), "logit_scale is 1000.*, not a number"),
        (lambda d: d.update(logit_scale=float("nan")), "logit_scale is nan"),
        (
            lambda d: d.update(logit_scale=3e38),
            "logit_scale is 3e.38, not a number from 1e-06 to 1e.10",
        ),
        (
            lambda d: d.update(logit_bias=-1e30),
            "logit_bias is -1e.30, not a number from -10000 to 10000",
        ),
        (lambda d: d.update(logit_bias=float("inf")), "logit_bias is inf"),
        (lambda d: d.update(backbone="RN50"), "backbone is 'RN50', not an object"),
        (lambda d: d.update(safetensors_sha256=7), "damaged or was changed"),
        (lambda d: d["setting"].pop("branch"), "branch is missing"),
        (lambda d: d["setting"].update(branch="audio"), "branch is 'audio', not `image` or `text`"),
        (lambda d: d["setting"].update(alpha=1.5), r"alpha is 1.5, not a number in \[0, 1\]"),
        (lambda d: d["setting"].update(alpha="guessed"), "alpha is 'guessed'"),
        (lambda d: d["setting"].update(beta="learned"), "beta_init is missing"),
        (lambda d: d["setting"].update(reduction=0), "reduction is 0, not an integer in"),
        (lambda d: d["setting"].update(epochs=1e300), "epochs is 1e\\+300"),
        (lambda d: d["setting"].update(batch_size=True), "batch_size is True"),
        (lambda d: d["setting"].update(branch="image"), "takes no part in the logits"),
        (lambda d: d.update(method="zero-shot"), "is no array of zero-shot"),
    ],
)
def test_contradictions_and_wrong_types_are_named(run: Path, change: Edit, sentence: str) -> None:
    edit(run, change)
    with pytest.raises(UserError, match=sentence):
        load_adapter(run)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", "{", "[" * 100_000, '{"format": 1e999}', "\ufeff{}", "9" * 5000],
)
def test_other_json_is_refused(run: Path, text: str) -> None:
    (run / "adapter.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot be read as JSON|does not describe"):
        load_adapter(run)


def test_what_is_not_there_is_said(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="no adapter at"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no adapter at"):
        load_adapter(run / "adapter.json" / "deeper")
    (run / "results.csv").write_text("method\n")
    with pytest.raises(UserError, match="no adapter at"):
        load_adapter(run / "results.csv")
    (run / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter.safetensors cannot be read"):
        load_adapter(run)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_under_the_name_is_refused_and_not_executed(run: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "executed"))
    replace_arrays(run, trap)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_adapter(run)
    (run / "adapter.json").write_bytes(trap)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_adapter(run)
    assert not (tmp_path / "executed").exists()
    pickle.loads(trap)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.pop("weights"), "classifier weights"),
        (
            lambda a: a.update(weights=a["weights"][:, :64]),
            r"has the shape \(128, 32\) and not \(D = 64, H = \?\)",
        ),
        (lambda a: a.update(weights=a["weights"][:, :0]), "weights holds something else than"),
        (
            lambda a: a.pop("fitted/text/bottleneck/up/kernel"),
            "text/bottleneck/up/kernel is missing",
        ),
        (lambda a: a.update(extra=np.zeros(3, np.float32)), "'extra' is no array of clip-adapter"),
        (
            lambda a: a.update(
                {"fitted/image/bottleneck/up/kernel": a["fitted/image/bottleneck/up/kernel"].T}
            ),
            r"shape \(128, 32\) and not \(H = 32, D = 128\)",
        ),
        (
            lambda a: a.update({"fitted/text/ratio/logit": np.zeros((), np.float32)}),
            "text/ratio/logit takes no part",
        ),
        (
            lambda a: a["fitted/text/bottleneck/up/kernel"].__setitem__((3, 4), np.nan),
            "text/bottleneck/up/kernel holds something else than finite",
        ),
        (lambda a: a["weights"].__setitem__((0, 0), np.inf), "weights holds something else than"),
    ],
)
def test_arrays_that_contradict_the_setting_are_refused(
    run: Path, change: Callable[[dict[str, np.ndarray]], object], sentence: str
) -> None:
    arrays = {n: a.copy() for n, a in load_file(run / "adapter.safetensors").items()}
    change(arrays)
    replace_arrays(run, save({n: np.asarray(a, order="C") for n, a in arrays.items()}))
    with pytest.raises(UserError, match=sentence):
        load_adapter(run)


def test_a_number_type_that_numpy_lacks_is_refused(run: Path) -> None:
    header = json.dumps({"weights": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}})
    replace_arrays(run, len(header).to_bytes(8, "little") + header.encode() + b"\0\0")
    with pytest.raises(UserError, match=r"numbers that NumPy has|weights of its classes"):
        load_adapter(run)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["learned", "hypernet", "image", "clip-adapter", "sgd", 0.6, 0.3, 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_a_field_says_it_is_refused_or_can_be_used(
    run: Path,
    saved_adapters: Mapping[str, SavedAdapter],
    data: st.DataObject,
    digits: Any,
    flax_logits: LogitsOf,
) -> None:
    save_adapter(run, saved_adapters["both-fixed"])

    def change(document: dict[str, Any]) -> None:
        place = data.draw(st.sampled_from([document, document["setting"]]))
        name = data.draw(st.sampled_from([*place, "unheard of"]))
        if data.draw(st.booleans()):
            place[name] = data.draw(json_values)
        else:
            place.pop(name, None)

    try:
        edit(run, change)
        adapter = load_adapter(run)
    except UserError as error:
        assert str(error).endswith(".")
        return
    assert np.isfinite(flax_logits(adapter, digits.features[:3])).all()


def test_fitted_weights_and_those_before_adaptation_do_not_meet(
    tmp_path: Path, saved_adapters: Mapping[str, SavedAdapter]
) -> None:
    """Several methods call what they fitted `weights`, as the classifier's own are called."""
    adapter = saved_adapters["lp++"]
    assert not np.array_equal(adapter.arrays["weights"], adapter.weights)
    save_adapter(tmp_path, adapter)
    loaded = load_adapter(tmp_path)
    assert np.array_equal(loaded.arrays["weights"], adapter.arrays["weights"])
    assert np.array_equal(loaded.weights, adapter.weights)
    twice = load_file(tmp_path / "adapter.safetensors") | {"alpha": np.zeros(10, np.float32)}
    twice["fitted/alpha"] = twice["alpha"]
    replace_arrays(tmp_path, save(twice))
    with pytest.raises(UserError, match="two arrays of one name"):
        load_adapter(tmp_path)
