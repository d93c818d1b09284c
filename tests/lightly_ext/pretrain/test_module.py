from __future__ import annotations

import csv
import inspect
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.optim import AdamW

from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain import module as pretrain_module
from lightly_ext.pretrain import pretraining as pretraining_module
from tests import distributed, reference
from tests.exact_resume import images
from tests.pretraining import (
    TINY,
    fused,
    loader,
    reference_batch,
    reference_module,
    reference_step,
    tiny,
    trainer,
)

# The teacher's tokens of the batch take the place of prototypes.
BATCH_HEAD = {"num_prototypes": None, "batch_norm": True}


class TestStellarPretrainingReference:
    @pytest.mark.parametrize("teacher", [False, True])
    def test_loss_terms__reference_numbers(self, teacher: bool) -> None:
        expected = reference.load("train_teacher" if teacher else "train")
        t = reference_step(reference_module(teacher))
        for ours, name in (
            (t.reconstruction, "MSE"),
            (t.clustering, "clustering_loss"),
            (t.alignment, "mask_loss"),
            (t.cls_clustering, "cls_clustering_loss"),
            (t.cls_alignment + t.cls_local_alignment, "cls_loss"),
            (0.1 * (t.koleo + t.koleo_views), "koleo_loss"),
            (t.total, "total"),
        ):
            theirs = expected[f"loss.{name}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, msg=name)

    @pytest.mark.parametrize("teacher", [False, True])
    def test_loss_terms__reference_gradients(self, teacher: bool) -> None:
        module = reference_module(teacher)
        reference_step(module).total.backward()
        stored = reference.load("train")
        if teacher:
            stored |= reference.load("train_teacher")
        gradients = {
            name: stored.get(f"grad.{name}", torch.zeros_like(weight))
            for name, weight in reference.weights().items()
        }
        expected = {
            f"model.{k}": v for k, v in reference.model_state(gradients).items()
        }
        # The folded CLS token has the gradient of the token itself.
        cls_token = gradients["encoder.embeddings.cls_token"]
        expected["model.encoder.vit.cls_token"] = cls_token
        for ours, theirs in (
            ("sparse_head", "clustering_head"),
            ("cls_head", "cls_cluster_head"),
        ):
            for name, value in reference.head_state(gradients, theirs).items():
                expected[f"{ours}.{name}"] = value
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        assert set(trainable) == set(expected) - {"model.decoder.position.frequencies"}
        for name, parameter in trainable.items():
            # Gradients of key biases are zero in exact arithmetic.
            tolerance = max(5e-5 * expected[name].abs().max().item(), 1e-6)
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=0, atol=tolerance, msg=name
            )

    def test_update_teacher__reference_numbers(self) -> None:
        data = reference.load("train_teacher")
        module = reference_module(teacher=True)
        module._update_teacher()
        t = reference_step(module)
        torch.testing.assert_close(
            t.total, data["ema.then_loss.total"], rtol=1e-5, atol=0
        )
        weight = data["ema.after.teacher_head.layer.weight"]
        ours = module.teacher["sparse_head"].prototypes.weight
        torch.testing.assert_close(ours, weight, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("teacher", [False, True])
    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)]
    )
    def test_loss_terms__pure_half_precision(
        self, dtype: torch.dtype, tolerance: float, teacher: bool
    ) -> None:
        module = reference_module(teacher)
        views, keep = reference_batch()
        expected = reference.load("train_teacher" if teacher else "train")["loss.total"]
        half = [None if view is None else view.to(dtype) for view in views]
        terms, *_ = module.to(dtype).loss_terms(type(views)(*half), keep)
        torch.testing.assert_close(terms.total, expected, rtol=tolerance, atol=0)
        terms.total.backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all(), name


