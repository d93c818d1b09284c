from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.transforms import BaseTransform, Compose, RandomApply, RandomChoice
from mmengine.runner import Runner
from mmseg.datasets.transforms import RandomFlip, RandomRotate
from mmseg.registry import TRANSFORMS
from torch import nn

from stellar_plugin.mmseg.card.card import (
    differences,
    make_card,
    read_evaluation,
    read_training,
)
from stellar_plugin.mmseg.card.described import described
from stellar_plugin.mmseg.card.provenance import (
    images_sha256,
    parameters,
    weights_origin,
)
from stellar_plugin.protocols import (
    SEGMENTATION,
    SEGMENTATION_PAPER_VOC,
    SEGMENTATION_VOC,
)
from tests.stellar_plugin.mmseg.mmseg_sets import WRITERS
from tests.stellar_plugin.mmseg.runners import built, resnet_config, tiny_config

Options = dict[str, Any]

pytestmark = pytest.mark.usefixtures("cpu")


@TRANSFORMS.register_module()
class Shaken(BaseTransform):
    """Somebody's transform, with settings as albumentations has them."""

    def __init__(self) -> None:
        self._strength = 3
        self.steps = [{"type": "Blur", "p": 0.25}]
        self.function = abs

    def transform(self, results: dict) -> dict:
        return results


