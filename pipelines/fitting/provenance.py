"""Where a run's numbers come from."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import version
from platform import python_version
from typing import Any

from clip_adapter.cache.metadata import Backbone2
from clip_adapter.cache.reader import FeatureCache

PROVENANCE = "provenance.json"
# What has a say in a run's numbers.
COMPUTED_WITH = ("clip-adapter", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


@dataclass(frozen=True)
class Provenance:
    """The cache in words and identities; backbone, preprocess and dataset as the cache has them."""

    backbone: dict[str, Any]
    preprocess: dict[str, Any]
    dataset: dict[str, Any]
    class_names: list[str]
    templates: list[str]
    cache_sha256: str
    test_images: int
    backbone2: Backbone2 | None = None

    @classmethod
    def of(cls, cache: FeatureCache) -> Provenance:
        return cls(
            cache.backbone,
            cache.preprocess,
            cache.dataset,
            cache.class_names,
            cache.templates,
            cache.content_sha256,
            cache.shape("test")[1] if "test" in cache.splits else 0,
            cache.backbone2,
        )

    def document(self) -> dict[str, Any]:
        """For provenance.json: this, its lines, and the versions of what computes."""
        versions = {"python": python_version(), **{name: version(name) for name in COMPUTED_WITH}}
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return {"about": self.lines(), "versions": versions, **own}

    @classmethod
    def of_document(cls, document: Any) -> Provenance:
        """What `document` made this of.

        Raises ValueError for anything else.
        """
        try:
            own = {f.name: document[f.name] for f in fields(cls) if f.default is MISSING}
            provenance = cls(**own, backbone2=document.get("backbone2"))
            provenance.lines()
            names = [provenance.cache_sha256, *provenance.class_names, *provenance.templates]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("no provenance of a run") from error
        if type(provenance.test_images) is not int or not all(isinstance(n, str) for n in names):
            raise ValueError("no provenance of a run")
        return provenance

    def lines(self) -> list[str]:
        """Backbone, data set and where the test split came from, for the top of a report."""
        named = [self.backbone, *([self.backbone2] if self.backbone2 else [])]
        backbone = " and ".join(f"{one['name']} ({one['pretrained']})" for one in named)
        test = self.dataset.get("splits", {}).get("test", "not recorded")
        classes = f"{len(self.class_names)} classes, {self.test_images} test images"
        return [f"{backbone} on {self.dataset['name']}: {classes}", f"test split: {test}"]
