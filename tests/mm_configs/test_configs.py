from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.datasets import CityscapesDataset, PascalVOCDataset
from mmseg.registry import DATASETS, MODELS, PARAM_SCHEDULERS
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import mm_configs
from stellar_plugin.checkpoints.layouts import AIM, TIMM
from stellar_plugin.checkpoints.methods import METHODS as PUBLISHED
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.mmseg.card.card import make_card, read_evaluation, read_training
from stellar_plugin.protocols import SEGMENTATION, SegmentationProtocol, segmentation
from tests.stellar_plugin.mmseg.mmseg_sets import write_digit_boards
from tests.stellar_plugin.mmseg.runners import built, load, named, tiny_config

CONFIGS = Path(__file__).parents[2] / "mm_configs"
# Classes of the community's and of the paper's family.
SETS = {
    "ade20k": (150, 150),
    "cityscapes": (19, 33),
    "voc": (21, 20),
}
SUFFIXES = ("", "_paper")
# Arguments of an encoder that are of one size.
SIZES = ("model_name", "img_size", "init_values")
VITS = (TIMM, AIM)
PROTOCOL = [f"stellar_{data}" for data in SETS]


def data_of(name: str) -> str:
    """The data set that a config is named after."""
    (data,) = (data for data in SETS if f"_{data}" in name)
    return data


# Rows of the table of methods, by the beginning of the names of their configs.
SYSTEMS = {
    system.config: (method, paper, system)
    for method in PUBLISHED
    for paper in method.papers
    for system in paper.systems
    if system.config
}
BASELINES = [stem for stem in SYSTEMS if stem != "stellar"]
# Of the last map, where it has not the 768 of ViT-B.
CHANNELS = {
    **dict.fromkeys(("mae_large", "ibot_large", "dinov2_large", "stellar_large"), 1024),
    **dict.fromkeys(("beit_large", "simmim"), 1024),
    **dict.fromkeys(("mae_huge", "stellar_huge", "ijepa"), 1280),
    **dict.fromkeys(("byol", "densecl", "aim_1b"), 2048),
    "aim_600m": 1536,
}
FINETUNE = [f"stellar_{data}_finetune" for data in SETS]
ALL = {
    *("stellar_digit_boards", "stellar_own_data", *FINETUNE),
    *(f"{stem}_{d}{suffix}" for stem in SYSTEMS for d in SETS for suffix in SUFFIXES),
}
# Those of one system are alike but for the data, which `test_text` sees: one of each
# family is read, which takes a tenth of a second.
COMMUNITY = [*PROTOCOL, *(f"{stem}_ade20k" for stem in BASELINES)]
PAPER = [
    *(f"{name}_paper" for name in PROTOCOL),
    *(f"{stem}_voc_paper" for stem in BASELINES),
]
NUM_CLASSES = {
    "stellar_digit_boards": 11,
    "stellar_own_data": 2,
    **{name: SETS[data_of(name)][0] for name in COMMUNITY},
    **{name: SETS[data_of(name)][1] for name in (*PAPER, *FINETUNE)},
}
CARDS = [*PROTOCOL, *(f"{name}_paper" for name in PROTOCOL), *FINETUNE]
PROTOCOLS = {
    name: protocol
    for name, protocol in vars(segmentation).items()
    if isinstance(protocol, SegmentationProtocol)
}


def files_of(stem: str) -> Files | None:
    """Facts of the published files of a system, None for STELLAR's own."""
    method = SYSTEMS[stem][0]
    return None if method.name == "STELLAR" else method.files[0]


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images that the system of a config was trained on."""
    stems = [stem for stem in SYSTEMS if name.startswith(f"{stem}_")]
    files = files_of(max(stems, key=len))
    return (
        (files and files.mean) or IMAGENET_DEFAULT_MEAN,
        (files and files.std) or IMAGENET_DEFAULT_STD,
    )


def backbone(stem: str) -> dict[str, Any]:
    """What the base of a system says of its backbone beside the file's name."""
    files, (method, _, system) = files_of(stem), SYSTEMS[stem]
    if files is None:
        return {"init_cfg": {}}
    if files.layout not in VITS:
        return {"type": "PretrainedNetwork", "init_cfg": {}}
    # Sizes are those of ViT-B; the other ones are the checkpoint's.
    of_b = system.name.endswith(" ViT-B")
    given = {k: v for k, v in method.vit_b.items() if of_b or k not in SIZES}
    return {"num_queries": 0, "norm_eps": files.norm_eps, "init_cfg": {}, **given}


