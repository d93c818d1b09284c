"""A whole grid of linear classifiers, trained in one pass over the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

# Letters in shape comments:
# B images, d width, C classes, H heads of one batch size, P parameters of a head

# 256 MiB in float32: 8192 images, 1000 classes and 5 heads are 164 MB.
LOGITS_AT_ONCE = 2**26
WEIGHTS = "weights"  # beside AdamW's own names in the state of a head


class HeadOptions(NamedTuple):
    """What differs between the heads of a grid.

    Attributes:
        batch_size: Number of images in an optimiser step.
        lr: Learning rate, constant.
    """

    batch_size: int
    lr: float


class ProbeHeads:
    """Classifiers LayerNorm -> linear for a grid of batch sizes and learning rates.

    Every head is trained as if it were alone, by AdamW on the cross-entropy with a
    constant learning rate, weight decay on all parameters and the norm of its gradient
    clipped. What the heads share is only computed once: features are loaded once for
    all, normalised once, and the heads of one batch size are one matrix product. All
    heads start from the same weights and see the images in the same order.

    Args:
        grid:
            Options of each head.
        dim:
            Width of the features.
        num_classes:
            Number of classes.
        weight_decay:
            Weight decay of all parameters.
        clip:
            Largest norm of the gradient of a head.
        seed:
            Decides on the first weights.
        share:
            Numbers of the heads to train here, when others are trained elsewhere. None
            trains all.
        device:
            Where to train.

    Examples:
        >>> grid = [HeadOptions(64, 1e-3), HeadOptions(64, 1e-2)]
        >>> heads = ProbeHeads(grid, 768, 1000, weight_decay=1e-4, clip=5.0)
        >>> heads.train_block(features, labels)
        >>> classifier = heads.module(1)
    """

    def __init__(
        self,
        grid: Sequence[HeadOptions],
        dim: int,
        num_classes: int,
        weight_decay: float,
        clip: float,
        seed: int = 0,
        share: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grid = list(grid)
        self.dim = dim
        self.num_classes = num_classes
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            start = _flat(_classifier(dim, num_classes)).to(device)
        share = range(len(grid)) if share is None else share
        self._groups: list[_Group] = []
        for batch_size in sorted({grid[i].batch_size for i in share}):
            numbers = [i for i in share if grid[i].batch_size == batch_size]
            weights = start.repeat(len(numbers), 1)
            group = _Group(numbers, batch_size, clip, weights, (num_classes, dim))
            options = [
                {"params": [row], "lr": grid[i].lr}
                for i, row in zip(numbers, group.rows, strict=True)
            ]
            # Fused: one pass over the memory, which is what a step costs.
            group.optimizer = AdamW(options, weight_decay=weight_decay, fused=True)
            self._groups.append(group)

    def train_block(self, features: Tensor, labels: Tensor) -> None:
        """Trains every head on the full batches that fit into a block of images.

        What remains behind the last full batch is not used, as with `drop_last`.

        Args:
            features:
                Float tensor with shape (num_images, dim).
            labels:
                Class indices with shape (num_images,), int64.
        """
        normalised = F.layer_norm(features.float(), (self.dim,))
        for group in self._groups:
            size = group.batch_size
            for start in range(0, len(labels) - size + 1, size):
                batch = slice(start, start + size)
                group.step(normalised[batch], labels[batch])

    @torch.no_grad()
    def count_correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Number of images that each head classifies correctly.

        Args:
            features:
                Float tensor with shape (num_images, dim).
            labels:
                Class indices with shape (num_images,), int64.

        Returns:
            int64 tensor with shape (len(grid),), 0 for heads that are trained
            elsewhere.
        """
        normalised = F.layer_norm(features.float(), (self.dim,))
        counts = torch.zeros(len(self.grid), dtype=torch.int64, device=labels.device)
        for group in self._groups:
            for rows, classes in group.chunks(normalised, labels):
                hits = group.logits(rows).argmax(dim=2) == classes[:, None]  # (B, H)
                counts[group.numbers] += hits.sum(dim=0)
        return counts

    def module(self, number: int) -> nn.Sequential:
        """A head as a module; of zeros if it is trained elsewhere.

        So the sum over all processes is the head.
        """
        head = _classifier(self.dim, self.num_classes)
        flat = torch.zeros_like(_flat(head))
        for group in self._groups:
            if number in group.numbers:
                flat = group.rows[group.numbers.index(number)].clone()
        nn.utils.vector_to_parameters(flat, head.parameters())
        return head.to(self.device)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Weights and optimiser of the heads trained here, by number."""
        state = {}
        for group in self._groups:
            for number, row in zip(group.numbers, group.rows, strict=True):
                tensors = {WEIGHTS: row, **group.optimizer.state[row]}
                state[number] = {k: v.cpu().clone() for k, v in tensors.items()}
        return state

    def load_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Continues from `state()`, of this or of several processes together."""
        for group in self._groups:
            for number, row in zip(group.numbers, group.rows, strict=True):
                tensors = {k: v.to(row.device) for k, v in state[number].items()}
                row.copy_(tensors.pop(WEIGHTS))
                group.optimizer.state[row] = tensors


