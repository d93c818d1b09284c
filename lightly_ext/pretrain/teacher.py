"""Momentum teacher, for pretraining from random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.models.utils import update_momentum
from lightly.utils.dist import gather, world_size
from torch import Tensor, nn

from lightly_ext.loss import TeacherTargets
from lightly_ext.pretrain.sharding import local_shards


class MomentumTeacher(nn.ModuleDict):
    """Copies of a student's parts that follow them slowly and make the targets.

    Args:
        student:
            Its "encoder", "sparse_head" and, if the CLS terms are on, "cls_head".
        momentum:
            Share of the teacher that a step keeps, in [0, 1).

    Raises:
        ValueError: If the momentum is out of range.
    """

    def __init__(self, student: dict[str, nn.Module], momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"teacher_momentum must be in [0, 1), got {momentum}.")
        super().__init__(copy.deepcopy(student))
        self.requires_grad_(False)
        self.momentum = momentum
        self.eval()

    def train(self, mode: bool = True) -> MomentumTeacher:
        """Stays in evaluation: dropped paths and drawn rotations are no targets."""
        return super().train(False)

    @torch.no_grad()
    def follow(
        self, student: dict[str, nn.Module], found_inf: Tensor | None = None
    ) -> None:
        """Moves every part a step towards the student's.

        Args:
            student:
                Its parts by name.
            found_inf:
                Scalar on their device: if it is not 0, nothing moves.
        """
        for name, part in student.items():
            if found_inf is None:
                update_momentum(part, self[name], self.momentum)
                continue
            kept = torch.where(found_inf > 0, 1.0, self.momentum)
            own = local_shards(self[name].parameters())
            torch._foreach_mul_(own, kept)
            moves = torch._foreach_mul(local_shards(part.parameters()), 1 - kept)
            torch._foreach_add_(own, list(moves))

    @torch.no_grad()
    def targets(
        self, images: Tensor, gather_distributed: bool = False
    ) -> TeacherTargets:
        """What the teacher says of images.

        Where its heads have no prototypes, its embeddings of the batch are those: each
        token is to be told from all others.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width).
            gather_distributed:
                Whether these are the embeddings of all processes.
        """
        result = self["encoder"](images)
        head: Any = self["sparse_head"]
        embeddings = head(result.sparse)
        targets = TeacherTargets(
            tokens=result.sparse,
            embeddings=embeddings,
            prototypes=_prototypes(head, embeddings, gather_distributed),
        )
        if "cls_head" not in self:
            return targets
        head = self["cls_head"]
        embeddings = head(result.cls)
        return targets._replace(
            cls_embeddings=embeddings,
            cls_prototypes=_prototypes(head, embeddings, gather_distributed),
        )


def _prototypes(head: Any, embeddings: Tensor, gather_distributed: bool) -> Tensor:
    if head.prototypes is not None:
        weight: Tensor = head.prototypes.weight
        return weight
    rows = embeddings.flatten(0, -2)
    several = gather_distributed and world_size() > 1
    return torch.cat(gather(rows)) if several else rows
