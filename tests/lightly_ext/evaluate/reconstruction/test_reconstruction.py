from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_image_folders
from lightly_ext.evaluate import cli
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.images import EvaluationImages, centre_crop
from lightly_ext.evaluate.pictures.gallery import GAP, LINE, PANEL_SIDE
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.reconstruction.autoencoder import (
    FrozenAutoencoder,
    build_autoencoder,
)
from lightly_ext.evaluate.reconstruction.image_metrics import ImageScores, to_uint8
from lightly_ext.evaluate.reconstruction.reconstruction import run_reconstruction
from lightly_ext.evaluate.result import Result
from stellar_plugin import Stellar
from stellar_plugin.decoder import PixelDecoder
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import MOST_PSNR_DB, RECONSTRUCTION
from tests.distributed import run_as_torchrun
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import (
    IMAGE_SIZE,
    SIZES,
    Given,
    make_given,
    run_options,
    write_images,
    write_model,
)
from tests.tokenizer_weights import SIZES as TOKENIZER_SIZES
from tests.tokenizer_weights import reference_tokenizer

NUM_CODES = int(TOKENIZER_SIZES["num_codes"])


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_networks", tiny_networks)


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "val", 9, seed=1))


@pytest.fixture
def train(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "train", 6))


def _given(model: str, tmp_path: Path, **options: Any) -> Given:
    return make_given(tmp_path, model, **{**SIZES, "batch_size": 4, **options})


def _tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.bin"
    torch.save(reference_tokenizer().state_dict(), path)
    return str(path)


def _token_model(tmp_path: Path) -> str:
    return write_model(tmp_path / "tokens", target="tokens", num_codes=NUM_CODES)


