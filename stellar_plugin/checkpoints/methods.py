"""The published methods: how their files are recognised, and how they are used.

One row per method. The reader of checkpoints, the features that "auto" stands for,
error messages and docs/models.md take from this table what they know of a method.
"""

from __future__ import annotations

import fnmatch
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from stellar_plugin.checkpoints.layouts import (
    AIM,
    BEIT,
    HAIKU,
    LAYOUTS,
    OFFICIAL,
    RESNET,
    STELLAR,
    SWIN,
    TIMM,
    TITOK,
    TRANSFORMERS,
)
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.positions import are_sines
from stellar_plugin.vit import STELLAR_NORM_EPS


@dataclass(frozen=True)
class System:
    """A model of the tables of STELLAR's paper.

    Attributes:
        name: Its name in published tables.
        file: Name of its published file, or of the model, in a folder where the
            files of several have one name.
        config: Beginning of the names of its configs in mm_configs, "" if it has none.
        options: With which `stellar evaluate` reads it as the paper did.
        size: Side of the images then, in px.
        stride: Side of a cell of its map of dense features, in px, None without map.
    """

    name: str
    file: str
    config: str = ""
    options: str = ""
    size: int = 224
    stride: int | None = 16


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Attributes:
        name: Its name there.
        url: Address of the paper.
        systems: Its models in the tables of STELLAR's paper.
        license: Licence under which its authors publish weights, or code and weights
            together, "" if none is stated.
    """

    name: str
    url: str
    systems: tuple[System, ...] = ()
    license: str = ""


@dataclass(frozen=True)
class Check:
    """What tensors must be like, where their names do not tell enough.

    Attributes:
        text: What must hold, in words.
        holds: Whether it does, of the tensors of a file by its names.
    """

    text: str
    holds: Callable[[State], bool]


# Of a licence.
NOT_STATED = "not stated"

SINES = Check(
    "positions of sines and cosines", lambda state: are_sines(state.get("pos_embed"))
)

CODES = 8192  # of the tokenizer that BEiT predicts
PREDICTS_CODES = Check(
    f"{CODES} rows of lm_head",
    lambda state: _shape(state, "lm_head.weight")[:1] == (CODES,),
)
PREDICTS_FEATURES = Check(
    "a square lm_head",
    lambda state: len({*_shape(state, "lm_head.weight"), 0}) == 2,
)


def _of_8_px(state: State) -> bool:
    table, kernel = _shape(state, "pos_embed"), _shape(state, "patch_embed.proj.weight")
    return table[1:2] == (1 + 28 * 28,) and kernel[2:] == (16, 16)


# SemMAE's code gathers positions of patches of 16 px from the table of those of 8 px.
OF_8_PX = Check("785 positions for patches of 16 px", _of_8_px)
SINES_OF_8_PX = Check(
    f"{SINES.text}, {OF_8_PX.text}",
    lambda state: SINES.holds(state) and OF_8_PX.holds(state),
)


@dataclass(frozen=True)
class Files:
    """One kind of files of a method: what tells them, what their tensors do not tell.

    A file is of this kind if it is of the layout, has all that it needs, and one of
    `marks`, `wrappers` or `called` tells, or none is named. Marks are stronger: a
    wrapper decides only where no mark of any method does, a file's name last.

    Attributes:
        layout: How tensors are named, one of `layouts.LAYOUTS`.
        marks: Patterns (as in `fnmatch`) of names of tensors.
        wrappers: Dictionaries or prefixes around the weights, the preferred one first.
        called: Patterns of names of published files of which nothing else tells.
        needs: Patterns of names that must all be there too.
        lacks: Patterns of names none of which may be there.
        check: What must hold of the tensors too.
        renamed: Parts of names -> parts of the names of the layout.
        ignored: Beginnings of names that features do not depend on.
        norm_eps: Epsilon of every LayerNorm.
        pos_antialias: Whether positions are resampled with antialiasing, None if the
            method does not say.
        num_heads: Attention heads, where the width does not tell.
        mean: Per-channel mean of the images, where it is not ImageNet's.
        std: Per-channel standard deviation of the images, where not ImageNet's.
        arguments: Other arguments of `StellarEncoder` that no tensor shows.
    """

    layout: str = TIMM
    marks: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    check: Check | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    norm_eps: float = 1e-6
    pos_antialias: bool | None = False
    num_heads: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def numerics(self) -> dict[str, Any]:
        """Arguments of `Stellar` that no tensor shows, as far as they are known."""
        names = ("norm_eps", "pos_antialias", "num_heads", "mean", "std")
        return {**self._known(*names), **self.arguments}

    def images(self) -> dict[str, Any]:
        """Mean and std of the images, where they are told."""
        return self._known("mean", "std")

    def _known(self, *names: str) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Method:
    """A published method, or several whose files cannot be told apart.

    Attributes:
        name: Name in results and messages.
        feature: Where its objective acts, so what features "auto" are: one of
            `protocols.FEATURES`, None if they must be named.
        files: The kinds of its files.
        papers: Where it was published.
        timm_names: Patterns of timm's names of its weights.
        vit_b: Arguments of `StellarEncoder` for its ViT-B, where not STELLAR's.
    """

    name: str
    feature: str | None
    files: tuple[Files, ...]
    papers: tuple[Paper, ...]
    timm_names: tuple[str, ...] = ()
    vit_b: Mapping[str, Any] = field(default_factory=dict)

    @property
    def license(self) -> str:
        """Licence of the published weights, "" if none is stated.

        Of papers that do not agree all are named, each with its own.
        """
        licenses = {paper.name: paper.license for paper in self.papers}
        if len(set(licenses.values())) == 1:
            return next(iter(licenses.values()))
        return ", ".join(f"{of} {text or NOT_STATED}" for of, text in licenses.items())


_OF_DINOV2: dict[str, Any] = {
    "renamed": {
        "register_tokens": "reg_token",
        ".mlp.w12.": ".mlp.fc1.",
        ".mlp.w3.": ".mlp.fc2.",
    },
    "ignored": ("mask_token",),
}
_OF_DINOV3: dict[str, Any] = {
    "ignored": ("mask_token",),
    "norm_eps": 1e-5,
    "pos_antialias": None,
}
_OF_BEIT: dict[str, Any] = {
    "ignored": ("mask_token", "lm_head."),
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
}
_OF_MAE = ("mask_token", "decoder_")
_OF_SEMMAE: dict[str, Any] = {"ignored": _OF_MAE, "arguments": {"img_size": 224}}
# A dictionary around a ResNet-50 whose names are its author's, in torchvision's order.
ORDERED = "online_backbone"

# In the order in which they are tried.
METHODS = (
    Method(
        "STELLAR",
        "sparse",
        (Files(STELLAR), Files(OFFICIAL, norm_eps=STELLAR_NORM_EPS)),
        (
            Paper(
                "STELLAR",
                "https://arxiv.org/abs/2602.01905",
                (
                    System("STELLAR ViT-B", "stellar-b16", "stellar"),
                    System("STELLAR ViT-L", "stellar-l16", "stellar_large"),
                    System("STELLAR ViT-H", "stellar-h16", "stellar_huge", stride=14),
                ),
            ),
        ),
    ),
    # Before the others: a supervised head may be on weights of every method.
    Method(
        "a classifier",
        None,
        (
            Files(
                marks=("head.weight", "head_dist.weight", "fc_norm.weight"),
                ignored=(*_OF_MAE, "lm_head.", "masked_embed"),
                pos_antialias=None,
            ),
            Files(
                TRANSFORMERS, marks=("classifier.weight",), norm_eps=STELLAR_NORM_EPS
            ),
            # MoCo's projection is called so too.
            Files(RESNET, marks=("fc.weight", "head.fc.weight"), lacks=("queue",)),
            Files(BEIT, marks=("head.weight", "fc_norm.weight")),
            Files(SWIN, marks=("head.weight", "head.fc.weight")),
        ),
        (Paper("DeiT", "https://arxiv.org/abs/2012.12877"),),
    ),
    Method(
        "BYOL",
        "cls",
        (
            Files(HAIKU, wrappers=("online_params", "target_params")),
            Files(RESNET, wrappers=(ORDERED,)),
            # mmselfsup and mmpretrain, then lightly's benchmarks.
            Files(RESNET, marks=("target_net.*",)),
            Files(
                RESNET,
                marks=("prediction_head.*",),
                needs=("teacher_projection_head.*",),
            ),
        ),
        (
            Paper(
                "BYOL",
                "https://arxiv.org/abs/2006.07733",
                (
                    System(
                        "BYOL RN-50",
                        "byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331.pth",
                        "byol",
                        stride=32,
                    ),
                ),
                "Apache-2.0",
            ),
        ),
    ),
    Method(
        "DenseCL",
        "dense",
        # Its own training, and mmpretrain's; the published file names it as author.
        (
            Files(RESNET, marks=("queue2",)),
            Files(RESNET, wrappers=("encoder_q",), needs=("queue2",)),
        ),
        (
            Paper(
                "DenseCL",
                "https://arxiv.org/abs/2011.09157",
                (
                    System(
                        "DenseCL RN-50",
                        "densecl_r50_imagenet_200ep.pth",
                        "densecl",
                        stride=32,
                    ),
                ),
                "GPL-3.0",
            ),
        ),
    ),
    Method(
        "MoCo v3",
        "cls",
        # Its ViT-S has 12 heads too.
        (
            Files(
                wrappers=("base_encoder", "momentum_encoder"),
                ignored=("predictor.",),
                num_heads=12,
            ),
        ),
        (
            Paper(
                "MoCo v3",
                "https://arxiv.org/abs/2104.02057",
                (System("MoCo v3 ViT-B", "vit-b-300ep.pth.tar", "mocov3"),),
                "CC BY-NC 4.0",
            ),
        ),
    ),
    Method(
        "MSN",
        "cls",
        # With its projection head: I-JEPA wraps weights so, too.
        (
            Files(
                wrappers=("target_encoder",),
                needs=("cls_token", "fc.fc1.weight"),
            ),
        ),
        (
            Paper(
                "MSN",
                "https://arxiv.org/abs/2204.07141",
                (System("MSN ViT-B", "vitb16_600ep.pth.tar", "msn"),),
                "CC BY-NC 4.0",
            ),
        ),
    ),
    Method(
        "I-JEPA",
        "dense",
        (
            Files(
                wrappers=("target_encoder",),
                lacks=("cls_token",),
                ignored=("predictor.",),
            ),
        ),
        (
            Paper(
                "I-JEPA",
                "https://arxiv.org/abs/2301.08243",
                (
                    System(
                        "I-JEPA ViT-H",
                        "IN1K-vit.h.14-300e.pth.tar",
                        "ijepa",
                        stride=14,
                    ),
                ),
                "CC BY-NC 4.0",
            ),
        ),
        timm_names=("*_ijepa",),
    ),
    Method(
        "BEiT",
        "dense",
        (
            # The second version has more blocks behind it, and other images.
            Files(
                BEIT,
                marks=("lm_head.weight",),
                lacks=("cls_pt_layers.*",),
                check=PREDICTS_CODES,
                **_OF_BEIT,
            ),
            Files(marks=("*.q_bias",), lacks=("reg_token",), **_OF_BEIT),
        ),
        (
            Paper(
                "BEiT",
                "https://arxiv.org/abs/2106.08254",
                (
                    System("BEiT ViT-B", "beit_base_patch16_224_pt22k.pth", "beit"),
                    System(
                        "BEiT ViT-L", "beit_large_patch16_224_pt22k.pth", "beit_large"
                    ),
                ),
                license="MIT",
            ),
        ),
    ),
    Method(
        "data2vec",
        "dense",
        (
            Files(
                BEIT,
                marks=("lm_head.weight",),
                check=PREDICTS_FEATURES,
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            ),
        ),
        (
            Paper(
                "data2vec",
                "https://arxiv.org/abs/2202.03555",
                (System("Data2Vec ViT-B", "base_800/checkpoint-799.pth", "data2vec"),),
                license="MIT",
            ),
        ),
    ),
    Method(
        "SimMIM",
        "dense",
        (
            Files(
                SWIN,
                marks=("mask_token", "decoder.0.weight"),
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            ),
        ),
        (
            Paper(
                "SimMIM",
                "https://arxiv.org/abs/2111.09886",
                (
                    System(
                        "SimMIM Swin-B",
                        "simmim_pretrain__swin_base__img192_window6__800ep.pth",
                        "simmim",
                        options="--resize 256 --crop 224",
                        stride=32,
                    ),
                ),
                license="MIT",
            ),
        ),
    ),
    Method(
        "DINO or iBOT",
        "cls",
        (
            Files(
                marks=("head.last_layer.*", "*.head.last_layer.*"),
                ignored=("masked_embed",),
            ),
            # Backbones alone.
            Files(called=("dino_*_pretrain.pth", "checkpoint_teacher.pth")),
            # lightly's examples and lightly-train's checkpoints, of any ViT.
            Files(
                marks=("*projection_head.last_layer.*", "teacher_head.last_layer.*"),
                pos_antialias=None,
                **_OF_DINOV2,
            ),
        ),
        (
            Paper(
                "DINO",
                "https://arxiv.org/abs/2104.14294",
                (System("DINO ViT-B", "dino_vitbase16_pretrain.pth", "dino"),),
                "Apache-2.0",
            ),
            Paper(
                "iBOT",
                "https://arxiv.org/abs/2111.07832",
                # One name of all sizes: only a folder tells.
                (
                    System(
                        "iBOT ViT-B",
                        "checkpoint_teacher.pth",
                        "ibot",
                        '--name "iBOT ViT-B"',
                    ),
                    System(
                        "iBOT ViT-L", "ibot_large/checkpoint_teacher.pth", "ibot_large"
                    ),
                ),
                "Apache-2.0",
            ),
        ),
        timm_names=("*.dino",),
        vit_b={"pos_antialias": False},
    ),
    Method(
        "SiameseIM",
        "dense",
        # Those of the average of the weights, which begin with mm_, are not read.
        (
            Files(
                marks=("mm_patch_embed.*", "projector_decoder_blocks.*"),
                ignored=(
                    *_OF_MAE,
                    "mm_",
                    "projector_decoder_blocks.",
                    "predictor_decoder_blocks.",
                ),
                arguments={"final_norm": False},
            ),
        ),
        (
            Paper(
                "SiameseIM",
                "https://arxiv.org/abs/2206.01204",
                (
                    System(
                        "SiameseIM ViT-B", "sim_base_1600ep_pretrain.pth", "siameseim"
                    ),
                ),
                "CC BY-NC 4.0",
            ),
        ),
        vit_b={"final_norm": False},
    ),
    Method(
        "SemMAE",
        "dense",
        (
            Files(marks=("decoder_*",), check=OF_8_PX, **_OF_SEMMAE),
            # Anybody wraps weights so.
            Files(wrappers=("model",), check=SINES_OF_8_PX, **_OF_SEMMAE),
        ),
        (
            Paper(
                "SemMAE",
                "https://arxiv.org/abs/2206.10207",
                # Where it is published it has no name.
                (System("SemMAE ViT-B", "semmae_vit_base_patch16.pth", "semmae"),),
            ),
        ),
    ),
    Method(
        "AIM",
        "dense",
        (
            Files(
                AIM,
                ignored=("head.",),
                pos_antialias=None,
                arguments={"pos_embed": "sincos", "img_size": 224},
            ),
        ),
        (
            Paper(
                "AIM",
                "https://arxiv.org/abs/2401.08541",
                (
                    System(
                        "AIM 600M",
                        "aim_600m_2bimgs_attnprobe_backbone.pth",
                        "aim_600m",
                        stride=14,
                    ),
                    System(
                        "AIM 1B",
                        "aim_1b_5bimgs_attnprobe_backbone.pth",
                        "aim_1b",
                        stride=14,
                    ),
                ),
                "Apple Machine Learning Research Model License",
            ),
        ),
    ),
    Method(
        "MAE",
        "dense",
        (
            # lightly's examples, which have a decoder of its own.
            Files(
                marks=("decoder.decoder_embed.*", "decoder_embed.*"),
                needs=("decoder.mask_token",),
                ignored=_OF_MAE,
                pos_antialias=True,
            ),
            Files(
                TRANSFORMERS,
                marks=("decoder.*",),
                ignored=("decoder.",),
                norm_eps=STELLAR_NORM_EPS,
            ),
        ),
        (
            Paper(
                "MAE",
                "https://arxiv.org/abs/2111.06377",
                (
                    System("MAE ViT-B", "mae_pretrain_vit_base.pth", "mae"),
                    System("MAE ViT-L", "mae_pretrain_vit_large.pth", "mae_large"),
                    System(
                        "MAE ViT-H", "mae_pretrain_vit_huge.pth", "mae_huge", stride=14
                    ),
                ),
                "CC BY-NC 4.0",
            ),
        ),
        timm_names=("*.mae",),
    ),
    Method(
        "MAE or SemMAE",
        "dense",
        (
            Files(marks=("decoder_*",), ignored=_OF_MAE),
            # Anybody wraps weights so.
            Files(wrappers=("model",), check=SINES, ignored=_OF_MAE),
        ),
        (
            Paper("MAE", "https://arxiv.org/abs/2111.06377", license="CC BY-NC 4.0"),
            Paper("SemMAE", "https://arxiv.org/abs/2206.10207"),
        ),
    ),
    Method(
        "TiTok",
        "sparse",
        (
            Files(
                TITOK,
                norm_eps=1e-5,
                pos_antialias=None,
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
            ),
        ),
        (
            Paper(
                "TiTok",
                "https://arxiv.org/abs/2406.07550",
                (
                    System(
                        "TiTok-64 ViT-B",
                        "tokenizer_titok_b64.bin",
                        size=256,
                        stride=None,
                    ),
                    System(
                        "TiTok-32 ViT-L",
                        "tokenizer_titok_l32.bin",
                        size=256,
                        stride=None,
                    ),
                ),
                license="Apache-2.0",
            ),
        ),
    ),
    Method(
        "DINOv2",
        "cls+dense",
        # Those with registers were released with antialiasing.
        (
            Files(marks=("register_tokens",), pos_antialias=True, **_OF_DINOV2),
            Files(
                marks=("mask_token",),
                needs=("*.ls1.gamma",),
                lacks=("storage_tokens",),
                **_OF_DINOV2,
            ),
            # lightly's examples and lightly-train's checkpoints.
            Files(
                marks=("teacher_dino_head.*", "teacher_head.dino_head.*"), **_OF_DINOV2
            ),
        ),
        (
            Paper(
                "DINOv2",
                "https://arxiv.org/abs/2304.07193",
                (
                    System(
                        "DINOv2 ViT-B",
                        "dinov2_vitb14_pretrain.pth",
                        "dinov2",
                        "--resize 256 --crop 224",
                        stride=14,
                    ),
                    System(
                        "DINOv2 ViT-L",
                        "dinov2_vitl14_pretrain.pth",
                        "dinov2_large",
                        "--resize 256 --crop 224",
                        stride=14,
                    ),
                ),
                "Apache-2.0",
            ),
        ),
        timm_names=("*_dinov2", "*_dinov2.*"),
        vit_b={
            "model_name": "vit_base_patch14_dinov2",
            "img_size": 518,
            "init_values": 1.0,
        },
    ),
    Method(
        "DINOv3",
        "cls+dense",
        (
            Files(marks=("storage_tokens",), **_OF_DINOV3),
            Files(
                marks=("blocks.0.gamma_2",),
                needs=("reg_token", "norm.weight"),
                lacks=("pos_embed",),
                **_OF_DINOV3,
            ),
        ),
        (
            Paper(
                "DINOv3",
                "https://arxiv.org/abs/2508.10104",
                license="DINOv3 License, "
                "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
            ),
        ),
        timm_names=(
            "*_dinov3",
            "*_dinov3.*",
            "*_dinov3_qkvb.lvd1689m",
            "*_dinov3_qkvb.sat493m",
        ),
        vit_b={"model_name": "vit_base_patch16_dinov3"},
    ),
    # Of the same tensors as DINOv3 or BEiT: known by timm's names alone.
    Method(
        "EVA-CLIP",
        None,
        (),
        (Paper("EVA-CLIP", "https://arxiv.org/abs/2303.15389", license="MIT"),),
        timm_names=("eva*_clip_*",),
    ),
    Method(
        "EUPE",
        None,
        (),
        (
            Paper(
                "EUPE",
                "https://github.com/facebookresearch/EUPE",
                license="FAIR Noncommercial Research License",
            ),
        ),
        timm_names=("*.eupe_*",),
    ),
    Method(
        "LingBot-Vision",
        None,
        (),
        (Paper("LingBot-Vision", "https://arxiv.org/abs/2607.05247"),),
        timm_names=("*_lingbot", "*_lingbot.*"),
    ),
)


def recognised(
    layout: str,
    names: Collection[str],
    wrappers: Collection[str],
    tensors: State,
    file: str,
) -> tuple[Method | None, Files | None, str]:
    """The method that trained a file, which of its kinds of files it is, what told it.

    Args:
        layout:
            Layout of the file.
        names:
            Names of its tensors.
        wrappers:
            Dictionaries and prefixes around the weights.
        tensors:
            Its tensors.
        file:
            Its own name.
    """
    possible = [
        (method, files)
        for method in METHODS
        for files in method.files
        if files.layout == layout
        and all(_has(names, p) for p in files.needs)
        and not any(_has(names, p) for p in files.lacks)
        and (files.check is None or files.check.holds(tensors))
    ]
    found = [
        (method, files, f"tensors {mark}" + _with_check(files))
        for method, files in possible
        for mark in files.marks
        if _has(names, mark)
    ]
    found += [
        (method, files, f"wrapper {wrapper}" + _with_check(files))
        for method, files in possible
        for wrapper in files.wrappers
        if wrapper in wrappers
    ]
    found += [
        (method, files, f"name of the file, {file}")
        for method, files in possible
        if _has([file], *files.called)
    ]
    found += [
        (method, files, f"names of layout '{layout}'")
        for method, files in possible
        if not (files.marks or files.wrappers or files.called)
    ]
    if not found:
        return None, None, ""
    method, files, rule = found[0]
    # What a supervised head sits on was trained for it, and is named as before.
    names_of = next((files for m, files, _ in found if m.feature), files)
    return method, names_of, rule


def of_timm(name: str) -> Method | None:
    """The method that trained timm's weights of a name, None if it does not say."""
    for method in METHODS:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in method.timm_names):
            return method
    return None


