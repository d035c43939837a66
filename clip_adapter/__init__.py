"""CLIP-Adapter: few-shot adapters on the cached features of a frozen CLIP.

The names below are public. Each is loaded when it is first used, so that importing this package
loads no array library; every other module is private and may move.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_adapter.adapters.formulas import cosine_logits, one_hot, unit
    from clip_adapter.adapters.hyper import Hyper
    from clip_adapter.adapters.method import Method
    from clip_adapter.adapters.optimisation import trained_with
    from clip_adapter.adapters.registry import METHODS, find_method
    from clip_adapter.cache.reader import FeatureCache
    from clip_adapter.cache.writer import write_cache
    from clip_adapter.extract.config import ExtractConfig
    from clip_adapter.extract.run import extract
    from clip_adapter.pipelines.commands.fit import fit
    from clip_adapter.pipelines.commands.predict import PredictConfig, predict
    from clip_adapter.pipelines.deciding.audit import AuditConfig, audit
    from clip_adapter.pipelines.deciding.suggest import SuggestConfig, suggest
    from clip_adapter.pipelines.fitting.config import FitConfig
    from clip_adapter.pipelines.saved.adapter_file import load_adapter
    from clip_adapter.pipelines.saved.pytorch import AdaptedClip, FittedHead
    from clip_adapter.pipelines.saved.sklearn import ClipAdapterClassifier, FewShotClassifier

    __version__: str

PUBLIC = {
    "fit": "pipelines.commands.fit",
    "FitConfig": "pipelines.fitting.config",
    "extract": "extract.run",
    "ExtractConfig": "extract.config",
    "FeatureCache": "cache.reader",
    "write_cache": "cache.writer",
    "load_adapter": "pipelines.saved.adapter_file",
    "predict": "pipelines.commands.predict",
    "PredictConfig": "pipelines.commands.predict",
    "suggest": "pipelines.deciding.suggest",
    "SuggestConfig": "pipelines.deciding.suggest",
    "audit": "pipelines.deciding.audit",
    "AuditConfig": "pipelines.deciding.audit",
    "FewShotClassifier": "pipelines.saved.sklearn",
    "ClipAdapterClassifier": "pipelines.saved.sklearn",
    "AdaptedClip": "pipelines.saved.pytorch",
    "FittedHead": "pipelines.saved.pytorch",
    "Method": "adapters.method",
    "Hyper": "adapters.hyper",
    "METHODS": "adapters.registry",
    "find_method": "adapters.registry",
    "trained_with": "adapters.optimisation",
    "cosine_logits": "adapters.formulas",
    "unit": "adapters.formulas",
    "one_hot": "adapters.formulas",
}
__all__ = [
    "METHODS",
    "AdaptedClip",
    "AuditConfig",
    "ClipAdapterClassifier",
    "ExtractConfig",
    "FeatureCache",
    "FewShotClassifier",
    "FitConfig",
    "FittedHead",
    "Hyper",
    "Method",
    "PredictConfig",
    "SuggestConfig",
    "__version__",
    "audit",
    "cosine_logits",
    "extract",
    "find_method",
    "fit",
    "load_adapter",
    "one_hot",
    "predict",
    "suggest",
    "trained_with",
    "unit",
    "write_cache",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("clip-adapter")
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Hall(ModuleType):
    """The function `extract` has the name of the room that it lies in, which importing anything of
    that room would put in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Hall

# In a checkout the rooms lie beside this folder; an installed package has them inside it.
_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "cache" / "FORMAT.md").is_file() and not (Path(__file__).parent / "cache").is_dir():
    __path__.append(str(_CHECKOUT))
