"""Networks that are no ViT of ours as backbones of mmsegmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor

from stellar_plugin.checkpoints import Checkpoint, LoadReport, load_network
from stellar_plugin.checkpoints.checkpoint import Architecture
from stellar_plugin.mmseg.pretrained import PretrainedBackbone
from stellar_plugin.networks import Network


@MODELS.register_module()
class PretrainedNetwork(PretrainedBackbone):
    """The last map of a ResNet, a Swin, a BEiT: of any of `stellar_plugin.networks`.

    Which network it is, and its sizes, are the checkpoint's. Images may have any size:
    what is missing to a multiple of the stride is padded at the bottom and right, and
    the map is brought back to the extent of the image.

    Args:
        frozen:
            Whether the network stays as it is: no gradients, and eval mode always, so
            that the statistics of its BatchNorm do not move.
        init_cfg:
            `dict(type="Pretrained", checkpoint=PATH)` with a checkpoint of a layout of
            such a network (`stellar_plugin.checkpoints`), read by `init_weights()`.
            None for a test, which takes the network from its own checkpoint.
        given:
            Arguments of the network that shall be others, for example img_size.

    Raises:
        ValueError: If an argument does not exist or does not fit the others, or the
            network has no map, as TiTok.
    """

    def __init__(
        self,
        frozen: bool = True,
        init_cfg: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        super().__init__("dense", frozen, init_cfg, given)
        self._build(self._told())

    @property
    def stride(self) -> int:
        """Side of a cell of the last map in px."""
        return self._known.stride

    @property
    def channels(self) -> int:
        """Width of the last map."""
        return self._known.embed_dim

    @property
    def has_last_map_alone(self) -> bool:
        """Always."""
        return True

    @property
    def _known(self) -> Network:
        if self.network is None:
            raise ValueError(
                "Nothing tells which network this is: give its weights by "
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=PATH), or "
                "load the checkpoint of a run."
            ) from self._unread
        return self.network

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in px of the images that it was made for."""
        return self._known.image_size

    def settings(self) -> dict[str, Any]:
        """Which network it is, and what it was built of."""
        return self._arguments

    def arguments(self) -> dict[str, Any]:
        """The same."""
        return self._arguments

    def adopt(self, arguments: Mapping[str, Any]) -> None:
        """Builds the network of a checkpoint, where nothing told of it before."""
        if self.network is None and "network" in arguments:
            self._rebuild(arguments)

    def _tell(self, checkpoint: Checkpoint) -> dict[str, Any]:
        network = checkpoint.network
        if network is None:
            raise ValueError(
                f"'{checkpoint.path}' ({checkpoint.read_as}) holds a ViT: "
                "type='StellarViT' of model.backbone reads it."
            )
        return {"network": network.family.__name__, **network.arguments}

    def _build(self, told: Mapping[str, Any]) -> None:
        self.network: Network | None = None
        self._arguments = {**told, **self._given} if told else {}
        if not told:
            return
        families, name = _families(), told["network"]
        if name not in families:
            raise ValueError(
                f"There is no network '{name}': the checkpoint is of another version."
            )
        sizes = {k: v for k, v in told.items() if k != "network"}
        self.network = Architecture(families[name], sizes).build(**self._given)
        if self.network.num_queries:
            raise ValueError(
                f"A {name} describes an image by {self.network.num_queries} tokens "
                "without places: it has no map to segment by."
            )
        if self.frozen:
            self.network.requires_grad_(False)

    def _start_random(self) -> None:
        # Nothing else needs to know: None is for tests, which adopt a network.
        _ = self._known
        super()._start_random()

    def _take(self, path: str) -> LoadReport:
        loaded, report = load_network(path, **self._given)
        self._known.load_state_dict(loaded.state_dict())
        return report

    def _maps(self, images: Tensor) -> list[Tensor]:
        result = self._known(images)
        return [result.dense.mT.unflatten(2, result.grid_size).contiguous()]


def _families(base: type[Network] = Network) -> dict[str, type[Network]]:
    """All families by name; the readers of checkpoints have imported them."""
    found: dict[str, type[Network]] = {}
    for family in base.__subclasses__():
        found |= {family.__name__: family, **_families(family)}
    return found
