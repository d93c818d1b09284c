"""ResNets as files hold them, and their features by the formulas."""

from __future__ import annotations

import math
import pickle
import sys
import types
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
LAYERS, PLANES, STEM = (1, 2, 1, 1), (4, 8, 8, 16), 6
FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")


def resnet_state(
    layers: Sequence[int] = LAYERS,
    planes: Sequence[int] = PLANES,
    stem: int = STEM,
    bottleneck: bool = True,
    groups: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> State:
    """Names and shapes of torchvision's ResNet without classifier, random numbers."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def conv(name: str, *shape: int) -> None:
        if device == "meta":
            state[f"{name}.weight"] = torch.empty(shape, device=device)
            return
        std = (2 / math.prod(shape[1:])) ** 0.5
        state[f"{name}.weight"] = std * torch.randn(shape, generator=generator)

    def norm(name: str, width: int) -> None:
        values = (0.5 + torch.rand(4, width, generator=generator)).to(device)
        values[1] -= 1  # of both signs
        values[2] -= 1
        kinds = ("weight", "bias", "running_mean", "running_var")
        for kind, value in zip(kinds, values, strict=True):
            state[f"{name}.{kind}"] = value.clone()
        state[f"{name}.num_batches_tracked"] = torch.tensor(7, device=device)

    conv("conv1", stem, 3, 7, 7)
    norm("bn1", stem)
    width = stem
    for stage, (count, plane) in enumerate(zip(layers, planes, strict=True), 1):
        out = 4 * plane if bottleneck else plane
        kernels = [(1, 1), (3, groups), (1, 1)] if bottleneck else [(3, 1), (3, 1)]
        for block in range(count):
            start, inner = f"layer{stage}.{block}", width
            for number, (kernel, split) in enumerate(kernels, 1):
                to = out if number == len(kernels) else plane
                conv(f"{start}.conv{number}", to, inner // split, kernel, kernel)
                norm(f"{start}.bn{number}", to)
                inner = to
            if block == 0 and (width != out or stage > 1):
                conv(f"{start}.downsample.0", out, width, 1, 1)
                norm(f"{start}.downsample.1", out)
            width = out
    return state


def padded(x: Tensor, kernel: int, stride: int, same: bool, value: float) -> Tensor:
    """Pads an image for a kernel: TensorFlow's SAME, or as much on all sides."""
    if not same or stride == 1:
        return F.pad(x, [kernel // 2] * 4, value=value)
    pads: list[int] = []
    for n in (x.shape[3], x.shape[2]):
        total = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def reference_map(state: State, images: Tensor, same: bool = False) -> Tensor:
    """The map of the last stage, (batch_size, dim, rows, columns), in eval mode."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernel = state[f"{conv}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = padded(x, kernel.shape[2], stride, same, 0)
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        scale, shift, mean, var = (
            state[f"{norm}.{kind}"][:, None, None]
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv_norm(images, "conv1", "bn1", 2).relu()
    x = F.max_pool2d(padded(x, 3, 2, same, -math.inf), 3, 2)
    blocks = sorted({n.rsplit(".conv1", 1)[0] for n in state if ".conv1." in n})
    for block in blocks:
        stride = 2 if block.endswith(".0") and not block.startswith("layer1") else 1
        names = [n for n in (1, 2, 3) if f"{block}.conv{n}.weight" in state]
        y = x
        for n in names:
            # The stride is in the 3x3, of two the first.
            step = stride if n == len(names) - 1 else 1
            y = conv_norm(y, f"{block}.conv{n}", f"{block}.bn{n}", step)
            y = y if n == names[-1] else y.relu()
        if f"{block}.downsample.0.weight" in state:
            x = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        x = (x + y).relu()
    return x


def haiku(state: State, root: str = "res_net50") -> tuple[dict[str, Any], ...]:
    """Parameters and state by the names of Haiku, as dictionaries of modules."""
    params: dict[str, Any] = {}
    averages: dict[str, Any] = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        full = f"{root}/~/{_haiku_module(module)}"
        values = tensor.numpy()
        if tensor.ndim == 4:
            params[full] = {"w": np.ascontiguousarray(values.transpose(2, 3, 1, 0))}
        elif kind in ("weight", "bias"):
            word = {"weight": "scale", "bias": "offset"}[kind]
            params.setdefault(full, {})[word] = values[None, None, None]
        elif kind != "num_batches_tracked":
            averages[f"{full}/~/{kind.removeprefix('running_')}_ema"] = {
                "counter": np.array(3, np.int32),
                "hidden": values[None, None, None] * 0.5,
                "average": values[None, None, None],
            }
    for head in ("projector/linear", "classifier"):
        params[head] = {"w": np.zeros((2, 2), np.float32)}
    return params, averages


def _haiku_module(module: str) -> str:
    parts = module.split(".")
    kind = {"conv": "conv", "bn": "batchnorm"}.get(parts[-1][:-1], "")
    if len(parts) == 1:
        return f"initial_{kind}"
    start = f"block_group_{int(parts[0][-1]) - 1}/~/block_{parts[1]}/~/"
    if parts[2] == "downsample":
        return f"{start}shortcut_{['conv', 'batchnorm'][int(parts[3])]}"
    return f"{start}{kind}_{int(parts[2][-1]) - 1}"


def write_deepmind(
    path: Path, online: State, target: State, dilled: bool = True, **given: Any
) -> Path:
    """Writes a pickle as DeepMind's training does, whose classes nobody has.

    Args:
        path:
            Where to write.
        online:
            The online ResNet by torchvision's names.
        target:
            The target ResNet.
        dilled:
            Whether the named tuple is written as dill does, with the names of its
            fields, or by the name of its class alone.
        given:
            What stands in the place of the values of these names.
    """
    flat_mapping = type("FlatMapping", (dict,), {"__reduce__": _as_flat_mapping})
    state_class: Any = namedtuple("_ByolExperimentState", FIELDS)
    modules: dict[str, types.ModuleType] = {}
    for name, value in (
        ("haiku._src.data_structures", flat_mapping),
        ("byol.byol_experiment", state_class),
        ("dill._dill", _create_namedtuple),
    ):
        for end in (*(i for i, c in enumerate(name) if c == "."), len(name)):
            modules.setdefault(name[:end], types.ModuleType(name[:end]))
        value.__module__ = name
        setattr(modules[name], value.__name__, value)
    params, averages = (flat_mapping(part) for part in haiku(online))
    others = [flat_mapping(part) for part in haiku(target)]
    values = dict(
        zip(FIELDS, (params, others[0], averages, others[1], ()), strict=True)
    )
    values |= {k: v for k, v in given.items() if k in FIELDS}
    content = {"experiment_state": state_class(**values), "step": np.array(9)}
    content |= {k: v for k, v in given.items() if k not in FIELDS}
    with patch.dict(sys.modules, modules), path.open("wb") as file:
        pickler = _Pickler(file, state_class if dilled else None)
        pickler.dump(content)
    return path


class _Pickler(pickle.Pickler):
    """Writes the class of a named tuple as dill does."""

    def __init__(self, file: Any, named_tuple: Any) -> None:
        super().__init__(file, protocol=2)
        self.named_tuple = named_tuple

    def reducer_override(self, value: Any) -> Any:
        if value is not self.named_tuple:
            return NotImplemented
        fields = (value.__name__, value._fields, value.__module__)
        return _create_namedtuple, fields


def _create_namedtuple(*_: Any) -> None:
    raise AssertionError("it is only named")


def _as_flat_mapping(self: Any) -> Any:
    return type(self), (dict(self),)
