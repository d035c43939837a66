"""Train glyph-clip, the small CLIP that stands in for a real one where none can be downloaded.

    python extract/glyph_clip/train.py --out FOLDER

Every image is a glyph that this script renders with the fonts in matplotlib's wheel, and every
caption names that glyph. No other data is read, neither for training nor for evaluation. FOLDER
receives ``open_clip_model.safetensors``, ``open_clip_config.json`` and ``bpe_merges.txt.gz``;
open_clip loads the first two through ``local-dir:FOLDER``, its ``SimpleTokenizer`` the third.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import open_clip
import PIL
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 0
STEPS = 3000
WARMUP = 100
BATCH = 128
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.2  # with these betas and this eps: open_clip's own defaults for a ViT
BETAS = (0.9, 0.98)
EPS = 1e-6
DIGIT_SHARE = 0.35  # ten glyphs of 73, and the ones that the model is for

CONTEXT_LENGTH = 24
MERGES = 4000  # the full table has 48,894; its embeddings alone would be 6 MB at this width

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 128,
        "head_width": 32,
        "layers": 4,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 512 + MERGES + 2,  # bytes, bytes that end a word, merges, start and end
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS_CFG: dict[str, Any] = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

# The fonts that have letters and digits. Left out: the display, symbol and size fonts, and cmmi10,
# whose digits are not where Unicode puts them. Three fonts, one of each family and each of
# another style, are never trained on: they tell how well the model reads a face it has not seen.
TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
)
HELD_OUT_FONTS = ("DejaVuSans-Oblique", "STIXGeneralBol", "cmtt10")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Only characters that every font above draws as themselves: the cm fonts have another encoding,
# with other glyphs at $ < > { }.
SYMBOL_NAMES = {
    "!": "exclamation mark",
    "#": "hash sign",
    "%": "percent sign",
    "&": "ampersand",
    "(": "left parenthesis",
    ")": "right parenthesis",
    "*": "asterisk",
    "+": "plus sign",
    ":": "colon",
    ";": "semicolon",
    "=": "equals sign",
    "?": "question mark",
    "@": "at sign",
    "[": "left bracket",
    "]": "right bracket",
}
# In print these letters are the digits 0 and 1, and no picture can tell them apart: they would
# teach that a zero is often no zero. Other look-alikes (S and 5, Z and 2, B and 8) do differ in
# every font, and stay: what tells them apart is worth learning.
SAME_AS_DIGITS = "OoIl"
# Every glyph is drawn at the same size, so these pairs differ in nothing: one name for both.
SAME_IN_BOTH_CASES = "CPSUVWXZcpsuvwxz"

DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "a photo of the number {}",
    "a photo of a {}",
    "a photo of a handwritten {}",
    "a picture of the digit {}",
    "a drawing of a {}",
    "the digit {}",
    "the number {}",
    "{}",
)
OTHER_TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a photo of a handwritten {}",
    "a picture of the {}",
    "a drawing of a {}",
    "the {}",
    "{}",
)

CANVAS = 64  # pixels a side, for rendering and warping: twice what the model sees
INK = 48  # the longer side of a glyph's ink on the canvas
# Sides of the small grey images that are then enlarged as the preprocessing enlarges them. In
# roughly equal ratios, because a pixel more or less matters by its share.
SMALL_SIDES = (8, 10, 12, 16, 20, 24, 32)

EVALUATE_EVERY = 250
COPIES = 16  # augmented images per held-out font and glyph


@dataclass(frozen=True)
class Glyph:
    """One character to draw, the name that captions use for it, and whether it is a digit."""

    character: str
    name: str
    is_digit: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        return DIGIT_TEMPLATES if self.is_digit else OTHER_TEMPLATES


def list_glyphs() -> list[Glyph]:
    """The 73 glyphs: digits first, then letters, then symbols. Some letters share a name."""
    glyphs = [Glyph(c, n, True) for c, n in zip(string.digits, DIGIT_NAMES, strict=True)]
    for character in string.ascii_letters:
        if character in SAME_AS_DIGITS:
            continue
        case = "capital " if character.isupper() else "small "
        prefix = "" if character in SAME_IN_BOTH_CASES else case
        glyphs.append(Glyph(character, f"{prefix}letter {character.lower()}"))
    return glyphs + [Glyph(character, name) for character, name in SYMBOL_NAMES.items()]


def render(font_path: Path, character: str) -> np.ndarray:
    """Draw one character, centred, its ink's longer side `INK` pixels: (CANVAS, CANVAS) uint8."""

    def load(size: float) -> ImageFont.FreeTypeFont:
        # The basic layout is in every Pillow build; the other one depends on a system library.
        return ImageFont.truetype(str(font_path), size, layout_engine=ImageFont.Layout.BASIC)

    left, top, right, bottom = load(256).getbbox(character)
    font = load(256 * INK / max(right - left, bottom - top))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, font=font, fill=255)
    return np.asarray(image)


