from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_plugin import Stellar
from tests import reference

transformers = pytest.importorskip("transformers")
# From folders only: what asks the hub fails at once.
TRUSTED = {"trust_remote_code": True, "local_files_only": True}
OUTPUTS = ("cls", "sparse", "dense", "localization")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where transformers puts the code of folders, and imports it from."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    reference.stellar().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, **TRUSTED)


def photo(height: int = 90, width: int = 120) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_auto_model__reference_numbers(model: Any) -> None:
    assert isinstance(model, transformers.PreTrainedModel) and not model.training
    expected = reference.load("forward")
    images = reference.normalized(expected["image"])
    with torch.no_grad():
        output = model(images)
    for ours, theirs in (("localization", "spatial"), *[(n, n) for n in OUTPUTS[:3]]):
        value = expected[f"out.{theirs}"].view_as(output[ours])
        torch.testing.assert_close(output[ours], value, rtol=0, atol=2e-5)


def test_auto_model__equals_stellar(folder: Path, model: Any) -> None:
    stellar = Stellar.from_pretrained(folder)
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        output, result = model(images), stellar(images)
        for name in OUTPUTS:
            ours = getattr(result, name)
            torch.testing.assert_close(output[name], ours, rtol=0, atol=0)
        prefix = torch.cat([result.cls[:, None], result.sparse, result.dense], 1)
        torch.testing.assert_close(output.last_hidden_state, prefix, rtol=0, atol=0)
        mean = result.sparse.mean(1)
        torch.testing.assert_close(output.pooler_output, mean, rtol=0, atol=0)
        torch.testing.assert_close(
            model.reconstruct(images), stellar.reconstruct(images), rtol=0, atol=0
        )
        plain = model(images, return_dict=False)
    assert output.hidden_states is None
    assert len(plain) == 6 and torch.equal(plain[0], output[0])


def test_output_hidden_states__end_in_the_norm(model: Any) -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        normed = model.encoder.vit.norm(output.hidden_states[-1])
        block = model.encoder.vit.blocks[0](output.hidden_states[0])
        first = output.hidden_states[0][:, 1:5]
    assert len(output.hidden_states) == 1 + len(model.encoder.vit.blocks)
    torch.testing.assert_close(normed, output.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(output.hidden_states[1], block, rtol=0, atol=0)
    torch.testing.assert_close(first, model.encoder.vit.reg_token, rtol=0, atol=0)


def test_bfloat16__equals_stellar(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, **TRUSTED
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    images = torch.randn(1, 3, 64, 64)
    stellar = Stellar.from_pretrained(folder).to(torch.bfloat16)
    with torch.no_grad():
        output, result = model(images), stellar(images.bfloat16())
    for name in OUTPUTS:
        assert output[name].dtype == torch.bfloat16
        torch.testing.assert_close(output[name], getattr(result, name), rtol=0, atol=0)


def test_gradient_checkpointing__same_gradients(model: Any) -> None:
    images = torch.randn(1, 3, 64, 64)
    gradients = []
    model.train()
    for enable in (model.gradient_checkpointing_disable, lambda: None):
        enable()
        model.zero_grad()
        model(images).localization.square().sum().backward()
        gradients.append([p.grad for p in model.encoder.parameters()])
        model.gradient_checkpointing_enable()
        assert model.encoder.vit.grad_checkpointing
        assert model.decoder.grad_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.encoder.vit.grad_checkpointing
    model.eval()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_save_pretrained__both_libraries_read_it(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    # Settings of a user of transformers are none of the model's.
    model.config.output_hidden_states = True
    model.save_pretrained(tmp_path)
    model.config.output_hidden_states = False
    again = transformers.AutoModel.from_pretrained(tmp_path, **TRUSTED)
    stellar = Stellar.from_pretrained(tmp_path)
    first = Stellar.from_pretrained(folder)
    assert stellar.config == first.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, stellar.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        *("config.json", "model.safetensors"),
        *("modeling_stellar.py", "preprocessor_config.json", "provenance.json"),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_stellar.StellarModel"


def test_from_pretrained__missing_weights(folder: Path, tmp_path: Path) -> None:
    model = reference.stellar()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_depth": 3}))
    with pytest.raises(
        ValueError, match=r"weights lack 12 tensors .*: decoder\.blocks\.2"
    ):
        transformers.AutoModel.from_pretrained(tmp_path, **TRUSTED)


def test_save_pretrained__origin_and_licence_stay(tmp_path: Path) -> None:
    first = reference.stellar()
    prior = {"source": "mae.pth", "read_as": "MAE", "license": "CC BY-NC 4.0"}
    first.provenance = {"commands": ["stellar pretrain"], "started_from": prior}
    first.save_pretrained(tmp_path / "first")
    model = transformers.AutoModel.from_pretrained(tmp_path / "first", **TRUSTED)
    with torch.no_grad():
        model.encoder.vit.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    again = Stellar.from_pretrained(tmp_path / "tuned")
    assert again.provenance["started_from"]["provenance"]["started_from"] == prior
    assert again.generate_model_card().data.license == "cc-by-nc-4.0"


def test_from_pretrained__of_a_folder_without_a_record(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "provenance.json").unlink()
    model = transformers.AutoModel.from_pretrained(tmp_path / "model", **TRUSTED)
    told = model.stellar.provenance["started_from"]
    assert told["source"] == str(tmp_path / "model") and told["is_local"]


def test_from_pretrained__schema_of_another_version(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({**config, "schema_version": 99})
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="schema version 99, this package reads 1"):
        transformers.AutoModel.from_pretrained(tmp_path / "model", **TRUSTED)


def test_auto_config__is_that_of_stellar(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder, **TRUSTED)
    stellar = Stellar.from_pretrained(folder).config
    assert {"schema_version": 1, **config.arguments} == stellar
    fresh = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert fresh.state_dict().keys() == reference.stellar().state_dict().keys()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_auto_image_processor__equals_transform(folder: Path, mode: str) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **TRUSTED)
    stellar = Stellar.from_pretrained(folder)
    image = photo().convert(mode)
    expected = stellar.transform()(image)
    pixels = processor(image)["pixel_values"]
    assert torch.equal(pixels, expected[None])
    if mode == "RGB":
        array = np.array(image)
        batch = processor([image, array, torch.from_numpy(array).permute(2, 0, 1)])
        assert all(torch.equal(one, expected) for one in batch["pixel_values"])
    wide = processor(image, size={"height": 32, "width": 96}, return_tensors="np")
    ours = stellar.transform((32, 96))(image)
    np.testing.assert_array_equal(wide["pixel_values"][0], ours)


def test_auto_image_processor__round_trip(folder: Path, tmp_path: Path) -> None:
    first = transformers.AutoImageProcessor.from_pretrained(folder, **TRUSTED)
    first.save_pretrained(tmp_path)
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, **TRUSTED)
    assert type(again) is type(first) and again.to_dict() == first.to_dict()


def test_pipeline__image_feature_extraction(folder: Path, model: Any) -> None:
    pipe = transformers.pipeline(
        "image-feature-extraction", model=str(folder), trust_remote_code=True
    )
    pixels = pipe.image_processor(photo())["pixel_values"]
    with torch.no_grad():
        output = model(pixels)
    tokens = torch.tensor(pipe(photo()))
    torch.testing.assert_close(tokens, output.last_hidden_state)
    pooled = pipe(photo(), pool=True, return_tensors=True)
    torch.testing.assert_close(pooled, output.pooler_output)


def test_rotary_positions__are_made_again(tmp_path: Path) -> None:
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    name = "vit_small_patch16_dinov3"
    stellar = Stellar(name, num_queries=2, target=None, img_size=32, **sizes).eval()
    stellar.save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, **TRUSTED)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        output, result = model(images), stellar(images)
    torch.testing.assert_close(output.sparse, result.sparse, rtol=0, atol=0)
    assert output.localization is None