def system_of(source: str, method: str) -> System | None:
    """The system of the paper whose published file a source is, as far as names tell.

    None where the files of several have one name and no folder tells.

    Args:
        source:
            File, folder or name of a model.
        method:
            Name of the method that its tensors tell.
    """
    # Not all files of a paper need be of the row that has its systems.
    of_method = {p.name for m in METHODS if m.name == method for p in m.papers}
    named = [
        system
        for row in METHODS
        for paper in row.papers
        if paper.name in of_method
        for system in paper.systems
        if Path(source).name == Path(system.file).name
    ]
    for system in named:
        alone = len(named) == 1 or len(Path(system.file).parts) > 1
        if alone and Path(source).match(system.file):
            return system
    return None


def of_own(name: Any) -> Method:
    """The method that a file of this package names.

    Raises:
        ValueError: If there is none of that name.
    """
    for method in METHODS:
        if method.name.casefold() == str(name).casefold():
            return method
    raise ValueError(f"it names a method that is not known: {reprlib.repr(name)}")


def wrappers() -> tuple[str, ...]:
    """All that methods wrap their weights in, the preferred ones first."""
    return tuple(w for m in METHODS for files in m.files for w in files.wrappers)


def ignored(layout: str) -> tuple[str, ...]:
    """What a method ignores in files of a layout, for files of unknown methods."""
    files = [f for m in METHODS for f in m.files if f.layout == layout]
    return tuple(name for f in files for name in f.ignored)


