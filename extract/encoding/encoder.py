"""The encode loop: a frozen CLIP over images and prompts."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clip_adapter.cache.rows import Rows
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.decode import PixelBatch, Plan, decode
from clip_adapter.extract.encoding.device import (
    MOST_TEXTS,
    forward_passes,
    shared_cores,
    text_passes,
)
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.extract.encoding.projection import take_projection
from clip_adapter.extract.encoding.unreadable import Skipped

FEATURES, FEATURES2 = "features", "features2"


class Stopwatch:
    """Seconds by name, for what one thread does or waits for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return time.perf_counter() - self._started

    def shares(self) -> str:
        """Such as `decode 7 %, forward 91 %, write 2 %`, of the time measured under any name."""
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{name} {part / total:.0%}" for name, part in self.seconds.items())


@dataclass(frozen=True)
class EncodedBatch:
    """Features of consecutive planned rows, without those that were skipped.

    features: (B, V, D) float32, or float16 where the model computes in less; un-normalised. name:
        what the cache calls them.
    pre_projection: (B, V, F), what the encoder's last linear map was applied to, if asked for.
    rows: (B,) their rows in the split. digests, contents: (B,) uint64, see PixelBatch.
    """

    features: np.ndarray
    pre_projection: np.ndarray | None
    rows: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]
    skipped: tuple[Skipped, ...]
    name: str = FEATURES

    def of_each_image(self) -> dict[str, np.ndarray]:
        """What each of the B images got, by the names of the cache."""
        arrays = {self.name: self.features, "contents": self.contents}
        if self.name == FEATURES:
            arrays["digests"] = self.digests
        if self.pre_projection is not None:
            arrays["pre_projection"] = self.pre_projection
        return arrays