class TestPretrained:
    def test_run__scores_what_the_model_reconstructs(
        self, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = write_model(tmp_path / "model")
        seen: list[tuple[Tensor, Tensor]] = []
        update = ImageScores.update

        def watched(self: Any, real: Tensor, decoded: list[Tensor]) -> None:
            seen.append((real, decoded[0]))
            update(self, real, decoded)

        monkeypatch.setattr(ImageScores, "update", watched)
        given = _given(model, tmp_path)
        result = run_reconstruction(*given, images, force=True)
        stellar = Stellar.from_pretrained(model)
        assert sum(len(real) for real, _ in seen) == 9
        for real, decoded in seen:
            with torch.no_grad():
                expected = stellar.reconstruct(given.model.normalize(real))
            error = to_uint8(expected, "32-true").int() - decoded.int()
            assert error.abs().max() <= 1
        assert result.scores["num_images"] == 9
        assert {"fid", "lpips", "psnr_db", "ssim"} <= set(result.scores)
        # Chance: each image in its mean colour, as a decoding, in the same metric.
        crops = _crops(given, images)
        flat = crops.float().mean((2, 3), keepdim=True).expand(crops.shape)
        by_hand = ImageScores(tiny_networks(given.devices), [""], crops.device)
        by_hand.update(crops, [flat.round().to(torch.uint8)])
        expected = by_hand.compute()["psnr_db"]
        assert result.chance == {"psnr_db": pytest.approx(expected, rel=1e-6)}
        assert result.protocol["name"] == "reconstruction-pretrained"
        assert result.protocol["networks"] == ["tiny"]
        assert "cannot be compared" in result.provenance["note"]
        assert result.provenance["grid"] == [2, 2]

    def test_run__identity_scores_perfectly(
        self, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Copy(PixelDecoder):
            def forward(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
                return current[0] / 255

        current: list[Tensor] = []
        encode = FrozenAutoencoder.encode

        def remembering(self: FrozenAutoencoder, images: Tensor) -> Any:
            current[:] = [images]
            return encode(self, images)

        monkeypatch.setattr(FrozenAutoencoder, "encode", remembering)
        monkeypatch.setattr("stellar_plugin.model.PixelDecoder", Copy)
        given = _given(write_model(tmp_path / "model"), tmp_path)
        scores = run_reconstruction(*given, images, force=True).scores
        assert scores["fid"] == pytest.approx(0, abs=1e-6)
        assert scores["lpips"] == 0
        assert scores["psnr_db"] == pytest.approx(MOST_PSNR_DB)
        assert scores["ssim"] == pytest.approx(1, abs=1e-6)

    def test_run__tokenizer_beside_every_token_score(
        self, tmp_path: Path, images: str
    ) -> None:
        given = _given(_token_model(tmp_path), tmp_path)
        tokenizer = _tokenizer(tmp_path)
        result = run_reconstruction(*given, images, tokenizer=tokenizer, force=True)
        inputs = _crops(given, images)
        own = reference_tokenizer()
        decoded = own.decode(own.encode(inputs / 255))
        errors = to_uint8(decoded, "32-true") / 255 - inputs / 255
        expected = float(errors.abs().mean())
        assert result.scores["tokenizer_lpips"] == pytest.approx(expected, rel=1e-3)
        assert {"tokenizer_fid", "tokenizer_psnr_db"} <= set(result.scores)
        assert weights_sha256(own) in result.protocol["target"]

    def test_run__unreadable_image_is_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_images(tmp_path / "val", 21)
        (folder / "0004.png").write_bytes(b"broken")
        given = _given(write_model(tmp_path / "model"), tmp_path)
        result = run_reconstruction(*given, str(folder), force=True)
        assert result.scores["num_images"] == 20
        assert result.provenance["num_unreadable"] == 1
        assert "1 of 21 images is unreadable" in capsys.readouterr().out
        (folder / "0004.png").unlink()
        other = _given(write_model(tmp_path / "model"), tmp_path)
        clean = run_reconstruction(*other, str(folder), force=True)
        assert clean.scores == pytest.approx(result.scores)

    def test_run__too_few_images(self, tmp_path: Path, images: str) -> None:
        given = _given(write_model(tmp_path / "model"), tmp_path)
        with pytest.raises(ValueError, match=r"9 images, FID needs 2048.*--force"):
            run_reconstruction(*given, images)

    def test_run__random_decoder_is_refused(self, tmp_path: Path, images: str) -> None:
        model = write_model(tmp_path / "model", target=None)
        with pytest.raises(ValueError, match=r"holds no decoder.*--form scratch"):
            run_reconstruction(*_given(model, tmp_path), images, force=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent": "dense"}, "reads the latent 'lowrank'"),
            ({"target": "tokens"}, "pretrained with target 'pixels', not 'tokens'"),
            ({"train": "x"}, "--form pretrained trains nothing"),
            ({"form": "scratch"}, "--train FOLDER"),
            ({"form": "finetuned", "decoder": "x", "epochs": 3}, "is trained already"),
            ({"form": "scratch", "train": "x", "epochs": 0}, "epochs must be at least"),
        ],
    )
    def test_run__options_that_do_not_fit(
        self, tmp_path: Path, images: str, options: dict[str, Any], message: str
    ) -> None:
        given = _given(write_model(tmp_path / "model"), tmp_path)
        with pytest.raises(ValueError, match=message):
            run_reconstruction(*given, images, force=True, **options)

    def test_run__no_tokenizer(self, tmp_path: Path, images: str) -> None:
        given = _given(_token_model(tmp_path), tmp_path)
        with pytest.raises(ValueError, match="--tokenizer maskgit-vqgan"):
            run_reconstruction(*given, images, force=True)


class TestTrained:
    def test_run__finetuned_changes_the_decoder_alone(
        self, tmp_path: Path, images: str, train: str
    ) -> None:
        model = write_model(tmp_path / "model")
        given = _given(model, tmp_path)
        before = weights_sha256(given.model)
        own = weights_sha256(_decoder(Stellar.from_pretrained(model)))
        options: Any = {"form": "finetuned", "train": train, "force": True}
        result = run_reconstruction(*given, images, epochs=2, **options)
        assert weights_sha256(given.model) == before
        assert result.provenance["decoder_sha256"] != own
        assert result.protocol["name"] == "reconstruction-finetuned"
        assert result.protocol["epochs"] == 2
        assert result.protocol["split"].startswith("decoder: train, 6 images;")
        as_pretrained = run_reconstruction(*given, images, force=True)
        assert as_pretrained.provenance["decoder_sha256"] == own
        assert as_pretrained.protocol != result.protocol

    @pytest.mark.slow
    def test_run__stored_decoder_scores_the_same(
        self, tmp_path: Path, images: str, train: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = _given(write_model(tmp_path / "model"), tmp_path)
        options: Any = {"form": "scratch", "latent": "dense", "force": True}
        first = run_reconstruction(
            *given, images, train=train, target="pixels", epochs=1, **options
        )
        assert first.model == f"{given.model.origin.name} (dense)"
        folder = given.results.folder(first) / "decoder"
        monkeypatch.setattr(
            "lightly_ext.evaluate.reconstruction.decoder_training.fit", None
        )
        by_name = run_reconstruction(*given, images, decoder=str(folder), **options)
        found = run_reconstruction(
            *given, images, train=train, target="pixels", epochs=1, **options
        )
        for result in (by_name, found):
            assert result.scores == first.scores
            assert result.protocol == first.protocol
        with pytest.raises(ValueError, match="trained for latent 'dense'"):
            run_reconstruction(
                *given, images, form="scratch", decoder=str(folder), force=True
            )
        with pytest.raises(ValueError, match="trained for form 'scratch'"):
            run_reconstruction(
                *given, images, form="finetuned", decoder=str(folder), force=True
            )
        with pytest.raises(FileNotFoundError, match="no trained decoder in"):
            run_reconstruction(*given, images, decoder=str(tmp_path), **options)

    @pytest.mark.parametrize(
        ("model", "crop", "codes"),
        [
            ("timm:resnet10t", 64, "(bicubic) to 32 px so that"),
            ("timm:vit_tiny_patch16_224", 32, "(bicubic) so that"),
        ],
    )
    @pytest.mark.parametrize("target", ["pixels", "tokens"])
    @pytest.mark.slow
    def test_run__scratch_on_other_encoders(
        self,
        tmp_path: Path,
        images: str,
        train: str,
        model: str,
        crop: int,
        codes: str,
        target: Any,
    ) -> None:
        given = _given(model, tmp_path, untrained=True, resize=crop, crop=crop)
        tokenizer = _tokenizer(tmp_path) if target == "tokens" else None
        options: Any = {"form": "scratch", "train": train, "epochs": 1, "force": True}
        with pytest.raises(ValueError, match="no low-rank latent: use --latent dense"):
            run_reconstruction(*given, images, latent="lowrank", **options)
        options |= {"target": target, "tokenizer": tokenizer}
        result = run_reconstruction(*given, images, **options)
        assert result.provenance["grid"] == [2, 2]
        assert result.provenance["latent"] == "dense"
        named = run_reconstruction(*given, images, latent="dense", **options)
        assert named.digest == result.digest
        assert (codes in result.protocol["target"]) == (target == "tokens")
        assert ("tokenizer_fid" in result.scores) == (target == "tokens")
        assert not result.model.endswith("(dense)")

    def test_run__training_images_are_not_scored(
        self, tmp_path: Path, images: str
    ) -> None:
        given = _given(write_model(tmp_path / "model"), tmp_path)
        with pytest.raises(ValueError, match="9 images are in the training set and"):
            run_reconstruction(
                *given, images, form="scratch", train=str(tmp_path), force=True
            )


class TestFrozenAutoencoder:
    def test_codes__as_in_pretraining(self, tmp_path: Path) -> None:
        # Patches of 14 px, codes of 16.
        model = write_model(
            tmp_path / "model",
            target="tokens",
            num_codes=NUM_CODES,
            img_size=28,
            patch_size=14,
        )
        given = _given(model, tmp_path, resize=28, crop=28)
        autoencoder = build_autoencoder(
            *given[:2], True, "lowrank", None, _tokenizer(tmp_path), 28
        )
        stellar = Stellar.from_pretrained(model)
        stellar.load_tokenizer(_tokenizer(tmp_path))
        pictures = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
        codes = stellar.target_codes(pictures / 255)
        result = stellar(given.model.normalize(pictures))
        logits = stellar.predict_codes(result.lowrank, result.grid_size)
        expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        torch.testing.assert_close(autoencoder.losses(pictures).mean(), expected)

    def test_losses__mean_squared_error(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "model")
        given = _given(model, tmp_path)
        autoencoder = build_autoencoder(*given[:2], True, "lowrank", None, None, 32)
        pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
        stellar = Stellar.from_pretrained(model)
        result = stellar(given.model.normalize(pictures))
        decoded = stellar.decode(result.lowrank, result.grid_size)
        expected = F.mse_loss(decoded, pictures / 255)
        torch.testing.assert_close(autoencoder.losses(pictures).mean(), expected)

    def test_build__grid_does_not_divide_the_image(self, tmp_path: Path) -> None:
        given = _given("timm:resnet10t", tmp_path, untrained=True)
        with pytest.raises(ValueError, match="grid of 2 x 2 does not cut 61 px"):
            build_autoencoder(*given[:2], False, "dense", "pixels", None, 61)


class TestMain:
    def test_main__stores_result_and_pictures(
        self, tmp_path: Path, images: str
    ) -> None:
        model = _token_model(tmp_path)
        arguments = ["--model", model, "--data", images, "--force", "true"]
        arguments += ["--tokenizer", _tokenizer(tmp_path), *run_options(tmp_path)]
        cli.main(["reconstruction", *arguments])
        (path,) = (tmp_path / "out").glob("reconstruction-*/result.json")
        assert Result.load(path).scores["num_images"] == 9
        picture = np.asarray(Image.open(path.parent / "reconstruction.png"))
        rows, columns = 4, 8  # input, decoded, the tokenizer's, strongest token
        factor = PANEL_SIDE // IMAGE_SIZE
        side = factor * IMAGE_SIZE
        assert picture.shape[1] == GAP + columns * (side + GAP)
        assert len(picture) > rows * (LINE + side + GAP)
        given = _given(model, tmp_path)
        first = _crops(given, images)[0].permute(1, 2, 0).byte().numpy()
        shown = picture[LINE : LINE + side : factor, GAP : GAP + side : factor]
        assert np.array_equal(shown, first)

    def test_main__error_is_one_line(self, tmp_path: Path, images: str) -> None:
        model = write_model(tmp_path / "model")
        with pytest.raises(ValueError, match=r"^T"):
            arguments = ["--model", model, "--data", images, *run_options(tmp_path)]
            cli.main(["reconstruction", *arguments])

    def test_main__digit_boards(self, tmp_path: Path) -> None:
        sets = make_board_sets(
            0, num_train=8, num_test=4, num_train_single=4, num_test_single=6
        )
        export_image_folders(sets, tmp_path / "boards")
        model = write_model(tmp_path / "model", img_size=60, patch_size=12)
        arguments = [
            *("--model", model, "--form", "finetuned", "--epochs", "2"),
            *("--data", str(tmp_path / "boards" / "single" / "test")),
            *("--train", str(tmp_path / "boards" / "train"), "--force", "true"),
            *run_options(tmp_path),
            *("--resize", "60", "--crop", "60"),
        ]
        cli.main(["reconstruction", *arguments])
        (path,) = (tmp_path / "out").glob("reconstruction-*/result.json")
        assert (path.parent / "decoder" / "model.safetensors").exists()
        assert Result.load(path).scores["num_images"] == 6

    @pytest.mark.slow
    def test_main__two_processes_as_one(self, tmp_path: Path) -> None:
        # 5 images to score, so uneven shares; training inside the same processes.
        val = str(write_images(tmp_path / "val", 5, seed=1))
        train = str(write_images(tmp_path / "train", 6))
        arguments = [
            *("--model", write_model(tmp_path / "model"), "--form", "finetuned"),
            *("--data", val, "--train", train, "--epochs", "2", "--force", "true"),
            *run_options(tmp_path),
        ]
        cli.main(["reconstruction", *arguments, "--output", str(tmp_path / "one")])
        arguments += ["--output", str(tmp_path / "two"), "--devices", "2"]
        run_as_torchrun(with_tiny_networks, arguments, tmp_path)
        one, two = (
            Result.load(next((tmp_path / name).glob("reconstruction-*/result.json")))
            for name in ("one", "two")
        )
        assert two.protocol == one.protocol
        assert two.scores == pytest.approx(one.scores, rel=1e-3)
        assert two.scores["num_images"] == 5


def with_tiny_networks(arguments: list[str]) -> None:
    """`stellar evaluate reconstruction` with tiny networks."""
    reconstruction.load_networks = tiny_networks
    cli.main(["reconstruction", *arguments])


def _decoder(model: Stellar) -> nn.Module:
    assert model.decoder is not None
    return model.decoder


def _crops(given: Given, folder: str) -> Tensor:
    """All images as the task cuts them, uint8."""
    name, files = find_images(folder)
    protocol = given.results.protocol(given.model, RECONSTRUCTION, data=name)
    transform = centre_crop(protocol, "bicubic")
    data = EvaluationImages(files, transform)
    return torch.stack([data[i].image for i in range(len(data))])
