"""What a second source of features adds on the digits: their 64 pixels beside glyph-clip.

    .venv/bin/python -m benchmarks.second_encoder FOLDER

Writes two caches and two runs to FOLDER, and prints test accuracies in per cent, mean ± deviation
over ten draws, without the pixels and with them; rounds of the support set choose (--select loo).
"""

import sys
from pathlib import Path

import numpy as np

from clip_adapter import ExtractConfig, FeatureCache, FitConfig, extract, fit, write_cache
from clip_adapter.extract.datasets.registry import open_dataset

METHODS = ("ridge", "proker", "tip-adapter", "gda")
SHOTS = (1, 4, 16)
SEEDS = tuple(range(1, 11))


def with_pixels(cache_path: Path, out: Path) -> Path:
    """The cache with each image's pixels, from 0 to 255, as features of a second encoder."""
    dataset = open_dataset("digits")
    with FeatureCache(cache_path) as cache:
        content = {
            "text/features": cache.text_features(),
            "text/class_names": cache.class_names,
            "text/templates": cache.templates,
        }
        for split in cache.splits:
            read = dataset.splits[split].read
            images = cache.images(split)
            pixels = [np.asarray(read(row), np.float32).ravel() for row in range(len(images.ids))]
            named = {"features": images.features, "labels": images.labels, "ids": images.ids}
            named["features2"] = np.stack(pixels)[None]
            content |= {f"images/{split}/{name}": values for name, values in named.items()}
        pixels_of = {"name": "pixels", "pretrained": "none", "weights_sha256": "0" * 64}
        write_cache(
            out,
            content,
            backbone=cache.backbone,
            preprocess=cache.preprocess,
            dataset=cache.dataset,
            logit_scale=cache.logit_scale,
            backbone2=pixels_of | {"embed_dim": 64, "image_size": 8, "preprocess": {}},
            force=True,
        )
    return out


def main(folder: Path) -> None:
    one = extract(ExtractConfig(out=folder / "digits.h5"))
    both = with_pixels(one, folder / "both.h5")
    found = {}
    for name, cache in (("one", one), ("both", both)):
        out = folder / name
        how = {"shots": SHOTS, "seeds": SEEDS, "select": "loo"}
        result = fit(FitConfig(cache, out, METHODS, ("zero-shot",), **how))
        found[name] = {(line.method, line.shots): line.test_accuracy for line in result.summary}
    print("| method |" + "".join(f" {shots} shots | with pixels |" for shots in SHOTS))
    print("|---|" + "---|---|" * len(SHOTS))
    for method in METHODS:
        cells = (
            f" {100 * spread.mean:.1f} ± {100 * spread.std:.1f} |"
            for shots in SHOTS
            for spread in (found[name][method, shots] for name in ("one", "both"))
        )
        print(f"| `{method}` |{''.join(cells)}")


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
