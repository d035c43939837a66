"""The text tower's file: it comes back as it was, and whatever it is not is refused."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from clip_adapter.cache.text_tower import (
    FORMAT,
    TextTower,
    TextTowerConfig,
    array_shapes,
    encode_text_tower,
    read_text_tower,
    tower_path,
    write_text_tower,
)
from clip_adapter.errors import UserError

CONFIG = TextTowerConfig(
    width=8,
    heads=2,
    layers=3,
    mlp_width=12,
    context_length=7,
    vocab_size=11,
    embed_dim=5,
    activation="quick_gelu",
    epsilon=1e-5,
    pooling="argmax",
    projection="linear_with_bias",
    start_id=9,
    end_id=10,
    pad_id=0,
    sentences=((1, 2, 3), (4, 3)),
    name_lengths=(2, 1),
    phrases={"a photo": (5, 6)},
    weights_sha256="0" * 64,
)


def tower(**changes: Any) -> TextTower:
    config = replace(CONFIG, **changes)
    rng = np.random.default_rng(0)
    shapes = array_shapes(config)
    return TextTower(
        config, {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    )


@pytest.mark.parametrize("projection", ["linear", "linear_with_bias", "none"])
def test_a_tower_comes_back_as_it_was(projection: str, tmp_path: Path) -> None:
    width = 8 if projection == "none" else 5
    stored = tower(projection=projection, embed_dim=width)
    content = encode_text_tower(stored)
    assert encode_text_tower(tower(projection=projection, embed_dim=width)) == content
    path = tower_path(tmp_path / "features.h5")
    assert path.name == "features.text_tower.safetensors"
    write_text_tower(path, content)
    config, arrays = read_text_tower(path, hashlib.sha256(content).hexdigest())
    assert config == stored.config
    assert arrays.keys() == stored.arrays.keys()
    assert all(np.array_equal(arrays[name], stored.arrays[name]) for name in arrays)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_transposed_array_is_stored_as_it_reads(tmp_path: Path) -> None:
    stored = tower()
    kernel = np.asfortranarray(stored.arrays["text_projection/kernel"])
    content = encode_text_tower(
        stored._replace(arrays={**stored.arrays, "text_projection/kernel": kernel})
    )
    assert content == encode_text_tower(stored)


def refusal(path: Path, sha256: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_text_tower(path, sha256)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_another_file_than_the_caches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.text_tower.safetensors"
    assert "There is no text tower at" in refusal(path)
    write_text_tower(path, encode_text_tower(tower()))
    assert "is not the text tower that the cache was written with" in refusal(path, "0" * 64)
    path.write_bytes(b"\x89HDF\r\n")
    assert "it is damaged or no safetensors file" in refusal(path)
    path.write_bytes(save({"a": np.zeros(3)}))
    assert "is no text tower" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "cannot be read" in refusal(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    content = encode_text_tower(tower())
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "it is damaged or no safetensors file" in refusal(path)


def _stated(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another configuration."""
    content = encode_text_tower(tower())
    length = int.from_bytes(content[:8], "little")
    stated = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][FORMAT])
    changed = change(stated)
    return save(load(content), {FORMAT: json.dumps(stated if changed is None else changed)})


CONFIGURATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda c: [1], "its configuration is [1], not an object"),
    "nothing": (lambda c: {}, "another format version than 1"),
    "newer": (lambda c: c.update(format_version=2), "another format version than 1"),
    "version true": (lambda c: c.update(format_version=True), "another format version than 1"),
    "lacking": (lambda c: c.pop("heads") and None, "its configuration lacks heads"),
    "unknown": (lambda c: c.update(colour=1), "its configuration has 'colour'"),
    "text for a number": (
        lambda c: c.update(width="8"),
        "its configuration.width is '8', not an integer from 1 to",
    ),
    "zero heads": (lambda c: c.update(heads=0), "its configuration.heads"),
    "huge": (lambda c: c.update(layers=10**30), "its configuration.layers"),
    "true layers": (lambda c: c.update(layers=True), "its configuration.layers"),
    "heads": (lambda c: c.update(heads=3), "its heads do not divide its width"),
    "activation": (lambda c: c.update(activation="relu"), "its configuration.activation"),
    "pooling": (lambda c: c.update(pooling=["last"]), "its configuration.pooling"),
    "epsilon": (lambda c: c.update(epsilon=float("nan")), "its configuration.epsilon"),
    "token": (lambda c: c.update(end_id=11), "it names tokens outside its vocabulary"),
    "name": (lambda c: c["sentences"][0].append(11), "it names tokens outside its vocabulary"),
    "negative": (lambda c: c["sentences"][0].append(-1), "its configuration.sentences"),
    "phrase": (lambda c: c["phrases"].update(a="b"), "its configuration.phrases"),
    "too long a name": (lambda c: c.update(name_lengths=[2, 3]), "lengths disagree"),
    "a name too few": (lambda c: c.update(name_lengths=[2]), "lengths disagree"),
    "width": (lambda c: c.update(projection="none"), "are of another width than its tokens"),
    "no bias": (lambda c: c.update(projection="linear"), "it lacks 'text_projection/bias', or"),
    "layers": (lambda c: c.update(layers=4), "is not (4, "),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    change, words = CONFIGURATIONS[case]
    path = tmp_path / "tower.safetensors"
    path.write_bytes(_stated(change))
    assert words in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_a_configuration_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    path.write_bytes(save(dict(tower().arrays), {FORMAT: text}))
    assert "its configuration is not JSON" in refusal(path)


def test_arrays_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    stored = tower()
    name = "blocks/c_fc/kernel"
    good = stored.arrays[name]
    spoilt = good.copy()
    spoilt[1, 2, 3] = np.inf
    for array, words in [
        (good.astype(np.float64), r"is not \(3, 8, 12\) float32"),
        (good[:, :, :11], r"is not \(3, 8, 12\) float32"),
        (good.reshape(3, 12, 8), r"is not \(3, 8, 12\) float32"),
        (spoilt, "holds values that are not finite"),
    ]:
        path.write_bytes(encode_text_tower(stored._replace(arrays={**stored.arrays, name: array})))
        assert re.search(f"{name} {words}", refusal(path))
    path.write_bytes(encode_text_tower(stored._replace(arrays={**stored.arrays, "more": good})))
    assert "it lacks 'more', or has it for no reason" in refusal(path)


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*: No such file or directory\."):
        write_text_tower(tmp_path / "none" / "tower.safetensors", b"")
