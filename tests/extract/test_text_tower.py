"""Out of open_clip: tokens as the tokenizer makes them, and refusals of what is no CLIP tower."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from clip_adapter.cache.text_tower import array_shapes
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.text_arrays import PHRASES, take_text_tower
from tests.adapters.towers import backbone


def test_the_tokens_are_the_tokenizers() -> None:
    found = backbone()
    config, arrays = take_text_tower(found, ["three", "zig-zagged (dog)", "one_two"])
    rows = found.tokenizer(["three.", "zig-zagged (dog).", "one two."]).tolist()
    for row, sentence in zip(rows, config.sentences, strict=True):
        assert row[: len(sentence) + 2] == [config.start_id, *sentence, config.end_id]
        assert set(row[len(sentence) + 2 :]) == {config.pad_id}
    # "(dog)." ends in one token for both characters, which counts as the name's.
    assert [len(s) - n for s, n in zip(config.sentences, config.name_lengths, strict=True)] == [
        1,
        0,
        1,
    ]
    assert config.phrases.keys() == set(PHRASES) and len(config.phrases["a photo of a"]) == 4
    assert {name: array.shape for name, array in arrays.items()} == array_shapes(config)


def test_a_name_longer_than_the_tower_is_stored_whole() -> None:
    config, _ = take_text_tower(backbone(), ["three " * 40])
    assert len(config.sentences[0]) == 41
    assert config.name_lengths == (40,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "siglip": ({"custom_text": True, "no_causal_mask": True}, "without a causal mask"),
    "coca": ({"custom_text": True, "embed_cls": True}, "appends a class token"),
    "first": ({"custom_text": True, "pool_type": "first"}, "pools its tokens by 'first'"),
    "scales": ({"ls_init_value": 0.1}, "has blocks of its own kind"),
    "custom": ({"qk_norm": True}, "has blocks of its own kind"),
    "tanh": ({"act_kwargs": {"approximate": "tanh"}}, "has blocks of its own kind"),
    "end": ({"pool_type": "eos", "eos_id": 2}, "waits for another end"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_text_encoders_are_refused(case: str) -> None:
    options, words = REFUSED[case]
    with pytest.raises(
        UserError, match=rf"^The text encoder of random .*{words}.*leave out --with"
    ):
        take_text_tower(backbone(**options), ["three"])


def test_a_text_encoder_of_another_library_is_refused() -> None:
    found = backbone(custom_text=True)
    found.model.text = torch.nn.Identity()
    with pytest.raises(UserError, match="is no transformer of open_clip's own"):
        take_text_tower(found, ["three"])


def test_a_tokenizer_without_a_start_is_refused() -> None:
    found = backbone()

    def tokens(texts: list[str], length: int = 24) -> torch.Tensor:
        return found.tokenizer(texts, length + 1)[:, 1:]

    with pytest.raises(UserError, match="does not mark where a text starts and ends"):
        take_text_tower(replace(found, tokenizer=tokens), ["three"])
