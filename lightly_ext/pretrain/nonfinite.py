"""Steps whose loss or gradient is not finite: seen, not taken, and told."""

from __future__ import annotations

from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightly_ext.data import printable
from lightly_ext.pretrain.checkpoint_files import LAST
from lightly_ext.pretrain.checkpoints import resume_command
from lightly_ext.pretrain.sharding import local_shards
from lightly_ext.pretrain.story import tell

# Steps after which the host reads what a device found: it goes on without waiting.
LAG = 2
# Of the scaler of fp16, which is halved whenever a gradient overflows.
MIN_SCALE = 1e-4
# Images that a message names; all of them are listed in this file in the run's folder.
NUM_SHOWN = 3
LIST = "nonfinite.txt"


class NonFiniteGuard(Callback):
    """Keeps steps that are not finite away from weights, optimiser and teacher.

    Whether a loss or a gradient is finite is known on the device, where the update is
    left out; the host reads it `LAG` steps later, before a validation and before a
    checkpoint is saved. Where the host runs the optimiser itself, it reads at once.
    With the scaler of fp16, gradients may overflow, and only the loss counts.

    Attributes:
        action:
            "stop" ends training at such a step, "skip" goes on.
        limit:
            Number of such steps in a row at which "skip" ends training, too. From there
            on there is no update, however late the host knows.
        dropped:
            Whether the host left out the update of this step.
        found_inf:
            1 if a fused optimiser leaves it out, 0 if not, a scalar on the device. None
            where the host decides.

    Raises:
        ValueError: If `action` is unknown or `limit` is less than 1.
    """

    def __init__(self, action: Literal["stop", "skip"], limit: int) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got '{action}'.")
        if limit < 1:
            raise ValueError(f"nonfinite_limit must be 1 or more, got {limit}.")
        self.action = action
        self.limit = 1 if action == "stop" else limit
        self.dropped = False
        self.found_inf: Tensor | None = None
        self._batches: list[_Batch] = []
        self._steps: list[_Step] = []
        self._in_a_row = 0
        self._in_a_row_on_device: Tensor | None = None

    def add_batch(
        self, terms: dict[str, Tensor], tokens: list[Tensor], indices: Tensor | None
    ) -> None:
        """Notes what the next step is made of.

        Args:
            terms:
                Terms of the loss of a batch by name, scalars, the total first.
            tokens:
                Tokens of its images, with shapes (batch_size, ...).
            indices:
                Numbers of the images in the training set, int64 with shape
                (batch_size,), if known.
        """
        values = torch.stack([value.detach().float() for value in terms.values()])
        finite = [x.detach().flatten(1).isfinite().all(dim=1) for x in tokens]
        images = torch.stack(finite).all(dim=0)
        self._batches.append(_Batch(list(terms), values, images, indices))

    def check(self, module: LightningModule, optimizer: Optimizer) -> Tensor:
        """Looks at a step before its update, behind the backward pass.

        Args:
            module:
                What is trained.
            optimizer:
                That of its gradients, which are not yet clipped.

        Returns:
            Norm of the gradients, a scalar.

        Raises:
            RuntimeError: If training must end, see `action`.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None]
        # None has one while heads warm up that no term reads.
        norms = torch.zeros(0, device=module.device)
        if parameters:
            norms = _norms(parameters)
        norm = torch.linalg.vector_norm(norms)
        batches, self._batches = self._batches, []
        trainer = module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        watched = [batch.terms[:1] for batch in batches]
        if scaler is None:
            watched.append(norm[None])
        found = (~torch.cat(watched).isfinite()).any().float()
        if trainer.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        # The scaler makes the host wait in every step, so it may be asked.
        scale = None if scaler is None else scaler.get_scale()
        self._steps.append(_Step(module, parameters, batches, found, norms, scale))
        if optimizer.defaults.get("fused"):
            self.found_inf = self._held(found)
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            self.settle(LAG)
        else:
            self.dropped = self.settle()
            if self.dropped:
                for parameter in parameters:
                    parameter.grad = None  # which AdamW passes over
        return norm

    def settle(self, keep: int = 0) -> bool:
        """Reads what was found, but for the last steps, and acts on it.

        Args:
            keep:
                Number of steps that may stay unread.

        Returns:
            Whether the last step that was read is not finite.

        Raises:
            RuntimeError: If training must end, see `action`.
        """
        finding = None
        while len(self._steps) > keep:
            step = self._steps.pop(0)
            finding = step.finding()
            self._in_a_row = 0 if finding is None else self._in_a_row + 1
            if finding is not None:
                self._act(step, finding)
        return finding is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier training."""
        self._batches, self._steps, self._in_a_row = [], [], 0
        self.dropped, self.found_inf, self._in_a_row_on_device = False, None, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settles before the weights are looked at."""
        self.settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settles the last steps."""
        self.settle()

    def _held(self, found: Tensor) -> Tensor:
        """Whether a device leaves a step out: for itself, or for those before it."""
        in_a_row = self._in_a_row_on_device
        if in_a_row is None:
            in_a_row = torch.zeros_like(found)
        held = torch.maximum(found, (in_a_row >= self.limit).float())
        self._in_a_row_on_device = (in_a_row + 1) * held
        return held

    def _act(self, step: _Step, finding: _Finding) -> None:
        trainer = step.module.trainer
        text = _told(step.number, finding, trainer)
        if self._in_a_row < self.limit:
            text = (
                f"{text} The step is skipped, {self._in_a_row} in a row; {self.limit} "
                "end the training (--nonfinite_limit)."
            )
            step.module.print(f"Warning: {text}")
            tell(trainer, "skipped", text)
            return
        ways = ["a lower --model.lr"]
        if step.scale is not None:
            ways.append("--trainer.precision=bf16-mixed")
        if self.action == "stop":
            ways.append("--on_nonfinite=skip (if single images are the cause)")
        else:
            text = f"{text} It is number {self._in_a_row} in a row."
        raise RuntimeError(
            f"{text} Go on with {' or '.join(ways)} from {_checkpoint(trainer)}"
        )


