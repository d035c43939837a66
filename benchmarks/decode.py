"""Time `extract --decode fast` against full decoding, and what it changes:
python benchmarks/decode.py

Times are CPU seconds of one thread for decoding and resizing a JPEG file to what ViT-B-32 takes
(224 pixels), the median of the rounds, alternating; hence images a second of a core. The files are
scikit-learn's two photographs (640 × 427), tiled with mirrored copies so that a pixel has as much
detail as in a photograph, saved by Pillow at quality 90; phones save more bytes a pixel or fewer.

Pixels are compared after preprocessing, in levels of 255, over both photographs, tiled and enlarged
(which blurs: the kinder case). Features and accuracies are those of glyph-clip, the only backbone
whose weights come with the package: digits enlarged to photographs' sizes, of which it sees 32
pixels. It says nothing of what CLIP's own weights make of photographs.
"""

import argparse
import io
import statistics
import time
from functools import partial

import numpy as np
import torch
from idle import machine, require_idle
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.encoding.images import open_image, read_rgb
from clip_adapter.extract.encoding.preprocess import Preprocess

SIZES = ((500, 375), (1024, 768), (1600, 1200), (4000, 3000))
OF_VIT: dict[str, object] = {"size": 224, "interpolation": "bicubic"} | {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
WAYS = {"full": Preprocess(OF_VIT), "fast": Preprocess(OF_VIT | {"decode": "fast"})}
DIGITS = ((256, 256), (1600, 1200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--digits", type=int, default=1797, help="how many of them")
    arguments = parser.parse_args()
    require_idle()
    print(machine())
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    print("| JPEG | bytes a pixel | full, images/s a core | fast | × | tiled | enlarged |")
    for size in SIZES:
        tiled = [jpeg(tile(each, size)) for each in photographs]
        enlarged = [jpeg(each.resize(size, Image.Resampling.LANCZOS)) for each in photographs]
        rates = images_a_second(tiled, arguments.rounds)
        density = sum(map(len, tiled)) / len(tiled) / size[0] / size[1]
        ratio = rates["fast"] / rates["full"]
        print(
            f"| {size[0]} × {size[1]} | {density:.2f} | {rates['full']:.1f} "
            f"| {rates['fast']:.1f} | {ratio:.2f} | {difference(tiled)} | {difference(enlarged)} |"
        )
    print("\n| digits as JPEG | cosine: mean, least | zero-shot %: full, fast | other answers |")
    backbone = load_backbone("glyph-clip")
    for size in DIGITS:
        print(f"| {size[0]} × {size[1]} | {digits(backbone, size, arguments.digits)} |")
    require_idle()


def tile(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The photograph beside and below its mirror images, cut to the size."""
    mirrored = np.asarray(image)
    mirrored = np.concatenate([mirrored, mirrored[:, ::-1]], axis=1)
    mirrored = np.concatenate([mirrored, mirrored[::-1]])
    times = -(-size[1] // mirrored.shape[0]), -(-size[0] // mirrored.shape[1])
    return Image.fromarray(np.tile(mirrored, (*times, 1))[: size[1], : size[0]])


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def view(how: Preprocess, content: bytes) -> np.ndarray:
    image = read_rgb(partial(open_image, content), how.drafted)
    return how.view(image, "", 0, 0)


def images_a_second(contents: list[bytes], rounds: int) -> dict[str, float]:
    """Of a core, by the median of the CPU seconds of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, how in WAYS.items():
            started = time.process_time()
            for content in contents:
                view(how, content)
            seconds[way].append((time.process_time() - started) / len(contents))
    return {way: 1 / statistics.median(each) for way, each in seconds.items()}


def difference(contents: list[bytes]) -> str:
    """Of the levels that the encoder is given: mean and largest."""
    pairs = [[view(how, content).astype(int) for how in WAYS.values()] for content in contents]
    apart = np.abs([full - fast for full, fast in pairs])
    return f"{apart.mean():.2f}, {apart.max()}"


def digits(backbone: Backbone, size: tuple[int, int], count: int) -> str:
    dataset = open_dataset("digits")
    parts = [(split, row) for split in dataset.splits.values() for row in range(len(split.ids))]
    parts = parts[:count]
    labels = np.array([split.labels[row] for split, row in parts])
    files = [jpeg(split.read(row).convert("RGB").resize(size)) for split, row in parts]
    prompts = [f"a photo of the digit {name}." for name in dataset.class_names]
    with torch.inference_mode():
        text = unit(backbone.model.encode_text(backbone.tokenizer(prompts)))
        features = []
        for way in WAYS:
            how = Preprocess(backbone.decoding(way).preprocess_config)
            pixels = torch.from_numpy(np.stack([view(how, content) for content in files]))
            features.append(unit(backbone.model.encode_image(how.normalised(pixels))))
        cosines = (features[0] * features[1]).sum(-1)
        answers = [(each @ text.T).argmax(-1).numpy() for each in features]
    right = ", ".join(f"{100 * (answer == labels).mean():.2f}" for answer in answers)
    others = int((answers[0] != answers[1]).sum())
    return f"{cosines.mean():.6f}, {cosines.min():.6f} | {right} | {others} of {len(files)}"


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


if __name__ == "__main__":
    main()
