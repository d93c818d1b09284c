from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stellar_plugin import Stellar, StellarEncoder, convert_cli
from stellar_plugin import onnx as stellar_onnx
from stellar_plugin.convert_cli import main
from stellar_plugin.onnx import export_onnx, outputs_of
from stellar_plugin.onnx_check import (
    MADE_UP,
    TOLERANCE,
    check_onnx,
    made_up_photos,
    passes,
    read_photos,
    report,
    sizes_to_check,
)
from tests import reference

onnx = pytest.importorskip("onnx")
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


SIZES = [(16, 16), (16, 80), (48, 32), (64, 64), (80, 80), (144, 112)]


def with_positions(encoder: StellarEncoder) -> StellarEncoder:
    """Positions that matter: else a wrong one would not be seen."""
    torch.manual_seed(0)
    torch.nn.init.normal_(encoder.vit.pos_embed)
    return encoder.eval()


@pytest.mark.slow
class TestDynamicSize:
    def test_export_onnx__positions_are_the_models_at_every_size(
        self, tmp_path: Path
    ) -> None:
        encoder = with_positions(reference.stellar().encoder)
        path = export_onnx(encoder, tmp_path / "m.onnx", dynamic_size=True)
        for size in SIZES:
            for batch in (1, 3):
                images = torch.randn(batch, 3, *size)
                with torch.no_grad():
                    expected = outputs_of(encoder, images)
                torch.testing.assert_close(
                    run(path, images), expected, rtol=0, atol=1e-4
                )
        # No multiple of the patch size: whole patches alone, as the docstring says.
        images = torch.randn(1, 3, 70, 50)
        with torch.no_grad():
            expected = outputs_of(encoder, images[:, :, :64, :48])
        torch.testing.assert_close(run(path, images), expected, rtol=0, atol=1e-4)

    def test_convert__rotary_positions_in_half_precision_are_checked(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = {"embed_dim": 48, "num_heads": 3, "depth": 1, "img_size": 32}
        model = Stellar("vit_small_patch16_dinov3", num_queries=2, target=None, **sizes)
        model.save_pretrained(tmp_path / "model")
        path = tmp_path / "m.onnx"
        options = ["--to=onnx", "--dynamic-size", "--fp16", "--check"]
        main([str(tmp_path / "model"), str(path), *options])
        said = capsys.readouterr().out
        assert "differs" not in said and "up to 0.01 passes" in said
        assert said.count("32 x 32") == said.count("48 x 80") == 3  # a row per output
        assert f"{path}, for normalised images of any size" in said
        tensors = onnx.load(path).graph.initializer
        large = {t.data_type for t in tensors if len(t.raw_data) > 2 * 48 * 48}
        assert large == {onnx.TensorProto.FLOAT16}
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            expected = outputs_of(model.eval().encoder, images)
        outputs = run(path, images)
        assert {output.dtype for output in outputs.values()} == {torch.float32}
        torch.testing.assert_close(outputs, expected, rtol=0, atol=3e-2)
        # Float16 is what was asked for: it is not the same to six digits.
        assert not torch.allclose(
            outputs["dense"], expected["dense"], rtol=0, atol=1e-5
        )


class TestCheck:
    @pytest.fixture
    def exported(self, monkeypatch: pytest.MonkeyPatch) -> StellarEncoder:
        """An encoder, and a file that computes something else by an offset."""
        encoder = reference.stellar().encoder

        class Session:
            def __init__(self, path: Path, providers: list[str]) -> None:
                self.offset = float(path.read_text())

            def get_outputs(self) -> list[SimpleNamespace]:
                return [SimpleNamespace(name=name) for name in ("sparse", "cls")]

            def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
                with torch.no_grad():
                    outputs = outputs_of(encoder, torch.from_numpy(inputs["images"]))
                values = [outputs[name] for name in names]
                values[1][0, 0] += self.offset
                return [value.numpy() for value in values]

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        return encoder

    @pytest.mark.parametrize(
        ("offset", "passing"),
        [(0.0, True), (1e-5, True), (0.1, False), (float("nan"), False)],
    )
    def test_check_onnx__what_passes(
        self, exported: StellarEncoder, tmp_path: Path, offset: float, passing: bool
    ) -> None:
        (tmp_path / "m.onnx").write_text(str(offset))
        photos = made_up_photos()[:2]
        sparse, cls = check_onnx(
            tmp_path / "m.onnx", exported, photos, [(48, 32)], (0.5,) * 3, (0.2,) * 3
        )
        assert sparse == ((48, 32), "sparse", 0, 0, 0)
        assert passes(sparse, TOLERANCE) and passes(cls, TOLERANCE) is passing
        if offset == 0.1:
            assert cls.largest == pytest.approx(0.1, rel=1e-4)
            assert cls.mean == pytest.approx(0.1 / (2 * 48), rel=1e-4)
        lines = report([sparse, cls], TOLERANCE).splitlines()
        assert lines[1].split()[:4] == ["48", "x", "32", "sparse"]
        assert lines[2].endswith("differs") is not passing

    def test_convert__a_file_that_differs_is_an_error(
        self,
        exported: StellarEncoder,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def export(_: StellarEncoder, path: Path, **__: Any) -> None:
            path.write_text("0.5")

        monkeypatch.setattr(convert_cli, "export_onnx", export)
        reference.stellar().save_pretrained(tmp_path / "model")
        arguments = [str(tmp_path / "model"), str(tmp_path / "m.onnx"), "--to=onnx"]
        main(arguments)
        (tmp_path / "m.onnx").unlink()
        with pytest.raises(RuntimeError, match="does not compute what the model does"):
            main([*arguments, "--check"])

    def test_sizes_to_check(self) -> None:
        encoder = reference.stellar().encoder
        assert sizes_to_check(encoder, dynamic_size=False) == [(64, 64)]
        assert sizes_to_check(encoder, dynamic_size=True) == [
            *((64, 64), (32, 32), (32, 64), (80, 112), (128, 64), (16, 16)),
        ]

    def test_read_photos(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for index, photo in enumerate(made_up_photos()):
            photo.save(tmp_path / f"{index}.bmp")
        (tmp_path / "broken.jpg").write_bytes(b"nothing")
        photos = read_photos(tmp_path)
        assert [photo.size[::-1] for photo in photos] == list(MADE_UP)
        assert "broken.jpg" in caplog.text
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="leave --images out"):
            read_photos(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--to=timm", "--fp16"], "--fp16 is for --to onnx, got --to timm"),
            (["--to=onnx", "--images=."], "--images is what --check compares on"),
            (["--to=onnx", "--check", "--images=no"], "there is no folder 'no'"),
        ],
    )
    def test_convert__options(
        self, tmp_path: Path, options: list[str], message: str
    ) -> None:
        name = "m.safetensors" if "--to=timm" in options else "m.onnx"
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main([str(tmp_path), str(tmp_path / name), *options])


class TestExportONNXInput:
    def test_export_onnx__one_size_or_any(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not both"):
            export_onnx(
                reference.stellar(), tmp_path / "m.onnx", (64, 64), dynamic_size=True
            )

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
