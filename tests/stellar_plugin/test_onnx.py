from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin import onnx as stellar_onnx
from stellar_plugin.convert_cli import main
from stellar_plugin.onnx import export_onnx
from tests import reference

onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"images": images.numpy()})
    return {n: torch.from_numpy(v) for n, v in zip(names, values, strict=True)}


@pytest.mark.slow
class TestExportONNX:
    def test_export_onnx__reference_numbers_at_any_batch_size(
        self, tmp_path: Path
    ) -> None:
        model = reference.stellar().train()
        path = export_onnx(model, tmp_path / "stellar.onnx")
        assert model.encoder.training
        assert [file.name for file in tmp_path.iterdir()] == ["stellar.onnx"]
        expected = reference.load("forward")
        images = reference.normalized(expected["image"])
        for size in (1, 3):
            outputs = run(path, images[:size])
            assert list(outputs) == ["sparse", "dense", "localization", "cls"]
            for ours, theirs in (
                ("localization", "spatial"),
                *[(n, n) for n in ("sparse", "dense", "cls")],
            ):
                value = expected[f"out.{theirs}"][:size].view_as(outputs[ours])
                torch.testing.assert_close(outputs[ours], value, rtol=0, atol=2e-5)

    def test_export_onnx__another_size_and_weights_beside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stellar_onnx, "MAX_BYTES", 0)
        path = export_onnx(reference.stellar(), tmp_path / "m.onnx", (48, 80))
        assert (tmp_path / "m.onnx.data").exists()
        expected = reference.load("forward")
        outputs = run(path, reference.normalized(expected["nonsquare.image"]))
        torch.testing.assert_close(
            outputs["sparse"], expected["nonsquare.sparse"], rtol=0, atol=2e-5
        )

    def test_export_onnx__rotary_positions(self, tmp_path: Path) -> None:
        name, sizes = "vit_small_patch16_dinov3", {"embed_dim": 48, "num_heads": 3}
        encoder = StellarEncoder(name, num_queries=2, depth=1, **sizes).eval()
        images = torch.randn(3, 3, 48, 80)
        outputs = run(export_onnx(encoder, tmp_path / "m.onnx", (48, 80)), images)
        with torch.no_grad():
            expected = encoder(images)
        for ours in ("sparse", "dense", "localization", "cls"):
            torch.testing.assert_close(
                outputs[ours], getattr(expected, ours), rtol=0, atol=2e-5
            )

    def test_export_onnx__plain_vit_without_cls(self, tmp_path: Path) -> None:
        encoder = StellarEncoder(
            "vit_tiny_patch16_224",
            num_queries=0,
            img_size=32,
            depth=1,
            class_token=False,
        ).eval()
        images = torch.randn(3, 3, 32, 32)
        outputs = run(export_onnx(encoder, tmp_path / "vit.onnx"), images)
        assert list(outputs) == ["dense"]
        dense = encoder(images).dense.detach()
        torch.testing.assert_close(outputs["dense"], dense, rtol=0, atol=2e-5)

    def test_convert__without_localization(self, tmp_path: Path) -> None:
        settings = {**reference.model_arguments(), "target": None}
        model = Stellar(**settings).eval()
        model.save_pretrained(tmp_path / "model")
        path = tmp_path / "out" / "m.onnx"
        main([str(tmp_path / "model"), str(path), "--to=onnx"])
        images = torch.randn(1, 3, 64, 64)
        outputs = run(path, images)
        assert list(outputs) == ["sparse", "dense", "cls"]
        sparse = model(images).sparse.detach()
        torch.testing.assert_close(outputs["sparse"], sparse, rtol=0, atol=2e-5)


class TestExportONNXInput:
    def test_convert__wrong_suffix(self, tmp_path: Path) -> None:
        arguments = [str(tmp_path), str(tmp_path / "m.bin"), "--to=onnx"]
        with pytest.raises(ValueError, match=r"OUTPUT must end in \.onnx"):
            main(arguments)

    def test_export_onnx__no_multiple_of_the_patch(self, tmp_path: Path) -> None:
        model: Stellar = reference.stellar()
        with pytest.raises(ValueError, match="50 x 64 is no multiple"):
            export_onnx(model, tmp_path / "m.onnx", (50, 64))

    def test_export_onnx__missing_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stellar_onnx, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"stellar-plugin\[export\]"):
            export_onnx(reference.stellar(), tmp_path / "m.onnx")