def known_layouts() -> str:
    """The layouts that are read and the methods that use them, for messages."""
    texts = []
    for layout in LAYOUTS:
        of = [m.name for m in METHODS if any(f.layout == layout.name for f in m.files)]
        users = f", as of {', '.join(of)}" if of else ""
        texts.append(f"{layout.name} ({layout.example}){users}")
    return "; ".join(texts)


def table() -> str:
    """The methods as a Markdown table, as docs/models.md has it."""
    lines = [
        "| method | licence of weights | recognised by | features `auto` | in timm |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        papers = ", ".join(f"[{paper.name}]({paper.url})" for paper in method.papers)
        title = papers if method.name in papers else f"{method.name} ({papers})"
        cells = [
            title,
            method.license or NOT_STATED,
            "; ".join(_told_by(files) for files in method.files) or "-",
            f"`{method.feature}`" if method.feature else "to be named",
            ", ".join(f"`{pattern}`" for pattern in method.timm_names) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told_by(files: Files) -> str:
    told = [f"tensors `{mark}`" for mark in files.marks]
    told += [f"wrapper `{wrapper}`" for wrapper in files.wrappers]
    told += [f"a file `{name}`" for name in files.called]
    text = f"{files.layout}: {' or '.join(told)}" if told else files.layout
    text += "".join(f", with `{name}`" for name in files.needs)
    text += "".join(f", without `{name}`" for name in files.lacks)
    return text + _with_check(files)


def _with_check(files: Files) -> str:
    return f" and {files.check.text}" if files.check else ""


def _shape(state: State, name: str) -> tuple[int, ...]:
    return tuple(state[name].shape) if name in state else ()


def _has(names: Collection[str], *patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns)
