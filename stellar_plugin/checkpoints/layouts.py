"""How files name the tensors of a network, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass

STELLAR, OFFICIAL = "stellar", "official STELLAR"
TRANSFORMERS, TIMM, BEIT, SWIN = "transformers ViT", "timm", "BEiT", "Swin"
TITOK, AIM = "TiTok", "AIM"
RESNET, HAIKU = "torchvision ResNet", "Haiku ResNet"


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        name: Its name.
        anchors: Tensors of which one is in every file; a prefix may stand before them.
        example: A name that is typical of it, for people.
    """

    name: str
    anchors: tuple[str, ...]
    example: str


# A file is of the first layout of which it has an anchor.
LAYOUTS = (
    Layout(
        STELLAR,
        ("encoder.vit.patch_embed.proj.weight", "encoder.vit.cls_token"),
        "encoder.vit.blocks.0...",
    ),
    Layout(
        OFFICIAL,
        ("sparse_tokens", "encoder.embeddings.patch_embeddings.projection.weight"),
        "sparse_tokens, encoder.encoder.layer.0... or encoder.layers.0...",
    ),
    Layout(
        TRANSFORMERS,
        ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"),
        "embeddings..., encoder.layer.0... or layers.0...",
    ),
    Layout(
        TITOK,
        ("encoder.latent_token_positional_embedding",),
        "latent_tokens, encoder.transformer.0.attn.in_proj_weight",
    ),
    # Before BEiT, of which it has an anchor in every stage.
    Layout(
        SWIN,
        ("layers.0.blocks.0.attn.qkv.weight", "layers.0.blocks.0.norm1.weight"),
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ),
    # Before timm, whose names it has too.
    Layout(
        BEIT,
        (
            "rel_pos_bias.relative_position_bias_table",
            "blocks.0.attn.relative_position_bias_table",
        ),
        "rel_pos_bias.relative_position_bias_table, blocks.0.gamma_1",
    ),
    # Before timm: its head has a class token.
    Layout(
        AIM,
        (
            "preprocessor.patchifier.proj.weight",
            "trunk.blocks.0.norm_1.weight",
            "trunk.post_trunk_norm.weight",
        ),
        "preprocessor.patchifier..., trunk.blocks.0...",
    ),
    Layout(
        TIMM,
        ("patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token"),
        "blocks.0.attn.qkv...",
    ),
    Layout(
        RESNET,
        ("layer1.0.conv1.weight", "4.0.conv1.weight"),
        "conv1.weight, layer1.0.conv1.weight",
    ),
    Layout(
        HAIKU, ("block_group_0.block_0.conv_0.w",), "block_group_0/~/block_0/~/conv_0"
    ),
)