def card(
    runner: Runner, part: str = "val", notes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The card of a run that is about to begin, with these notes and no other."""
    loop = runner.val_loop if part == "val" else runner.test_loop
    training = read_training(runner)
    whole = make_card(runner, training.fields, read_evaluation(runner, loop))
    told = [*training.notes, *whole.notes]
    assert len(told) == len(notes), told
    assert all(note in text for note, text in zip(notes, told, strict=True)), told
    return whole.fields


def resnet_card(folder: Path, options: Options, *notes: str) -> dict[str, Any]:
    said = {"evaluation": {"model": "R18", "data": "Mine", "protocol": "SEGMENTATION"}}
    return card(built(resnet_config(folder, {**said, **options})), notes=notes)


def changed(found: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Fields that are not as usual, None where one is missing."""
    names = found.keys() | usual.keys()
    return {n: found.get(n) for n in names if found.get(n) != usual.get(n)}


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"train_cfg.max_iters": 400}, {"iterations": 400, "warmup": 15}),
            ({"train_dataloader.batch_size": 4}, {"batch_sizes": [4]}),
            (
                # Steps of the optimiser, each of two iterations.
                {"optim_wrapper.accumulative_counts": 2},
                {"batch_sizes": [32], "iterations": 20000, "warmup": 750},
            ),
            ({"optim_wrapper.optimizer.lr": 0.1}, {"lrs": [0.1]}),
            ({"optim_wrapper.optimizer.weight_decay": 0}, {"weight_decay": 0}),
            (
                {"optim_wrapper.optimizer.betas": (0.9, 0.95)},
                {"optimizer": "AdamW, betas 0.9 and 0.95"},
            ),
            ({"model.backbone.feature": "lowrank"}, {"features": "lowrank"}),
            ({"model.backbone.out_indices": (0,)}, {"features": "dense 0"}),
            ({"model.backbone.frozen": False}, {"backbone": "trained"}),
            ({"model.test_cfg.stride": (100, 100)}, {"stride": 100}),
            ({"model.test_cfg.stride": (100, 90)}, {"stride": "100 x 90"}),
            (
                {"model.test_cfg.mode": "whole"},
                {
                    "inference": "whole image",
                    "crop": None,
                    "stride": None,
                    "train_views": SEGMENTATION.train_views.replace(
                        "random crop", "random crop 512 x 512"
                    ),
                },
            ),
            ({"train_dataloader.dataset.indices": 2}, {"limit": 2}),
            ({"val_dataloader.dataset.indices": [0, 2]}, {"limit": 2}),
            (
                {
                    "train_dataloader.dataset.indices": 2,
                    "val_dataloader.dataset.indices": 1,
                },
                {"limit": 1},
            ),
            ({"optim_wrapper.clip_grad": {"max_norm": 5.0}}, {"clip": 5.0}),
            (
                {"optim_wrapper.clip_grad": {"type": "value", "clip_value": 0.5}},
                {"clip": "by value: {'clip_value': 0.5}"},
            ),
            ({"optim_wrapper.clip_grad": None}, {}),
            (
                {"model.decode_head.dropout_ratio": 0.1},
                {"head": "BatchNorm, dropout 0.1, 1 x 1 convolution"},
            ),
            (
                {"model.decode_head.norm_cfg": None},
                {"head": "1 x 1 convolution"},
            ),
            (
                {"model.decode_head.loss_decode.class_weight": [1.0] * 20 + [0.5]},
                {
                    "loss": "CrossEntropyLoss(avg_non_ignore=False, class_weight="
                    f"({', '.join(['1'] * 20)}, 0.5), cls_criterion=cross_entropy, "
                    "reduction=mean, use_mask=False, use_sigmoid=False)"
                },
            ),
            (
                {"model.decode_head.loss_decode.loss_weight": 0.4},
                {"loss": "cross-entropy, weight 0.4"},
            ),
            ({"param_scheduler": []}, {"schedule": "constant", "warmup": None}),
            (
                {"train_dataloader.dataset.ann_file": "ImageSets/Segmentation/val.txt"},
                {"split": "val / val"},
            ),
            ({"evaluation.data": "Mine"}, {"data": "Mine"}),
            ({"evaluation.changes": {"classes": "two"}}, {"classes": "two"}),
        ],
    )
    def test_show_in_the_card(
        self, options: Options, expected: Options, tmp_path: Path
    ) -> None:
        found = card(built(tiny_config("stellar_voc", tmp_path, options)))
        assert changed(found, SEGMENTATION_VOC.card()) == expected

    def test_differences__named_with_both_values(self, tmp_path: Path) -> None:
        runner = built(
            tiny_config("stellar_voc", tmp_path, {"train_cfg.max_iters": 40})
        )
        expected = {"iterations": [40000, 40], "warmup": [1500, 2]}
        assert differences(runner, card(runner)) == expected

    def test_changes__of_what_is_read(self, tmp_path: Path) -> None:
        changes = {"evaluation.changes": {"iterations": 9, "split": "a / b"}}
        runner = built(tiny_config("stellar_voc", tmp_path, changes))
        found = card(runner, notes=("evaluation.changes.iterations is not used",))
        assert changed(found, SEGMENTATION_VOC.card()) == {"split": "a / b"}

    def test_processes__batch_of_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cfg = tiny_config("stellar_voc", tmp_path, {"train_dataloader.batch_size": 2})
        runner = built(cfg)
        name = "stellar_plugin.mmseg.card.training.get_world_size"
        monkeypatch.setattr(name, lambda: 8)
        expected = {"rule": "BatchNorm of each process alone"}
        assert changed(card(runner), SEGMENTATION_VOC.card()) == expected
        head = runner.model.decode_head
        head.norm = nn.SyncBatchNorm.convert_sync_batchnorm(head.norm)
        assert card(runner) == SEGMENTATION_VOC.card()

    def test_paper__evaluation_batch_of_the_part(self, tmp_path: Path) -> None:
        options = {"test_evaluator.batch_size": 5, "train_cfg.max_epochs": 3}
        runner = built(tiny_config("stellar_voc_paper", tmp_path, options))
        usual = SEGMENTATION_PAPER_VOC.card()
        assert changed(card(runner), usual) == {"epochs": 3}
        expected = {"epochs": 3, "evaluation_batch": 5}
        assert changed(card(runner, "test"), usual) == expected

    def test_several_metrics(self, tmp_path: Path) -> None:
        cfg = tiny_config("stellar_voc_paper", tmp_path)
        cfg.val_evaluator = [{"type": "IoUMetric", "prefix": "all"}, cfg.val_evaluator]
        both = (SEGMENTATION.averaging, SEGMENTATION_PAPER_VOC.averaging)
        expected = {"averaging": f"all: {both[0]}; paper: {both[1]}"}
        assert changed(card(built(cfg)), SEGMENTATION_PAPER_VOC.card()) == expected


class TestNames:
    def test_unknown_protocol(self, tmp_path: Path) -> None:
        options = {"evaluation.protocol": "SEGMENTATION_MOON"}
        runner = built(tiny_config("stellar_voc", tmp_path, options))
        found = card(runner, notes=("'SEGMENTATION_MOON', which is no protocol",))
        expected = {"source": "not told", "classes": "21"}
        assert changed(found, SEGMENTATION_VOC.card()) == expected
        assert differences(runner, found) == {}

    def test_nothing_said__named_by_what_ran(self, tmp_path: Path) -> None:
        runner = built(resnet_config(tmp_path))
        found = card(runner, notes=("no evaluation.model, data and protocol: write",))
        assert (found["name"], found["source"]) == ("segmentation", "not told")
        assert found["data"] == "ADE20KDataset"


