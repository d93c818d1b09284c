"""Training from DINOv3, which rotates instead of adding positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from lightly_ext.pretrain import MAEPretraining
from lightly_ext.pretrain.optimization import parameter_groups
from stellar_plugin import Stellar
from tests.pretraining import TINY, TINY_MAE, loader, tiny, trainer

NAME = "vit_tiny_patch16_dinov3_qkvb"
MODEL = {**TINY["model"], "model_name": NAME, "rope_rescale_coords": 2.0}


def test_fit__with_momentum_teacher(tmp_path: Path) -> None:
    module = tiny(model=MODEL, teacher_momentum=0.5)
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    trainer(tmp_path).fit(module, loader())
    after = module.model.state_dict()
    same = [name for name, tensor in after.items() if tensor.equal(before[name])]
    assert same == ["decoder.position.frequencies"]
    # The student draws rotations, the teacher's targets are those of evaluation.
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        module.train()
        assert not module.model(images).sparse.equal(module.model(images).sparse)
        expected = module.teacher.eval()["encoder"](images).sparse
        module.train()
        assert module.teacher.targets(images).tokens.equal(expected)
    module.model.save_pretrained(tmp_path / "model")
    saved = Stellar.from_pretrained(tmp_path / "model")
    assert saved(images).sparse.equal(module.model.eval()(images).sparse)


def test_prior__model_is_that_of_the_file(tmp_path: Path) -> None:
    vit = timm.create_model(NAME, depth=1, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "dinov3.pth")
    decoder = {k: v for k, v in MODEL.items() if k.startswith("decoder_")}
    module = tiny(model={**decoder, "img_size": 32}, prior=str(tmp_path / "dinov3.pth"))
    encoder = module.model.encoder
    assert module.hparams["model"]["model_name"] == "vit_tiny_patch16_dinov3_qkvb"
    assert encoder.vit.reg_token[:, :4].equal(vit.reg_token)
    assert encoder.vit.num_reg_tokens == 4 + 16
    assert encoder.grid_size == (2, 2)


def test_parameter_groups__frequencies_do_not_decay() -> None:
    name = "vit_small_patch16_rope_mixed_224"
    module = tiny(model={**TINY["model"], "model_name": name})
    frequencies = module.model.encoder.vit.rope.freqs
    groups = parameter_groups(module, 0.04)
    (decay,) = {
        g["weight_decay"] for g in groups for p in g["params"] if p is frequencies
    }
    assert decay == 0


def test_mae__is_of_vits_with_a_table() -> None:
    with pytest.raises(ValueError, match="position"):
        MAEPretraining(model={**TINY_MAE, "model_name": NAME})
