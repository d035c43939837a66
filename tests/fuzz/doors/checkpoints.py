"""Weights and configurations that came from elsewhere: folders with open_clip_config.json, state
dicts in safetensors, in PyTorch's ZIP archives and in programs, and merges of tokenizers."""

import gzip
import json
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file

from clip_adapter.extract.backbones.loading import load_backbone
from tests.extract.tiny_models import TEXT, VIT, Attack
from tests.fuzz.attempt import Attempt
from tests.fuzz.damage import NESTED, change_json, damage

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
ZIP = "open_clip_pytorch_model.bin"
PROGRAM = "ViT.pt"  # which may lie in the place of the ZIP archive
MERGES = "bpe_merges.txt.gz"
MODEL = {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT | {"context_length": 8}}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "size": 16}
BAIT = "executed"


def prepare(folder: Path) -> None:
    document = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / CONFIG).write_text(json.dumps(document))
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()
    save_file(model.state_dict(), folder / WEIGHTS)
    torch.save(model.state_dict(), folder / ZIP)
    torch.jit.script(model).save(folder / PROGRAM)
    lines = ['"bpe_simple_vocab', "a b", "c d</w>"]
    (folder / MERGES).write_bytes(gzip.compress("\n".join(lines).encode()))


def attempt(rng: random.Random, prepared: Path, folder: Path) -> Attempt:
    model = folder / "model"
    model.mkdir()
    shutil.copyfile(prepared / CONFIG, model / CONFIG)
    victim = rng.choice((CONFIG, CONFIG, WEIGHTS, ZIP))
    weights = ZIP if victim == ZIP else WEIGHTS
    source = PROGRAM if victim == ZIP and rng.random() < 0.5 else weights
    shutil.copyfile(prepared / source, model / weights)
    if rng.random() < 0.1:
        victim = MERGES
        shutil.copyfile(prepared / MERGES, model / MERGES)
    change = CHANGES.get(victim, damage)
    found = Attempt((change if rng.random() < 0.6 else damage)(rng, model / victim))
    found.read(lambda: load_backbone(f"local-dir:{model}"))
    if (folder / BAIT).exists():
        found.faults.append("executed: what came with the weights")
    return found


def _change_config(rng: random.Random, path: Path) -> str:
    if rng.random() < 0.1:
        text = rng.choice(NESTED[:4])
        path.write_text(text)
        return f"{CONFIG} is {text[:20]}"
    document, what = change_json(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(document))
    return what


def _change_weights(rng: random.Random, path: Path) -> str:
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    how = _change_tensor(rng, weights, name)
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return f"{name}: {how}"


def _change_tensor(rng: random.Random, weights: dict[str, torch.Tensor], name: str) -> str:
    how = rng.choice(("gone", "type", "shape", "value", "renamed"))
    if how == "gone":
        del weights[name]
    elif how == "type":
        weights[name] = weights[name].to(rng.choice((torch.float64, torch.int8, torch.bool)))
    elif how == "shape":
        shapes = (weights[name][None].clone(), weights[name].reshape(-1)[:1].clone())
        weights[name] = rng.choice(shapes)
    elif how == "value":
        weights[name] = weights[name] * rng.choice((float("nan"), float("inf"), 0.0))
    else:
        weights[rng.choice(("x", "\x1b[2J", "x" * 5000))] = weights.pop(name)
    return how


def _change_zip(rng: random.Random, path: Path) -> str:
    """A pickle that names what it must not, another state, or another directory."""
    how = rng.choice(("payload", "payload in it", "state", "entry", "directory"))
    if how == "payload":
        path.write_bytes(pickle.dumps(Attack(Path.touch, Path(BAIT))))
    elif how == "payload in it":
        torch.save({"state_dict": Attack(Path.touch, Path(BAIT))}, path)
    elif how == "state":
        odd = rng.choice(([], {}, {"state_dict": 1}, None, {1: torch.zeros(2)}, torch.zeros(3)))
        torch.save(odd, path)
    elif how == "entry":
        other = path.with_name("other")
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
            victim = rng.choice(source.namelist())
            for name in source.namelist():
                content = source.read(name)
                if name == victim:
                    content = rng.choice((b"", b"\x80\x04.", content[:-1], content * 2))
                target.writestr(name, content)
        other.replace(path)
    else:
        content = bytearray(path.read_bytes())
        start = content.rindex(b"PK\1\2") if rng.random() < 0.5 else len(content) - 22
        for _ in range(rng.choice((1, 2, 8))):
            content[rng.randrange(start, len(content))] = rng.randrange(256)
        path.write_bytes(content)
    return f"ZIP: {how}"


CHANGES = {CONFIG: _change_config, WEIGHTS: _change_weights, ZIP: _change_zip}
