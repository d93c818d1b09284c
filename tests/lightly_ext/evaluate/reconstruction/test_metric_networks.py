from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x,
)
from torchvision.models import alexnet

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.reconstruction.image_metrics import ImageScores
from lightly_ext.evaluate.reconstruction.metric_networks import (
    ALEXNET,
    INCEPTION,
    InceptionFeatures,
    PerceptualDistance,
    load_networks,
)
from tests.lightly_ext.evaluate.reconstruction.metric_weights import (
    write_alexnet,
    write_inception,
)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_alexnet(tmp_path_factory.mktemp("weights") / "alexnet.pth")


def _images(num: int, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


class TestPerceptualDistance:
    @pytest.mark.slow
    def test_forward__authors_definition(self, alexnet_file: Path) -> None:
        network, _ = ALEXNET.load(alexnet_file)
        assert isinstance(network, PerceptualDistance)
        first, second = _images(4).div(255).chunk(2)
        backbone = alexnet(num_classes=1).features
        state = torch.load(alexnet_file)
        backbone.load_state_dict(
            {k.removeprefix("features."): v for k, v in state.items()}
        )
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, y = ((2 * image - 1 - shift) / scale for image in (first, second))
        expected = torch.zeros(2)
        stage = 0
        for layer in backbone[:12]:  # the last pooling is not part of it
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                difference = (_unit(x) - _unit(y)).square()
                weight = getattr(network.net, f"lin{stage}").model[-1].weight
                expected += F.conv2d(difference, weight).mean(dim=(1, 2, 3))
                stage += 1
        assert stage == 5
        torch.testing.assert_close(network(first, second), expected)

    def test_forward__one_image(self, alexnet_file: Path) -> None:
        network, _ = ALEXNET.load(alexnet_file)
        image = _images(1) / 255
        assert network(image, image).tolist() == [0.0]
        assert not network.training


class TestInceptionFeatures:
    @pytest.mark.slow
    def test_forward__resizes_as_tensorflow_and_normalises(
        self, inception_file: Path
    ) -> None:
        network, _ = INCEPTION.load(inception_file)
        assert isinstance(network, InceptionFeatures)
        seen: list[Tensor] = []
        hook = network.net.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        features = network(_images(1))
        hook.remove()
        assert features.shape == (1, network.num_features) == (1, 2048)
        resized = interpolate_bilinear_2d_like_tensorflow1x(
            _images(1).float(), size=(299, 299), align_corners=False
        )
        torch.testing.assert_close(seen[0], (resized - 128) / 128)
        assert torch.equal(network(_images(1)), features)
        assert not any(p.requires_grad for p in network.parameters())


class TestWeightFile:
    def test_load__sha256(self, alexnet_file: Path) -> None:
        _, digest = ALEXNET.load(alexnet_file)
        assert digest == hashlib.sha256(alexnet_file.read_bytes()).hexdigest()

    def test_load__other_network(self, alexnet_file: Path) -> None:
        with pytest.raises(ValueError, match="not hold the weights of weights-inc"):
            INCEPTION.load(alexnet_file)

    def test_load__runs_no_code_of_a_file(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "touched",))

        for file in (INCEPTION, ALEXNET):
            torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
            with pytest.raises(ValueError, match="does not hold the weights"):
                file.load(tmp_path / "evil.pth")
        assert not (tmp_path / "touched").exists()

    def test_find__in_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / ALEXNET.name).touch()
        assert ALEXNET.find(None) == tmp_path / "checkpoints" / ALEXNET.name

    def test_find__downloads_and_checks_the_hash(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(
            "torch.hub.download_url_to_file", lambda *args: asked.append(args)
        )
        path = INCEPTION.find(None)
        assert asked == [(INCEPTION.url, str(path), "6726825d")]
        assert path.name == "weights-inception-2015-12-05-6726825d.pth"

    def test_find__no_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        monkeypatch.setattr("torch.hub.download_url_to_file", fail)
        with pytest.raises(FileNotFoundError, match="no route to host") as error:
            ALEXNET.find(None)
        for part in (
            "alexnet-owt-7be5be79.pth",
            "https://download.pytorch.org/models/",
            str(tmp_path / "checkpoints"),
            "--lpips_net FILE",
        ):
            assert part in str(error.value)

    def test_find__named_file_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no '.*nowhere.pth'"):
            INCEPTION.find(str(tmp_path / "nowhere.pth"))


class TestLoadNetworks:
    @pytest.mark.slow
    def test_load_networks__wired_into_scores(
        self, inception_file: Path, alexnet_file: Path
    ) -> None:
        devices = Devices(accelerator="cpu", num_workers=0)
        networks = load_networks(devices, str(inception_file), str(alexnet_file))
        assert [text.split()[0] for text in networks.identity] == [
            "InceptionV3",
            "AlexNet",
        ]
        scores = ImageScores(networks, [""], torch.device("cpu"))
        scores.update(_images(3), [_images(3)])
        found = scores.compute()
        assert found["fid"] == pytest.approx(0, abs=1e-3)
        assert found["lpips"] == 0

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.slow
    def test_load_networks__scores_do_not_depend_on_the_device(
        self, inception_file: Path, alexnet_file: Path
    ) -> None:
        found = []
        for device in ("cpu", "cuda"):
            devices = Devices(accelerator=device)
            networks = load_networks(devices, str(inception_file), str(alexnet_file))
            scores = ImageScores(networks, [""], devices.device)
            images = _images(4).to(devices.device)
            scores.update(images, [255 - images])
            found.append(scores.compute())
        assert found[1] == pytest.approx(found[0], rel=1e-4)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
