"""The encode loop: a frozen CLIP over images and prompts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.backbone import Backbone
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.prompts import prompts


@torch.inference_mode()
def encode_text(
    backbone: Backbone, class_name: str, templates: Sequence[str], device: torch.device
) -> np.ndarray:
    """Text features of one class, (1, P, D) float32, un-normalised."""
    tokens = backbone.tokenizer(prompts(class_name, templates)).to(device)
    return backbone.model.encode_text(tokens).float().cpu().numpy()[None]


@torch.inference_mode()
def encode_images(
    backbone: Backbone,
    split: Split,
    device: torch.device,
    *,
    start: int,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[np.ndarray, slice]]:
    """Image features of a split from row `start` on, batch by batch.

    Yields (B, 1, D) float32, un-normalised, with the rows they belong to. Decoding and
    preprocessing run in `workers` threads (Pillow releases the interpreter lock), up to two
    batches ahead of the model.

    Raises UserError naming the first image that cannot be decoded.
    """

    def load(row: int) -> torch.Tensor:
        try:
            return backbone.preprocess(split.read(row))
        except (OSError, ValueError) as error:
            raise UserError(f"{split.ids[row]} cannot be decoded: {error}") from error

    with ThreadPoolExecutor(workers) as pool:
        rows = iter(range(start, len(split.labels)))
        ahead = [pool.submit(load, row) for row in islice(rows, 3 * batch_size)]
        while ahead:
            batch = torch.stack([future.result() for future in ahead[:batch_size]])
            ahead = ahead[batch_size:] + [
                pool.submit(load, row) for row in islice(rows, batch_size)
            ]
            features = backbone.model.encode_image(batch.to(device)).float().cpu().numpy()
            yield features[:, None], slice(start, start + len(batch))
            start += len(batch)
