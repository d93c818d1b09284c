"""The prior: what a run promises holds for the method mae, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lightly_ext.data import ViewBatch
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.pretrain import MAEPretraining
from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain.export import export_model
from lightly_ext.pretrain.recipes import merge_recipes
from lightly_ext.transforms import STELLARTransform
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    create_encoder,
    load_encoder,
    read_checkpoint,
)
from stellar_plugin.convert_cli import main as convert
from tests import pretraining
from tests.exact_resume import assert_equal_states, images, write_classes
from tests.lightly_ext.loss.test_masked_patches import reference_loss
from tests.pretraining import MAE_VIEW, TINY_MAE, tiny_mae, trainer


def batch(size: int = 4) -> ViewBatch:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(256, (size, 1, 3, 32, 32), generator=generator)
    seeds = torch.arange(size) * 1000
    return ViewBatch(views.to(torch.uint8), None, seeds, torch.arange(size))


class TestMAEPretraining:
    def step(self, module: MAEPretraining, given: ViewBatch) -> torch.Tensor:
        module.log_losses = lambda *_: False
        return module.training_step(given, 0)

    def test_training_step__reference(self) -> None:
        module, given = tiny_mae(), batch()
        loss = self.step(module, given)
        normal = module.normalize(given.global_views[:, 0] / 255)
        keep = module._masks(4, given.seeds)
        predictions = module.model(normal, keep).patches
        expected = reference_loss(normal, predictions, keep, 8)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_training_step__gradients_of_every_trainable_parameter(self) -> None:
        module = tiny_mae()
        self.step(module, batch()).backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert name.endswith("pos_embed")

    def test_masks__of_an_image_depend_on_its_seed_alone(self) -> None:
        module = tiny_mae()
        keep = module._masks(4, batch().seeds)
        assert keep.shape == (4, 4)
        assert torch.equal(module._masks(2, batch().seeds[2:]), keep[2:])
        assert len({tuple(sorted(row)) for row in keep.tolist()}) == 4

    @pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
    def test_init__mask_ratio_out_of_range(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=f"above 0 and below 1, got {ratio}"):
            tiny_mae(mask_ratio=ratio)

    @pytest.mark.parametrize(
        ("ratio", "said"), [(0.99, "keeps none of the 4 x 4 patches")]
    )
    def test_check_views__masks(self, ratio: float, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            tiny_mae(mask_ratio=ratio).check_views(MAE_VIEW)

    @pytest.mark.parametrize(
        ("transform", "said"),
        [
            (STELLARTransform(2, 0, 32), "reads one global view"),
            (STELLARTransform(1, 1, 32), "num_local_views to 0, got 1 and 1"),
            (STELLARTransform(1, 0, 36), "no multiple of the model's patch_size 8"),
            (STELLARTransform(1, 0, 64), "is 64, the model's img_size 32"),
        ],
    )
    def test_check_views__what_does_not_fit(
        self, transform: STELLARTransform, said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            tiny_mae().check_views(transform)

    def test_weights__of_another_kind(self, tmp_path: Path) -> None:
        stellar = pretraining.tiny()
        stellar.model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has latent queries, which an MAE"):
            tiny_mae(weights=str(tmp_path))


class TestExportedModel:
    """The `model/` folder, and the checkpoint of a training, by all who read them."""

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("mae")
        module = tiny_mae(model={**TINY_MAE, "mean": (0.4, 0.5, 0.6)}, lr=1e-2)
        fit = trainer(folder, max_epochs=1)
        fit.fit(module, datamodule=images(folder / "images", transform=MAE_VIEW))
        fit.save_checkpoint(folder / "last.ckpt")
        export_model(module, folder / "model")
        return module, folder

    @pytest.mark.parametrize("name", ["model", "last.ckpt"])
    def test_read_checkpoint(self, name: str, run: tuple[Any, Path]) -> None:
        module, folder = run
        checkpoint = read_checkpoint(folder / name)
        assert checkpoint.method.name == "MAE"
        assert not checkpoint.has_decoder
        # What is one's own has no licence of published weights.
        assert "CC BY-NC" not in str(load_encoder(checkpoint)[1])
        told = {k: checkpoint.config[k] for k in ("norm_eps", "mean", "pos_antialias")}
        assert told == {
            "norm_eps": 1e-6,
            "mean": [0.4, 0.5, 0.6],
            "pos_antialias": False,
        }
        encoder, pixels = create_encoder(checkpoint), torch.randn(2, 3, 32, 32)
        expected = module.model.eval().encoder(pixels)
        assert torch.equal(encoder(pixels).dense, expected.dense)
        assert torch.equal(encoder(pixels).cls, expected.cls)

    def test_prior(self, run: tuple[Any, Path]) -> None:
        module, folder = run
        sizes = {k: v for k, v in TINY_MAE.items() if not k.startswith("decoder_")}
        decoder = {k: v for k, v in pretraining.TINY["model"].items() if "decoder" in k}
        stellar = pretraining.tiny(
            model={**sizes, **decoder, "num_queries": 3}, prior=str(folder / "model")
        )
        assert stellar.model.mean == (0.4, 0.5, 0.6)
        assert stellar.model.encoder.vit.norm.eps == 1e-6
        theirs = module.model.encoder.state_dict()
        ours = stellar.model.encoder.state_dict()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
        assert ours["vit.reg_token"].shape[1] == 3
        positions = stellar.model.encoder.vit.pos_embed
        assert positions.requires_grad

    def test_weights__go_on_with_the_encoder(self, run: tuple[Any, Path]) -> None:
        module, folder = run
        again = MAEPretraining(model={}, weights=str(folder / "model"))
        assert_equal_states(
            again.model.encoder.state_dict(), module.model.encoder.state_dict()
        )
        assert again.model.config["mean"] == [0.4, 0.5, 0.6]

    def test_evaluation__dense_features(self, run: tuple[Any, Path]) -> None:
        module, folder = run
        model = load_frozen_model(str(folder / "model"))
        assert model.resolve_feature("auto") == "dense"
        pixels = torch.rand(2, 3, 32, 32)
        expected = module.eval().features(module.normalize(pixels))
        torch.testing.assert_close(model.pooled(pixels, "dense"), expected)

    def test_convert__to_timm(self, run: tuple[Any, Path]) -> None:
        module, folder = run
        convert([str(folder / "model"), str(folder / "a.safetensors"), "--to", "timm"])
        vit = timm.create_model(
            *("vit_tiny_patch16_224",),
            **{k: v for k, v in TINY_MAE.items() if k in ("img_size", "patch_size")},
            **{k: TINY_MAE[k] for k in ("embed_dim", "depth", "num_heads")},
            no_embed_class=True,
            num_classes=0,
            checkpoint_path=str(folder / "a.safetensors"),
        ).eval()
        pixels = torch.randn(2, 3, 32, 32)
        tokens = module.model.eval().encoder.forward_features(pixels)
        torch.testing.assert_close(vit.forward_features(pixels), tokens)

    def test_stellar_model__is_refused(self, run: tuple[Any, Path]) -> None:
        with pytest.raises(ValueError, match="no latent queries"):
            Stellar.from_pretrained(run[1] / "model")

    def test_read_checkpoint__unknown_method(
        self, run: tuple[Any, Path], tmp_path: Path
    ) -> None:
        shutil.copytree(run[1] / "model", tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        config["method"] = "MAEE"
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="a method that is not known: 'MAEE'"):
            read_checkpoint(tmp_path / "model")


def test_sample_rows__hidden_patches_alone_are_filled() -> None:
    module, pixels = tiny_mae().eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        inputs, seen, filled = module.sample_rows(module.normalize(pixels))
    keep = module._masks(2, torch.arange(2))
    kept = torch.zeros(2, 16).scatter(1, keep, 1.0).view(2, 4, 4).bool().numpy()
    kept = kept.repeat(8, 1).repeat(8, 2)
    assert np.abs(inputs[kept].astype(int) - filled[kept]).max() <= 1
    assert np.abs(inputs[kept].astype(int) - seen[kept]).max() <= 1
    assert set(np.unique(seen[~kept])) <= {127, 128}
    assert np.abs(inputs[~kept].astype(int) - filled[~kept]).mean() > 5


class TestMain:
    OPTIONS = (
        *("--method=mae", "--trainer.enable_progress_bar=false"),
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        *("--data.num_workers=0", "--data.batch_size=4"),
        *(f"--model.model.{name}={value}" for name, value in TINY_MAE.items()),
        *("--data.transform.global_crop_size=32", "--trainer.max_epochs=1"),
    )

    @pytest.mark.slow
    def test_main__page_and_resumption(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_classes(tmp_path / "images", 8)
        (tmp_path / "images" / "0" / "broken.png").write_bytes(b"not an image")
        options = [
            *(*self.OPTIONS, f"--data.path={tmp_path / 'images'}"),
            f"--output={tmp_path / 'run'}",
        ]
        pretrain_cli.main(options)
        model = tmp_path / "run" / "model"
        said = capsys.readouterr().out
        assert f"stellar pretrain --config photos --data.path {tmp_path}" in said
        assert f"--model.prior {model}" in said
        assert "Skipped 1 unreadable of 9 images" in said
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["method"] == "mae"
        assert (record["step"], record["unreadable_images"]) == (2, 1)
        assert set(record["samples"]["moments"]) == {"0", "1", "2"}
        page = (tmp_path / "run" / "index.html").read_text()
        assert MAEPretraining.CAPTION in page
        with Image.open(tmp_path / "run" / "samples" / "step_00000002.jpg") as picture:
            assert picture.height > 2 * 32
        again = [f"--config={tmp_path / 'run' / 'config.yaml'}", "--resume"]
        with pytest.raises(ValueError, match="trains by the method 'mae' and cannot"):
            pretrain_cli.main([*again, "--method=stellar"])
        fit = pretrain_cli.main([*again, "--trainer.max_epochs=2"])
        assert fit.global_step == 4
        assert isinstance(fit.lightning_module, MAEPretraining)

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--method=mea", "There is no method 'mea'. Did you mean 'mae'?"),
            ("--model.mask_ration=0.5", "Did you mean '--model.mask_ratio'?"),
            ("--model.model.dept=2", "of MaskedAutoencoder. Did you mean 'depth'?"),
            ("--model.head.num_prototypes=2", "There is no option --model.head"),
            ("--model.model.num_queries=2", "no option --model.model.num_queries"),
        ],
    )
    def test_options__are_named(self, option: str, said: str) -> None:
        with pytest.raises(ValueError) as error:
            pretrain_cli.PretrainCLI(
                merge_recipes(["--method=mae", "--data.path=x", option])
            )
        assert said in str(error.value)

    def test_merge_recipes__the_last_method_decides(self) -> None:
        config, *_ = merge_recipes(["-c=photos_prior", "-c=digit_boards"])
        assert json.loads(config.removeprefix("--config="))["method"] == "mae"
        (config,) = merge_recipes(["--config=photos_prior", "--method=stellar"])
        recipe = json.loads(config.removeprefix("--config="))
        assert recipe["method"] == "stellar"
        assert recipe["model"]["model"] == {"num_queries": 16}
        assert recipe["trainer"]["gradient_clip_val"] == 3.0


def test_resume__keeps_what_the_run_started_from(tmp_path: Path) -> None:
    first = tiny_mae()
    first.started_from = {"source": "mae.pth", "license": "CC BY-NC 4.0"}
    data = images(tmp_path / "images", transform=MAE_VIEW)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(first, datamodule=data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = tiny_mae()
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    export_model(again, tmp_path / "model")
    assert again.started_from == first.started_from
    record = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert record["started_from"]["license"] == "CC BY-NC 4.0"
