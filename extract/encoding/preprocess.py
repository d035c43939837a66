"""From an RGB image to what the image encoder takes: the evaluation view and augmented ones.

The work is divided where that is fastest: geometry on 8-bit pixels, one image at a time, in
threads; numbers (scaling and normalisation) on whole batches, on the model's device. Together they
are open_clip's evaluation preprocessing, bit for bit on a CPU.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, Normalize

from clip_adapter.extract.encoding.images import BadImage

# The official CLIP-Adapter's augmentation (CoOp's `random_resized_crop` and `random_flip`).
CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# Pixels of an image resized so that its shortest side is what the encoder takes: 134 MB, and at 224
# pixels a strip 668 times as long as it is wide.
RESIZED_PIXELS_MAX = 1 << 25


def refuse_strips(image: Image.Image, config: Mapping[str, Any]) -> None:
    """Raises BadImage for an image so long and narrow that it would grow beyond all bounds.

    Before the centre is cut out, the shortest side is made as long as the encoder's `size`, and the
    other grows with it: 1 × 1,000,000 pixels become 224 × 224,000,000.

    config: open_clip's preprocessing configuration.
    """
    if config.get("resize_mode", "shortest") != "shortest":
        return
    height, width = height_and_width(config)
    scale = max(width / image.width, height / image.height)
    resized = round(image.width * scale), round(image.height * scale)
    if resized[0] * resized[1] > RESIZED_PIXELS_MAX:
        raise BadImage(
            f"its {image.width} × {image.height} pixels would become {resized[0]} × {resized[1]}, "
            f"more than {RESIZED_PIXELS_MAX:,}; cut it into pieces less long and narrow"
        )


def height_and_width(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def drafted(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height below which no side of a JPEG is decoded, where it is decoded fast: twice
    what the shorter side is resized to."""
    if config.get("decode") != "fast":
        return None
    height, width = (2 * math.ceil(n / config.get("crop_pct", 1)) for n in height_and_width(config))
    return width, height


def evaluation(config: Mapping[str, Any]) -> Compose:
    """PIL image → (3, height, width) float32, as the configuration says: timm's preprocessing
    where it has a `crop_pct`, else open_clip's."""
    config = {name: value for name, value in config.items() if name != "decode"}
    if "crop_pct" not in config:
        return image_transform_v2(PreprocessCfg(**config), is_train=False)
    names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    how = {name: config[name] for name in names}
    return create_transform((3, *height_and_width(config)), is_training=False, **how)


class Preprocess:
    """What `config` says, see `evaluation`, in two halves.

    height, width: of the pixels that the encoder takes. drafted: see the function.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        *geometry, _to_tensor, normalize = evaluation(config).transforms
        if not isinstance(normalize, Normalize):
            raise TypeError(f"the preprocessing ends with {normalize}, not Normalize")
        # Images are RGB already, so that open_clip's last step to there is left out.
        self._geometry = Compose(geometry if "crop_pct" in config else geometry[:-1])
        self._mean = torch.as_tensor(normalize.mean)
        self._std = torch.as_tensor(normalize.std)
        self._config = config
        self.height, self.width = height_and_width(config)
        self.drafted = drafted(config)

    def view(self, image: Image.Image, name: str, number: int, seed: int) -> npt.NDArray[np.uint8]:
        """View `number` of an RGB image, (height, width, 3).

        View 0 is the evaluation preprocessing. The others are draws that depend on the seed, the
        image's name and the number alone: a random crop of 50 to 100 % of the area with a ratio of
        3:4 to 4:3, resized bicubically, and mirrored half of the time.

        Raises BadImage for shapes that cannot be brought to the encoder's.
        """
        if number == 0:
            refuse_strips(image, self._config)
            try:
                return np.asarray(self._geometry(image))
            except (MemoryError, ValueError) as error:  # a side of the resized image may be 0
                raise BadImage(
                    f"its {image.width} × {image.height} pixels cannot be resized: {error}"
                ) from error
        rng = np.random.default_rng(_entropy(seed, name, number))
        left, top, width, height = crop_box(image.width, image.height, rng)
        crop = image.crop((left, top, left + width, top + height))
        view = np.asarray(crop.resize((self.width, self.height), Image.Resampling.BICUBIC))
        return view[:, ::-1] if rng.random() < 0.5 else view

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, height, width, 3) uint8 → (B, 3, height, width) float32, channels last in memory."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        values = pixels.permute(0, 3, 1, 2).float().div_(255)
        return values.sub_(mean[:, None, None]).div_(std[:, None, None])


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, drawn as torchvision's RandomResizedCrop does.

    After ten draws that do not fit the image it is the largest central crop of a ratio that does.
    """
    low, high = np.log(CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            return int(rng.integers(0, width - w + 1)), top, w, h
    smallest, largest = CROP_RATIO
    w = min(width, max(1, round(height * largest)))
    h = min(height, max(1, round(width / smallest)))
    return (width - w) // 2, (height - h) // 2, w, h


def _entropy(seed: int, name: str, number: int) -> int:
    key = f"{seed} {number} {name}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
