"""Small pretrainings for tests: a tiny module, its data and its trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision.io import write_png

from lightly_ext.loss import STELLARLossTerms
from lightly_ext.pretrain import MAEPretraining, StellarPretraining
from lightly_ext.pretrain.recipes import merge_recipes
from lightly_ext.transforms import STELLARTransform, STELLARViews
from tests import reference

TINY = {
    "model": {
        "model_name": "stellar_vit_tiny_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "num_queries": 3,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "head": {"hidden_dim": 16, "output_dim": 8, "num_prototypes": 12},
    "augment": {"gaussian_blur": 0.0},
    "mask_ratio": 0.5,
}
# TINY on the command line.
TINY_OPTIONS = [
    "--model.model.model_name=stellar_vit_tiny_patch16_224",
    "--model.model.img_size=32",
    "--model.model.patch_size=16",
    "--model.model.embed_dim=24",
    "--model.model.depth=1",
    "--model.model.num_heads=2",
    "--model.model.decoder_dim=16",
    "--model.model.decoder_depth=1",
    "--model.model.decoder_num_heads=2",
    "--model.head.hidden_dim=16",
    "--model.head.output_dim=8",
    "--model.head.num_prototypes=12",
    "--model.mask_ratio=0.5",
    # The kernel of the blur is larger than the crops.
    "--model.augment={gaussian_blur: 0.0}",
]


def tiny(**kwargs: Any) -> StellarPretraining:
    seed_everything(0)
    return StellarPretraining(**{**TINY, **kwargs})


TINY_MAE = {
    "model_name": "stellar_vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
MAE_VIEW = STELLARTransform(1, 0, global_crop_size=32, global_crop_scale=(0.2, 1.0))


def tiny_mae(**kwargs: Any) -> MAEPretraining:
    seed_everything(0)
    return MAEPretraining(**{"model": TINY_MAE, "lr_scaling": "none", **kwargs})


class Views(torch.utils.data.Dataset):
    """Views of random images, already stacked."""

    def __init__(self, length: int = 8, num_local: int = 2) -> None:
        generator = torch.Generator().manual_seed(0)

        def views(count: int, size: int) -> Tensor:
            shape = (length, count, 3, size, size)
            images = torch.randint(256, shape, generator=generator)
            return images.to(torch.uint8)

        self.views = views(2, 32), views(num_local, 16)

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(views[index] for views in self.views)


def loader(batch_size: int = 4, **kwargs: Any) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Views(**kwargs), batch_size)


def first_view(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, None]:
    """Batches of `Views` for a method that reads one view."""
    return torch.stack([views[:1] for views, _ in items]), None


def fused(*arguments: Any, **options: Any) -> AdamW:
    """In place of AdamW: leaves steps out on the device, as on a GPU."""
    return AdamW(*arguments, **{**options, "fused": True})


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **kwargs})


class StopAfterTwoEpochs(Callback):
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def assert_same_training(module: nn.Module, other: nn.Module) -> None:
    state = module.state_dict()
    assert list(state) == list(other.state_dict())
    for name, value in other.state_dict().items():
        if name.endswith("qkv.bias"):
            continue  # Adam makes steps of the rounding noise in key gradients.
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5, msg=name)


def reference_module(teacher: bool) -> StellarPretraining:
    module = StellarPretraining(
        model=reference.model_arguments(),
        head=reference.head_arguments(),
        teacher_momentum=0.9 if teacher else None,
    )
    load_reference(module.model.encoder, module, reference.weights())
    module.model.load_state_dict(reference.model_state(reference.weights()))
    if teacher:
        state = reference.teacher_weights()
        load_reference(module.teacher["encoder"], module.teacher, state)
    return module


def load_reference(encoder: Any, heads: Any, state: dict[str, Tensor]) -> None:
    model_state = reference.model_state(state)
    prefix = "encoder."
    encoder.load_state_dict(
        {k[len(prefix) :]: v for k, v in model_state.items() if k.startswith(prefix)}
    )
    get = heads.__getitem__ if hasattr(heads, "keys") else heads.get_submodule
    for name, theirs in (
        ("sparse_head", "clustering_head"),
        ("cls_head", "cls_cluster_head"),
    ):
        get(name).load_state_dict(reference.head_state(state, theirs))


def reference_batch() -> tuple[STELLARViews, Tensor]:
    """Views and the patches that masked ones keep."""
    data = reference.load("train")
    names = ("image", "global_views", "local_views")
    normalized = (reference.normalized(data[name]) for name in names)
    return STELLARViews(*normalized, data["image"]), data["ids_keep"].view(3, 2, -1)


def reference_step(module: StellarPretraining) -> STELLARLossTerms:
    terms, *_ = module.loss_terms(*reference_batch())
    return terms


def merged(*names: str) -> dict[str, Any]:
    """What recipes say together."""
    (config,) = merge_recipes([f"--config={name}" for name in names])
    return json.loads(config.removeprefix("--config="))


def write_photos(folder: Path, number: int, side: int) -> Path:
    """Images of one colour, a little wider than high."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        image = torch.full((3, side, side + 8), i % 256, dtype=torch.uint8)
        write_png(image, str(folder / f"{i:04d}.png"))
    return folder