class TestStellarPretraining:
    def test_fit__lowers_the_loss(self, tmp_path: Path) -> None:
        module = tiny(lr=1e-2, min_lr=1e-2, warmup_fraction=0.0)
        losses: list[float] = []
        step = module.training_step
        module.training_step = lambda *a: losses.append(x := step(*a)) or x
        trainer(tmp_path, max_epochs=15).fit(module, loader())
        first, last = (torch.stack(part).mean() for part in (losses[:4], losses[-4:]))
        assert last < first - 1.0

    @pytest.mark.parametrize(
        "loss, teacher",
        [
            ({}, None),
            ({}, 0.99),
            ({}, "batch"),
            ({"reconstruction_weight": 0.0}, None),
            ({"clustering_weight": 0.0, "cls_clustering_weight": 0.0}, None),
            ({"cls_alignment_weight": 0.0}, None),
            ({"koleo_weight": 0.0}, None),
            ({"cls_clustering_weight": 0.0, "cls_alignment_weight": 0.0}, 0.99),
            (
                {
                    "clustering_weight": 0.0,
                    "alignment_weight": 0.0,
                    "cls_clustering_weight": 0.0,
                    "cls_alignment_weight": 0.0,
                },
                None,
            ),
            ({"matching": "identity"}, None),
        ],
    )
    def test_fit__every_trainable_parameter_has_gradient(
        self, loss: dict[str, Any], teacher: float | str | None, tmp_path: Path
    ) -> None:
        head = TINY["head"]
        if teacher == "batch":
            head, teacher = head | BATCH_HEAD, 0.9
        module = tiny(loss=loss, head=head, teacher_momentum=teacher)
        trainer(tmp_path, max_steps=1).fit(module, loader())
        # Lightning clears gradients before a step, not after it.
        missing = [
            n
            for n, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
        ]
        assert missing == []

    @pytest.mark.parametrize("term", ["alignment", "cls_alignment"])
    def test_loss_terms__teacher_tokens_in_place_of_prototypes(self, term: str) -> None:
        module = tiny(
            head=TINY["head"] | BATCH_HEAD,
            teacher_momentum=0.9,
            # So cold that each of the teacher's tokens is assigned to itself.
            loss={"target_temperature": 1e-4, "matching": "identity"},
        )
        views = module.augment(*next(iter(loader())))
        keep = random_focal_mask(8, (4, 4), 0.5).unflatten(0, (4, 2))
        terms, sparse, _ = module.loss_terms(views, keep)
        masked = module.model(views.global_views.flatten(0, 1), keep.flatten(0, 1))
        other = module.teacher["encoder"](views.global_views[:, 1])
        name = "sparse" if term == "alignment" else "cls"
        head = getattr(module, f"{name}_head")
        teacher_head = module.teacher[f"{name}_head"]
        predictions = head(getattr(masked, name)).double()
        targets = teacher_head(getattr(other, name)).double()
        # (image, view, token): each view's tokens against all of the teacher's.
        logits = predictions.view(4, 2, -1, 8) @ targets.view(-1, 8).T / 0.12
        number = torch.arange(logits.shape[-1]).view(4, 1, -1).expand(4, 2, -1)
        expected = F.cross_entropy(logits.flatten(0, 2), number.flatten())
        loss = getattr(terms, term).item()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert len(sparse.prototypes) == 4 * 3

    def test_init__neither_prototypes_nor_teacher(self) -> None:
        with pytest.raises(ValueError, match="give teacher_momentum"):
            tiny(head=TINY["head"] | BATCH_HEAD)

    def test_training_step__reconstructs_the_pixels_as_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, given = tiny(), {}
        monkeypatch.setattr(module, "_watch", Mock())
        monkeypatch.setattr(
            module.criterion, "terms", lambda **kwargs: given.update(kwargs) or Mock()
        )
        batch = next(iter(loader()))
        module.training_step(batch, 0)
        assert torch.equal(given["images"], batch[0][:, 0].float() / 255)

    def test_training_step__what_batches_share_is_drawn_anew_in_each(
        self, tmp_path: Path
    ) -> None:
        # The order of colour operations, the same in all processes.
        def drawn() -> list[int]:
            module = tiny()
            augment = Mock(side_effect=module.augment.forward)
            module.augment.forward = augment
            data = images(tmp_path / "images")
            trainer(tmp_path, max_epochs=2).fit(module, datamodule=data)
            return [call.args[2].initial_seed() for call in augment.call_args_list]

        assert drawn() == (seeds := drawn())
        assert len(set(seeds)) == len(seeds) == 2 * 3

    def test_training_step__masks_as_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = []

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            given.append(args)
            return random_focal_mask(*args, **kwargs)

        monkeypatch.setattr(pretrain_module, "random_focal_mask", recorded)
        module = tiny(mask_ratio=0.7, focal_prob=0.3)
        monkeypatch.setattr(module, "_watch", Mock())
        module.training_step(next(iter(loader())), 0)
        # Four images with two views of 4 x 4 patches.
        assert given == [(8, (4, 4), 0.7, 0.3)]

    def test_configure_optimizers__global_batch(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = tiny(lr=1.0, lr_scaling="linear", betas=(0.8, 0.95))
        fit = trainer(tmp_path, accumulate_grad_batches=2)
        fit.fit(module, loader())
        assert "Global batch 8, learning rate 0.00391" in capsys.readouterr().out
        assert fit.optimizers[0].defaults["betas"] == (0.8, 0.95)

    def test_configure_optimizers__global_batch_of_all_processes(self) -> None:
        module = tiny(lr=1.0, lr_scaling="linear")
        module.trainer = Mock(world_size=3, accumulate_grad_batches=2)
        module.trainer.train_dataloader.batch_size = 4
        assert module._scaled_lr() == 24 / 2048

    def test_init__defaults_of_the_method(self) -> None:
        parameters = inspect.signature(StellarPretraining).parameters
        expected = {"mask_ratio": 0.8, "focal_prob": 0.5, "teacher_momentum": None}
        expected |= {"lr": 1.5e-4, "lr_scaling": "none", "min_lr": 1e-6}
        expected |= {"warmup_fraction": 0.1, "weight_decay": 0.04}
        expected |= {"betas": (0.9, 0.999), "head_warmup_steps": 0}
        assert {name: parameters[name].default for name in expected} == expected

    def test_init__views_are_normalised_as_the_model_says(self) -> None:
        numbers = {"mean": [0.0, 0.5, 1.0], "std": [1.0, 0.25, 0.5]}
        module = tiny(model={**TINY["model"], **numbers})
        white = torch.full((1, 1, 3, 32, 32), 255, dtype=torch.uint8)
        target = module.augment(white).target
        expected = torch.tensor([1.0, 2.0, 0.0]).view(1, 3, 1, 1).expand_as(target)
        torch.testing.assert_close(target, expected)

    def test_validation_step__pooled_tokens_of_normalised_images(self) -> None:
        module = tiny().eval()
        images = torch.randint(256, (3, 3, 32, 32)).to(torch.uint8)
        labels = torch.arange(3)
        found = module.validation_step((images, labels), 0)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        expected = module.model((images / 255 - mean) / std).sparse.mean(dim=1)
        torch.testing.assert_close(found["features"], expected)
        assert torch.equal(found["labels"], labels)

    def test_init__switched_off_terms_build_no_modules(self) -> None:
        module = tiny(loss={"reconstruction_weight": 0.0})
        assert module.model.decoder is None
        assert not any("_proj" in name for name, _ in module.named_parameters())
        off = {"clustering_weight": 0.0, "alignment_weight": 0.0}
        assert tiny(loss=off).sparse_head is None
        off = {"cls_clustering_weight": 0.0, "cls_alignment_weight": 0.0}
        assert tiny(loss=off).cls_head is None

    def test_configure_optimizers__decay_groups(self, tmp_path: Path) -> None:
        module = tiny(weight_decay=0.3)
        fit = trainer(tmp_path, max_steps=1)
        fit.fit(module, loader())
        decay = {
            id(p): group["weight_decay"]
            for group in fit.optimizers[0].param_groups
            for p in group["params"]
        }
        for name, parameter in module.named_parameters():
            free = parameter.ndim < 2 or name.split(".")[-1] in (
                "cls_token",
                "reg_token",
                "pos_embed",
            )
            assert decay[id(parameter)] == (0.0 if free else 0.3), name
        assert decay[id(module.sparse_head.prototypes.weight)] == 0.3

    @pytest.mark.parametrize(
        "scaling, factor", [("none", 1.0), ("sqrt", 2**-4.5), ("linear", 2**-9)]
    )
    def test_configure_optimizers__schedule(
        self,
        scaling: Any,
        factor: float,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        # A global batch of 4 is 2048 / 2^9.
        module = tiny(lr=1.0, lr_scaling=scaling, min_lr=1e-3, warmup_fraction=0.2)
        rates = []
        step = module.training_step

        def recorded(*args: Any) -> Tensor:
            rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
            return step(*args)

        module.training_step = recorded
        trainer(tmp_path, max_epochs=5).fit(module, loader())
        assert len(rates) == 10
        assert rates[:2] == pytest.approx([0.5 * factor, factor])
        assert rates[2] == pytest.approx(factor)
        assert rates[-1] == pytest.approx(1e-3)
        assert all(a >= b for a, b in pairwise(rates[1:]))
        assert f"lr_scaling: {scaling}" in capsys.readouterr().out

    @pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
    @pytest.mark.parametrize("scaler", [None, "of fp16"])
    def test_configure_optimizers__fused(
        self, scaler: str | None, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, optimizer = tiny(), Mock(side_effect=AdamW)
        module.trainer = Mock(max_epochs=-1, max_steps=10, world_size=1)
        module.trainer.train_dataloader.batch_size = 4
        module.trainer.precision_plugin.scaler = scaler
        monkeypatch.setattr(pretraining_module, "AdamW", optimizer)
        monkeypatch.setattr(StellarPretraining, "device", torch.device(device))
        monkeypatch.setattr(module, "_scaled_lr", lambda: 0.1)
        module.configure_optimizers()
        chosen = True if device == "cuda" and scaler is None else None
        assert optimizer.call_args.kwargs["fused"] is chosen

    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_fit__clips_with_a_fused_optimizer(
        self, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pretraining_module, "AdamW", fused)
        module = tiny()
        clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
        fit = trainer(tmp_path, max_steps=1, precision="bf16-mixed", **clipping)
        fit.fit(module, loader())
        assert fit.optimizers[0].defaults["fused"]
        gradients = [p.grad.flatten() for p in module.parameters() if p.requires_grad]
        order = 2 if algorithm == "norm" else torch.inf
        norm = torch.cat(gradients).norm(order).item()
        assert norm == pytest.approx(0.01, rel=1e-4)

    def test_fit__says_when_prototypes_outnumber_tokens(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = tiny(head={**TINY["head"], "num_prototypes": 13})
        trainer(tmp_path, max_steps=1).fit(module, loader())
        printed = capsys.readouterr().out
        assert "12 tokens per step are balanced over 13 prototypes" in printed

    def test_fit__teacher_follows_each_optimizer_step(self, tmp_path: Path) -> None:
        module = tiny(teacher_momentum=0.9)
        expected = {
            n: p.clone() for n, p in module.teacher["encoder"].named_parameters()
        }
        step = module.optimizer_step

        def recorded(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            for name, student in module.model.encoder.named_parameters():
                expected[name] = 0.9 * expected[name] + 0.1 * student.detach()

        module.optimizer_step = recorded
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(module, loader())
        for name, parameter in module.teacher["encoder"].named_parameters():
            torch.testing.assert_close(parameter, expected[name])
            assert not parameter.requires_grad

    def test_fit__teacher_needs_two_views(self, tmp_path: Path) -> None:
        module = tiny(teacher_momentum=0.9)
        data = loader()
        data.dataset.views = (data.dataset.views[0][:, :1], data.dataset.views[1])
        with pytest.raises(ValueError, match="num_global_views"):
            trainer(tmp_path).fit(module, data)

    def test_fit__bf16_is_close_to_fp32(self, tmp_path: Path) -> None:
        totals = []
        for precision in ("32-true", "bf16-mixed"):
            module = tiny(teacher_momentum=0.9)
            fit = trainer(tmp_path, max_steps=1, precision=precision)
            fit.fit(module, loader())
            totals.append(fit.callback_metrics["train/total"].item())
            assert all(p.dtype == torch.float32 for p in module.parameters())
        assert totals[1] == pytest.approx(totals[0], rel=0.02)

    def test_fit__pure_bf16_is_close_to_fp32(self, tmp_path: Path) -> None:
        totals, features = [], []
        for precision in ("32-true", "bf16-true"):
            module = tiny(teacher_momentum=0.9)
            fit = trainer(tmp_path, max_steps=1, precision=precision)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                fit.fit(module, loader())
            warned = any("it stays behind" in str(warning.message) for warning in told)
            assert warned == (precision == "bf16-true")
            totals.append(fit.callback_metrics["train/total"].item())
            batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2)
            features.append(module.eval().validation_step(batch, 0)["features"])
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert totals[1] == pytest.approx(totals[0], rel=0.02)
        torch.testing.assert_close(features[1], features[0], rtol=0, atol=0.1)

    def test_setup__pure_fp16_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"16-true.*Use 16-mixed"):
            trainer(tmp_path, precision="16-true").fit(tiny(), loader())

    def test_fit__between_logged_steps(self, tmp_path: Path) -> None:
        # Two steps an epoch; every third step is logged.
        module, figures = tiny(), []
        log_dict = module.log_dict

        def recorded(values: dict[str, Any]) -> None:
            if any(name.startswith("health/") for name in values):
                figures.append((module.global_step, set(values)))
            log_dict(values)

        module.log_dict = recorded
        logger = CSVLogger(tmp_path)
        options = {"log_every_n_steps": 3, "max_epochs": 4, "logger": logger}
        trainer(tmp_path, **options).fit(module, loader())
        # Figures of health are computed for the steps that are logged, not for others.
        names = {"token_rank", "token_cosine", "token_distance"}
        names |= {"prototype_usage", "prototypes_used"}
        names |= {"localization_entropy", "localization_usage"}
        names |= {"non_identity_matches", "matching_collisions", "matching_entropy"}
        names |= {"clustering_over_ln_k", "alignment_over_ln_k"}
        names |= {"cls_clustering_over_ln_k", "cls_alignment_over_ln_k"}
        names |= {"cls_local_alignment_over_ln_k"}
        assert figures == [(step, {f"health/{x}" for x in names}) for step in (2, 5)]
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row["train/total"]] == ["2", "5"]
        for name in ("token_rank", "gradient_norm", "loader_wait"):
            logged = [row["step"] for row in rows if row[f"health/{name}"]]
            assert logged == ["2", "5"], name

    def test_fit__never_logged(self, tmp_path: Path) -> None:
        fit = trainer(tmp_path, log_every_n_steps=0)
        fit.fit(tiny(), loader())
        assert fit.global_step == 2

    def test_load_from_checkpoint__without_the_priors_file(
        self, tmp_path: Path
    ) -> None:
        prior = tiny().model
        # Without this the same seed would make the same weights.
        torch.nn.init.normal_(prior.encoder.vit.pos_embed)
        prior.save_pretrained(tmp_path / "prior")
        module = tiny(prior=str(tmp_path / "prior"))
        torch.testing.assert_close(
            module.model.encoder.vit.pos_embed, prior.encoder.vit.pos_embed
        )
        fit = trainer(tmp_path, max_steps=1)
        fit.fit(module, loader())
        fit.save_checkpoint(tmp_path / "run.ckpt")
        (tmp_path / "prior" / "model.safetensors").unlink()
        loaded = StellarPretraining.load_from_checkpoint(tmp_path / "run.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    def test_on_train_batch_start__draws_differ_by_step_and_process(self) -> None:
        draws = []
        for rank, epoch, batch, seed in (
            *((0, 0, 0, 3), (1, 0, 0, 3), (0, 1, 0, 3)),
            *((0, 0, 1, 3), (0, 0, 0, 4), (0, 0, 0, 3)),
        ):
            module = tiny()
            seed_everything(seed)
            module.trainer = Mock(global_rank=rank, current_epoch=epoch)
            module.on_train_batch_start(None, batch)
            draws.append(torch.rand(1).item())
        assert len(set(draws)) == 5
        assert draws[0] == draws[-1]

    def test_init__bad_momentum(self) -> None:
        with pytest.raises(ValueError, match="teacher_momentum"):
            tiny(teacher_momentum=1.0)


class TestOnlineKNN:
    def test_fit__accuracy_of_separable_classes(self, tmp_path: Path) -> None:
        # Class 0 is dark, class 1 is bright.
        labels = torch.arange(40) % 2
        images = (labels * 200)[:, None, None, None] + torch.randint(
            40, (40, 3, 32, 32)
        )
        images = images.to(torch.uint8)
        split = [
            torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(images[part], labels[part]), 8
            )
            for part in (slice(0, 30), slice(30, 40))
        ]
        module = tiny()
        fit = trainer(tmp_path, num_sanity_val_steps=0)
        fit.fit(module, loader(), split)
        assert fit.callback_metrics["knn_top1"].item() == 1.0

    @pytest.mark.slow
    def test_validate__two_processes_like_one(self, tmp_path: Path) -> None:
        alone = validate(0, 1)
        assert 0.3 < alone < 1.0
        for accuracy in distributed.run(validate, tmp_path):
            assert accuracy == pytest.approx(alone)


def validate(rank: int, world_size: int) -> float:
    """Accuracy of the online kNN."""
    # Odd sizes: the sampler repeats images, which must not count twice.
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (42,), generator=generator)
    noise = torch.randint(200, (42, 3, 32, 32), generator=generator)
    images = (noise + labels[:, None, None, None]).to(torch.uint8)
    split = [
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images[part], labels[part]), 4
        )
        for part in (slice(0, 31), slice(31, 42))
    ]
    options: dict[str, Any] = {}
    if world_size > 1:
        distributed.say_as_torchrun(rank, world_size)
        options = {"strategy": "ddp", "devices": world_size}
    validation = trainer(Path(), **options)
    validation.validate(tiny(), split, verbose=False)
    assert validation.world_size == world_size
    return validation.callback_metrics["knn_top1"].item()
