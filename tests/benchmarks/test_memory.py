from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.gpu.sizes import LARGE, TINY
from benchmarks.memory import (
    GIB,
    activation_bytes,
    block_bytes,
    count_parameters,
    state_bytes,
    table,
)
from benchmarks.step import BASE
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.optimization import parameter_groups


def kept_bytes(block: nn.Module, tokens: Tensor) -> int:
    """Bytes of what autograd keeps of a block, without weights and their copies."""
    shapes = [{p.shape, p.mT.shape} for p in block.parameters() if p.ndim == 2]
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_copy = any(tensor.shape in pair for pair in shapes)
        if storage.data_ptr() not in weights and not is_copy:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        block(tokens)
    return sum(kept.values())


class TestBlockBytes:
    @pytest.mark.parametrize("width, heads", [(48, 3), (128, 2)])
    def test_block_bytes__what_autograd_keeps(self, width: int, heads: int) -> None:
        tokens = torch.randn(5, 17, width, requires_grad=True)
        kept = kept_bytes(Block(width, heads, qkv_bias=True), tokens)
        assert kept == 5 * 17 * block_bytes(width, heads)


class TestStateBytes:
    def test_state_bytes__of_a_real_step(self) -> None:
        module = StellarPretraining(**TINY.recipe)
        optimizer = torch.optim.AdamW(parameter_groups(module, 0.1))
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
        weights = [p for p in module.parameters() if p.requires_grad]
        gradients = [p.grad for p in weights if p.grad is not None]
        held = sum(x.nbytes for x in (*weights, *gradients, *moments))
        assert state_bytes(count_parameters(TINY)) == held

    def test_state_bytes__in_shards(self) -> None:
        parameters = count_parameters(TINY)
        whole = 8 * parameters.outside + 12 * parameters.block
        for processes in (2, 64):
            shards = state_bytes(parameters, processes, sharded=True) - whole
            assert shards * processes == pytest.approx(16 * parameters.total)
        assert state_bytes(parameters, 2) == 20 * parameters.total


class TestActivationBytes:
    def test_activation_bytes__checkpointed_keeps_a_block(self) -> None:
        deeper = replace(TINY, depth=TINY.depth + 1)
        (images, patches), *_ = (TINY.passes[name] for name in ("masked",))
        tokens = sum(n * (5 + k) for n, k in TINY.passes.values())
        more = [
            activation_bytes(deeper, 1, on) - activation_bytes(TINY, 1, on)
            for on in (False, True)
        ]
        assert more == [tokens * block_bytes(48, 3), tokens * 4 * 48]
        assert images * (5 + patches) < tokens

    # H100, torch 2.11: docs/performance.md. The decoder was not checkpointed then.
    def test_activation_bytes__near_what_was_measured(self) -> None:
        base, large = map(count_parameters, (BASE, LARGE))
        needed = state_bytes(base) + 2 * base.total + activation_bytes(BASE, 128)
        assert needed / GIB == pytest.approx(50.6, rel=0.05)
        decoder = 128 * 196 * 6 * (block_bytes(512, 8) - block_bytes(512, 8, True))
        needed = state_bytes(large) + 2 * large.total
        needed += activation_bytes(LARGE, 128, checkpointed=True) + decoder
        assert needed / GIB == pytest.approx(25.3, rel=0.05)


def test_table__sums() -> None:
    rows = [row.strip("| ").split(" | ") for row in table(128)]
    assert rows[0] == ["GiB a GPU, batch 128", "B", "L", "H"]
    found = {name: [float(value) for value in values] for name, *values in rows[2:]}
    parts = (
        found["weights, gradients, moments: fsdp2, 8 GPUs"],
        found["copies of the weights in bf16"],
        found["activations and views, checkpointed"],
    )
    sums = [sum(values) for values in zip(*parts, strict=True)]
    given = found["**all**, checkpointed: fsdp2, 8 GPUs"]
    assert given == pytest.approx(sums, abs=0.15)  # each is rounded to a tenth
