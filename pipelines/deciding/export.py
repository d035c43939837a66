"""A fitted classifier as one file that runs without this package: ONNX, or PyTorch's `.pt2`."""

import io
import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from clip_adapter.adapters.decisions import probabilities
from clip_adapter.errors import UserError, first_line
from clip_adapter.extract.backbones.loading import silent_loaders
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.pipelines.saved.pytorch import AdaptedClip
from clip_adapter.words import shortened, size

INPUT, OUTPUTS = "images", ("logits", "probabilities")
BATCHES = (1, 3, 8)  # at which a file is held against what `predict` computes
TOLERANCE = 1e-5  # of the logit scale, or of the largest logit where that is more
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: a protocol buffer has at most 2 GiB
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
METADATA = "metadata.json"  # within a .pt2

Images = npt.NDArray[np.float32]
Run = Callable[[Images], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


class Classifier(nn.Module):
    """Preprocessed images (B, 3, H, W) → logits (B, C) and probabilities (B, C), the softmax of
    logits / temperature. It has the image tower alone, not the text tower."""

    def __init__(self, model: AdaptedClip, temperature: float) -> None:
        super().__init__()
        self.visual, self.head = model.clip.visual, model.head
        self._temperature = temperature

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.visual(images))
        return logits, torch.softmax(logits / self._temperature, dim=1)


def export_classifier(
    model: AdaptedClip,
    adapter: SavedAdapter,
    temperature: float,
    ending: str,
    metadata: Mapping[str, Any],
) -> tuple[bytes, float, float]:
    """The content of a file, how far its logits are at most from those of `adapter.logits` on the
    features of `model`, and how far they may be.

    ending: `.onnx` or `.pt2`. metadata: JSON that the file carries.
    Raises UserError for a backbone that cannot be traced, and for what the format cannot hold.
    """
    classifier = Classifier(model, temperature).eval()
    name = str(adapter.info.backbone.get("name"))
    images = noise(adapter.info.preprocess, max(BATCHES))
    with torch.inference_mode():
        features = model.clip.encode_image(images).float().numpy()
    expected = adapter.logits(features)
    program = _traced(classifier, images[:3], name)
    content, run = WRITERS[ending](program, metadata, name)
    allowed = TOLERANCE * max(adapter.info.logit_scale, float(np.abs(expected).max()))
    return content, _difference(run, images.numpy(), expected, temperature), allowed


def noise(preprocess: Mapping[str, Any], count: int) -> torch.Tensor:
    """(count, 3, H, W): preprocessed images of random pixels, the same ones always."""
    how = Preprocess(preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (count, how.height, how.width, 3), np.uint8)
    return how.normalised(torch.from_numpy(pixels)).contiguous()


def require_onnx() -> None:
    """Raises UserError where a package of the extra `onnx` is not there."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ONNX needs the package {missing[0]}: pip install 'clip-adapter[onnx]'; a name that "
            "ends with .pt2 needs none."
        )


def _traced(classifier: Classifier, images: torch.Tensor, name: str) -> ExportedProgram:
    try:
        program = torch.export.export(
            classifier, (images,), dynamic_shapes=({0: Dim("batch", min=1)},)
        )
    except Exception as error:  # of dozens of kinds
        reason = shortened(first_line(error), 200)
        raise UserError(
            f"The backbone {name} cannot be traced by torch.export ({reason}); AdaptedClip runs it "
            "in Python."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    return program


def _onnx(program: ExportedProgram, metadata: Mapping[str, Any], name: str) -> tuple[bytes, Run]:
    import onnxruntime

    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    if weights > LARGEST_ONNX:
        raise UserError(
            f"{name} has {size(weights)} of weights, and an ONNX file holds at most 2 GiB; give a "
            "name that ends with .pt2."
        )
    try:
        with silent_loaders():
            converted = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=OUTPUTS, verbose=False
            )
        if converted is None:
            raise ValueError("the exporter made nothing")
        model = converted.model_proto
        _clean(model, metadata)
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the exporter, of protocol buffers and of the runtime
        reason = shortened(first_line(error), 200)
        raise UserError(
            f"The backbone {name} cannot be written as ONNX ({reason}); give a name that ends with "
            ".pt2."
        ) from error
    return content, lambda images: tuple(session.run(OUTPUTS, {INPUT: images}))


def _clean(model: Any, metadata: Mapping[str, Any]) -> None:
    """Name the batch axis, add the metadata, and leave out the exporter's own notes, in which this
    machine's paths stand."""
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    values = [*graph.input, *graph.output, *graph.value_info]
    for value in values:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(rf"\b{symbol}\b", "batch", axis.dim_param)
    for part in chain([graph], graph.node, graph.initializer, values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))


def _pt2(program: ExportedProgram, metadata: Mapping[str, Any], _: str) -> tuple[bytes, Run]:
    file = io.BytesIO()
    document = json.dumps(metadata, ensure_ascii=False, indent=1)
    torch.export.save(program, file, extra_files={METADATA: document})
    file.seek(0)
    module = torch.export.load(file).module()

    def run(images: Images) -> Any:
        with torch.inference_mode():
            return tuple(values.numpy() for values in module(torch.from_numpy(images)))

    return file.getvalue(), run


WRITERS = {".onnx": _onnx, ".pt2": _pt2}


def _difference(
    run: Run, images: Images, expected: npt.NDArray[np.float32], temperature: float
) -> float:
    """The largest difference of a logit; infinite where probabilities are not what they should be,
    or anything is NaN."""
    largest = 0.0
    for count in BATCHES:
        logits, shares = run(images[:count])
        wanted = probabilities(logits, temperature)
        atol = TOLERANCE * max(1.0, float(np.abs(logits).max()) / temperature / 10)  # of float32
        if shares.shape != wanted.shape or not np.allclose(shares, wanted, rtol=0, atol=atol):
            return float("inf")
        largest = max(largest, float(np.abs(logits - expected[:count]).max()))
    return largest