class TestResNet:
    """An ordinary config, nothing of which is STELLAR's."""

    def test_whole_card(self, tmp_path: Path) -> None:
        head = (
            "FCNHead(act_cfg={type: ReLU}, align_corners=False, channels=8, "
            "concat_input=False, dropout_ratio=0.1, ignore_index=255, kernel_size=3, "
            "norm_cfg={type: BN}, num_convs=1)"
        )
        assert resnet_card(tmp_path, {}) == {
            "name": "segmentation",
            "source": SEGMENTATION.source,
            "data": "Mine",
            "split": "training / validation",
            "features": "maps 3",
            # No flip, no distortion, no resize.
            "train_views": "random crop 64 x 64",
            "inference": "whole image",
            "label_resolution": "of the original image",
            "classes": "150, label 0 is ignored",
            "num_classes": 150,
            "head": head,
            "backbone": "trained",
            "loss": "cross-entropy",
            "optimizer": "SGD, momentum 0.9",
            "lrs": [0.01],
            "batch_sizes": [2],
            "weight_decay": 0,
            "iterations": 2,
            "schedule": "constant",
            "averaging": SEGMENTATION.averaging,
        }

    @pytest.mark.parametrize(
        ("options", "backbone", "trained"),
        [
            ({}, "trained", 11_176_512),
            (
                {"model.backbone.frozen_stages": 1},
                "trained but for conv1, bn1, layer1",
                11_176_512 - 9408 - 128 - 147_968,
            ),
            (
                {"model.backbone.frozen_stages": 4, "model.backbone.norm_eval": True},
                "frozen",
                0,
            ),
            (
                # Not in the optimiser's hands, but its features change all the same.
                {
                    "optim_wrapper.paramwise_cfg": {
                        "custom_keys": {"backbone": {"lr_mult": 0.0}}
                    }
                },
                "frozen but for the statistics of BatchNorm",
                0,
            ),
        ],
    )
    def test_trained_parameters(
        self, options: Options, backbone: str, trained: int, tmp_path: Path
    ) -> None:
        runner = built(resnet_config(tmp_path, options))
        assert read_training(runner).fields["backbone"] == backbone
        head = 512 * 8 * 9 + 2 * 8 + 8 * 150 + 150
        expected = {"parameters": 11_176_512 + head}
        assert parameters(runner) == {**expected, "trained_parameters": trained + head}

    def test_groups_of_parameters(self, tmp_path: Path) -> None:
        rules = {"custom_keys": {"backbone": {"lr_mult": 0.1}}, "norm_decay_mult": 0.0}
        options = {
            "optim_wrapper.paramwise_cfg": rules,
            "optim_wrapper.optimizer.weight_decay": 0.05,
        }
        found = changed(resnet_card(tmp_path, options), resnet_card(tmp_path, {}))
        assert found == {
            "optimizer": "SGD, momentum 0.9, by parameter "
            f"{{'paramwise_cfg': {rules}}}",
            "lrs": [0.01, 0.001],
            "weight_decay": "0 and 0.05",
        }

    def test_auxiliary_head_and_neck(self, tmp_path: Path) -> None:
        usual = resnet_config(tmp_path).model.decode_head.to_dict()
        loss = {"type": "CrossEntropyLoss", "loss_weight": 0.4}
        auxiliary = {**usual, "in_index": 0, "in_channels": 8, "loss_decode": loss}
        neck = {"type": "FPN", "in_channels": [64, 128, 256, 512], "out_channels": 8}
        options = {
            "model.neck": {**neck, "num_outs": 4},
            "model.auxiliary_head": auxiliary,
            "model.decode_head.in_channels": 8,
        }
        found = resnet_card(tmp_path, options)
        assert found["loss"] == (
            "cross-entropy; auxiliary FCNHead: cross-entropy, weight 0.4"
        )
        assert found["head"].startswith("FPN(")
        assert ", out_channels=8, " in found["head"]

    def test_cascade(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path)
        first = cfg.model.decode_head.to_dict()
        ocr = {"type": "OCRHead", "in_channels": 512, "in_index": 3, "channels": 8}
        ocr |= {"ocr_channels": 4, "num_classes": 150, "norm_cfg": {"type": "BN"}}
        cfg.model.update(type="CascadeEncoderDecoder", num_stages=2)
        cfg.model.decode_head = [first, ocr]
        found = card(built(cfg), notes=("no evaluation.",))
        assert found["num_classes"] == 150
        assert found["loss"] == "cross-entropy; cross-entropy"
        assert found["head"].split("(")[0] == "FCNHead"
        assert ", OCRHead(act_cfg=" in found["head"]

    def test_head_without_loss__one_field_not_told(self, tmp_path: Path) -> None:
        runner = built(resnet_config(tmp_path))
        del runner.model.decode_head.loss_decode
        note = "loss not told: AttributeError('FCNHead has no module named loss...')"
        found = card(runner, notes=(note, "no evaluation."))
        assert [k for k, v in found.items() if v == "not told"] == ["source", "loss"]

    def test_everything_unreadable__every_field_not_told(self, tmp_path: Path) -> None:
        runner = built(resnet_config(tmp_path))
        runner.model = nn.Identity()
        runner.optim_wrapper = runner.param_schedulers = None
        runner._train_loop.dataloader = runner._val_loop.dataloader = None
        runner._val_loop.evaluator = None
        training, evaluation = (
            read_training(runner),
            read_evaluation(runner, runner.val_loop),
        )
        told = {**training.fields, **evaluation.fields}
        assert {k for k, v in told.items() if v != "not told"} == {"warmup", "schedule"}
        assert len(training.notes) == 11
        assert len(evaluation.notes) == 8
        whole = make_card(runner, training.fields, evaluation)
        assert whole.fields["split"] == "not told / not told"
        assert whole.fields["data"] == "not told"

    def test_interrupt__is_no_reading(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("stellar_plugin.mmseg.card.card.part_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read_training(built(resnet_config(tmp_path)))

    def test_averaged_weights(self, tmp_path: Path) -> None:
        hook = {"type": "EMAHook", "momentum": 0.01, "begin_iter": 1}
        cfg = resnet_config(tmp_path)
        cfg.custom_hooks = [*cfg.custom_hooks, hook]
        assert card(built(cfg), notes=("no evaluation.",))["rule"] == (
            "averaged weights {'type': 'ExponentialMovingAverage', 'momentum': 0.01, "
            "'begin_iter': 1}"
        )


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedulers", "schedule", "warmup"),
        [
            (
                # As most configs of mmsegmentation write it.
                [
                    {"type": "LinearLR", "start_factor": 1e-6, "begin": 0, "end": 15},
                    {"type": "PolyLR", "power": 0.9, "eta_min": 1e-4, "begin": 15},
                ],
                "polynomial (power 0.9) to 0.0001 from iteration 15, after linear "
                "warm-up",
                15,
            ),
            (
                [{"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": 5}],
                "constant, after linear warm-up from 0.1",
                5,
            ),
            (
                [{"type": "MultiStepLR", "milestones": [8, 11], "gamma": 0.1}],
                "MultiStepLR(begin=0, by_epoch=False, end=40, gamma=0.1, milestones="
                "{8: 1, 11: 1}, param_name=lr)",
                None,
            ),
        ],
    )
    def test_iterations(
        self,
        schedulers: list[dict[str, Any]],
        schedule: str,
        warmup: int | None,
        tmp_path: Path,
    ) -> None:
        options = {
            "train_cfg.max_iters": 40,
            "param_scheduler": [{**s, "by_epoch": False} for s in schedulers],
        }
        found = card(built(tiny_config("stellar_voc", tmp_path, options)))
        assert (found["schedule"], found.get("warmup")) == (schedule, warmup)

    @pytest.mark.parametrize("by_epoch", [False, True])
    def test_our_warm_up_by_epochs(self, by_epoch: bool, tmp_path: Path) -> None:
        warm_up = {"type": "WarmUpLR", "fraction": 0.25, "by_epoch": by_epoch}
        options = {
            "train_cfg.max_epochs": 8,
            "train_dataloader.batch_size": 1,
            "param_scheduler": [warm_up],
        }
        found = card(built(tiny_config("stellar_voc_paper", tmp_path, options)))
        assert found["epochs"] == 8
        assert found["schedule"] == "constant, after linear warm-up"
        assert found["warmup"] == 6  # a quarter of 8 epochs of 3 iterations


class TestData:
    @pytest.mark.parametrize(
        ("wrapper", "split"),
        [
            ("ConcatDataset", "train (1464 images) / val"),
            ("RepeatDataset", "train (1464 images) in RepeatDataset(times=4) / val"),
            (
                "MultiImageMixDataset",
                "train (1464 images) / val",
            ),
        ],
    )
    def test_wrapped_set(self, wrapper: str, split: str, tmp_path: Path) -> None:
        cfg = tiny_config("stellar_voc", tmp_path)
        inner = cfg.train_dataloader.dataset
        concat = {"type": "ConcatDataset", "datasets": [inner, inner]}
        cfg.train_dataloader.dataset = {
            "ConcatDataset": concat,
            "RepeatDataset": {"type": wrapper, "dataset": inner, "times": 4},
            "MultiImageMixDataset": {
                "type": wrapper,
                "dataset": concat,
                "pipeline": [{"type": "RandomRotate", "prob": 1.0, "degree": 5.0}],
            },
        }[wrapper]
        found = changed(card(built(cfg)), SEGMENTATION_VOC.card())
        mixed = found.pop("train_views", "")
        assert found == ({} if "Repeat" not in wrapper else {"split": split})
        # Steps of the wrapper follow those inside.
        assert bool(mixed) == (wrapper == "MultiImageMixDataset")
        assert mixed in ("", f"{SEGMENTATION.train_views}, {ROTATION}")

    def test_images__told_apart_by_their_contents(self, tmp_path: Path) -> None:
        root = WRITERS["ade20k"](tmp_path / "data")
        splits = ("train", "val", "test")
        options = {f"{s}_dataloader.dataset.data_root": str(root) for s in splits}
        dataset = built(resnet_config(tmp_path, options)).val_loop.dataloader.dataset
        before = images_sha256(dataset)
        assert images_sha256(dataset) == before
        label = root / "annotations/validation/1.png"
        label.write_bytes(label.read_bytes() + b"\0")
        assert images_sha256(dataset) != before


NECK = {"type": "FPN", "in_channels": [48], "out_channels": 48, "num_outs": 1}
ROTATION = (
    "RandomRotate(auto_bound=False, degree=(-5, 5), pal_val=0, prob=1, seg_pad_val=255)"
)


class TestTransforms:
    def test_exactly_what_ran(self, tmp_path: Path) -> None:
        flip = {"type": "RandomFlip", "prob": 0.25, "direction": "vertical"}
        rotate = {"type": "RandomRotate", "prob": 1.0, "degree": 5.0}
        cfg = resnet_config(tmp_path)
        steps = cfg.train_dataloader.dataset.pipeline
        cfg.train_dataloader.dataset.pipeline = [
            *steps[:2],
            {"type": "Resize", "scale": (128, 64), "keep_ratio": False},
            {"type": "RandomApply", "transforms": [rotate], "prob": 0.3},
            {
                "type": "RandomChoice",
                "transforms": [[flip], [rotate]],
                "prob": [0.5, 0.5],
            },
            {"type": "Shaken"},
            *steps[2:],
        ]
        flip_text = "RandomFlip(direction=vertical, prob=0.25)"
        assert card(built(cfg), notes=("no evaluation.",))["train_views"] == (
            "Resize(backend=cv2, clip_object_border=True, interpolation=bilinear, "
            "keep_ratio=False, scale=(128, 64)), "
            f"RandomApply(prob=0.3, transforms=Compose(transforms=({ROTATION}))), "
            "RandomChoice(prob=(0.5, 0.5), transforms=("
            f"Compose(transforms=({flip_text})), Compose(transforms=({ROTATION})))), "
            "Shaken(_strength=3, function=abs, steps=({type: Blur, p: 0.25})), "
            "random crop 64 x 64"
        )

    def test_test_images(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path)
        read, labels, pack = cfg.val_dataloader.dataset.pipeline
        cfg.val_dataloader.dataset.pipeline = [
            read,
            {"type": "Resize", "scale": (256, 64), "keep_ratio": True},
            labels,
            {"type": "ResizeToMultiple", "size_divisor": 16},
            pack,
        ]
        found = card(built(cfg), notes=("no evaluation.",))
        multiple = "ResizeToMultiple(size_divisor=16)"
        assert (found["resize"], found["longest"]) == (64, 256)
        assert found["test_views"] == multiple
        assert found["label_resolution"] == f"after {multiple}"
        # What converts labels leaves their resolution.
        loader = {"type": "LoadConvertedAnnotations", "values": list(range(1, 151))}
        cfg.val_dataloader.dataset.pipeline[2:4] = [{**loader, "ignored": [0]}]
        cfg.experiment_name += "converted"
        found = card(built(cfg), notes=("no evaluation.",))
        assert found["label_resolution"] == "of the original image"

    @pytest.mark.parametrize(
        ("options", "cells"),
        [
            ({"model.backbone.patch_size": 16}, ""),
            ({"model.backbone.patch_size": 8}, "; cells of 8 px"),
            ({"model.neck": NECK}, "; cells of a size not told"),
        ],
    )
    def test_patch_grid__names_cells_of_another_size(
        self, options: dict[str, Any], cells: str, tmp_path: Path
    ) -> None:
        runner = built(tiny_config("stellar_voc_paper", tmp_path, options))
        found = read_evaluation(runner, runner.test_loop).fields["label_resolution"]
        assert found == f"patch grid, nearest{cells}"

    def test_augmented_test(self, tmp_path: Path) -> None:
        cfg = tiny_config("stellar_voc", tmp_path)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
        runner = built(cfg)
        found = read_evaluation(runner, runner.test_loop)
        assert found.notes == []
        assert found.fields["label_resolution"] == "of the original image"
        resized = [
            "Resize(backend=cv2, clip_object_border=True, interpolation=bilinear, "
            f"keep_ratio=True, scale_factor=({scale}, {scale}))"
            for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75)
        ]
        flips = [f"RandomFlip(direction=horizontal, prob={p})" for p in (0, 1)]
        first, *others = resized
        views = ", ".join([first, *flips, *others])
        assert found.fields["inference"] == (
            f"sliding window, mean of 12 views: {views}"
        )


