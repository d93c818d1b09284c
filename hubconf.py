"""The sizes of STELLAR for torch.hub, from a checkout of this repository.

    import torch
    model = torch.hub.load("CHECKOUT", "stellar_vit_base_patch16_224", source="local")
    model = torch.hub.load("CHECKOUT", "stellar", "runs/pretrain/model", source="local")

The first is timm's model, with timm's arguments; the second the whole of a trained one.
"""

from typing import Any

from stellar_plugin import Stellar
from stellar_plugin.vit import (
    stellar_vit_base_patch16_224,
    stellar_vit_huge_patch14_224,
    stellar_vit_large_patch16_224,
    stellar_vit_small_patch16_224,
    stellar_vit_tiny_patch16_224,
)

__all__ = [
    "stellar",
    "stellar_vit_base_patch16_224",
    "stellar_vit_huge_patch14_224",
    "stellar_vit_large_patch16_224",
    "stellar_vit_small_patch16_224",
    "stellar_vit_tiny_patch16_224",
]

# What torch.hub looks for before it imports this file.
dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub"]


def stellar(source: str, **kwargs: Any) -> Stellar:
    """A trained model, see `Stellar.from_pretrained`.

    Args:
        source:
            Folder, weight file, "stellar-b16" or the name of a hub repository.
        kwargs:
            Other arguments of `Stellar.from_pretrained`.
    """
    return Stellar.from_pretrained(source, **kwargs)
