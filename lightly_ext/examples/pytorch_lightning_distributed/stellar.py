# This example requires the following dependencies:
#   pip install "stellar-plugin[pretrain]"
#
# It differs from the paper: a small ViT from random weights without momentum teacher, a
# small batch and few prototypes. The paper's recipes are behind `stellar pretrain`.
#
# Run it with `python stellar.py path/to/images`.

from __future__ import annotations

from jsonargparse import auto_cli
from pytorch_lightning import Trainer

from lightly_ext.data import StellarDataModule
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.transforms import STELLARTransform


def main(
    path: str,
    epochs: int = 10,
    devices: int = 2,
    batch_size: int = 32,
    num_workers: int = 4,
    num_views: int = 8,
    num_prototypes: int = 512,
) -> None:
    """Trains STELLAR on all images below a folder.

    Args:
        path: Folder with images.
        epochs: Number of epochs.
        devices: Number of GPUs, or of processes on CPU.
        batch_size: Number of images per step and device.
        num_workers: Number of processes that load images.
        num_views: Number of global views, and of local views.
        num_prototypes: Number of prototypes of each head.
    """
    data = StellarDataModule(
        path,
        batch_size=batch_size,
        num_workers=num_workers,
        transform=STELLARTransform(
            num_global_views=num_views, num_local_views=num_views
        ),
    )
    model = StellarPretraining(
        model={"model_name": "stellar_vit_small_patch16_224", "decoder_dim": 256},
        head={"num_prototypes": num_prototypes},
        # Assignments are balanced over the tokens of all devices.
        loss={"gather_distributed": True},
        lr=1.5e-4,
        weight_decay=0.04,
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=devices,
        strategy="ddp",
        gradient_clip_val=3.0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    if trainer.is_global_zero:
        model.model.save_pretrained("stellar")


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