def render_all(fonts: tuple[str, ...], glyphs: list[Glyph]) -> Tensor:
    """Ink masks of every glyph in every font: (fonts, glyphs, CANVAS, CANVAS) float32, 0 to 1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = [[render(folder / f"{font}.ttf", g.character) for g in glyphs] for font in fonts]
    return torch.from_numpy(np.stack([np.stack(row) for row in images])).float() / 255


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


class Batches:
    """Draws captioned training images."""

    def __init__(self, glyphs: list[Glyph], tokenizer: SimpleTokenizer, seed: int) -> None:
        self.ink = render_all(TRAINING_FONTS, glyphs)
        self.augment = Augmenter(seed)
        digits = torch.tensor([glyph.is_digit for glyph in glyphs])
        share = torch.where(digits, DIGIT_SHARE / digits.sum(), (1 - DIGIT_SHARE) / (~digits).sum())
        self.weights = share
        # Prompt templates often end in a full stop: with and without must mean the same.
        self.tokens = [
            tokenizer([t.format(glyph.name) + stop for t in glyph.templates for stop in ("", ".")])
            for glyph in glyphs
        ]

    def draw(self) -> tuple[Tensor, Tensor]:
        """(BATCH, 3, 32, 32) float32 images and (BATCH, CONTEXT_LENGTH) int64 captions."""
        # Names repeat within a batch (four or five images per digit), and the loss calls those
        # pairs wrong. That is left so: the draws do not depend on which digit it is, so the
        # unavoidable part of the loss is the same for all ten and favours none, and the batch
        # keeps its share of digits. Captions differ anyway in template.
        generator = self.augment.generator
        glyph = torch.multinomial(self.weights, BATCH, replacement=True, generator=generator)
        font = self.augment.choice(len(TRAINING_FONTS), BATCH)
        picks = self.augment.uniform(0, 1, BATCH).tolist()
        tokens = [self.tokens[g] for g in glyph.tolist()]
        captions = [t[int(p * len(t))] for t, p in zip(tokens, picks, strict=True)]
        return self.augment(self.ink[font, glyph]), torch.stack(captions)


class HeldOut:
    """Zero-shot accuracy on the fonts that training never shows."""

    def __init__(self, glyphs: list[Glyph], tokenizer: SimpleTokenizer, seed: int) -> None:
        names = list(dict.fromkeys(glyph.name for glyph in glyphs))  # digits first
        fonts = len(HELD_OUT_FONTS)
        ink = render_all(HELD_OUT_FONTS, glyphs).repeat(COPIES, 1, 1, 1).flatten(0, 1)
        self.images = Augmenter(seed)(ink)
        labels = torch.tensor([names.index(glyph.name) for glyph in glyphs])
        self.labels = labels.repeat(COPIES * fonts)
        digits = len(DIGIT_NAMES)
        prompts = [f"a photo of the digit {name}." for name in names[:digits]]
        self.prompts = tokenizer(prompts + [f"a photo of a {name}." for name in names[digits:]])

    @torch.no_grad()
    def accuracy(self, model: Any) -> tuple[float, float]:
        """Among all names, over all images; and among the ten digits, over images of digits."""
        text = model.encode_text(self.prompts, normalize=True)
        image = torch.cat([model.encode_image(chunk) for chunk in self.images.split(512)])
        logits = image @ text.T
        every = (logits.argmax(-1) == self.labels).float().mean().item()
        is_digit = self.labels < len(DIGIT_NAMES)
        guesses = logits[is_digit][:, : len(DIGIT_NAMES)].argmax(-1)
        return every, (guesses == self.labels[is_digit]).float().mean().item()


def write_merges(path: Path) -> None:
    """Write the header and the first `MERGES` lines of open_clip's own byte-pair table, gzipped.

    Without a newline at the end, which SimpleTokenizer would take for one more (empty) merge.
    """
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    # No file name and no time in the gzip header, so that the same table gives the same bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write("\n".join(lines[: 1 + MERGES]).encode())


def write_config(path: Path) -> None:
    """Write the file in which open_clip's ``local-dir:`` finds architecture and preprocessing."""
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; as in open_clip, gains, biases and the logit scale are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over `WARMUP` steps, then half a cosine down to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1)))


def train(out: Path, steps: int, seed: int) -> None:
    """Train for `steps` steps and write the three files into the folder `out`."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    write_merges(out / "bpe_merges.txt.gz")
    write_config(out / "open_clip_config.json")

    tokenizer = SimpleTokenizer(
        bpe_path=str(out / "bpe_merges.txt.gz"), context_length=CONTEXT_LENGTH
    )
    assert tokenizer.vocab_size == MODEL_CFG["text_cfg"]["vocab_size"]
    glyphs = list_glyphs()
    batches = Batches(glyphs, tokenizer, seed + 1)
    held_out = HeldOut(glyphs, tokenizer, seed + 2)
    model = open_clip.CLIP(**MODEL_CFG)
    loss_of = open_clip.ClipLoss()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    print(
        f"torch {torch.__version__}, open_clip {open_clip.__version__}, "
        f"matplotlib {matplotlib.__version__}, pillow {PIL.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"seed {seed}, {steps} steps of {BATCH}, {len(TRAINING_FONTS)} training fonts, "
        f"{len(HELD_OUT_FONTS)} held-out fonts, {len(glyphs)} glyphs, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
    )

    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        images, captions = batches.draw()
        loss = loss_of(*model(images, captions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
        losses.append(loss.item())
        if step % EVALUATE_EVERY == 0 or step == steps:
            report(f"step {step:4d}", model, held_out, np.mean(losses), time.perf_counter() - start)
            losses.clear()

    weights = out / "open_clip_model.safetensors"
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, weights)
    stored = open_clip.create_model(f"local-dir:{out}")
    every, digits = held_out.accuracy(stored)
    print(f"stored as fp16, loaded again: held-out fonts {every:.1%}, digits {digits:.1%}")
    print(f"{weights.name}: {weights.stat().st_size:,} bytes")
    print(f"sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()}")


def report(label: str, model: Any, held_out: HeldOut, loss: float, seconds: float) -> None:
    """Print one line: mean loss since the last one, logit scale, held-out accuracy, time."""
    every, digits = held_out.accuracy(model)
    print(
        f"{label}  loss {loss:.3f}  logit scale {model.logit_scale.exp().item():5.1f}  "
        f"held-out fonts {every:.1%}, digits {digits:.1%}  {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train glyph-clip on glyphs rendered here.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this)"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    # Sums are split over threads, so their number is part of what makes a run repeatable.
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    train(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
