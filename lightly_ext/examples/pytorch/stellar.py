# This example requires the following dependencies:
#   pip install "stellar-plugin[pretrain]"
#
# It differs from the paper: a small ViT from random weights without momentum teacher,
# one process, a small batch and few prototypes, a constant learning rate. The paper's
# recipes are behind `stellar pretrain`.
#
# Run it with `python stellar.py path/to/images`.

from __future__ import annotations

from functools import partial

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightly_ext.data import ImageFolderDataset, collate_views
from lightly_ext.loss import CLSViews, SparseViews, STELLARLoss
from lightly_ext.modules import STELLARProjectionHead, random_focal_mask
from lightly_ext.transforms import STELLARColorAugment, STELLARTransform, STELLARViews
from stellar_plugin import Stellar


class STELLAR(nn.Module):
    """A STELLAR model with its two heads."""

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.model = Stellar("stellar_vit_small_patch16_224", decoder_dim=256)
        width = self.model.encoder.embed_dim
        self.sparse_head = STELLARProjectionHead(width, num_prototypes=num_prototypes)
        self.cls_head = STELLARProjectionHead(width, num_prototypes=num_prototypes)

    def forward(
        self, views: STELLARViews, keep: Tensor
    ) -> tuple[SparseViews, CLSViews, Tensor]:
        """Returns sparse tokens, CLS embeddings and the reconstruction."""
        assert views.local_views is not None  # num_local_views is not 0
        global_shape = views.global_views.shape[:2]
        local_shape = views.local_views.shape[:2]
        target = self.model(views.target)
        masked = self.model(views.global_views.flatten(0, 1), keep)
        local = self.model(views.local_views.flatten(0, 1))
        view_tokens = masked.sparse.unflatten(0, global_shape)
        sparse = SparseViews(
            tokens=target.sparse,
            view_tokens=view_tokens,
            embeddings=self.sparse_head(target.sparse),
            view_embeddings=self.sparse_head(view_tokens),
            prototypes=self.sparse_head.prototypes.weight,
        )
        cls = CLSViews(
            embeddings=self.cls_head(target.cls),
            view_embeddings=self.cls_head(masked.cls).unflatten(0, global_shape),
            local_embeddings=self.cls_head(local.cls).unflatten(0, local_shape),
            prototypes=self.cls_head.prototypes.weight,
        )
        return sparse, cls, self.model.decode(target.lowrank, target.grid_size)


def main(
    path: str,
    epochs: int = 10,
    batch_size: int = 32,
    num_workers: int = 4,
    num_views: int = 8,
    num_prototypes: int = 512,
) -> None:
    """Trains STELLAR on all images below a folder.

    Args:
        path: Folder with images.
        epochs: Number of epochs.
        batch_size: Number of images per step, at most those of the folder.
        num_workers: Number of processes that load images.
        num_views: Number of global views, and of local views.
        num_prototypes: Number of prototypes of each head.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = STELLARTransform(num_global_views=num_views, num_local_views=num_views)
    dataset = ImageFolderDataset(path, transform)
    batch_size = min(batch_size, len(dataset))
    dataloader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=partial(collate_views, num_global_views=num_views),
    )
    model = STELLAR(num_prototypes).to(device)
    augment = STELLARColorAugment().to(device)
    criterion = STELLARLoss()
    optimizer = AdamW(model.parameters(), lr=1.5e-4, weight_decay=0.04)

    print("Starting Training")
    for epoch in range(epochs):
        total_loss = 0.0
        for batch in dataloader:
            views = augment(batch.global_views.to(device), batch.local_views.to(device))
            keep = random_focal_mask(batch_size * num_views, (14, 14), device=device)
            sparse, cls, reconstruction = model(views, keep)
            loss = criterion(sparse, cls, reconstruction, views.images)
            total_loss += loss.item()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch: {epoch:>02}, loss: {total_loss / len(dataloader):.5f}")
    model.model.save_pretrained("stellar")


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
