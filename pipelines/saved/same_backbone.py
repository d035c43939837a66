"""Whether features come from the backbone and the preprocessing that an adapter was fitted for."""

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo


def check_same_backbone(
    identity: Mapping[str, Any], preprocess: Mapping[str, Any], info: AdapterInfo, remedy: str
) -> None:
    """Raises UserError where they do not.

    identity, preprocess: as a cache states them. remedy: what to do about other weights.
    """
    name = identity.get("name")
    found, wanted = identity.get("weights_sha256"), info.backbone.get("weights_sha256")
    if found != wanted:
        raise UserError(
            f"The adapter was fitted for other weights of {info.backbone.get('name')} (SHA-256 "
            f"{reprlib.repr(wanted)}) than those of {name} here ({reprlib.repr(found)}); {remedy}."
        )
    # What is compared has been through JSON on the adapter's side.
    for key, value in json.loads(json.dumps(dict(preprocess))).items():
        if info.preprocess.get(key) != value:
            raise UserError(
                f"The adapter was fitted on images preprocessed with {key} "
                f"{reprlib.repr(info.preprocess.get(key))}, {name} here uses "
                f"{reprlib.repr(value)}; extract and fit again."
            )


def check_same_width(found: int, wanted: int, name: str) -> None:
    """Raises UserError where `name` gives features of another width than the adapter takes."""
    if found != wanted:
        raise UserError(
            f"The adapter takes features {wanted} wide, those of {name} are {found} wide; fit it "
            "again."
        )
