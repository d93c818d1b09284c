"""ResNets of BYOL, DenseCL and nobody, as published and as trained."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin.checkpoints import create_encoder, load_network, read_checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.recognise import parse
from stellar_plugin.networks.resnet import ResNet
from stellar_plugin.state_dict import misfits
from tests.checkpoint_files import prefixed, save, timm_vit
from tests.resnet_files import (
    State,
    haiku,
    padded,
    reference_map,
    resnet_state,
    write_deepmind,
)

OTHER = resnet_state(seed=1)
SIZES = ((64, 64), (45, 70))


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_features(network: ResNet, state: State, same: bool = False) -> None:
    for size in SIZES:
        expected = reference_map(state, images(*size), same)
        found = network(images(*size))
        assert found.grid_size == tuple(-(-side // 32) for side in size)
        dense = expected.flatten(2).mT
        scale = dense.abs().max()
        assert scale > 0.1
        torch.testing.assert_close(
            found.dense / scale, dense / scale, rtol=0, atol=1e-5
        )
        cls = expected.mean(dim=(2, 3))
        torch.testing.assert_close(found.cls / scale, cls / scale, rtol=0, atol=1e-5)
        assert found.sparse.shape == (2, 0, expected.shape[1])


def mmpretrain_byol(state: State) -> dict[str, Any]:
    tensors = prefixed(state, "backbone.") | prefixed(OTHER, "target_net.module.0.")
    tensors |= {
        "neck.fc0.weight": torch.ones(2, 2),
        "target_net.steps": torch.tensor(1),
    }
    tensors["head.predictor.fc0.weight"] = torch.ones(2, 2)
    return {"meta": {"epoch": 200}, "state_dict": tensors}


def lightly_byol(state: State) -> dict[str, Any]:
    tensors = prefixed(OTHER, "backbone.") | prefixed(state, "teacher_backbone.")
    for head in ("projection_head", "prediction_head", "teacher_projection_head"):
        tensors[f"{head}.layers.0.weight"] = torch.ones(2, 2)
    tensors["online_classifier.online_classifier.weight"] = torch.ones(2, 2)
    return {"state_dict": tensors, "epoch": 99, "hyper_parameters": {"num_classes": 2}}


def densecl_training(state: State) -> dict[str, Any]:
    tensors = prefixed(state, "encoder_q.0.") | prefixed(OTHER, "encoder_k.0.")
    tensors |= prefixed(state, "backbone.")
    tensors["encoder_q.1.mlp.0.weight"] = torch.ones(2, 2)
    for name in ("queue", "queue2"):
        tensors |= {name: torch.ones(2, 3), f"{name}_ptr": torch.tensor([1])}
    return {"state_dict": tensors}


def mmpretrain_densecl(state: State) -> dict[str, Any]:
    tensors = prefixed(state, "backbone.") | prefixed(OTHER, "encoder_k.module.0.")
    tensors |= {"neck.mlp.0.weight": torch.ones(2, 2), "queue": torch.ones(2, 3)}
    return {"state_dict": {**tensors, "queue2": torch.ones(2, 3)}}


def moco(state: State) -> dict[str, Any]:
    tensors = prefixed(state, "module.encoder_q.") | prefixed(
        OTHER, "module.encoder_k."
    )
    tensors["module.encoder_q.fc.weight"] = torch.ones(2, 64)
    return {"state_dict": {**tensors, "module.queue": torch.ones(2, 3)}}


def sequential(state: State) -> State:
    children = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
    parts = [name.partition(".") for name in state]
    return {
        f"backbone.{children.index(child)}.{rest}": tensor
        for (child, _, rest), tensor in zip(parts, state.values(), strict=True)
    }


class TestContainers:
    @pytest.mark.parametrize(
        ("container", "method", "feature", "choice"),
        [
            (mmpretrain_byol, "BYOL", "cls", "not of target_net.0"),
            (lightly_byol, "BYOL", "cls", "'state_dict.teacher_backbone', not of back"),
            (lambda s: {"state_dict": s, "author": "DenseCL"}, "DenseCL", "dense", ""),
            (densecl_training, "DenseCL", "dense", "'state_dict.encoder_q.0', not of"),
            (
                mmpretrain_densecl,
                "DenseCL",
                "dense",
                "'state_dict.backbone', not of",
            ),
            (moco, None, None, "'state_dict.encoder_q', not of encoder_k"),
            (lambda s: {"state_dict": s, "author": "OpenSelfSup"}, None, None, ""),
            (lambda s: s, None, None, ""),
            (sequential, None, None, ""),
            (
                lambda s: {
                    **s,
                    "fc.weight": torch.ones(5, 64),
                    "fc.bias": torch.ones(5),
                },
                "a classifier",
                None,
                "",
            ),
        ],
    )
    def test_file__is_told_and_gives_its_features(
        self,
        container: Callable[[State], dict[str, Any]],
        method: str | None,
        feature: str | None,
        choice: str,
        tmp_path: Path,
    ) -> None:
        state = resnet_state()
        path = save(container(state), tmp_path / "resnet.pth")
        network, report = load_network(path)
        assert isinstance(network, ResNet)
        assert (network.stride, network.embed_dim, network.image_size) == (32, 64, None)
        assert_features(network, state)
        assert not report.unexpected and not report.missing
        assert choice in report.choice and bool(choice) == bool(report.choice)
        assert report.untold == (() if method else ("padding=symmetric",))
        model = load_frozen_model(str(path))
        assert model.origin.method == (method or "torchvision ResNet")
        assert model.origin.feature == feature
        if feature is None:
            with pytest.raises(ValueError, match=r"name --features, one of"):
                model.resolve_feature("auto")

    def test_byol_of_other_names__is_read_by_their_order(self, tmp_path: Path) -> None:
        state = resnet_state(layers=(3, 4, 6, 3))
        assert len(state) == 318
        names = {
            name: name.replace("layer", "stage").replace("bn", "n") for name in state
        }
        odd = {f"net.{names[name]}": tensor for name, tensor in state.items()}
        other = resnet_state(layers=(3, 4, 6, 3), seed=1)
        content = {
            "online_backbone": odd | {"head.weight": torch.ones(2, 2)},
            "online_projection": {"l1.weight": torch.ones(2, 2)},
            "target_backbone": dict(zip(odd, other.values(), strict=True)),
        }
        path = save(content, tmp_path / "byol.pth.tar")
        network, report = load_network(path)
        assert_features(network, state)
        assert report.unexpected == ("head.weight",)
        assert read_checkpoint(path).method.name == "BYOL"
        # Two values of another kind: the order tells nothing.
        swapped = list(odd)
        swapped[1:3] = reversed(swapped[1:3])
        content["online_backbone"] = {name: odd[name] for name in swapped}
        with pytest.raises(ValueError, match=r"of no known layout. Its names: net."):
            read_checkpoint(save(content, tmp_path / "swapped.pth.tar"))
        content["online_backbone"] = {
            name.replace("layer", "stage"): tensor
            for name, tensor in resnet_state((2, 2, 2, 2), bottleneck=False).items()
        }
        with pytest.raises(ValueError, match="is of no known layout"):
            read_checkpoint(save(content, tmp_path / "resnet18.pth.tar"))

    @pytest.mark.parametrize(
        ("structure", "sizes"),
        [
            ({"bottleneck": False, "layers": (2, 2, 2, 2)}, (16, 1)),
            ({"bottleneck": False, "planes": (6, 8, 8, 16)}, (16, 1)),
            ({"groups": 2}, (64, 2)),
            ({"stem": 64, "planes": (16, 8, 8, 16)}, (64, 1)),
        ],
    )
    def test_other_structures__are_read_off_the_tensors(
        self, structure: dict[str, Any], sizes: tuple[int, int], tmp_path: Path
    ) -> None:
        state = resnet_state(**structure)
        network, _ = load_network(save(state, tmp_path / "resnet.safetensors"))
        assert network.embed_dim == sizes[0]
        second: Any = network.named.get_submodule("layer2.0.conv2")
        assert second.groups == sizes[1]
        assert_features(network, state)

    def test_counters__may_be_missing(self, tmp_path: Path) -> None:
        state = {n: t for n, t in resnet_state().items() if t.ndim}
        network, report = load_network(save(state, tmp_path / "resnet.pth"))
        assert_features(network, state)
        assert report.ignored == ()

    @pytest.mark.parametrize("same", [False, True])
    def test_names__of_resnet_50_at_full_size(self, same: bool, tmp_path: Path) -> None:
        widths = {"layers": (3, 4, 6, 3), "planes": (64, 128, 256, 512), "stem": 64}
        state = resnet_state(**widths, device="meta")
        with torch.device("meta"):
            published = resnet50().state_dict()
        assert len(published) == 320
        assert {*published} - {*state} == {"fc.weight", "fc.bias"}
        assert len([t for t in state.values() if t.ndim == 4]) == 53
        content = {"state_dict": state, "author": "DenseCL"}
        checkpoint = parse(RawCheckpoint(tmp_path / "densecl.pth", content))
        with torch.device("meta"):
            network = checkpoint.network.build(padding="same" if same else "symmetric")
        fitted, _ = network.fitted(checkpoint.state)
        assert misfits(network.named.state_dict(), fitted) == ""
        assert misfits(published, fitted) == "missing: fc.weight, fc.bias"
        assert network.embed_dim == 2048


class TestDeepMind:
    @pytest.mark.parametrize("dilled", [True, False])
    @pytest.mark.parametrize("bottleneck", [True, False])
    def test_pickle__is_its_online_network(
        self, dilled: bool, bottleneck: bool, tmp_path: Path
    ) -> None:
        state = resnet_state(bottleneck=bottleneck, planes=(8, 8, 8, 16))
        path = write_deepmind(tmp_path / "res50x1.pkl", state, OTHER, dilled)
        with pytest.raises((ModuleNotFoundError, AttributeError)):
            pickle.loads(path.read_bytes())
        network, report = load_network(path)
        assert_features(network, state, same=True)
        assert report.read_as == "BYOL in layout 'Haiku ResNet'"
        assert (
            report.choice == "those of 'online_params.res_net50', not of target_params"
        )
        assert report.untold == report.unexpected == report.missing == ()
        assert "projector.linear.w" in report.ignored
        assert load_frozen_model(str(path)).origin.feature == "cls"

    def test_converted_file__needs_padding(self, tmp_path: Path) -> None:
        state = resnet_state()
        path = save(state, tmp_path / "converted.pth")
        same = load_frozen_model(str(path), model_kwargs={"padding": "same"})
        assert_features(same.backbone, state, same=True)
        assert "not told, assumed" in load_frozen_model(str(path)).origin.facts
        assert "padding" not in same.origin.facts.get("not told, assumed", "")
        with pytest.raises(
            ValueError, match="padding must be 'symmetric', 'same', got"
        ):
            load_frozen_model(str(path), model_kwargs={"padding": "valid"})

    def test_padding__is_that_of_loops(self) -> None:
        network = ResNet(layers=(1, 1, 1, 1), channels=(4,) * 4, padding="same")
        network.eval()
        conv: Any = network.named.get_submodule("conv1")
        pool: Any = network.named.get_submodule("maxpool")
        kernels = conv.weight.detach().numpy()

        def convolve(cut: Any) -> Any:
            return (kernels * cut).sum((1, 2, 3))

        for size in ((8, 9), (7, 12)):
            image = torch.randn(1, 3, *size)
            found = conv(image)[0].detach()
            expected = loops(
                image[0].numpy(), 7, lambda cut: (kernels * cut).sum((1, 2, 3))
            )
            torch.testing.assert_close(
                found, torch.from_numpy(expected), atol=1e-4, rtol=0
            )
            highest = loops(image[0].numpy(), 3, lambda cut: cut.max((1, 2)), -np.inf)
            assert pool(image)[0].equal(torch.from_numpy(highest))

    def test_code__is_not_run(self, tmp_path: Path) -> None:
        canary = tmp_path / "canary"

        class Evil:
            def __reduce__(self) -> Any:
                return os.system, (f"touch '{canary}'",)

        state = resnet_state()
        path = write_deepmind(tmp_path / "evil.pkl", state, OTHER, rng=Evil())
        pickle.loads(pickle.dumps(Evil(), 2))
        assert canary.exists()  # whoever unpickles it runs it
        canary.unlink()
        network, _ = load_network(path)
        assert_features(network, state, same=True)
        assert not canary.exists()
        params, _ = haiku(state)
        params["res_net50/~/initial_conv"]["w"] = Evil()
        path = write_deepmind(
            tmp_path / "eviler.pkl", state, OTHER, online_params=params
        )
        with pytest.raises(
            ValueError, match=r"initial_conv.w is a posix.system, no arr"
        ):
            load_network(path)
        assert not canary.exists()

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ({"online_params": ()}, "its online_params are tuple"),
            ({"online_state": None}, "its online_state are NoneType"),
            (
                {"online_params": {"a": {"w": np.array(["x"], object)}}},
                "an array does not hold plain numbers",
            ),
            ({"online_params": {"a": 3}}, "online_params of a are int"),
        ],
    )
    def test_other_content__is_named(
        self, given: dict[str, Any], match: str, tmp_path: Path
    ) -> None:
        path = write_deepmind(tmp_path / "byol.pkl", resnet_state(), OTHER, **given)
        with pytest.raises(ValueError, match=f"of BYOL.*{match}.*convert it"):
            read_checkpoint(path)

    def test_second_version__is_refused(self, tmp_path: Path) -> None:
        params, _ = haiku(resnet_state())
        params["res_net50/~/final_batchnorm"] = {"scale": np.ones((1, 1, 1, 64), "f4")}
        given = {"online_params": params}
        path = write_deepmind(tmp_path / "v2.pkl", resnet_state(), OTHER, **given)
        with pytest.raises(ValueError, match=r"unexpected: final_batchnorm.scale"):
            load_network(path)

    def test_cut_file__is_named(self, tmp_path: Path) -> None:
        path = write_deepmind(tmp_path / "byol.pkl", resnet_state(), OTHER)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"byol.pkl' cannot be read .* cut short"):
            read_checkpoint(path)


def loops(
    image: Any, kernel: int, apply: Callable[[Any], Any], outside: float = 0
) -> Any:
    """What a kernel of stride 2 gives by TensorFlow's description of SAME."""
    sides = image.shape[1:]
    count = [-(-n // 2) for n in sides]
    before = [max(kernel - (n % 2 or 2), 0) // 2 for n in sides]
    rows = []
    for i in range(count[0]):
        for j in range(count[1]):
            cut = np.full((3, kernel, kernel), outside, np.float32)
            for a in range(kernel):
                for b in range(kernel):
                    y, x = 2 * i + a - before[0], 2 * j + b - before[1]
                    if 0 <= y < sides[0] and 0 <= x < sides[1]:
                        cut[:, a, b] = image[:, y, x]
            rows.append(apply(cut))
    return np.stack(rows, axis=1).reshape(-1, *count)


def test_padded__is_what_is_published_of_224() -> None:
    # Of the stem 2 before and 3 behind, of the pooling none before and 1 behind.
    ones = torch.ones(1, 1, 224, 224)
    stem, pool = (
        padded(ones, 7, 2, True, 0),
        padded(ones[..., :112, :112], 3, 2, True, 0),
    )
    assert stem.shape[-1] == 229 and stem[0, 0, 2, :3].tolist() == [0, 0, 1]
    assert pool.shape[-1] == 113 and pool[0, 0, 0, [0, -1]].tolist() == [1, 0]


class TestMixedUp:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                {"decode_head.conv_seg.weight": torch.ones(2)},
                "segmentation network",
            ),
            ({"backbone.stem.0.weight": torch.ones(2)}, "stem of three convolutions"),
            (
                {"backbone.layer4.0.conv3.weight": None},
                "has no layer4.0.conv3.weight",
            ),
            (
                {"backbone.layer2.1.se.fc1.weight": torch.ones(2)},
                "unexpected: layer2.1",
            ),
            ({"backbone.layer2.0.bn2.bias": None}, "missing: layer2.0.bn2.bias"),
            (
                {"backbone.conv1.weight": torch.ones(6, 3, 3, 3)},
                r"conv1.weight \(6, 3, 3, 3\) instead of \(6, 3, 7, 7\)",
            ),
            (
                {"backbone.conv1.weight": torch.ones(6)},
                "conv1.weight is .6,., which should have 4 dimensions",
            ),
        ],
    )
    def test_structure__is_named(
        self, change: dict[str, Any], match: str, tmp_path: Path
    ) -> None:
        tensors = {**prefixed(resnet_state(), "backbone."), **change}
        tensors = {name: t for name, t in tensors.items() if t is not None}
        path = save({"state_dict": tensors}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=f"odd.pth.*{match}"):
            load_network(path)

    def test_resnet__is_no_vit(self, tmp_path: Path) -> None:
        path = save(mmpretrain_byol(resnet_state()), tmp_path / "byol.pth")
        with pytest.raises(ValueError, match=r"BYOL.* holds a ResNet, which takes no"):
            create_encoder(path)

    def test_vit__is_no_resnet(self, tmp_path: Path) -> None:
        tensors = prefixed(timm_vit().state_dict(), "backbone.")
        tensors["target_net.0.cls_token"] = torch.ones(1, 1, 48)
        path = save({"state_dict": tensors}, tmp_path / "vit.pth")
        checkpoint = read_checkpoint(path)
        assert (checkpoint.layout, checkpoint.method) == ("timm", None)
        with pytest.raises(ValueError, match=r"holds a ViT: load it by load_encoder"):
            load_network(path)
