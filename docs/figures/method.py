"""The pictures of docs/method.md: each step of the method, as a model does it.

    python -m docs.figures.method --model MODEL --photos '[A.jpg, B.jpg]'

writes docs/method/*.jpg. Nothing in them is invented: tokens, maps, masks, assignments
and matches are what model, heads and transforms give for the first photo (clustering:
for all). MODEL is a folder that `stellar pretrain` wrote, with its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from docs.figures.card import CARD, INK, SOFT, Box, Card, Colour, shades
from lightly_ext.loss import assign_prototypes, match_tokens
from lightly_ext.modules import STELLARProjectionHead, random_focal_mask
from lightly_ext.transforms import STELLARColorAugment, STELLARTransform
from stellar_plugin import Factorization, Stellar
from stellar_plugin.checkpoints import load_head_weights, read_checkpoint
from stellar_plugin.visualize import (
    Uint8Array,
    denormalize,
    scale_maps,
    to_pictures,
    token_maps,
    token_palette,
)

WIDTH = 640
TITLE, TEXT = 22, 20  # 12 and 11 px on a phone
MASK_RATIO, SEED = 0.8, 3
TARGET_TEMPERATURE = 0.06


class Scene(NamedTuple):
    """All that the figures are made of.

    Attributes:
        model: The model.
        head: Its head of sparse tokens.
        photos: Photos, of which the first is looked at.
        images: Them as inputs, (photos, 3, height, width).
        result: What the encoder makes of them.
    """

    model: Stellar
    head: STELLARProjectionHead
    photos: list[Image.Image]
    images: Tensor
    result: Factorization

    @property
    def pictures(self) -> Uint8Array:
        """The inputs as they look."""
        return denormalize(self.images, self.model.mean, self.model.std)

    @property
    def palette(self) -> Uint8Array:
        """The colours of the tokens."""
        return token_palette(self.result.sparse.shape[1])

    @property
    def colours(self) -> list[Colour]:
        """Them as Pillow takes them."""
        return [(int(r), int(g), int(b)) for r, g, b in self.palette]


def spread(values: Tensor) -> np.ndarray:
    """Values from 0, the least of them, to 1, the largest."""
    return ((values - values.min()) / (values.max() - values.min())).numpy()


def encoder(scene: Scene) -> Card:
    """Image and queries -> tokens and patch features."""
    card = Card(WIDTH, 336)
    picture, side = scene.pictures[0], 168
    rows, columns = scene.result.grid_size
    photo = Box(24, 60, side, side)
    card.text(photo.x, 32, "photo in patches", TITLE)
    card.picture(photo, picture, "photo")
    for i in range(1, rows):
        y = photo.y + side * i / rows
        card.line((photo.x, y), (photo.x + side, y), CARD, 0.5)
    for i in range(1, columns):
        x = photo.x + side * i / columns
        card.line((x, photo.y), (x, photo.y + side), CARD, 0.5)
    card.text(photo.x, 262, "queries, learned", TITLE)
    queries = Box(24, 282, side, 24)
    count = len(scene.palette)
    for i, colour in enumerate(scene.colours):
        card.fill(queries.cell(0, i, (1, count)).inset(1.5), colour, 4)
    vit = Box(244, 60, 110, 246)
    card.frame(vit, SOFT, 10)
    card.text(vit.x + 55, 170, "ViT\nall see all", TITLE, anchor="mm")
    for y in (144, 294):
        card.arrow(200, y, 36)
        card.arrow(362, y, 36)
    dense, sparse = scene.result.dense[0], scene.result.sparse[0]
    card.text(408, 32, f"U: {dense.shape[0]} x {dense.shape[1]}", TITLE)
    card.picture(Box(408, 60, 208, side), shades(spread(dense), INK), "dense")
    card.text(408, 254, f"S: {sparse.shape[0]} x {sparse.shape[1]}", TITLE)
    _tokens(card, Box(408, 272, 208, 48), sparse, scene.palette)
    return card


def _tokens(card: Card, box: Box, sparse: Tensor, palette: Uint8Array) -> None:
    """S: a row per token, in its colour."""
    values = spread(sparse)[..., None] * palette[:, None]
    card.picture(box, values.round().astype(np.uint8), "sparse")


def localization(scene: Scene) -> Card:
    """L: its rows are mixtures, its columns maps."""
    card = Card(WIDTH, 330)
    weights = scene.result.localization[0]
    rows, columns = scene.result.grid_size
    photo = Box(24, 60, 216, 216)
    card.text(24, 32, "five patches", TITLE)
    card.picture(photo, scene.pictures[0], "photo")
    # For the tokens with the largest shares, the patches that have most of them.
    largest = weights.mean(dim=0).topk(min(5, weights.shape[1])).indices
    patches = weights[:, largest].argmax(dim=0).tolist()
    card.text(272, 32, "their rows of L", TITLE)
    for i, patch in enumerate(patches):
        place = photo.cell(patch // columns, patch % columns, (rows, columns))
        card.frame(place.inset(-2), INK)
        y = 60 + 45.5 * i
        card.text(place.x + place.width + 5, place.y, "abcde"[i], TEXT)
        card.text(272, y + 17, "abcde"[i], TEXT)
        x = 292.0
        for token, weight in enumerate(weights[patch].tolist()):
            card.fill(Box(x, y, 150 * weight, 34), scene.colours[token])
            x += 150 * weight
    token = int(largest[0])
    grid = scene.result.grid_size
    where = token_maps(scene.result.localization, grid, grid)[0, token]
    card.text(472, 32, f"column {token}", TITLE)
    column = shades(scale_maps(where).numpy(), scene.palette[token])
    card.picture(Box(472, 60, 144, 144), column, f"map of token {token}")
    card.text(472, 226, f"a map: where\ntoken {token} is", TEXT, SOFT)
    card.text(24, 304, "A row: what a patch is made of; it sums to one.", TEXT, SOFT)
    return card


def lowrank(scene: Scene) -> Card:
    """Z = L S, as matrices."""
    card = Card(WIDTH, 334)
    weights, sparse = scene.result.localization[0], scene.result.sparse[0]
    latent = scene.result.lowrank[0]
    (patches, tokens), dim = weights.shape, sparse.shape[1]
    top, height = 62, 184
    coloured = weights.numpy()[..., None] * scene.palette[None]
    card.text(24, 32, "L", TITLE)
    card.picture(Box(24, top, 88, height), coloured.round().astype(np.uint8), "L")
    card.text(136, top + height / 2, "x", 26, SOFT, "mm")
    card.text(160, 32, "S", TITLE)
    _tokens(card, Box(160, top, 200, 76), sparse, scene.palette)
    card.text(386, top + height / 2, "=", 26, SOFT, "mm")
    card.text(414, 32, "Z", TITLE)
    card.picture(Box(414, top, 202, height), shades(spread(latent), INK), "Z")
    for x, y, size in (
        (24, top + height + 22, (patches, tokens)),
        (160, top + 98, (tokens, dim)),
        (414, top + height + 22, (patches, dim)),
    ):
        card.text(x, y, f"{size[0]} x {size[1]}", TEXT, SOFT)
    few, many = patches * tokens + tokens * dim, patches * dim
    card.text(24, 310, f"{few} numbers in place of {many}", TEXT)
    return card


@torch.no_grad()
def decoder(scene: Scene) -> Card:
    """What the decoder makes of Z, and what it missed."""
    height, width = scene.images.shape[-2:]
    card = Card(WIDTH, 312)
    rebuilt = scene.model.reconstruct(scene.images[:1], (height, width))
    picture = to_pictures(rebuilt)[0]
    missed = np.abs(picture.astype(float) - scene.pictures[0]).mean(axis=-1) / 255
    error = float(((picture / 255.0 - scene.pictures[0] / 255.0) ** 2).mean())
    columns = (
        ("photo", scene.pictures[0]),
        ("decoded from Z", picture),
        ("missed", shades(missed, INK)),
    )
    for i, (title, shown) in enumerate(columns):
        box = Box(24 + 202 * i, 60, 188, 188)
        card.text(box.x, 32, title, TITLE)
        card.picture(box, shown, title)
    card.text(
        24, 280, f"mean squared error {error:.4f}, of intensities 0 to 1", TEXT, SOFT
    )
    return card


def views(scene: Scene) -> Card:
    """Target view, masked views and local crops of one photo."""
    card = Card(WIDTH, 372)
    size, patch = scene.images.shape[-1], scene.model.encoder.patch_size
    torch.manual_seed(SEED)
    transform = STELLARTransform(
        num_global_views=3,
        num_local_views=3,
        global_crop_size=size,
        local_crop_size=max(patch, size * 3 // 7 // patch * patch),
    )
    drawn = transform(scene.photos[0])
    augment = STELLARColorAugment(
        mean=scene.model.mean, std=scene.model.std, gaussian_blur=0.0
    )
    whole = torch.stack(drawn[:3])[None]
    coloured = augment(whole, torch.stack(drawn[3:])[None])
    assert coloured.local_views is not None
    mean, std = scene.model.mean, scene.model.std
    masked = denormalize(coloured.global_views[0], mean, std)
    local = denormalize(coloured.local_views[0], mean, std)
    grid = scene.result.grid_size
    keep = random_focal_mask(3, grid, MASK_RATIO)
    seen = torch.zeros(3, grid[0] * grid[1]).scatter(1, keep, 1.0)
    shown = token_maps(seen[..., None], grid, (size, size))[:, 0].numpy()[..., None]
    masked = (masked * shown + np.array(CARD) * 1.6 * (1 - shown)).astype(np.uint8)
    card.text(24, 32, "target view", TITLE)
    card.picture(Box(24, 60, 176, 176), to_pictures(coloured.images)[0], "target")
    card.text(24, 262, "whole, its\nown colours", TEXT, SOFT)
    card.text(236, 32, "masked views: a fifth is seen", TITLE)
    card.text(236, 214, "local crops: only CLS is used", TITLE)
    for i in range(3):
        card.picture(Box(236 + 130 * i, 54, 122, 122), masked[i], f"masked {i}")
        card.picture(Box(236 + 130 * i, 236, 104, 104), local[i], f"local {i}")
    return card


@torch.no_grad()
def clustering(scene: Scene) -> Card:
    """Tokens on prototypes: by their own choice, and balanced."""
    card = Card(WIDTH, 372)
    embeddings = scene.head(_batch(scene)).flatten(0, 1)
    prototypes = scene.head.prototypes.weight
    own = (embeddings @ prototypes.mT / TARGET_TEMPERATURE).softmax(dim=-1)
    balanced = assign_prototypes(embeddings, prototypes, TARGET_TEMPERATURE)
    # Prototypes in the order of what they get by the tokens' own choice.
    order = own.sum(dim=0).argsort(descending=True)
    for x, title, rows in (
        (24, "own choice", own[:, order]),
        (336, "balanced: the targets", balanced[:, order]),
    ):
        card.text(x, 32, title, TITLE)
        card.picture(Box(x, 60, 280, 168), shades(rows.sqrt().numpy(), INK), title)
        usage = rows.sum(dim=0)
        bars = Box(x, 244, 280, 56)
        for i, count in enumerate((usage / own.sum(dim=0).max()).clamp(max=1).tolist()):
            cell = bars.cell(0, i, (1, len(usage)))
            height = bars.height * count
            low = Box(cell.x, bars.y + bars.height - height, cell.width - 0.5, height)
            card.fill(low, (90, 160, 255))
    text = f"Rows: {len(own)} tokens. Columns: {own.shape[1]} prototypes.\n"
    card.text(24, 324, text + "Bars: tokens that a prototype gets.", TEXT, SOFT)
    return card


def _batch(scene: Scene) -> Tensor:
    """Tokens of some crops of every photo, as a batch of training has them."""
    torch.manual_seed(SEED)
    size = scene.images.shape[-1]
    transform = STELLARTransform(
        num_global_views=8, num_local_views=0, global_crop_size=size
    )
    crops = torch.stack([torch.stack(transform(photo)) for photo in scene.photos])
    normalize = STELLARColorAugment(
        mean=scene.model.mean, std=scene.model.std
    ).normalize
    return scene.model(normalize(crops.flatten(0, 1).float() / 255)).sparse


@torch.no_grad()
def matching(scene: Scene) -> Card:
    """Tokens of a masked view, and the target tokens they are matched with."""
    card = Card(WIDTH, 372)
    torch.manual_seed(SEED)
    keep = random_focal_mask(1, scene.result.grid_size, MASK_RATIO)
    masked = scene.model(scene.images[:1], keep).sparse[0]
    target = scene.result.sparse[0]
    found = match_tokens(masked, target)
    count = len(target)
    left, right = Box(24, 60, 130, 280), Box(236, 60, 130, 280)
    card.text(24, 32, "masked view", TITLE)
    card.text(236, 32, "target view", TITLE)
    for i, match in enumerate(found.indices.tolist()):
        ends = left.cell(i, 0, (count, 1)), right.cell(match, 0, (count, 1))
        start, end = (box.y + box.height / 2 for box in ends)
        card.line((158, start), (232, end), scene.colours[i])
    for box, tokens in ((left, masked), (right, target)):
        values = spread(tokens[:, :24])
        for i, colour in enumerate(scene.palette):
            strip = shades(values[i : i + 1], colour)
            card.picture(box.cell(i, 0, (count, 1)).inset(2), strip, f"{box.x} {i}")
    plan = Box(406, 60, 210, 210)
    card.text(406, 32, "transport plan P", TITLE)
    card.picture(plan, shades(spread(found.plan), INK), "plan")
    card.text(406, 292, "rows: masked view,\ncolumns: target", TEXT, SOFT)
    return card


def koleo(scene: Scene) -> Card:
    """How alike the tokens of one image are."""
    card = Card(WIDTH, 336)
    unit = torch.nn.functional.normalize(scene.result.sparse[0], dim=-1)
    cosine = unit @ unit.mT
    count = len(cosine)
    nearest = cosine.clone().fill_diagonal_(-1).argmax(dim=-1).tolist()
    grid = Box(52, 86, 228, 228)
    card.text(24, 32, "cosine of the tokens", TITLE)
    card.picture(grid, shades(cosine.clamp(0, 1).numpy(), INK), "cosine")
    for i, paint in enumerate(scene.colours):
        side = grid.cell(i, 0, (count, count))
        card.fill(Box(28, side.y + 4, 16, side.height - 8), paint, 3)
        above = grid.cell(0, i, (count, count))
        card.fill(Box(above.x + 4, 62, above.width - 8, 16), paint, 3)
        cell = grid.cell(i, nearest[i], (count, count))
        card.frame(cell.inset(2), paint)
    card.text(312, 32, "nearest of each (framed)", TITLE)
    for i, near in enumerate(nearest):
        y = grid.y + grid.height * (i + 0.5) / count
        for x, token in ((330, i), (404, near)):
            card.fill(Box(x, y - 10, 20, 20), scene.colours[token], 5)
        card.arrow(356, y, 42)
        distance = float((unit[i] - unit[near]).norm())
        card.text(440, y, f"distance {distance:.2f}", TEXT)
    return card


FIGURES: dict[str, Callable[[Scene], Card]] = {
    figure.__name__: figure
    for figure in (
        *(encoder, localization, lowrank, decoder),
        *(views, clustering, matching, koleo),
    )
}


@torch.no_grad()
def load_scene(model: str, photos: list[str]) -> Scene:
    """Loads model and head, and runs them on photos."""
    loaded = Stellar.from_pretrained(model)
    opened = [Image.open(photo).convert("RGB") for photo in photos]
    images = torch.stack([loaded.transform()(photo) for photo in opened])
    result = loaded(images)
    result.localization  # noqa: B018 (kept without gradient)
    return Scene(loaded, _head(model), opened, images, result)


def _head(model: str) -> STELLARProjectionHead:
    """The head of sparse tokens that lies beside a model."""
    checkpoint = read_checkpoint(model)
    if "sparse_head" not in checkpoint.heads:
        raise ValueError(
            f"'{model}' has no head of sparse tokens; take the folder `model` of a run "
            "of `stellar pretrain` with prototypes."
        )
    state = checkpoint.heads["sparse_head"]
    hidden, width = state["layers.0.weight"].shape
    prototypes, output = state["prototypes.weight"].shape
    head = STELLARProjectionHead(width, hidden, output, prototypes)
    load_head_weights({"sparse_head": head}, checkpoint)
    return head.eval()


def main(model: str, photos: list[str], output: str = "docs/method") -> None:
    """Draws the pictures of docs/method.md.

    Args:
        model: Folder of a model with its heads, as `stellar pretrain` writes it.
        photos: Files; the first is looked at, clustering takes the tokens of all.
        output: Folder that the pictures are written to.
    """
    scene = load_scene(model, photos)
    for name, figure in FIGURES.items():
        figure(scene).save(Path(output, f"{name}.jpg"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
