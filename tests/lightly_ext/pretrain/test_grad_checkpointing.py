from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.pretrain import MAEPretraining, StellarPretraining
from lightly_ext.pretrain import pretraining as pretraining_module
from lightly_ext.pretrain.compilation import compile_blocks
from tests.pretraining import (
    TINY,
    TINY_MAE,
    StopAfterTwoEpochs,
    Views,
    assert_same_training,
    first_view,
    loader,
    tiny,
    tiny_mae,
    trainer,
)

DEEP = {"depth": 6, "decoder_depth": 4}


def stellar(**kwargs: Any) -> StellarPretraining:
    # Dropped numbers are drawn again in the backward pass, and must be the same.
    drops = {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}
    return tiny(model={**TINY["model"], **DEEP, **drops}, **kwargs)


def mae(**kwargs: Any) -> MAEPretraining:
    return tiny_mae(model={**TINY_MAE, **DEEP}, **kwargs)


def gradients(module: Any, tmp_path: Path) -> dict[str, Tensor]:
    data = loader()
    if isinstance(module, MAEPretraining):
        data = DataLoader(Views(), 4, collate_fn=first_view)
    trainer(tmp_path, max_steps=1).fit(module, data)
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found
    return found


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward pass, each memory once, without weights."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = function()
    loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("make", [stellar, mae])
class TestGradCheckpointing:
    def test_fit__same_gradients(
        self, make: Callable[..., Any], tmp_path: Path
    ) -> None:
        expected = gradients(make(), tmp_path)
        found = gradients(make(grad_checkpointing=True), tmp_path)
        assert list(found) == list(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)

    def test_forward__memory(self, make: Callable[..., Any]) -> None:
        images = torch.randn(2, 3, 32, 32)
        keep = torch.arange(8).expand(2, -1)

        def loss(module: Any) -> Tensor:
            if isinstance(module, MAEPretraining):
                return module.model(images, keep).patches.square().mean()
            latent = module.model(images)
            masked = module.model(images, keep).sparse
            decoded = module.model.decode(latent.lowrank, latent.grid_size)
            return decoded.square().mean() + masked.square().mean()

        plain, less = (
            saved_bytes(partial(loss, make(grad_checkpointing=on).train()))
            for on in (False, True)
        )
        # Of a block its input alone, a twentieth; the rest is outside of blocks.
        assert less < plain / 4

    @pytest.mark.slow
    def test_fit__compiled(
        self, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without = partial(compile_blocks, backend="aot_eager")
        monkeypatch.setattr(pretraining_module, "compile_blocks", without)
        monkeypatch.setattr(pretraining_module, "compiler_error", lambda _: None)
        expected = gradients(make(compile=True), tmp_path)
        found = gradients(make(compile=True, grad_checkpointing=True), tmp_path)
        for name, gradient in found.items():
            tolerance = max(1e-4 * expected[name].abs().max().item(), 1e-6)
            torch.testing.assert_close(
                gradient, expected[name], rtol=0, atol=tolerance, msg=name
            )


def test_fit__resumed_without(tmp_path: Path) -> None:
    drop, half = StopAfterTwoEpochs(), {"ckpt_path": tmp_path / "half.ckpt"}
    whole, first, second = (stellar(grad_checkpointing=x) for x in (False, True, False))
    trainer(tmp_path, max_epochs=3).fit(whole, loader())
    fit = trainer(tmp_path, max_epochs=3, callbacks=[drop])
    fit.fit(first, loader())
    fit.save_checkpoint(half["ckpt_path"])
    trainer(tmp_path, max_epochs=3).fit(second, loader(), **half)
    assert_same_training(second, whole)