def settings(cfg: Config, part: str, step: str, name: str) -> list[Any]:
    """What a step of a pipeline is set to: once, or never where it is not used."""
    pipeline = cfg[f"{part}_dataloader"].dataset.pipeline
    return [s[name] for s in pipeline if step == s.get("name", s["type"]) and name in s]


def numbers(cfg: Config) -> dict[str, list[Any]]:
    """Every place of a config where a number of the protocol stands, by its field."""
    model, optimizer = cfg.model, cfg.optim_wrapper.optimizer
    scales = settings(cfg, "train", "RandomResize", "scale")
    sides = settings(cfg, "train", "RandomResizedCrop", "size")
    squares = [model.data_preprocessor.size, model.test_cfg.get("crop_size", ())]
    squares += settings(cfg, "train", "RandomCrop", "crop_size")
    resized = []
    for part in ("val", "test"):
        scales += settings(cfg, part, "Resize", "scale")
        resized += settings(cfg, part, "Resize", "size")
        sides += settings(cfg, part, "CenterCrop", "size")
    iterations = cfg.train_cfg.get("max_iters")
    evaluators = (cfg.val_evaluator, cfg.test_evaluator)
    return {
        "resize": resized + [min(scale) for scale in scales],
        "longest": [max(scale) for scale in scales],
        "crop": sides + [side for square in squares for side in square],
        "stride": list(model.test_cfg.get("stride", ())),
        "train_scale": settings(cfg, "train", "RandomResizedCrop", "scale"),
        "train_ratio": settings(cfg, "train", "RandomResize", "ratio_range"),
        "num_classes": [model.decode_head.num_classes],
        "lrs": [(optimizer.lr,)],
        "batch_sizes": [(cfg.train_dataloader.batch_size,)],
        "weight_decay": [optimizer.weight_decay],
        "epochs": [n for n in [cfg.train_cfg.get("max_epochs")] if n],
        "iterations": [n for n in [iterations] if n],
        "warmup": [
            s.fraction * iterations for s in cfg.param_scheduler if "fraction" in s
        ],
        "evaluation_batch": [e.batch_size for e in evaluators if "batch_size" in e],
    }


