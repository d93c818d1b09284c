from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import create_encoder, read_checkpoint
from stellar_plugin.weight_files import parsing, usable
from tests.checkpoint_files import timm_vit

SIZES = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Stellar("stellar_vit_tiny_patch16_224", num_queries=2, **SIZES, **DECODER)
    model.save_pretrained(tmp_path)
    return tmp_path


def configure(folder: Path, **values: Any) -> None:
    """Sets or, with ..., removes values of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    "error",
    [KeyError(3), EOFError(), RecursionError("deep"), MemoryError(), OSError(22)],
)
def test_parsing__one_error(error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"^'a/b' cannot be read as JSON: \S+") as found,
        parsing(Path("a/b"), "JSON"),
    ):
        raise error
    assert type(found.value) is ValueError


def test_parsing__missing_permission_is_said() -> None:
    with pytest.raises(PermissionError), parsing(Path("a"), "JSON"):
        raise PermissionError


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), "a is int64"),
        (torch.zeros(2, dtype=torch.bool), "a is bool"),
        (torch.zeros(2, dtype=torch.complex64), "a is complex64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "a is float8_e4m3fn"),
        (torch.zeros(0, 3), r"a is empty, \(0, 3\)"),
        (torch.tensor([0, math.nan]), "a is not finite"),
        (torch.tensor([0, -math.inf], dtype=torch.float16), "a is not finite"),
        (torch.zeros(2).to_sparse(), "a is sparse or without values"),
        (torch.zeros(2, device="meta"), "a is sparse or without values"),
    ],
)
def test_usable__refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"'x.pth' holds tensors .*: {message}. Take"):
        usable({"b": torch.ones(2), "a": tensor}, Path("x.pth"))


def test_usable__each_with_memory_of_its_own() -> None:
    shared = torch.arange(6.0).view(2, 3)
    state = {"a": shared, "b": shared, "c": shared.T, "d": torch.ones(1).expand(3)}
    found = usable(state, Path("x.pth"))
    assert all(found[name].equal(tensor) for name, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in found.values())
    found["a"].zero_()
    assert found["b"].equal(shared.new_tensor([[0, 1, 2], [3, 4, 5]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # Far more than the memory of any machine, if it were built.
        ({"embed_dim": 2**15, "num_heads": 8}, r"cls_token \(1, 1, 24\) instead of"),
        ({"depth": 100_000}, "it has 1 blocks, its config says depth=100000"),
        ({"embed_dim": 10**9}, "config tell.*: embed_dim must be 1 to 32768"),
        ({"mean": ...}, r"config\.json' has no mean, which the weights do not show"),
        ({"num_heads": 5}, "makes no model: timm cannot build"),
        ({"decoder_num_heads": 3}, "decoder_dim 16 is no multiple of num_heads 3"),
        ({"schema_version": True}, "has schema version True"),
        ({"pretrained": True}, "'pretrained' is no argument"),
        ({"norm_eps": [1]}, "norm_eps must be a number or None, got"),
        (
            {"target": "tokens", "num_codes": 3, "tokenizer": {"num_codes": 3}},
            "does not fit the decoder|does not hold the tokenizer",
        ),
    ],
)
def test_config__names_the_file(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    configure(folder, **values)
    with pytest.raises(ValueError, match=message) as found:
        Stellar.from_pretrained(folder)
    assert str(folder) in str(found.value)


def test_heads__damaged_file_is_named(folder: Path) -> None:
    (folder / "heads.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"heads\.safetensors' has 1 bytes"):
        Stellar.from_pretrained(folder)


def test_training_that_went_wrong__is_refused(folder: Path) -> None:
    state = Stellar.from_pretrained(folder).state_dict()
    state["encoder.vit.norm.bias"][0] = math.nan
    torch.save(state, folder / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth.*vit\.norm\.bias is not finite"):
        read_checkpoint(folder / "model.pth")


def test_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = dict(timm_vit().state_dict())
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    with torch.no_grad():
        encoder = create_encoder(tmp_path / "x.pth", num_heads=3)
    assert encoder.vit.cls_token.numel() == 48
