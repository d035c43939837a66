"""OpenAI's form of weights: read, but never run."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import convert_weights_to_lp

from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.backbones.weights import UnsafeArchive, is_torchscript, read_weights
from tests.extract.tiny_models import CONFIGS, Attack, random_model, refused, register

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path / "configs", monkeypatch)


@pytest.fixture
def model() -> open_clip.CLIP:
    """A ViT with weights in half precision, like OpenAI's."""
    torch.manual_seed(3)
    model = open_clip.CLIP(**{**CONFIGS["ViT-B-32"], "quick_gelu": True}).eval()
    convert_weights_to_lp(model)
    return model


@pytest.fixture
def archive(tmp_path: Path, model: open_clip.CLIP) -> Path:
    """The model as a program, with numbers among its buffers as in OpenAI's files."""
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(7))
    torch.jit.script(model).save(tmp_path / "ViT-B-32.pt")
    return tmp_path / "ViT-B-32.pt"


def test_every_weight_is_read_exactly(archive: Path, model: open_clip.CLIP) -> None:
    found, wanted = read_weights(archive), model.state_dict()
    assert found.keys() - wanted.keys() == {"attn_mask"}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_traced_program_is_read_too(tmp_path: Path) -> None:
    model = random_model("RN50")
    traced = torch.jit.trace_module(
        model,
        {
            "encode_text": (torch.zeros(1, 77, dtype=torch.long),),
            "encode_image": (torch.zeros(1, 3, 64, 64),),
        },
        check_trace=False,
    )
    traced.save(tmp_path / "RN50.pt")
    found = read_weights(tmp_path / "RN50.pt")
    for name, tensor in model.state_dict().items():
        # As in OpenAI's files, what tracing does not need may be missing.
        assert torch.equal(found[name], tensor) or name.endswith("num_batches_tracked")


def test_it_is_a_backbone_with_quick_gelu(archive: Path, model: open_clip.CLIP) -> None:
    assert is_torchscript(archive)
    backbone = load_backbone("ViT-B-32", str(archive))
    assert backbone.identity["quick_gelu"] is True
    assert backbone.identity["pretrained"] == "ViT-B-32.pt"
    assert next(backbone.model.parameters()).dtype == torch.float32
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.model.encode_image(images), model.float().encode_image(images)
        )


def test_it_does_not_fit_another_architecture(archive: Path) -> None:
    refused("RN50", archive, r"RN50 could not be loaded from ViT-B-32\.pt")


def test_a_saved_state_is_no_program(tmp_path: Path) -> None:
    torch.save(random_model("ViT-B-32").state_dict(), tmp_path / "state.pt")
    assert not is_torchscript(tmp_path / "state.pt")
    assert not is_torchscript(tmp_path / "missing.pt")


def repacked(archive: Path, path: Path, change: Callable[[str, bytes], bytes], **how: Any) -> Path:
    """The archive with some of its files changed."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", **how) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return path


@pytest.mark.parametrize(
    "call", [os.mkdir, eval, getattr, torch.load, torch.jit.load, pickle.loads, print]
)
def test_code_in_the_data_is_not_run(archive: Path, tmp_path: Path, call: Any) -> None:
    trace = tmp_path / "was here"
    evil = pickle.dumps(Attack(call, str(trace)), protocol=2)

    path = pickled(archive, tmp_path / "evil.pt", evil)
    with pytest.raises(UnsafeArchive, match=r"it names .*, which weights do not need"):
        read_weights(path)
    refused("ViT-B-32", path, r"evil\.pt is a TorchScript archive that cannot be used")
    assert not trace.exists()


def test_the_program_itself_is_not_looked_at(archive: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return b"import os; os.mkdir('x')" if "/code/" in name else content

    path = repacked(archive, tmp_path / "other_code.pt", change)
    assert read_weights(path).keys() == read_weights(archive).keys()


def pickled(archive: Path, path: Path, instructions: bytes) -> Path:
    def change(name: str, content: bytes) -> bytes:
        return instructions if name.endswith("/data.pkl") else content

    return repacked(archive, path, change)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x001X\x03\x00\x00\x00cpu"


@pytest.mark.parametrize(
    "instructions",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02N.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02c__torch__.a\nB\n)\x81]b.",
        b"\x80\x02c__torch__.a\nB\n(K\x01tR.",
        # a storage that claims more values than it has; a view beyond its storage; a huge view
        b"\x80\x02" + STORAGE + b"J\xff\xff\xff\x7ftQ.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\x80tQK\x7f(K\x05t(K\x01ttR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\x80tQK\x00(J\xff\xff\xff\x7ft(K\x00ttR.",
    ],
)
def test_broken_data(archive: Path, tmp_path: Path, instructions: bytes) -> None:
    with pytest.raises(UnsafeArchive) as caught:
        read_weights(pickled(archive, tmp_path / "bad.pt", instructions))
    assert "\n" not in str(caught.value)


def test_a_module_that_holds_itself_and_a_flood_of_modules(archive: Path, tmp_path: Path) -> None:
    module = b"\x80\x02c__torch__.a\nB\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(UnsafeArchive, match="more than 100000 modules"):
        read_weights(pickled(archive, tmp_path / "loop.pt", module))


def test_a_compressed_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    """PyTorch does not compress, so a small file cannot unfold into a huge one."""
    path = repacked(
        archive, tmp_path / "z.pt", lambda _, content: content, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(UnsafeArchive, match="compressed"):
        read_weights(path)
