"""The methods by name."""

from clip_adapter.adapters.clip_adapter_method import ClipAdapterMethod
from clip_adapter.adapters.linear_probe import LinearProbe
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.zero_shot import ZeroShot

METHODS: dict[str, Method] = {
    "zero-shot": ZeroShot(),
    "linear-probe": LinearProbe(),
    "clip-adapter": ClipAdapterMethod(),
}
