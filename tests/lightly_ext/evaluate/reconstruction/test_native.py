from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext.evaluate import cli
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.reconstruction.image_metrics import ImageScores
from lightly_ext.evaluate.reconstruction.reconstruction import run_reconstruction
from stellar_plugin.protocols import RECONSTRUCTION_NATIVE
from tests import titok_loops as loops
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_images,
)
from tests.titok_files import Sizes, shapes, weights, write_titok


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_networks", tiny_networks)


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "val", 3, seed=1))


@pytest.fixture
def titok(tmp_path: Path) -> str:
    return write_titok(tmp_path / "tokenizer_titok_b64.bin")


def _given(model: str, tmp_path: Path, **options: Any) -> Given:
    return make_given(tmp_path, model, **{**SIZES, "batch_size": 2, **options})


class TestNative:
    def test_run__scores_what_loops_decode(
        self,
        titok: str,
        tmp_path: Path,
        images: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        update = ImageScores.update

        def watched(self: Any, real: Tensor, decoded: list[Tensor]) -> None:
            (native,) = decoded
            seen.extend(zip(real, native, strict=True))
            update(self, real, decoded)

        monkeypatch.setattr(ImageScores, "update", watched)
        result = run_reconstruction(*_given(titok, tmp_path), images, force=True)
        state = {k: v.double() for k, v in weights(shapes(Sizes())).items()}
        assert len(seen) == 3
        for real, native in seen:
            tokens = loops.tokens_of(state, real.double() / 255)
            codes = loops.codes_of(state, tokens[-Sizes().num_tokens :])
            error = loops.decoded(state, codes) * 255 - native.double()
            assert error.abs().max() <= 0.501
        assert {"fid", "lpips", "psnr_db", "ssim"} <= set(result.scores)
        assert result.scores["num_images"] == 3 and set(result.chance) == {"psnr_db"}
        card = RECONSTRUCTION_NATIVE.replace(
            data="val",
            target="soft codes of its MaskGIT-VQGAN",
            networks=("tiny",),
            **SIZES,
        ).card()
        assert result.protocol == card
        assert result.provenance["latent"] == "sparse"
        assert result.provenance["grid"] == [1, Sizes().num_tokens]
        assert "do not tell their crops" in result.provenance["note"]
        assert (
            "The latent is 5 codes, which the model decodes" in capsys.readouterr().out
        )

    def test_run__untrained_beside(
        self, titok: str, tmp_path: Path, images: str
    ) -> None:
        given = _given(titok, tmp_path, controls=True)
        result = run_reconstruction(*given, images, force=True)
        assert result.control is not None
        folder = given.results.folder(result)
        untrained = json.loads((folder / "result.json").read_text())["untrained"]
        assert untrained["num_images"] == 3
        assert untrained["psnr_db"] != result.scores["psnr_db"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent": "dense"}, "by itself: leave --latent out"),
            (
                {"target": "tokens", "tokenizer": "val/0000.png"},
                "by itself: leave --target and --tokenizer out",
            ),
            (
                {"form": "finetuned", "train": "train"},
                "scored as it was published: leave --form finetuned",
            ),
            ({"form": "scratch", "train": "train"}, "is 5 tokens in no grid, which"),
            (
                {"form": "scratch", "train": "train", "latent": "lowrank"},
                "no localization of tokens, so no low-rank",
            ),
        ],
    )
    def test_run__options_that_do_not_fit(
        self,
        titok: str,
        tmp_path: Path,
        images: str,
        options: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_images(tmp_path / "train", 2)
        monkeypatch.chdir(tmp_path)
        given = _given(titok, tmp_path)
        with pytest.raises(ValueError, match=message):
            run_reconstruction(*given, images, force=True, **options)

    def test_run__another_size(self, titok: str, tmp_path: Path, images: str) -> None:
        given = _given(titok, tmp_path, crop=16)
        with pytest.raises(
            ValueError, match=r"does not take images of 16 x 16 px: .* 32 x 32 px alone"
        ):
            run_reconstruction(*given, images, force=True)

    def test_run__first_stage(self, tmp_path: Path, images: str) -> None:
        path = tmp_path / "stage1.bin"
        torch.save(weights(shapes(Sizes(), pixels=False)), path)
        given = _given(str(path), tmp_path)
        with pytest.raises(ValueError, match="holds no pixel decoder, as files of the"):
            run_reconstruction(*given, images, force=True)

    @pytest.mark.slow
    def test_run__new_decoder_on_its_patches(
        self, titok: str, tmp_path: Path, images: str
    ) -> None:
        train = str(write_images(tmp_path / "train", 3))
        options: Any = {"form": "scratch", "latent": "dense", "target": "pixels"}
        given = _given(titok, tmp_path)
        result = run_reconstruction(
            *given, images, force=True, train=train, epochs=1, **options
        )
        assert result.protocol["name"] == "reconstruction-scratch"
        assert result.model == "TiTok-64 ViT-B (dense)"
        assert result.provenance["grid"] == [2, 2]

    def test_command_line(
        self,
        titok: str,
        tmp_path: Path,
        images: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = [*run_options(tmp_path), "--data", images, "--force"]
        cli.main(["reconstruction", "--model", titok, *options])
        out = capsys.readouterr().out
        assert "read as: TiTok in layout 'TiTok'" in out
        assert "not told, assumed: use_l2_norm=True" in out
        assert "head: the model's native decoder, a full ViT" in out
        (folder,) = (tmp_path / "out").glob("reconstruction-val-TiTok_64_ViT_B-*")
        assert (folder / "reconstruction.png").stat().st_size > 1000
        scores = json.loads((folder / "result.json").read_text())["scores"]
        assert scores["num_images"] == 3 and scores["psnr_db"] > 0
