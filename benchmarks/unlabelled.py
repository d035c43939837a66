"""What images without labels are worth on feature caches: python benchmarks/unlabelled.py --help

One by one: the training images that a task does not draw are taken without their labels, those of
all classes or of the first five, through the public `fit --unlabelled`; test images are classified
one by one. `plain` is without them, `refined` with the refinement whether or not it is worth it,
`kept` what `fit` saves. Together (transductive): the test images themselves, all or those of the
first five classes, which are then the only ones that count.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from clip_adapter.adapters.engine.evaluation import Score
from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.stata import classes_found, refine, temperature_of
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import write_cache
from clip_adapter.listener import Listener
from clip_adapter.pipelines.fitting import unlabelled as refining
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.run import run_fit
from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter

FEW = 5


class AlwaysBetter(Score):
    """Keeps what it is no reason to keep, to see what that would cost."""

    def __ge__(self, other: object) -> bool:
        return True


def with_unlabelled(path: Path, out: Path, classes: int) -> Path:
    """The same cache with the training images of the first classes once more, without labels."""
    with FeatureCache(path) as cache:
        content = {"text/features": cache.text_features(), "text/class_names": cache.class_names}
        content["text/templates"] = cache.templates
        for split in cache.splits:
            images = cache.images(split)
            content[f"images/{split}/features"] = images.features
            content[f"images/{split}/labels"] = images.labels
            content[f"images/{split}/ids"] = images.ids
        train = cache.images("train", views=1)
        own = np.flatnonzero(train.labels < classes)
        content["images/unlabelled/features"] = train.features[:, own]
        content["images/unlabelled/ids"] = [train.ids[row] for row in own.tolist()]
        write_cache(
            out,
            content,
            backbone=cache.backbone,
            dataset=cache.dataset,
            logit_scale=cache.logit_scale,
            logit_bias=cache.logit_bias,
            preprocess=cache.preprocess,
            arguments={},
        )
    return out


def one_by_one(
    path: Path, methods: Sequence[str], shots: int, seeds: Sequence[int], folder: Path
) -> Iterator[list[str]]:
    """Rows of the first table, and the adapters of the plain runs in `folder`."""
    with FeatureCache(path) as cache:
        count = len(cache.class_names)
    for classes in (count, FEW):
        cache_path = with_unlabelled(path, folder / f"{classes}.h5", classes)
        common = {"baselines": (), "shots": shots, "seeds": tuple(seeds)}
        runs = {}
        for name, which in (("plain", None), ("refined", cache_path), ("kept", cache_path)):
            config = FitConfig(
                cache=cache_path,
                out=folder / f"{name}-{classes}",
                method=tuple(methods),
                unlabelled=which,
                **common,
            )
            refining.Score = AlwaysBetter if name == "refined" else Score
            runs[name] = run_fit(config, Listener()).results
        for method in methods:
            cells = []
            for rows in runs.values():
                own = [100 * (r.test_accuracy or 0) for r in rows if r.method == method]
                cells.append(f"{statistics.fmean(own):.2f}")
            kept = [not r.note.startswith("not") for r in runs["kept"] if r.method == method]
            yield [f"{classes} of {count}", method, *cells, f"{sum(kept)} of {len(kept)}"]


def together(path: Path, adapters: Sequence[SavedAdapter]) -> Iterator[list[str]]:
    """Rows of the second table, of one method's adapters."""
    with FeatureCache(path) as cache:
        test = cache.images("test")
        count = len(cache.class_names)
    for classes in (count, FEW):
        own = test.labels < classes
        rows, labels = test.features[0][own], test.labels[own]
        measured = []
        for adapter in adapters:
            logits = adapter.logits(rows)
            temperature = temperature_of(logits, cosine_logits(np, rows, adapter.head))
            shares, _ = refine(rows, logits, adapter.weights, temperature)
            right = [np.mean(some.argmax(axis=1) == labels) for some in (logits, shares)]
            measured.append([*(100 * share for share in right), len(classes_found(shares))])
        plain, shared, found = np.mean(measured, axis=0)
        method = adapters[0].info.method
        shown = [f"{plain:.2f}", f"{shared:.2f}", f"{found:.1f}"]
        yield [f"{classes} of {count}", str(len(rows)), method, *shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("caches", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=["zero-shot", "ridge", "clip-adapter"])
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    for path in given.caches:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = list(one_by_one(path, given.methods, given.shots, given.seeds, folder))
            heads = ["classes there", "method", "plain", "refined", "kept", "times"]
            print(Table(heads, rows, f"{path.stem}, one by one").markdown())
            rows = []
            for method in given.methods:
                runs = [folder / f"plain-{FEW}/adapters/{method}" for _ in given.seeds]
                names = [f"shots-{given.shots}-seed-{seed}" for seed in given.seeds]
                adapters = [load_adapter(run / own) for run, own in zip(runs, names, strict=True)]
                rows += together(path, adapters)
            heads = ["classes there", "images", "method", "one by one", "together", "found"]
            print(Table(heads, rows, f"{path.stem}, together").markdown(), flush=True)


if __name__ == "__main__":
    main()
