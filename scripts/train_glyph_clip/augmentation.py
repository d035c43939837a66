"""What makes a photograph of a printed character, at random."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.train_glyph_clip.glyphs import CANVAS, INK
from scripts.train_glyph_clip.model import PREPROCESS_CFG

# Sides of the small grey images that are then enlarged as the preprocessing enlarges them. In
# roughly equal ratios, because a pixel more or less matters by its share.
SMALL_SIDES = (8, 10, 12, 16, 20, 24, 32)


class Augmenter:
    """Turns ink masks into what the preprocessing gives for a small grey image of that glyph.

    The ranges are chosen to be wide, not to fit a data set: a pen's slant, proportions, stroke
    and unsteadiness; a camera's or scanner's blur, contrast, polarity, noise and resolution.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def choice(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def __call__(self, ink: Tensor) -> Tensor:
        """(N, CANVAS, CANVAS) ink masks → (N, 3, 32, 32) normalised float32 images."""
        ink = self.blur(self.warp(self.thicken(ink[:, None])))
        side = PREPROCESS_CFG["size"]
        images = torch.empty(len(ink), 1, side, side)
        sides = self.choice(len(SMALL_SIDES), len(ink))
        for index, small in enumerate(SMALL_SIDES):
            rows = (sides == index).nonzero()[:, 0]
            if len(rows):
                mask = resize(ink[rows], small, "bilinear")
                images[rows] = enlarge(self.photograph(mask), side)
        mean, std = PREPROCESS_CFG["mean"][0], PREPROCESS_CFG["std"][0]
        return ((images - mean) / std).expand(-1, 3, -1, -1)

    def thicken(self, ink: Tensor) -> Tensor:
        """Widen the strokes by 0, 2 or 4 canvas pixels (printed stems are about 2 to 10)."""
        radius = self.choice(3, len(ink))
        ink = ink.clone()
        for r in (1, 2):
            ink[radius == r] = F.max_pool2d(ink[radius == r], 2 * r + 1, stride=1, padding=r)
        return ink

    def warp(self, ink: Tensor) -> Tensor:
        """Scale, stretch, slant, turn and move the glyph, and bend it smoothly."""
        n = len(ink)
        size = self.uniform(0.6, 1.0, n)  # share of the frame that the longer side fills
        stretch = self.uniform(math.log(0.7), math.log(1.4), n).exp().sqrt()
        angle = self.uniform(-15, 15, n) * math.pi / 180
        slant = self.uniform(-0.35, 0.35, n)
        scale = size * CANVAS / INK
        zero = torch.zeros(n)
        stretches = torch.stack([stretch * scale, zero, zero, scale / stretch], -1)
        slants = torch.stack([zero + 1, slant, zero, zero + 1], -1)
        turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
        forward = turns.view(n, 2, 2) @ slants.view(n, 2, 2) @ stretches.view(n, 2, 2)
        # affine_grid asks where each output point comes from: the inverse of the motion.
        inverse = torch.linalg.inv(forward)
        room = (1 - size)[:, None] + 0.06
        move = self.uniform(-1, 1, n, 2) * room
        theta = torch.cat([inverse, -inverse @ move[:, :, None]], -1)
        grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
        # Few and random control points, joined smoothly: the unsteady hand.
        bend = self.normal(n, 2, 4, 4) * self.uniform(0, 0.1, n, 1, 1, 1)
        bend = F.interpolate(bend, (CANVAS, CANVAS), mode="bicubic", align_corners=True)
        return F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)

    def blur(self, ink: Tensor) -> Tensor:
        """Gaussian blur, σ up to 2 canvas pixels, another for each image."""
        n = len(ink)
        sigma = self.uniform(0.1, 2.0, n, 1)
        offsets = torch.arange(-4, 5)
        kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, -1).view(n, 1, 1, 9)
        stacked = F.conv2d(ink.transpose(0, 1), kernel, padding=(0, 4), groups=n)
        stacked = F.conv2d(stacked, kernel.transpose(2, 3), padding=(4, 0), groups=n)
        return stacked.transpose(0, 1)

    def photograph(self, mask: Tensor) -> Tensor:
        """(N, 1, S, S) ink masks → grey values in 0 to 1, eight bits deep."""
        n, side = len(mask), mask.shape[-1]
        paper = self.uniform(0, 0.3, n, 1, 1, 1)
        ink = self.uniform(0.6, 1.0, n, 1, 1, 1)
        # Half of the images have even paper and no noise, as scans do; the rest have both.
        rough = self.uniform(0, 1, n, 1, 1, 1) < 0.5
        stains = self.normal(n, 1, 4, 4) * self.uniform(0, 0.15, n, 1, 1, 1) * rough
        paper = paper + resize(stains, side, "bicubic")
        noise = self.normal(n, 1, side, side) * self.uniform(0, 0.08, n, 1, 1, 1) * rough
        image = paper * (1 - mask) + ink * mask + noise
        negative = self.uniform(0, 1, n, 1, 1, 1) < 0.5
        return eight_bits(torch.where(negative, 1 - image, image))


def resize(images: Tensor, side: int, mode: str) -> Tensor:
    """Resize (N, 1, S, S) to (N, 1, side, side) with PIL's filters (which `antialias` selects)."""
    return F.interpolate(images, (side, side), mode=mode, antialias=True)


def enlarge(images: Tensor, side: int) -> Tensor:
    """Resize (N, 1, S, S) grey images to (N, 1, side, side) as `PREPROCESS_CFG` does it.

    PIL resizes the rows, then the columns, and stores eight bits after each.
    """
    wide = F.interpolate(images, (images.shape[-2], side), mode="bicubic", antialias=True)
    return eight_bits(resize(eight_bits(wide), side, "bicubic"))


def eight_bits(images: Tensor) -> Tensor:
    """Clip to 0…1 and round to 256 levels, as an image that has been stored."""
    return (images.clamp(0, 1) * 255).round() / 255
