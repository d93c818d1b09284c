"""The linear probe: a norm and a 1 x 1 convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from stellar_plugin.mmseg.weights import WholeModule


@MODELS.register_module()
class LinearProbeHead(WholeModule, BaseDecodeHead):
    """Linear classifier of every cell of a feature map, after a norm [0].

    Over a frozen backbone this is linear probing as DINOv2 defined it. The norm is
    plain BatchNorm; with `sync_bn = "torch"` in the config mmengine synchronises it
    when the run is distributed.

    - [0]: DINOv2, 2023, https://arxiv.org/abs/2304.07193

    Args:
        in_channels:
            Channels of the feature map; with `input_transform="resize_concat"` the
            channels of each of several.
        num_classes:
            Number of classes, at least 2: an object's background is one.
        norm_cfg:
            Norm before the convolution, None for none.
        dropout_ratio:
            Dropout of whole channels before the convolution.
        kwargs:
            As everywhere in mmseg: in_index, input_transform, loss_decode, ...

    Raises:
        ValueError: If `input_transform` leaves several feature maps, or there is one
            class.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        *,
        num_classes: int,
        norm_cfg: dict[str, Any] | None = None,
        dropout_ratio: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("input_transform") == "multiple_select":
            raise ValueError(
                "LinearProbeHead reads one feature map; use input_transform=None or "
                "'resize_concat' instead of 'multiple_select'."
            )
        if num_classes < 2:
            raise ValueError(
                f"num_classes must be at least 2, got {num_classes}: mmseg takes one "
                "logit for an object and its background. Name both as classes."
            )
        channels = in_channels if isinstance(in_channels, int) else sum(in_channels)
        super().__init__(
            in_channels,
            channels,
            num_classes=num_classes,
            norm_cfg=norm_cfg,
            dropout_ratio=dropout_ratio,
            **kwargs,
        )
        self.norm = (
            nn.Identity()
            if norm_cfg is None
            else build_norm_layer(norm_cfg, channels)[1]
        )

    def settings(self) -> dict[str, Any]:
        """Which maps are read, which no tensor shows; and sizes, for people."""
        names = (
            *("in_channels", "num_classes", "in_index", "input_transform"),
            *("align_corners", "threshold"),
        )
        return {name: getattr(self, name) for name in names}

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Classifies every cell.

        Args:
            inputs:
                Feature maps of the backbone, each (batch_size, channels, height,
                width).

        Returns:
            Logits with shape (batch_size, num_classes, height, width).

        Raises:
            ValueError: If the features have other than `in_channels` channels.
        """
        features = self._transform_inputs(inputs)
        if features.shape[1] != self.channels:
            raise ValueError(
                f"decode_head.in_channels is {self.channels}, the backbone gives "
                f"{features.shape[1]} channels: set it to that."
            )
        return self.cls_seg(self.norm(features))
