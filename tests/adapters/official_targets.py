"""The published subsets of the embedded default's features, as tasks.

On these the official implementations were run whose accuracies are in data/official_*.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.adapters.method import Head, Method, Setting, Task
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache, Images

SEEDS = (1, 2, 3)


def official(name: str) -> dict[str, Any]:
    """The figures of data/official_NAME.json."""
    return json.loads((Path(__file__).parent / f"data/official_{name}.json").read_text())


@dataclass(frozen=True)
class Splits:
    """View 0 of a cache's images, and its zero-shot classifier."""

    train: Images
    val: Images
    test: Images
    head: Head

    @classmethod
    def of(cls, path: Path) -> "Splits":
        with FeatureCache(path) as cache:
            text = jnp.asarray(cache.text_features())
            scale, bias = jnp.float32(cache.logit_scale), jnp.float32(cache.logit_bias)
            head = Head(classifier_weights(jnp, text), scale, bias, text)
            images = [cache.images(split, views=1) for split in ("train", "val", "test")]
        return cls(*images, head)

    def task(self, shots: int, seed: int) -> Task:
        """The published draw: so many images a class, and min(shots, 4) to validate on."""
        rows = draw_few_shot(self.train.labels, self.val.labels, shots=shots, seed=seed)
        return Task(
            jnp.asarray(self.train.features[:, rows.support]),
            jnp.asarray(self.train.labels[rows.support]),
            jnp.asarray(self.val.features[0, rows.validation]),
            jnp.asarray(self.val.labels[rows.validation]),
            self.head,
            jnp.int32(seed),
        )

    def accuracy(self, method: Method, setting: Setting, task: Task, engine: Engine) -> float:
        """On the test split, of a setting fitted to its end."""
        arrays = fit(method, setting, None, task, engine)
        logits = make_classify(method, setting, arrays, task.head)(self.test.features[0])
        return float(np.mean(logits.argmax(axis=1) == self.test.labels))
