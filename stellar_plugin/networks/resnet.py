"""ResNets of any width, also padded as TensorFlow pads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import resnet
from torch import Tensor, nn

from stellar_plugin.networks.network import TimmNetwork

BLOCKS: dict[str, Any] = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}
TIMM_STEM = 64
COUNTER = "num_batches_tracked"


class ResNet(TimmNetwork):
    """timm's `ResNet`: CLS is the mean over the map of its last stage, dense that map.

    It takes images of any size; the map has a cell for every 32 px begun.

    Args:
        block:
            What its stages are made of: two 3x3 convolutions ("basic", as in ResNet-18)
            or a 3x3 between two 1x1 convolutions ("bottleneck", as in ResNet-50), which
            has the stride in the 3x3.
        layers:
            Number of blocks of each stage.
        channels:
            Channels of each stage, of bottlenecks a fourth of what comes out.
        stem_width:
            Channels behind the first convolution.
        base_width:
            Channels of a group of a 3x3 convolution, of 64 `channels`.
        cardinality:
            Number of groups of a 3x3 convolution.
        padding:
            What convolutions and pooling of stride 2 see beyond the image: as much on
            all sides ("symmetric", as PyTorch pads) or, of an odd number of pixels, one
            more below and to the right ("same", as TensorFlow and JAX pad).
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"] = "bottleneck",
        layers: tuple[int, ...] = (3, 4, 6, 3),
        channels: tuple[int, ...] = (64, 128, 256, 512),
        stem_width: int = TIMM_STEM,
        base_width: float = 64,
        cardinality: int = 1,
        padding: Literal["symmetric", "same"] = "symmetric",
    ) -> None:
        counts, planes = tuple(layers), tuple(channels)
        widths: Any = {"base_width": base_width, "cardinality": cardinality}
        model: Any = resnet.ResNet(
            BLOCKS[block], counts, num_classes=0, channels=planes, **widths
        )
        if stem_width != TIMM_STEM:
            # timm's stem has one width.
            model.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
            model.bn1 = nn.BatchNorm2d(stem_width)
            blocks = (BLOCKS[block],) * len(planes)
            widths["norm_layer"] = nn.BatchNorm2d
            stages, _ = resnet.make_blocks(blocks, planes, counts, stem_width, **widths)
            for name, stage in stages:
                setattr(model, name, stage)
            model.init_weights()
        if padding == "same":
            _pad_same(model)
        super().__init__(model)

    def fitted(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Adds the counters of batch normalisation, which features do not depend on."""
        names = (n for n in self.named.state_dict() if n.endswith(COUNTER))
        counters = {name: torch.zeros((), dtype=torch.int64) for name in names}
        return {**counters, **state}, []


def _pad_same(model: Any) -> None:
    """Puts timm's modules for TensorFlow's padding in the places of stride 2."""
    model.maxpool = MaxPool2dSame(3, stride=2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            if module.stride == (1, 1):
                continue  # both pad alike
            padded = Conv2dSame(
                module.in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                groups=module.groups,
                bias=False,
            )
            padded.weight = module.weight
            model.set_submodule(name, padded)
