"""Where a run's numbers come from."""

from dataclasses import dataclass
from typing import Any

from clip_adapter.cache.reader import FeatureCache


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

    @classmethod
    def of(cls, cache: FeatureCache) -> "Provenance":
        return cls(
            cache.backbone,
            cache.preprocess,
            cache.dataset,
            cache.class_names,
            cache.templates,
            cache.content_sha256,
            cache.shape("test")[1] if "test" in cache.splits else 0,
        )

    def lines(self) -> list[str]:
        """Backbone, data set and where the test split came from, for the top of a report."""
        backbone = f"{self.backbone['name']} ({self.backbone['pretrained']})"
        test = self.dataset.get("splits", {}).get("test", "not recorded")
        classes = f"{len(self.class_names)} classes, {self.test_images} test images"
        return [f"{backbone} on {self.dataset['name']}: {classes}", f"test split: {test}"]
