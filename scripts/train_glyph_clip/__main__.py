"""Train glyph-clip, the small CLIP that stands in for a real one where none can be downloaded.

    python -m scripts.train_glyph_clip --out FOLDER

Every image is a glyph that is rendered here with the fonts in matplotlib's wheel, and every caption
names that glyph. No other data is read, neither for training nor for evaluation. FOLDER receives
``open_clip_model.safetensors``, ``open_clip_config.json`` and ``bpe_merges.txt.gz``; open_clip
loads the first two through ``local-dir:FOLDER``, its ``SimpleTokenizer`` the third.
"""

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import open_clip
import PIL
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn

from scripts.train_glyph_clip.data import BATCH, Batches, HeldOut
from scripts.train_glyph_clip.glyphs import HELD_OUT_FONTS, TRAINING_FONTS, list_glyphs
from scripts.train_glyph_clip.model import (
    CONTEXT_LENGTH,
    MODEL_CFG,
    write_config,
    write_merges,
)

SEED = 0
STEPS = 3000
WARMUP = 100
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.2  # with these betas and this eps: open_clip's own defaults for a ViT
BETAS = (0.9, 0.98)
EPS = 1e-6
EVALUATE_EVERY = 250


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
    parser = argparse.ArgumentParser(
        "train_glyph_clip", description="Train glyph-clip on glyphs rendered here."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
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
