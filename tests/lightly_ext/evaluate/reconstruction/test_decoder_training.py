from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext import durable
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import folder_images
from lightly_ext.evaluate.reconstruction.autoencoder import (
    FrozenAutoencoder,
    build_autoencoder,
)
from lightly_ext.evaluate.reconstruction.decoder_files import load_decoder
from lightly_ext.evaluate.reconstruction.decoder_training import (
    DecoderTraining,
    train_decoder,
)
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import RECONSTRUCTION_SCRATCH
from tests.lightly_ext.evaluate.small import (
    IMAGE_SIZE,
    Given,
    make_given,
    write_images,
    write_model,
)
from tests.tokenizer_weights import reference_tokenizer

PROTOCOL = RECONSTRUCTION_SCRATCH.replace(
    resize=IMAGE_SIZE, crop=IMAGE_SIZE, lrs=(1e-3,), batch_sizes=(4,), epochs=4
)


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return _given(write_model(tmp_path / "model"), tmp_path)


def _given(model: str, tmp_path: Path, **options: Any) -> Given:
    return make_given(tmp_path, model, **options)


def _tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.bin"
    torch.save(reference_tokenizer().state_dict(), path)
    return str(path)


def _small(autoencoder: FrozenAutoencoder) -> FrozenAutoencoder:
    """The same with a smaller decoder."""
    torch.manual_seed(0)
    old: Any = autoencoder.decoder
    size = {"decoder_dim": 32, "depth": 1, "num_heads": 2}
    own = (
        old.head.kernel_size[0]
        if autoencoder.target == "pixels"
        else old.head.out_features
    )
    autoencoder.decoder = type(old)(old.proj.in_features, own, **size)
    return autoencoder


def _build(given: Given, target: str, tmp_path: Path) -> FrozenAutoencoder:
    tokenizer = _tokenizer(tmp_path) if target == "tokens" else None
    return _small(
        build_autoencoder(
            given.model, given.devices, False, "lowrank", target, tokenizer, IMAGE_SIZE
        )  # type: ignore[arg-type]
    )


