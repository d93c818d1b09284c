"""Training checkpoints, read as weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightly_ext.pretrain import StellarPretraining
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import create_encoder
from tests import pretraining


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[StellarPretraining, Path]:
    module = pretraining.tiny(teacher_momentum=0.9)
    folder = tmp_path_factory.mktemp("run")
    trainer = pretraining.trainer(folder, max_steps=1)
    trainer.fit(module, pretraining.loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


def test_model__of_the_student(trained: tuple[StellarPretraining, Path]) -> None:
    module, path = trained
    expected = module.model.state_dict()
    state = Stellar.from_pretrained(path).state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(tensor) for name, tensor in expected.items())
    teacher = module.teacher["encoder"].state_dict()["vit.cls_token"]
    assert not teacher.equal(expected["encoder.vit.cls_token"])


def test_encoder(trained: tuple[StellarPretraining, Path]) -> None:
    module, path = trained
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        found = create_encoder(path)(images).lowrank
        assert found.equal(module.model.eval()(images).lowrank)


def test_weights__of_another_run(trained: tuple[StellarPretraining, Path]) -> None:
    module, path = trained
    other = StellarPretraining(**pretraining.TINY, weights=str(path))
    expected = module.state_dict()
    for name, tensor in other.state_dict().items():
        assert tensor.equal(expected[name]), name


def test_run_folder__names_its_model(
    trained: tuple[StellarPretraining, Path], tmp_path: Path
) -> None:
    trained[0].model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"The model of this run is '.*/model'"):
        Stellar.from_pretrained(tmp_path)