class _Batch(NamedTuple):
    """Terms (T,) of a batch, whose tokens are finite (B,), and its images' numbers."""

    names: list[str]
    terms: Tensor
    images: Tensor
    indices: Tensor | None


class _Finding(NamedTuple):
    """What a process knows of a step that is not finite.

    Attributes:
        terms:
            Names of the terms of the loss that are not finite.
        reason:
            What is not finite, in words.
        files:
            Images that may have caused it.
    """

    terms: list[str]
    reason: str
    files: list[str]


class _Step:
    """A step, until the host reads what the device found."""

    def __init__(
        self,
        module: LightningModule,
        parameters: list[nn.Parameter],
        batches: list[_Batch],
        found: Tensor,
        norms: Tensor,
        scale: float | None,
    ) -> None:
        self.module, self.number = module, module.global_step
        self.parameters, self.batches, self.scale = parameters, batches, scale
        parts = [found[None], norms]
        parts += [x.float() for batch in batches for x in (batch.terms, batch.images)]
        # From a GPU to pinned memory: the copy is queued, and the host goes on.
        self._values = torch.cat(parts).to("cpu", non_blocking=True)
        self._event: Any = None
        if found.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def finding(self) -> _Finding | None:
        """What is not finite, None if all is."""
        if self._event is not None:
            self._event.synchronize()
        values = iter(self._values.tolist())
        if next(values) == 0:
            if self.scale is None or self.scale >= MIN_SCALE:
                return None
            reason = f"The scaler of fp16 fell to {self.scale:.3g}: gradients overflow"
            return _Finding([], reason, [])
        norms = list(islice(values, len(self.parameters)))
        terms: dict[str, None] = {}
        suspects, all_files = [], []
        for batch in self.batches:
            found = [n for n in batch.names if not isfinite(next(values))]
            finite = list(islice(values, len(batch.images)))
            files = self._files(batch)
            all_files += files
            if found and files:
                some = [f for f, ok in zip(files, finite, strict=True) if not ok]
                suspects += some or files
            terms |= dict.fromkeys(found)
        if terms:
            reason = f"The loss is not finite ({', '.join(terms)})"
            return _Finding(list(terms), reason, suspects)
        reason = f"The gradient is not finite (first in {self._first(norms)})"
        return _Finding([], reason, all_files)

    def _first(self, norms: list[float]) -> str:
        """The first parameter, in the order of the module, with such a gradient."""
        pairs = zip(self.parameters, norms, strict=True)
        found = {id(p) for p, norm in pairs if not isfinite(norm)}
        names = (n for n, p in self.module.named_parameters() if id(p) in found)
        # The norm of large finite ones may overflow.
        return next(names, "the sum of all")

    def _files(self, batch: _Batch) -> list[str]:
        data: Any = getattr(self.module.trainer, "datamodule", None)
        if data is None or batch.indices is None:
            return []
        dataset = data.train_dataset
        return [printable(dataset.file(i)) for i in batch.indices.tolist()]


def _norms(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of the gradient of each; of the whole one, where processes have shards."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(local_shards(gradients)))
    if isinstance(gradients[0], DTensor):
        squares = norms.square()
        dist.all_reduce(squares)
        norms = squares.sqrt()
    return norms


def _told(number: int, finding: _Finding, trainer: Trainer) -> str:
    """What all processes know of a step, in words; lists the images in a file."""
    findings = [finding]
    if trainer.world_size > 1:
        findings *= trainer.world_size
        dist.all_gather_object(findings, finding)
    # What is not finite spreads from one process to others, but not into all terms.
    most = max(len(each.terms) for each in findings)
    findings = [each for each in findings if len(each.terms) == most]
    files = [file for each in findings for file in each.files]
    text = (
        f"{findings[0].reason} at step {number}; weights, optimiser and teacher stay "
        "as they were before it."
    )
    if not files:
        return text
    listed = Path(trainer.default_root_dir) / LIST
    if trainer.is_global_zero:
        listed.parent.mkdir(parents=True, exist_ok=True)
        with listed.open("a", encoding="utf-8") as file:
            file.write("\n  ".join([f"step {number}: {findings[0].reason}", *files]))
            file.write("\n")
    shown = ", ".join(f"'{file}'" for file in files[:NUM_SHOWN])
    more = f" and {len(files) - NUM_SHOWN} more" if len(files) > NUM_SHOWN else ""
    return f"{text} Its images: {shown}{more}, listed in '{listed}'."


def _checkpoint(trainer: Trainer) -> str:
    """The last one, and what to type to go on from it."""
    output = Path(trainer.default_root_dir)
    last = output / "checkpoints" / LAST
    place = f"'{last.resolve()}'" if last.exists() else "the start (nothing is saved)"
    return f"{place}: {resume_command(output)}"
