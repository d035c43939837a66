"""Captioned images: drawn at random for training, fixed for the fonts that it never shows."""

from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from scripts.train_glyph_clip.augmentation import Augmenter
from scripts.train_glyph_clip.glyphs import (
    DIGIT_NAMES,
    HELD_OUT_FONTS,
    TRAINING_FONTS,
    Glyph,
    render_all,
)

BATCH = 128
DIGIT_SHARE = 0.35  # ten glyphs of 73, and the ones that the model is for
COPIES = 16  # augmented images per held-out font and glyph


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
