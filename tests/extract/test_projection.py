"""The last linear map: what comes before it, times the map, is what open_clip gives."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.encoding.encoder import Encoder
from clip_adapter.extract.encoding.projection import take_projection
from tests.adapters.towers import TEXT

VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160}
WITH: dict[str, tuple[dict[str, Any], int, bool]] = {
    "vit": (VIT, 32, False),
    "vit, averaged": ({**VIT, "pool_type": "avg", "final_ln_after_pool": True}, 32, False),
    "resnet": (RESNET, 256, True),
    "timm": ({**TIMM, "timm_proj": "linear"}, 64, False),
    "timm, bias": ({**TIMM, "timm_proj": "linear", "timm_proj_bias": True}, 64, True),
}
WITHOUT: dict[str, dict[str, Any]] = {
    "mlp": {**TIMM, "timm_proj": "mlp"},
    "own head": {**TIMM, "timm_proj": None},
    "none": {**TIMM, "timm_proj": "none"},
    "coca": {**VIT, "output_tokens": True},
}


def model(vision: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    dim = 64 if vision.get("timm_proj") == "none" else 24
    made = open_clip.CustomTextCLIP(dim, vision, TEXT).eval().requires_grad_(False)
    for parameter in made.visual.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)
    return made


@pytest.mark.parametrize("case", WITH)
def test_before_the_map_times_the_map_are_the_features(case: str) -> None:
    vision, width, has_bias = WITH[case]
    made = model(vision)
    pixels = torch.randn(3, 3, vision["image_size"], vision["image_size"])
    expected = made.encode_image(pixels)
    projection = take_projection(made.visual, case)
    pooled = projection.pooled(pixels)
    weights, bias = projection.arrays()
    assert (pooled.shape, weights.shape) == ((3, width), (width, 24))
    assert (bias is not None) == has_bias
    np.testing.assert_allclose(projection(pooled), expected, rtol=1e-4, atol=1e-5)
    product = pooled.double().numpy() @ weights + (0 if bias is None else bias)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", WITHOUT)
def test_an_encoder_that_ends_otherwise_is_refused(case: str) -> None:
    with pytest.raises(UserError, match=f"image encoder of {case} does not end in a linear proj"):
        take_projection(model(WITHOUT[case]).visual, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_gives_both(dtype: torch.dtype) -> None:
    def encoder(with_projection: bool) -> Encoder:
        found = Backbone(
            model(VIT).to(dtype),
            preprocess=lambda image: torch.empty(0),
            tokenizer=lambda texts: torch.zeros(len(texts), 24),
            identity={"name": "vit", "embed_dim": 24},
            preprocess_config={
                "size": 16, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3,
                "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
            },
            logit_scale=100.0,
            logit_bias=0.0,
            dtype=dtype,
        )  # fmt: skip
        return Encoder(found, torch.device("cpu"), 4, with_projection=with_projection)

    pixels = torch.randint(0, 256, (2, 5, 16, 16, 3), dtype=torch.uint8)
    both = encoder(True)
    found, plain = both.images(pixels), encoder(False).images(pixels)
    assert (found.shape, found.dtype) == ((2, 5, 24 + 32), both.stored_dtype)
    torch.testing.assert_close(found[..., :24], plain)
    assert both.images(pixels[:, :0]).shape == (2, 0, 56)
    assert both.projection is not None
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    product = both.projection(found[..., 24:].to(dtype)).float()
    torch.testing.assert_close(product, plain.float(), rtol=tolerance, atol=tolerance)
