"""The two stages of the random prior, one after the other, by their recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain import cli as pretrain_cli
from tests.pretraining import TINY_OPTIONS, merged

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

SHORT = [
    *TINY_OPTIONS,
    "--data.path=images",
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--data.transform=lightly_ext.transforms.STELLARTransform",
    "--data.transform.num_global_views=2",
    "--data.transform.num_local_views=2",
    "--data.transform.global_crop_size=32",
    "--data.transform.local_crop_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--model.lr=1e-2",
    "--model.teacher_momentum=0.5",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with eight images."""
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        image = torch.randint(256, (3, 40, 40), generator=generator)
        write_png(image.to(torch.uint8), str(tmp_path / "images" / f"{i}.png"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
class TestStages:
    def test_stages__second_continues_from_the_first(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = pretrain_cli.main(["--config=random_stage1", *SHORT])
        first = trainer.lightning_module
        assert Path(trainer.default_root_dir) == Path("runs/random_stage1")

        # Teacher weights are in the checkpoint, and differ from the student's.
        last = folder / "runs" / "random_stage1" / "checkpoints" / "last.ckpt"
        saved = torch.load(last, weights_only=True)["state_dict"]
        teacher = {k: v for k, v in first.state_dict().items() if "teacher." in k}
        assert len(teacher) > 20
        for name, value in teacher.items():
            assert torch.equal(saved[name], value), name
        prototypes = "sparse_head.prototypes.weight"
        assert not torch.equal(saved[f"teacher.{prototypes}"], saved[prototypes])
        again = StellarPretraining.load_from_checkpoint(last)
        assert torch.equal(
            again.teacher["sparse_head"].prototypes.weight,
            first.teacher["sparse_head"].prototypes.weight,
        )

        starts: list[dict[str, torch.Tensor]] = []
        on_train_start = StellarPretraining.on_train_start

        def recorded(module: StellarPretraining) -> None:
            starts.append({k: v.clone() for k, v in module.state_dict().items()})
            on_train_start(module)

        monkeypatch.setattr(StellarPretraining, "on_train_start", recorded)
        options = [option for option in SHORT if "teacher" not in option]
        second = pretrain_cli.main(["--config=random_stage2", *options])
        assert second.lightning_module.teacher is None
        expected = {
            k: v for k, v in first.state_dict().items() if not k.startswith("teacher.")
        }
        assert starts[0].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(starts[0][name], value), name
        trained = second.lightning_module.state_dict()
        assert not torch.equal(trained[prototypes], expected[prototypes])
        assert (folder / merged("random_stage2")["output"] / "model").is_dir()
