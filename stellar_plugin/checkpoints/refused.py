"""Files that are published beside those that are read, and hold no such network."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Refused:
    """One kind of file.

    Attributes:
        needs: Patterns (as in `fnmatch`) of names of tensors that are all there.
        lacks: Patterns of names none of which is there.
        text: What it is, and what to take instead.
    """

    needs: tuple[str, ...]
    lacks: tuple[str, ...]
    text: str


_AIM_V2 = (
    "AIM v2, another network than AIM: take timm's weights of it, as by "
    "'timm:aimv2_large_patch14_224'"
)
_BEIT = (
    "BEiT or data2vec by the names of transformers: take the file of its authors, such "
    "as beit_base_patch16_224_pt22k.pth or base_800/checkpoint-799.pth"
)
_MM = "a network by the names of OpenMMLab: take the file of the method's authors"
REFUSED = (
    Refused(
        ("*encoder.relative_position_bias.relative_position_bias_table",), (), _BEIT
    ),
    Refused(
        ("*attention.relative_position_bias.relative_position_bias_table",), (), _BEIT
    ),
    Refused(
        ("*attention.self.relative_position_bias_table",),
        (),
        "Swin by the names of transformers: take the file of its authors, such as "
        "simmim_pretrain__swin_base__img192_window6__800ep.pth",
    ),
    Refused(
        ("*layers.0.blocks.0.attn*.logit_scale",),
        (),
        "Swin V2, whose attention is another than Swin's: take timm's weights of it, "
        "as by 'timm:swinv2_base_window8_256'",
    ),
    Refused(("*layers.0.ln1.weight",), (), _MM),
    Refused(("*attn.w_msa.relative_position_bias_table",), (), _MM),
    Refused(
        ("*head.cls_token", "*head.k.weight", "*head.v.weight"),
        ("*trunk.*",),
        "the head of AIM's attention probe alone: take the file of the backbone, such "
        "as aim_600m_2bimgs_attnprobe_backbone.pth",
    ),
    Refused(("*trunk.blocks.0.mlp.fc3.weight",), (), _AIM_V2),
    Refused(
        ("*encoder.layers.0.rms_norm1.weight", "*encoder.layers.0.ffn.*"), (), _AIM_V2
    ),
    Refused(
        ("prototypes",),
        ("*.*",),
        "the prototypes of MSN alone: take the whole file, such as "
        "vitb16_600ep.pth.tar, of which the target_encoder is read",
    ),
)


def refuse(names: Collection[str], path: Path) -> None:
    """Says of a file that is known and not read what it is.

    Args:
        names:
            Names of its tensors.
        path:
            The file.

    Raises:
        ValueError: If it is one of `REFUSED`.
    """
    for kind in REFUSED:
        if all(fnmatch.filter(names, pattern) for pattern in kind.needs) and not any(
            fnmatch.filter(names, pattern) for pattern in kind.lacks
        ):
            raise ValueError(f"'{path}' holds {kind.text}.")