def _epoch_losses(folder: Path) -> list[float]:
    losses = []
    for path in sorted(folder.glob("log/version_*/metrics.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        losses += [float(r["loss_epoch"]) for r in rows if r.get("loss_epoch")]
    return losses


class TestTrainDecoder:
    @pytest.mark.parametrize("target", ["pixels", "tokens"])
    @pytest.mark.slow
    def test_train_decoder__lowers_its_loss_and_stores_the_decoder(
        self, given: Given, tmp_path: Path, target: str
    ) -> None:
        files = folder_images(write_images(tmp_path / "train", 8))
        autoencoder = _build(given, target, tmp_path)
        encoder = weights_sha256(given.model)
        folder = tmp_path / "decoder"
        train_decoder(
            given.devices, autoencoder, files, PROTOCOL, folder, {"form": "x"}
        )
        losses = _epoch_losses(folder)
        assert len(losses) == PROTOCOL.epochs
        assert losses[-1] < losses[0]
        assert weights_sha256(given.model) == encoder
        assert not any(p.requires_grad for p in given.model.parameters())
        again = _build(given, target, tmp_path)
        load_decoder(again, folder)
        assert weights_sha256(again.decoder) == weights_sha256(autoencoder.decoder)

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.slow
    def test_train_decoder__resumes_exactly(
        self, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = write_model(tmp_path / "model")
        given = _given(model, tmp_path, num_workers=num_workers)
        files = folder_images(write_images(tmp_path / "train", 6))
        whole = _build(given, "pixels", tmp_path)
        train_decoder(given.devices, whole, files, PROTOCOL, tmp_path / "whole", {})
        step = DecoderTraining.training_step
        calls = Counter[str]()

        def power_cut(self: DecoderTraining, *args: Any) -> Tensor:
            calls["step"] += 1
            if calls["step"] == 6:  # in the middle of the third epoch
                raise OSError("power cut")
            return step(self, *args)

        monkeypatch.setattr(DecoderTraining, "training_step", power_cut)
        parts = _build(given, "pixels", tmp_path)
        with pytest.raises(OSError, match="power cut"):
            train_decoder(given.devices, parts, files, PROTOCOL, tmp_path / "parts", {})
        assert not (tmp_path / "parts" / "model.safetensors").exists()
        parts = _build(given, "pixels", tmp_path)
        torch.rand(3)  # the state of the global generator does not matter
        train_decoder(given.devices, parts, files, PROTOCOL, tmp_path / "parts", {})
        assert weights_sha256(parts.decoder) == weights_sha256(whole.decoder)
        assert _epoch_losses(tmp_path / "parts") == _epoch_losses(tmp_path / "whole")

    def test_train_decoder__takes_what_is_there(
        self, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = folder_images(write_images(tmp_path / "train", 4))
        first = _build(given, "pixels", tmp_path)
        folder = tmp_path / "decoder"

        def killed(module: Any, path: str) -> None:
            Path(path).write_bytes(b"half of")
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(durable, "save_model", killed)
            with pytest.raises(KeyboardInterrupt):
                train_decoder(
                    given.devices, first, files, PROTOCOL, folder, {"form": "x"}
                )
        train_decoder(given.devices, first, files, PROTOCOL, folder, {"form": "x"})
        monkeypatch.setattr(DecoderTraining, "training_step", None)
        again = _build(given, "pixels", tmp_path)
        train_decoder(given.devices, again, files, PROTOCOL, folder, {"form": "x"})
        assert weights_sha256(again.decoder) == weights_sha256(first.decoder)
        with pytest.raises(ValueError, match="another training, which differs in form"):
            train_decoder(given.devices, again, files, PROTOCOL, folder, {"form": "y"})

    def test_train_decoder__checkpoint_holds_what_is_trained(
        self, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Nothing goes through the temporary folder of the system.
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
        files = folder_images(write_images(tmp_path / "train", 4))
        autoencoder = _build(given, "tokens", tmp_path)
        protocol = PROTOCOL.replace(epochs=1)
        train_decoder(given.devices, autoencoder, files, protocol, tmp_path / "d", {})
        last = tmp_path / "d" / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(last, weights_only=True)
        prefix = "autoencoder.decoder."
        assert all(name.startswith(prefix) for name in checkpoint["state_dict"])
        assert checkpoint["unreadable"].tolist() == [False] * 4

    def test_train_decoder__unreadable_image_has_no_part(
        self, given: Given, tmp_path: Path
    ) -> None:
        folder = write_images(tmp_path / "train", 25)
        (folder / "0003.png").write_bytes(b"broken")
        autoencoder = _build(given, "pixels", tmp_path)
        protocol = PROTOCOL.replace(epochs=1)
        count = train_decoder(
            given.devices,
            autoencoder,
            folder_images(folder),
            protocol,
            tmp_path / "d",
            {},
        )
        assert count == 1
        config = json.loads((tmp_path / "d" / "config.json").read_text())
        assert config["num_unreadable"] == 1

    def test_train_decoder__too_many_unreadable(
        self, given: Given, tmp_path: Path
    ) -> None:
        folder = write_images(tmp_path / "train", 4)
        (folder / "0003.png").write_bytes(b"broken")
        autoencoder = _build(given, "pixels", tmp_path)
        with pytest.raises(RuntimeError, match=r"1 of 4 images .*0003.png.*too many"):
            train_decoder(
                given.devices,
                autoencoder,
                folder_images(folder),
                PROTOCOL.replace(epochs=1),
                tmp_path / "d",
                {},
            )


class TestDecoderTraining:
    def test_training_step__loss_of_readable_images(
        self, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        autoencoder = _build(given, "pixels", tmp_path)
        module = DecoderTraining(autoencoder, PROTOCOL, 9)
        monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
        module._trainer = type("T", (), {"world_size": 1})()
        images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
        batch: Any = (
            images,
            torch.tensor([5, 7, 2]),
            torch.tensor([True, False, True]),
            torch.full((3, 2), 32),
        )
        loss = module.training_step(batch, 0)
        expected = autoencoder.losses(images[[0, 2]]).sum() / 3
        torch.testing.assert_close(loss, expected)
        assert module.unreadable.nonzero().tolist() == [[7]]


def test_batch__not_divisible(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = folder_images(write_images(tmp_path / "train", 4))
    autoencoder = _build(given, "pixels", tmp_path)
    protocol = PROTOCOL.replace(batch_sizes=(5,))
    monkeypatch.setattr(Devices, "world_size", 2)
    with pytest.raises(ValueError, match="5 images cannot be shared by 2 devices"):
        train_decoder(given.devices, autoencoder, files, protocol, tmp_path / "d", {})
