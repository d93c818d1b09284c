"""From the names of torchvision's and of Haiku's ResNets to those of timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import resnet
from torch import Tensor

from stellar_plugin.checkpoints import methods
from stellar_plugin.checkpoints.checkpoint import Architecture, Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import HAIKU, RESNET
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import State, check_dimensions
from stellar_plugin.networks.resnet import COUNTER, ResNet

STAGES = 4
# What a ResNet's own names begin with, of any structure.
NETWORK = ("conv", "bn", "layer", "maxpool.", "stem.")
# torchvision's children in a Sequential, as lightly's examples have them.
SEQUENTIAL = {"0.": "conv1.", "1.": "bn1."} | {
    f"{number + 3}.": f"layer{number}." for number in range(1, STAGES + 1)
}
SEQUENTIAL_ANCHOR = "4.0.conv1.weight"
SEGMENTATION = "decode_head."
HAIKU_MODULE = re.compile(
    r"(?:initial_|block_group_(?P<group>\d+)\.block_(?P<block>\d+)\.)"
    r"(?P<shortcut>shortcut_)?(?P<kind>conv|batchnorm)(?:_(?P<number>\d+))?"
    r"\.(?P<value>.+)"
)
HAIKU_KINDS = {"conv": ("conv", "downsample.0"), "batchnorm": ("bn", "downsample.1")}
HAIKU_VALUES = {
    "w": "weight",
    "scale": "weight",
    "offset": "bias",
    "mean_ema.average": "running_mean",
    "var_ema.average": "running_var",
}
# What averages are computed from, and a classifier.
HAIKU_UNUSED = (".hidden", ".counter", "logits.w", "logits.b")


def read_resnet(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a ResNet by torchvision's names.

    Raises:
        ValueError: If it is of a structure that `ResNet` has not, or part of a
            segmentation network.
    """
    _refuse_segmentation(raw.content)
    if SEQUENTIAL_ANCHOR in state:
        state = {_of_sequential(name): tensor for name, tensor in state.items()}
    author = raw.content.get("author")
    method = next((m for m in methods.METHODS if m.name == author), None)
    told = files is not None or method is not None
    network = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(NETWORK) and not name.endswith(COUNTER)
    }
    unused = ("fc.", *(files.ignored if files else ()))
    left = [name for name in state if name not in network]
    ignored = [n for n in left if n.startswith(unused) or n.endswith(COUNTER)]
    return Checkpoint(
        raw.path,
        RESNET,
        network,
        method=method,
        rule=f"its author, '{author}'" if method else "",
        network=Architecture(ResNet, _sizes(network)),
        num_queries=0,
        # Weights that were converted look like those that were trained in PyTorch.
        assumed={} if told else {"padding": "symmetric"},
        unexpected=tuple(name for name in left if name not in ignored),
        ignored=tuple(ignored),
    )


def read_haiku(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a ResNet by Haiku's names, which pads as TensorFlow does.

    Raises:
        ValueError: If it is of a structure that `ResNet` has not.
    """
    ignored = tuple(name for name in state if name.endswith(HAIKU_UNUSED))
    network = dict(_of_haiku(n, t) for n, t in state.items() if n not in ignored)
    return Checkpoint(
        raw.path,
        HAIKU,
        network,
        network=Architecture(ResNet, {**_sizes(network), "padding": "same"}),
        num_queries=0,
        ignored=ignored,
    )


def in_order(tensors: State) -> State:
    """Names the values of a ResNet-50 whose names are others, in torchvision's order.

    Args:
        tensors:
            Its tensors, and maybe others behind them.

    Returns:
        The same by torchvision's names, or as they are if their kinds, numbers of
        dimensions and kernels are not one by one those of a ResNet-50.
    """
    with torch.device("meta"):
        expected = ResNet().named.state_dict()
    pairs = list(zip(_counted_out(expected), _counted_out(tensors), strict=False))
    alike = len(pairs) == len(_counted_out(expected)) and all(
        new.rpartition(".")[2] == old.rpartition(".")[2]
        and expected[new].shape[2:] == tensors[old].shape[2:]
        and expected[new].ndim == tensors[old].ndim
        for new, old in pairs
    )
    names = {old: new for new, old in pairs} if alike else {}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _counted_out(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in state if not name.endswith(COUNTER)]


def _of_sequential(name: str) -> str:
    for number, child in SEQUENTIAL.items():
        if name.startswith(number):
            return child + name.removeprefix(number)
    return name


def _of_haiku(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and layout of PyTorch; names that Haiku's ResNet has not stay."""
    found = HAIKU_MODULE.fullmatch(name)
    if found is None or found["value"] not in HAIKU_VALUES:
        return name, tensor
    if found["kind"] == "conv":
        check_dimensions(name, tensor, 4)
        tensor = tensor.permute(3, 2, 0, 1)
    else:
        tensor = tensor.flatten()
    kind, shortcut = HAIKU_KINDS[found["kind"]]
    numbered = f"{kind}{int(found['number'] or 0) + 1}"
    module = shortcut if found["shortcut"] else numbered
    if found["group"] is not None:
        module = f"layer{int(found['group']) + 1}.{int(found['block'])}.{module}"
    return f"{module}.{HAIKU_VALUES[found['value']]}", tensor


def _sizes(state: State) -> dict[str, Any]:
    """Arguments of `ResNet` from its tensors.

    Raises:
        ValueError: If tensors that tell them are not there, or it has a stem of
            several convolutions.
    """
    if "conv1.0.weight" in state or "stem.0.weight" in state:
        raise ValueError(
            "it is a ResNet with a stem of three convolutions (ResNet-C or D); with "
            "timm's names '--model timm:resnet50c --weights FILE' or resnet50d reads it"
        )
    bottleneck = "layer1.0.conv3.weight" in state
    last = "conv3" if bottleneck else "conv2"
    stages = [f"layer{number}." for number in range(1, STAGES + 1)]
    width, group_width = _kernel(state, "layer1.0.conv2.weight")[:2]
    out = [_kernel(state, f"{stage}0.{last}.weight")[0] for stage in stages]
    channels = [n // resnet.Bottleneck.expansion if bottleneck else n for n in out]
    sizes: dict[str, Any] = {
        "block": "bottleneck" if bottleneck else "basic",
        "layers": [_count(state, stage) for stage in stages],
        "channels": channels,
        "stem_width": _kernel(state, "conv1.weight")[0],
    }
    if bottleneck and channels[0]:
        sizes["cardinality"] = width // group_width
        sizes["base_width"] = 64 * group_width / channels[0]
    return sizes


def _kernel(state: State, name: str) -> torch.Size:
    """Shape of a convolution's kernel: channels out, in, height, width."""
    if name not in state:
        raise ValueError(f"it is no whole ResNet: it has no {name}")
    check_dimensions(name, state[name], 4)
    if not state[name].numel():
        raise ValueError(f"{name} is empty, {tuple(state[name].shape)}")
    return state[name].shape


def _count(state: State, stage: str) -> int:
    """Number of blocks of a stage."""
    return len({n.split(".")[1] for n in state if n.startswith(stage)})


def _refuse_segmentation(content: Mapping[str, Any]) -> None:
    inner = content.get("state_dict")
    names = map(str, inner if isinstance(inner, Mapping) else content)
    if any(name.startswith(SEGMENTATION) for name in names):
        raise ValueError(
            f"it is a segmentation network of mmsegmentation ({SEGMENTATION}*), whose "
            "strides may be others: test it by mim test, or save what is under "
            "'backbone.' as safetensors if its map has a cell for every 32 px"
        )