@pytest.mark.slow
def test_remote_code__names_the_package_and_finds_it(
    folder: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
from transformers import AutoImageProcessor, AutoModel
class Absent:
    def find_spec(self, name, *_):
        if name == "stellar_plugin":
            raise ModuleNotFoundError("No module named 'stellar_plugin'")

sys.meta_path.insert(0, Absent())
try:
    AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.meta_path[0]
for auto in (AutoModel, AutoImageProcessor):
    print(type(auto.from_pretrained({str(folder)!r}, trust_remote_code=True)))
# From now on no code has to be trusted.
print(type(AutoModel.from_pretrained({str(folder)!r})))
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert "Run `pip install stellar_plugin`" in out.stdout, out.stderr
    assert out.stdout.split("\n")[1:4] == [
        "<class 'stellar_plugin.transformers.StellarModel'>",
        "<class 'stellar_plugin.transformers.StellarImageProcessor'>",
        "<class 'stellar_plugin.transformers.StellarModel'>",
    ], out.stderr
    assert len([*tmp_path.rglob("modeling_stellar.py")]) == 1


def test_image_processor__batches_of_arrays_and_tensors(folder: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **TRUSTED)
    pixels = np.asarray(photo())
    expected = processor([photo(), photo()])["pixel_values"]
    arrays = processor(np.stack([pixels, pixels]))["pixel_values"]
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    tensors = processor(torch.stack([tensor, tensor]))["pixel_values"]
    torch.testing.assert_close(arrays, expected, rtol=0, atol=0)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    gray = processor(pixels[..., :1])["pixel_values"]
    same = processor(pixels[..., 0])["pixel_values"]
    torch.testing.assert_close(gray, same, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "got str 'photo.jpg'; open a file by PIL.Image.open"),
        ([], "There is no image"),
        (np.zeros((3, 8, 9), np.uint8), r"got uint8 with shape \(3, 8, 9\)"),
        (np.zeros((8, 9, 3)), r"got float64 with shape \(8, 9, 3\)"),
    ],
)
def test_image_processor__no_images(folder: Path, images: Any, message: str) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **TRUSTED)
    with pytest.raises(ValueError, match=message):
        processor(images)


@pytest.mark.parametrize("size", [64, {"shortest_edge": 64}, {}])
def test_image_processor__other_sizes(folder: Path, size: Any) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **TRUSTED)
    with pytest.raises(ValueError, match=r'size must be \{"height"'):
        processor(photo(), size=size)
