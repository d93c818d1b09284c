from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from lightly_ext.evaluate import cli
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.text import tower as tower_module
from lightly_ext.evaluate.text.tower import (
    KNOWN_TEXTS,
    embed_texts,
    load_text_tower,
)
from tests.lightly_ext.evaluate.small import write_model
from tests.lightly_ext.evaluate.text.small_text import (
    TEXT_DIM,
    TOWER_CONFIG,
    write_tower,
)

TEXTS = ["a red square", "a blue square", "nothing " * 40]


def test_forward__unit_vectors_of_the_whole_model(tmp_path: Path) -> None:
    name = write_tower(tmp_path)
    tower = load_text_tower(name, None)
    model = open_clip.create_model(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(tower(TEXTS), expected, atol=1e-6, rtol=0)
    assert tower.dim == TEXT_DIM
    assert tower.name == tmp_path.name
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.train().training


def test_sha256__of_the_text_half_alone(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "a")
    path = tmp_path / "a" / "open_clip_model.safetensors"
    same = load_text_tower(name, "openai").sha256  # a folder has its own weights
    model = open_clip.create_model(name)
    model.visual.proj.data += 1
    model.logit_scale.data += 1
    open_clip_name = _register(tmp_path)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.pt")
    other_file = load_text_tower(open_clip_name, str(tmp_path / "other.pt"))
    assert (
        same == other_file.sha256 == load_text_tower(open_clip_name, str(path)).sha256
    )
    assert same != load_text_tower(write_tower(tmp_path / "b", seed=1), None).sha256


def test_load__activation_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create(name: str, **kwargs: Any) -> torch.nn.Module:
        seen.update(kwargs)
        text = {**TOWER_CONFIG["text_cfg"], "context_length": 77}
        return open_clip.CLIP(**{**TOWER_CONFIG, "text_cfg": text})

    monkeypatch.setattr(open_clip, "create_model", create)
    assert load_text_tower("ViT-B-16", "openai").name == "ViT-B-16-quickgelu"
    assert seen["force_quick_gelu"] and seen["pretrained"] == "openai"
    assert load_text_tower("ViT-B-16", "laion2b_s34b_b88k").name == "ViT-B-16"
    assert not seen["force_quick_gelu"]


def test_load__bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-X-1'"):
        load_text_tower("ViT-X-1", "openai")
    with pytest.raises(FileNotFoundError, match=r"no weight file 'x.pt'.*knows openai"):
        load_text_tower("ViT-B-16", "x.pt")
    name = _register(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=f"cannot be read as those of {name}"):
        load_text_tower(name, str(tmp_path / "wrong.pt"))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match=r"torch.jit.load\(FILE\)"):
        load_text_tower(name, str(tmp_path / "script.pt"))
    empty = write_tower(tmp_path / "empty")
    (tmp_path / "empty" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        load_text_tower(empty, None)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    with pytest.raises(FileNotFoundError) as error:
        load_text_tower("ViT-B-16", "openai")
    for text in (
        "no route",
        "open_clip_model.safetensors",
        "'timm/vit_base_patch16_clip_224.openai'",
        "--text_model ViT-B-16-quickgelu --text_weights FILE",
    ):
        assert text in str(error.value)


def test_embed_texts__once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_module, "CHUNK", 2)
    devices = Devices(accelerator="cpu", num_workers=0)
    tower = load_text_tower(write_tower(tmp_path / "tower"), None)
    expected, known = tower(TEXTS), tower(KNOWN_TEXTS)
    calls: list[list[str]] = []

    def forward(texts: list[str]) -> torch.Tensor:
        if texts == KNOWN_TEXTS:
            return known
        calls.append(texts)
        if texts == TEXTS[2:] and len(calls) == 2:
            raise RuntimeError("interrupted")
        return expected[[TEXTS.index(t) for t in texts]]

    monkeypatch.setattr(tower, "forward", forward)
    with pytest.raises(RuntimeError, match="interrupted"):
        _embedded(devices, tmp_path, tower)
    torch.testing.assert_close(_embedded(devices, tmp_path, tower), expected)
    assert calls == [TEXTS[:2], TEXTS[2:], TEXTS[2:]]
    torch.testing.assert_close(_embedded(devices, tmp_path, tower), expected)
    assert len(calls) == 3
    assert len(_embedded(devices, tmp_path, tower, TEXTS[:1])) == 1  # another list
    assert len(calls) == 4


def test_embed_texts__another_activation_of_the_same_weights(tmp_path: Path) -> None:
    devices = Devices(accelerator="cpu", num_workers=0)
    source = write_tower(tmp_path / "tower")
    first = load_text_tower(source, None)
    _embedded(devices, tmp_path, first)
    config = {"model_cfg": {**TOWER_CONFIG, "quick_gelu": True}, "preprocess_cfg": {}}
    (tmp_path / "tower" / "open_clip_config.json").write_text(json.dumps(config))
    second = load_text_tower(source, None)
    assert second.sha256 == first.sha256
    assert not torch.allclose(second(TEXTS), first(TEXTS), atol=1e-3)
    for tower in (second, first):
        torch.testing.assert_close(_embedded(devices, tmp_path, tower), tower(TEXTS))


def test_missing_open_clip__names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith(("lightly_ext.evaluate.text", "lightly_ext.evaluate.align")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    model = write_model(tmp_path)
    with pytest.raises(SystemExit, match=r"pip install 'stellar-plugin\[text\]'"):
        cli.main(["align-text", "--model", model, "--data", "x"])


def _embedded(
    devices: Devices,
    cache: Path,
    tower: tower_module.TextTower,
    texts: list[str] = TEXTS,
) -> torch.Tensor:
    return torch.from_numpy(embed_texts(devices, cache, tower, texts).copy())


def _register(folder: Path) -> str:
    """Makes the tiny model known to open_clip by name."""
    path = folder / "tiny-test-clip.json"
    path.write_text(json.dumps(TOWER_CONFIG))
    open_clip.add_model_config(path)
    return path.stem