class Encoder:
    """A backbone's two towers on a device.

    batch_size: images of every forward pass of the image tower; smaller batches are filled up, so
        that an image has the same features to the last bit whichever others are encoded with it.
        (Libraries compute a batch of another size in another order.)
    compiled: compile the image tower for that size. `compile_seconds` says how long that took.
    name: what the cache calls its image features.
    with_projection: `images` gives what comes before the last linear map, too. The map is taken out
        of the backbone's model.

    Raises UserError where it cannot be compiled, or there is no such map.
    """

    name = FEATURES

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        batch_size: int,
        *,
        compiled: bool = False,
        with_projection: bool = False,
        name: str = FEATURES,
    ) -> None:
        self.device = device
        self.name = name
        if device.type == "cuda":
            if device.index is not None:  # else every process has a context on the first GPU too
                torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
        self.preprocess = Preprocess(backbone.preprocess_config)
        self.dim: int = backbone.identity["embed_dim"]
        self.compile_seconds = 0.0
        self._tokenizer = backbone.tokenizer
        self._model = backbone.model.to(device, memory_format=torch.channels_last)
        self.projection = None
        if with_projection:
            self.projection = take_projection(self._model.visual, backbone.identity["name"])
        self._dtype = backbone.dtype
        self.stored_dtype = torch.float32 if self._dtype == torch.float32 else torch.float16
        self._batch_size = batch_size
        self._compiled = compiled
        self._forward = self._image_features
        if compiled:
            self._compile(batch_size)

    def rows(self, views: int) -> Rows:
        """What each image gets, see `EncodedBatch.of_each_image`."""
        dtype = np.dtype(np.float32 if self.stored_dtype == torch.float32 else np.float16)
        rows: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            self.name: (dtype, (views, self.dim)),
            "contents": (np.dtype(np.uint64), ()),
        }
        if self.name == FEATURES:
            rows["digests"] = (np.dtype(np.uint64), ())
        if self.projection is not None:
            rows["pre_projection"] = (dtype, (views, len(self.projection.weights)))
        return rows

    def texts(self, batches: Iterable[Sequence[str]]) -> Iterator[npt.NDArray[np.float32]]:
        """Text features (P, D) of each batch of prompts, un-normalised, in order."""
        running: deque[Future[npt.NDArray[np.float32]]] = deque()
        with text_passes(self.device) as pool:
            for prompts in batches:  # tokenised in this thread: not all tokenizers bear several
                running.append(pool.submit(self._text, self._tokenizer(list(prompts))))
                if len(running) > MOST_TEXTS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    @torch.inference_mode()
    def _text(self, tokens: torch.Tensor) -> npt.NDArray[np.float32]:
        return self._model.encode_text(tokens.to(self.device)).float().cpu().numpy()

    def tokens(self, prompts: Sequence[str]) -> npt.NDArray[np.int32]:
        """What the text tower is given for each prompt, (P, L)."""
        return self._tokenizer(list(prompts)).numpy().astype(np.int32)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the text tower reads only the beginning."""
        with_none = ["", *prompts]
        tokens = self._tokenizer(with_none)
        roomier = self._tokenizer(with_none, tokens.shape[1] + 1)
        # One place more is filled with padding, as for "", unless something had been cut off.
        added = roomier.sum(dim=1) - tokens.sum(dim=1)
        is_cut = (added[1:] != added[0]).tolist()
        return [prompt for prompt, cut in zip(prompts, is_cut, strict=True) if cut]

    @torch.inference_mode()
    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (V, B, D) on the device, of pixels (V, B, height, width, 3), uint8.

        With the projection (V, B, D + F): what comes before it stands behind the features.
        Each view is a forward pass of its own: view 0 comes out the same with and without others.
        """
        batch = self._batch_size
        # What is compiled knows tensors made in inference mode; for others it is compiled again.
        pixels = pixels.to(self.device, non_blocking=True, copy=self._compiled)
        views, count = pixels.shape[:2]
        if not count:
            width = self.dim + (0 if self.projection is None else len(self.projection.weights))
            return torch.empty((views, 0, width), dtype=self.stored_dtype, device=self.device)
        if count < batch:
            pixels = torch.cat([pixels, pixels[:, :1].expand(-1, batch - count, -1, -1, -1)], dim=1)
        try:
            return torch.stack([self._forward(view)[:count] for view in pixels])
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.device} lacks the memory for {batch} images at once; take fewer with "
                "--batch-size."
            ) from error

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.preprocess.normalised(pixels).to(self._dtype)
        if self.projection is None:
            return self._model.encode_image(values).to(self.stored_dtype)
        pooled = self.projection.pooled(values)
        return torch.cat([self.projection(pooled), pooled], dim=1).to(self.stored_dtype)

    @torch.inference_mode()
    def _compile(self, batch: int) -> None:
        from torch._inductor import config as inductor

        started = time.perf_counter()
        shape = (batch, self.preprocess.height, self.preprocess.width, 3)
        self._forward = torch.compile(self._image_features, dynamic=False)
        try:
            # On a CPU weights become constants, laid out for its caches.
            with inductor.patch(freezing=self.device.type == "cpu"), shared_cores(self.device):
                self._forward(torch.zeros(shape, dtype=torch.uint8, device=self.device))
        except Exception as error:  # the compiler's stages raise errors of their own kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--compile failed ({reason[:200]}); it needs a C++ compiler on a CPU and Triton "
                "on a GPU; leave it out to do without."
            ) from error
        self.compile_seconds = time.perf_counter() - started


def encode_images(
    encoder: Encoder, split: Split, plan: Plan, watch: Stopwatch
) -> Iterator[EncodedBatch]:
    """Encode the planned rows of a split, batch by batch, in order.

    watch: is told what the loop waits for: decode or forward.

    Raises UserError naming the first image that cannot be used; see `decode`.
    """
    running: deque[tuple[PixelBatch, Callable[[], torch.Tensor]]] = deque()
    pixels = decode(split, encoder.preprocess, plan)
    with forward_passes(encoder) as (start, ahead):

        def oldest() -> EncodedBatch:
            batch, features = running.popleft()
            with watch("forward"):
                array = np.ascontiguousarray(features().numpy().transpose(1, 0, 2))
            pooled = None if encoder.projection is None else array[..., encoder.dim :]
            array = array[..., : encoder.dim]
            return EncodedBatch(
                *(array, pooled, batch.rows, batch.digests, batch.contents, batch.skipped),
                encoder.name,
            )

        failure: UserError | None = None
        while True:
            with watch("decode"):
                try:
                    batch = next(pixels, None)
                except UserError as error:  # raised when what came before is delivered
                    batch, failure = None, error
            if batch is None:
                break
            with watch("forward"):
                running.append((batch, start(batch.pixels)))
            if len(running) > ahead:
                yield oldest()
        while running:
            yield oldest()
        if failure is not None:
            raise failure