class _Group:
    """Heads of one batch size: one row of parameters each, stepped together."""

    optimizer: AdamW

    def __init__(
        self,
        numbers: list[int],
        batch_size: int,
        clip: float,
        weights: Tensor,
        shape: tuple[int, int],
    ) -> None:
        self.numbers = numbers
        self.batch_size = batch_size
        self.clip = clip
        self.parameters = weights.requires_grad_()  # (H, P)
        # The same memory, for an optimiser with a learning rate per head.
        self.rows = list(weights.detach())
        self._shape = shape

    def logits(self, normalised: Tensor) -> Tensor:
        """Logits of all heads: (B, d) -> (B, H, C)."""
        num_classes, dim = self._shape
        sizes = [dim, dim, num_classes * dim, num_classes]
        gain, shift, weight, bias = self.parameters.split(sizes, dim=1)
        weight = weight.unflatten(1, self._shape)  # (H, C, d)
        # W (g n + s) + b = (W g) n + (W s + b): one product for all heads. The small
        # products are faster one by one than as a batch.
        shifted = [w @ s for w, s in zip(weight, shift, strict=True)]
        offset = torch.stack(shifted) + bias
        product = F.linear(
            normalised, (weight * gain[:, None]).flatten(0, 1), offset.flatten()
        )
        return product.unflatten(1, (-1, num_classes))

    def chunks(self, rows: Tensor, labels: Tensor) -> zip[tuple[Tensor, Tensor]]:
        """Cuts a batch so that the logits of all heads fit into memory."""
        logits_per_image = len(self.numbers) * self._shape[0]
        size = max(1, LOGITS_AT_ONCE // logits_per_image)
        return zip(rows.split(size), labels.split(size), strict=True)

    def step(self, normalised: Tensor, labels: Tensor) -> None:
        """One optimiser step of all heads on one batch."""
        num_heads, batch_size = len(self.numbers), len(labels)
        self.parameters.grad = None
        for rows, classes in self.chunks(normalised, labels):
            # The heads share no parameters, so the gradient of the sum is everyone's.
            loss = F.cross_entropy(
                self.logits(rows).flatten(0, 1),
                classes.repeat_interleave(num_heads),
                reduction="sum",
            )
            (loss / batch_size).backward()
        gradient = self.parameters.grad
        assert gradient is not None
        norm = gradient.norm(dim=1, keepdim=True)
        gradient *= (self.clip / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_
        for row, of_row in zip(self.rows, gradient, strict=True):
            row.grad = of_row
        self.optimizer.step()


def _classifier(dim: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))


def _flat(head: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(head.parameters()).detach()
