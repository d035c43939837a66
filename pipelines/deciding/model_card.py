"""The page beside an exported classifier: what it is, how to run it, what it is not good for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_adapter.errors import UserError
from clip_adapter.extract.encoding.preprocess import drafted, height_and_width
from clip_adapter.pipelines.reporting.runs import load_runs
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo
from clip_adapter.words import counted, printable

# What brings a picture to the encoder's size, by open_clip's `resize_mode`. torchvision rounds the
# longer side down where the target is square, and open_clip rounds it to the nearest elsewhere.
CROP = """\
    left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
    image = image.crop((left, top, left + {width}, top + {height}))"""
SQUARE = f"""\
    sides = [int({{width}} * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling.{{resampling}})
{CROP}"""
OBLONG = f"""\
    ratio = min(image.width / {{width}}, image.height / {{height}})
    image = image.resize([round(side / ratio) for side in image.size], Image.Resampling.BICUBIC)
{CROP}"""
SQUASH = "    image = image.resize(({width}, {height}), Image.Resampling.{resampling})"
LONGEST = """\
    ratio = max(image.width / {width}, image.height / {height})
    sides = [round(side / ratio) for side in image.size]
    image, small = Image.new("RGB", ({width}, {height}), {fill}), image
    corner = (({width} - sides[0]) // 2, ({height} - sides[1]) // 2)
    image.paste(small.resize(sides, Image.Resampling.{resampling}), corner)"""
PREPROCESS = """\
import numpy as np
from PIL import Image

def preprocess(path):  # an image file → (3, {height}, {width}) float32
    image = Image.open(path){draft}.convert("RGBA")  # what is transparent lies over white
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{geometry}
    pixels = np.asarray(image, np.float32) / 255
    pixels = (pixels - np.float32({mean})) / np.float32({std})
    return pixels.transpose(2, 0, 1)
"""
DRAFT = """
    image.draft(None, ({width}, {height}))  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    image = image"""
RUN = {
    ".onnx": """\
import json
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
classes = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
images = np.stack([preprocess("photo.png")])
logits, probabilities = session.run(None, {{"images": images}})
print(classes[probabilities[0].argmax()], probabilities[0].max())
""",
    ".pt2": """\
import json
import torch

metadata = {{"metadata.json": ""}}
module = torch.export.load("{name}", extra_files=metadata).module()
classes = json.loads(metadata["metadata.json"])["class_names"]
images = torch.from_numpy(np.stack([preprocess("photo.png")]))
with torch.inference_mode():
    logits, probabilities = module(images)
print(classes[int(probabilities[0].argmax())], float(probabilities[0].max()))
""",
}


def preprocessing(config: Mapping[str, Any]) -> str:
    """Twelve lines of PIL and NumPy that do what open_clip's `config` says."""
    height, width = height_and_width(config)
    mode = config.get("resize_mode", "shortest")
    shortest = SQUARE if height == width else OBLONG
    geometry = {"squash": SQUASH, "longest": LONGEST}.get(mode, shortest)
    resampling = "BILINEAR" if config.get("interpolation") == "bilinear" else "BICUBIC"
    fill = (int(config.get("fill_color", 0)),) * 3
    sides = {"height": height, "width": width}
    least = drafted(config)
    return PREPROCESS.format(
        geometry=geometry.format(**sides, resampling=resampling, fill=fill),
        mean=list(config["mean"]),
        std=list(config["std"]),
        draft=DRAFT.format(width=least[0], height=least[1]) if least else "",
        **sides,
    )


def model_card(out: Path, info: AdapterInfo, metadata: Mapping[str, Any], **found: Any) -> str:
    """The page for the file `out`. found: `accuracy`, in words, and `difference`, of logits."""
    height, width = height_and_width(info.preprocess)
    backbone = f"{info.backbone.get('name')} ({info.backbone.get('pretrained')})"
    stated = {"data set": info.dataset.get("name"), **info.fitted}
    page = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return page.format(
        name=out.name,
        count=counted(len(info.class_names), "class", "classes"),
        classes=len(info.class_names),
        writer=metadata["writer"],
        height=height,
        width=width,
        class_names=printable(json.dumps(info.class_names, ensure_ascii=False)),
        backbone=printable(backbone),
        weights=info.backbone.get("weights_sha256"),
        method=info.method,
        setting=_listed(info.setting) or "nothing to set",
        adapter=metadata["adapter_sha256"],
        fitted=_listed(stated),
        temperature=metadata["temperature"],
        coverage=_coverage(metadata),
        preprocess=preprocessing(info.preprocess),
        run=RUN[out.suffix].format(name=out.name),
        **found,
    )


def measured(run: Path, info: AdapterInfo) -> str:
    """How the run at `run` did on its test images with what it kept, in words."""
    try:
        results = load_runs([run])[0].results
    except UserError:  # an adapter on its own, or a run that has not finished
        results = ()
    key = (info.method, info.fitted.get("shots"), info.fitted.get("seed"))
    for result in results:
        if result.key == key and not result.held and result.test_accuracy is not None:
            images = counted(result.test_images, "test image")
            before = ", before the last fit on all labelled images"
            when = before if "refitted_on" in info.fitted else ""
            origin = printable(
                str(info.dataset.get("splits", {}).get("test", "origin not recorded"))
            )
            return f"{100 * result.test_accuracy:.2f} % of {images} ({origin}){when}"
    return "not known here; `clip-adapter evaluate` measures it"


def _listed(values: Mapping[str, Any]) -> str:
    return printable(", ".join(f"{name} {value}" for name, value in values.items()))


def _coverage(metadata: Mapping[str, Any]) -> str:
    by = counted(metadata["held_out"], "held-out image")
    if not metadata["thresholds"]:
        return f"nothing is promised, by {by}."
    shares = ", ".join(
        f"{100 * float(share):g} % by all classes of probability {1 - q:.6g} or more"
        for share, q in metadata["thresholds"].items()
    )
    return f"{shares}, and always by the most probable one; on average, over all classes, by {by}."