class TestDescribed:
    def test_the_same_text_for_the_same_settings(self) -> None:
        def step() -> Any:
            turned = RandomRotate(prob=1.0, degree=5.0)
            choice = RandomChoice([[RandomFlip(prob=0.5)], [turned]])
            return Compose([RandomApply([choice], prob=0.1), Shaken()])

        assert described(step()) == described(step())
        assert " at 0x" not in described(step())

    def test_large_arrays__by_their_values(self) -> None:
        class Weighted:
            def __init__(self, values: torch.Tensor) -> None:
                self.values = values

        zeros, ones = (described(Weighted(f(100))) for f in (torch.zeros, torch.ones))
        assert zeros != ones
        assert described(Weighted(torch.ones(100))) == ones
        assert described(Weighted(torch.ones(2))) == "Weighted(values=[1.0, 1.0])"


class TestWeightsOrigin:
    def test_random(self, tmp_path: Path) -> None:
        untrained = {"checkpoint": "random weights", "sha256": None}
        assert weights_origin(built(tiny_config("stellar_voc", tmp_path))) == untrained
        scratch = {"checkpoint": "trained from random weights", "sha256": None}
        assert weights_origin(built(resnet_config(tmp_path))) == scratch

    def test_by_name__hash_of_what_was_loaded(self, tmp_path: Path) -> None:
        runner = built(resnet_config(tmp_path))
        name = "torchvision://resnet18"
        runner.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": name}
        found = weights_origin(runner)
        assert found["checkpoint"] == name
        assert found["sha256"].startswith("weights ")
        runner.model.backbone.conv1.weight.data += 1
        assert weights_origin(runner)["sha256"] != found["sha256"]

    def test_load_from__comes_after_all_other(self, tmp_path: Path) -> None:
        path = tmp_path / "begun.pth"
        path.write_bytes(b"")
        runner = built(resnet_config(tmp_path, {"load_from": str(path)}))
        assert weights_origin(runner) == {
            "checkpoint": str(path),
            "sha256": sha256().hexdigest(),
        }


def test_make_card__of_a_test_whose_training_is_unknown(tmp_path: Path) -> None:
    runner = built(tiny_config("stellar_voc", tmp_path))
    evaluation = read_evaluation(runner, runner.test_loop)
    found = make_card(runner, {"split": "not told", "lrs": "not told"}, evaluation)
    assert found.fields["split"] == "not told / val"
    assert found.fields["lrs"] == "not told"
    assert found.fields["crop"] == 512