def learning_rates(cfg: Config, max_iters: int) -> list[float]:
    """The learning rate of every iteration, by mmengine's own schedulers.

    As `Runner.build_param_scheduler` does, `end` is the length of the run.
    """
    optimizer = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=cfg.optim_wrapper.optimizer.lr
    )
    schedulers = [
        PARAM_SCHEDULERS.build({"end": max_iters, **s, "optimizer": optimizer})
        for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_all_configs_are_listed() -> None:
    assert set(mm_configs.names()) == ALL


@pytest.mark.parametrize("name", ["stellar_voc", "_base_/stellar_linear"])
def test_base__from_anywhere(name: str, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(f'_base_ = __import__("mm_configs").path("{name}")\nseed = 3\n')
    expected = {**load(name).to_dict(), "seed": 3}
    assert Config.fromfile(own).to_dict() == expected


def test_path__no_such_config() -> None:
    with pytest.raises(FileNotFoundError, match="'nothing'; `stellar configs` lists"):
        mm_configs.path("nothing")


@pytest.mark.slow
def test_all_protocols_are_followed() -> None:
    of_sets = {name for name, protocol in PROTOCOLS.items() if protocol.data}
    followed = {load(name).evaluation.protocol for name in NUM_CLASSES}
    assert followed == {*of_sets, "SEGMENTATION"}


@pytest.mark.parametrize("name", NUM_CLASSES)
class TestEveryConfig:
    @pytest.mark.slow
    def test_model__builds(self, name: str) -> None:
        cfg = load(name)
        with (
            DefaultScope.overwrite_default_scope(cfg.default_scope),
            torch.device("meta"),
        ):
            model = MODELS.build(cfg.model)
        assert model.num_classes == model.decode_head.conv_seg.out_channels
        assert model.num_classes == NUM_CLASSES[name]
        assert type(model.decode_head.norm) is torch.nn.BatchNorm2d
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        if name in FINETUNE:
            assert "backbone.encoder.vit.patch_embed.proj.weight" in trainable
            trainable = [n for n in trainable if not n.startswith("backbone.")]
        assert sorted(trainable) == [
            "decode_head.conv_seg.bias",
            "decode_head.conv_seg.weight",
            "decode_head.norm.bias",
            "decode_head.norm.weight",
        ]

    def test_images__normalised_as_in_pretraining(self, name: str) -> None:
        cfg = load(name)
        preprocessor = MODELS.build(cfg.model.data_preprocessor)
        mean, std = map(torch.tensor, normalisation(name))
        # OpenCV's order of channels, intensities up to 255.
        bgr = torch.tensor([255, 0, 51], dtype=torch.uint8)
        sample = {"inputs": [bgr[:, None, None].expand(3, 60, 60)], "data_samples": []}
        (normalised,) = preprocessor(sample)["inputs"]
        expected = (torch.tensor([0.2, 0.0, 1.0]) - mean) / std
        torch.testing.assert_close(normalised[:, 0, 0], expected, rtol=1e-4, atol=1e-4)

    def test_result_is_stored(self, name: str) -> None:
        hooks = ("SegmentationResultHook", "ResumeByConfigHook")
        assert load(name).custom_hooks == [{"type": hook} for hook in hooks]

    def test_inference__has_the_pipeline_of_the_test(self, name: str) -> None:
        cfg = load(name)
        # mmsegmentation's bases name their scope besides.
        steps = [
            {k: v for k, v in s.items() if k != "_scope_"} for s in cfg.test_pipeline
        ]
        assert steps == cfg.test_dataloader.dataset.pipeline


def cards(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is read from a run of a config, for validation and for test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = built(cfg)
    training = read_training(runner)
    found = [
        make_card(runner, training.fields, read_evaluation(runner, loop))
        for loop in (runner.val_loop, runner.test_loop)
    ]
    assert not any(readings.notes for readings in (training, *found))
    return [readings.fields for readings in found]


# The other methods' configs differ in the backbone alone: TestMethods.
@pytest.mark.parametrize("name", CARDS)
def test_card__is_the_protocols(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(name, tmp_path)
    card = PROTOCOLS[cfg.evaluation.protocol].card()
    assert cards(cfg, monkeypatch) == [card, card]


@pytest.mark.parametrize("name", [*COMMUNITY, *PAPER, *FINETUNE])
class TestEveryProtocol:
    def test_numbers__are_the_protocols_wherever_they_stand(self, name: str) -> None:
        cfg = load(name)
        card = PROTOCOLS[cfg.evaluation.protocol].card()
        found = {
            field: [list(v) if isinstance(v, tuple) else v for v in values]
            for field, values in numbers(cfg).items()
            if values
        }
        expected = {k: v for k, v in card.items() if not isinstance(v, str)}
        assert found.keys() == expected.keys()
        for field, values in found.items():
            assert values == [pytest.approx(expected[field])] * len(values), field


def test_digit_boards__card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = copy.deepcopy(load("stellar_digit_boards"))
    data = write_digit_boards(tmp_path / "data")
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.data_root = str(data)
    cfg = named(cfg, tmp_path / "work")
    card = SEGMENTATION.card()
    for name in ("resize", "crop", "longest", "stride", "train_ratio"):
        del card[name]
    card = {
        **card,
        "source": "the demo",
        "data": "digit boards",
        "features": "lowrank",
        "split": "training / validation",
        "train_views": "whole images",
        "inference": "whole image",
        "classes": "digits and background, label 0 is ignored",
        "num_classes": 11,
        "lrs": [0.01],
        "iterations": 300,
        "warmup": 30,
    }
    assert cards(cfg, monkeypatch) == [card, card]


DUMPED = [
    "stellar_ade20k",
    "stellar_own_data",
    "stellar_digit_boards",
    "dinov2_voc_paper",
]


@pytest.mark.parametrize("name", DUMPED)
def test_saved_by_the_runner__stands_alone(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    cfg.dump(tmp_path / "dumped.py")
    again = Config.fromfile(tmp_path / "dumped.py")
    assert again.model == cfg.model
    assert again.train_dataloader == cfg.train_dataloader
    assert list(again.custom_imports.imports) == ["stellar_plugin.mmseg"]


@pytest.mark.parametrize("name", ["stellar_ade20k", "stellar_digit_boards"])
class TestOwnAndInheritedSchedule:
    @pytest.mark.parametrize("max_iters", [None, 400])
    def test_learning_rate__warm_up_then_to_zero(
        self, name: str, max_iters: int | None
    ) -> None:
        cfg = load(name)
        max_iters = max_iters or cfg.train_cfg.max_iters
        fraction = 30 / 300 if name == "stellar_digit_boards" else 1500 / 40000
        warmup = round(fraction * max_iters)
        peak, last = cfg.optim_wrapper.optimizer.lr, max_iters - 1
        rates = learning_rates(cfg, max_iters)
        for t in (0, 1, warmup // 2, warmup - 1, warmup, last // 2, last):
            factor = 1e-6 + (1 - 1e-6) * min(1, t / (warmup - 1))
            assert rates[t] == pytest.approx(peak * (1 - t / last) * factor, abs=1e-15)


@pytest.mark.parametrize("name", PROTOCOL)
class TestCommunityProtocol:
    def test_what_no_number_says(self, name: str) -> None:
        cfg = load(name)
        assert cfg.param_scheduler == load("stellar_ade20k").param_scheduler
        assert cfg.model.test_cfg.mode == "slide"
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            assert evaluator.type == "CountedIoUMetric"
            assert evaluator.iou_metrics == ["mIoU"]
        assert cfg.sync_bn == "torch"
        assert cfg.model.decode_head.loss_decode.type == "CrossEntropyLoss"


class TestVoc:
    def test_training_split__without_the_augmented_set(self) -> None:
        dataset = load("stellar_voc").train_dataloader.dataset
        assert dataset.type == "PascalVOCDataset"
        assert dataset.ann_file == "ImageSets/Segmentation/train.txt"


@pytest.mark.parametrize("name", [*PAPER, *FINETUNE])
class TestPaperProtocol:
    def test_what_no_number_says(self, name: str) -> None:
        cfg = load(name)
        steps = cfg.test_dataloader.dataset.pipeline
        assert [step.get("name") for step in steps[2:4]] == ["Resize", "CenterCrop"]
        assert settings(cfg, "train", "RandomFlip", "prob") == [0.5]
        assert cfg.param_scheduler == []
        losses = [
            (x["type"], x["loss_weight"]) for x in cfg.model.decode_head.loss_decode
        ]
        assert losses == [("CrossEntropyLoss", 1.0), ("LabelledDiceLoss", 1.0)]
        assert cfg.val_evaluator.type == cfg.test_evaluator.type == "BatchJaccard"

    def test_labels__zero_is_ignored_on_every_set(self, name: str) -> None:
        cfg = load(name)
        for part in ("train", "val", "test"):
            dataset = cfg[f"{part}_dataloader"].dataset
            assert dataset.reduce_zero_label
            own = DATASETS.get(dataset.type).METAINFO
            classes = {**own, **dataset.get("metainfo", {})}["classes"]
            assert len(classes) == NUM_CLASSES[name]


class TestPaperCityscapes:
    def test_classes__are_the_raw_ids_1_to_33(self) -> None:
        dataset = load("stellar_cityscapes_paper").val_dataloader.dataset
        assert dataset.seg_map_suffix == "_gtFine_labelIds.png"
        names = dataset.metainfo.classes
        # Class = id - 1; ids as in the Cityscapes scripts.
        ids = {"ego vehicle": 1, "road": 7, "building": 11, "car": 26, "bicycle": 33}
        assert {name: names.index(name) + 1 for name in ids} == ids
        train_ids = CityscapesDataset.METAINFO["classes"]
        assert [name for name in names if name in train_ids] == list(train_ids)


class TestPaperVoc:
    def test_classes__without_background(self) -> None:
        classes = load("stellar_voc_paper").val_dataloader.dataset.metainfo.classes
        assert list(classes) == list(PascalVOCDataset.METAINFO["classes"][1:])


@pytest.mark.parametrize("stem", BASELINES)
class TestSystems:
    def test_text(self, stem: str) -> None:
        """All six are the same lines: what is read of one holds for all."""
        _, _, system = SYSTEMS[stem]
        method, architecture = system.name.rsplit(" ", 1)
        for data, suffix in itertools.product(SETS, SUFFIXES):
            base = f"stellar_{data}{suffix}.py"
            assert Path(mm_configs.path(f"{stem}_{data}{suffix}")).read_text() == (
                f"# {base} with the {architecture} of {method}.\n"
                f'_base_ = ["./{base}", "./_base_/backbones/{stem}.py"]\n\n'
                "model = _base_.baseline.model\n"
                "evaluation = dict(model=_base_.baseline.name)\n"
            )

    def test_base__is_the_row_of_the_method(self, stem: str) -> None:
        _, paper, system = SYSTEMS[stem]
        path = CONFIGS / "_base_" / "backbones" / f"{stem}.py"
        base = Config.fromfile(path).baseline.to_dict()
        assert base["name"] == system.name
        assert paper.url in path.read_text()
        model = base["model"]
        file = model["backbone"]["init_cfg"].pop("checkpoint")
        assert file == f"checkpoints/{system.file}"
        assert model.pop("decode_head", {}) == (
            {"in_channels": CHANNELS[stem]} if stem in CHANNELS else {}
        )
        normalised = model.pop("data_preprocessor", {})
        usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        told = dict(zip(("mean", "std"), normalisation(f"{stem}_voc"), strict=True))
        assert normalised == {
            name: pytest.approx([255 * value for value in values])
            for name, values in told.items()
            if tuple(values) != usual[name]
        }
        assert model == {"backbone": backbone(stem)}

    def test_only_the_model_differs(self, stem: str) -> None:
        for data, suffix in (("ade20k", ""), ("voc", "_paper")):
            name = f"{stem}_{data}{suffix}"
            cfg, stellar = load(name), load(f"stellar_{data}{suffix}")
            system = SYSTEMS[stem][2]
            assert cfg.evaluation == {**stellar.evaluation, "model": system.name}
            assert cfg.model.backbone.init_cfg.type == "Pretrained"
            assert (
                cfg.model.backbone.init_cfg.checkpoint == f"checkpoints/{system.file}"
            )
            assert cfg.model.backbone.frozen
            head = {**cfg.model.decode_head}
            assert head.pop("in_channels") == CHANNELS.get(stem, 768)
            assert {**head, "in_channels": 768} == stellar.model.decode_head
            own = ("backbone", "decode_head", "data_preprocessor")
            assert {k: v for k, v in cfg.model.items() if k not in own} == {
                k: v for k, v in stellar.model.items() if k not in own
            }
            own = ("model", "evaluation", "baseline", "filename")
            assert {k: v for k, v in cfg.items() if k not in own} == {
                k: v for k, v in stellar.items() if k not in own
            }


def test_docs__name_every_system() -> None:
    text = (CONFIGS.parent / "docs/segmentation.md").read_text()
    for stem, (_, _, system) in SYSTEMS.items():
        channels, file = CHANNELS.get(stem, 768), load(f"{stem}_ade20k")
        file = file.model.backbone.init_cfg.checkpoint.removeprefix("checkpoints/")
        cells = f"{channels} | {system.stride} | `{file}`"
        assert f"| {system.name} | `{stem}_ade20k` | {cells} |\n" in text
    assert text.count("_ade20k` | ") == len(SYSTEMS)


@pytest.mark.parametrize("stem", ["mae", "dino", "ibot", "mocov3", "dinov2"])
def test_vit(stem: str) -> None:
    cfg = load(f"{stem}_ade20k")
    with torch.device("meta"):
        encoder = MODELS.build(cfg.model.backbone).encoder
    assert encoder.embed_dim == cfg.model.decode_head.in_channels
    assert encoder.num_queries == encoder.vit.num_reg_tokens == 0
    assert encoder.patch_size == (14 if stem == "dinov2" else 16)
    assert encoder.vit.norm.eps == 1e-6
    assert hasattr(encoder.vit.blocks[0].ls1, "gamma") == (stem == "dinov2")
    side = 37 if stem == "dinov2" else 14
    assert encoder.vit.patch_embed.grid_size == (side, side)
