"""Health of a training: figures of logged steps, and a word when one goes wrong."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightly_ext.data import num_cpus
from lightly_ext.loss import MATCHING_FIGURES, SparseViews, STELLARLossTerms
from lightly_ext.metrics import health_figures
from lightly_ext.pretrain.loader_wait import LoaderWait, advice
from lightly_ext.pretrain.story import tell

CROSS_ENTROPIES = (
    *("clustering", "alignment"),
    *("cls_clustering", "cls_alignment", "cls_local_alignment"),
)
# Logged steps in a row after which a figure is sick, or well again: single batches lie.
PATIENCE = 3
# Steps before which, or while the learning rate warms up, nothing is judged: random
# weights look sick in every way.
MIN_STEPS = 100
# Logged steps whose gradient norms the next is compared with.
HISTORY = 50


class Symptom(NamedTuple):
    """A figure beyond a limit, and what that means.

    Attributes:
        figure:
            Name of the figure, see docs/pretraining.md.
        side:
            On which side of the limit it is sick.
        limit:
            Limit of the healthy.
        cause:
            What it means and its likely cause.
    """

    figure: str
    side: Literal["above", "below"]
    limit: float
    cause: str

    def is_seen(self, value: float) -> bool:
        """Whether a value is beyond the limit; one that is not finite is not."""
        beyond = value > self.limit if self.side == "above" else value < self.limit
        return math.isfinite(value) and beyond


COLLAPSED = (
    "The tokens collapse: within images, or in all of them, they are nearly the same. "
    "Likely causes: too high a learning rate, or alignment or KoLeo switched off."
)
UNIFORM = (
    "The prediction is no better than one that knows nothing but the number K of "
    "prototypes. Likely causes: too low or too high a learning rate, frozen heads, too "
    "high a temperature, or far fewer tokens in a step than prototypes."
)
# How the limits were found: docs/pretraining.md, section Health.
SYMPTOMS = (
    Symptom("token_cosine", "above", 0.95, COLLAPSED),
    Symptom("token_distance", "below", 0.02, COLLAPSED),
    Symptom("token_rank", "below", 1.5, COLLAPSED),
    Symptom(
        *("prototype_usage", "below", 0.1),
        "A few prototypes take nearly all tokens. Likely causes: collapsed tokens, or "
        "too low or too high a learning rate.",
    ),
    *(Symptom(f"{name}_over_ln_k", "above", 0.99, UNIFORM) for name in CROSS_ENTROPIES),
    Symptom(
        *("reconstruction_over_mean", "above", 0.99),
        "The prediction of hidden patches is no better than the mean of each. Likely "
        "causes: too low or too high a learning rate, or images without content.",
    ),
    Symptom(
        *("localization_entropy", "above", 0.95),
        "Every patch belongs to all tokens alike: nothing is localized. Likely causes: "
        "collapsed tokens, or too high a learning rate.",
    ),
    Symptom(
        *("localization_usage", "below", 0.01),
        "One token takes all patches of an image. Likely causes: collapsed tokens, or "
        "images without content.",
    ),
    Symptom(
        *("matching_collisions", "above", 0.5),
        "Most target tokens are matched with no token of a view, or with several: the "
        "matching does not tell tokens apart. Likely cause: collapsed tokens.",
    ),
    Symptom(
        *("gradient_norm_over_median", "above", 100.0),
        "The gradient explodes. Likely causes: too high a learning rate, or too short "
        "a warm-up.",
    ),
)


def training_figures(
    terms: STELLARLossTerms,
    sparse: SparseViews,
    localization: Tensor | None,
    num_cls_prototypes: int | None,
) -> dict[str, Tensor]:
    """Figures of a step, by name.

    Args:
        terms:
            Terms of its loss.
        sparse:
            Its sparse tokens and embeddings.
        localization:
            That of the target view with shape (batch_size, num_patches, num_tokens), or
            None without reconstruction.
        num_cls_prototypes:
            Number K of prototypes of the CLS token, None without its head.

    Returns:
        Those of `health_figures`; of every cross-entropy with prototypes its part of
        ln K, the value of a prediction that knows nothing; those of the matching.
    """
    figures = health_figures(
        sparse.tokens, sparse.embeddings, sparse.prototypes, localization
    )
    num_sparse = None if sparse.prototypes is None else len(sparse.prototypes)
    losses = terms.losses()
    for name in CROSS_ENTROPIES:
        number = num_cls_prototypes if name.startswith("cls") else num_sparse
        if name in losses and number is not None and number > 1:
            figures[f"{name}_over_ln_k"] = losses[name] / math.log(number)
    values = {name: getattr(terms, name) for name in MATCHING_FIGURES}
    return figures | {k: v for k, v in values.items() if v is not None}


class HealthMonitor(Callback):
    """Reads the figures of logged steps and says once when one goes wrong.

    And once more when it is well again. The figures come from a module, by `note`; the
    wait for data is measured here, and said once.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Tensor] = {}
        # Steps in a row in which a figure was not what it was last said to be.
        self._streaks = dict.fromkeys((s.figure for s in SYMPTOMS), 0)
        self._sick: set[str] = set()
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._start = MIN_STEPS
        self._loader_wait = LoaderWait()

    def note(self, figures: dict[str, Tensor]) -> None:
        """Keeps figures of this step, scalars, until it ends."""
        self._noted |= figures

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Learns from which step on figures are judged."""
        steps = pl_module.continuation.total_steps(trainer)
        warmup = int(pl_module.hparams["warmup_fraction"] * steps)
        self._start = max(MIN_STEPS, warmup)

    def on_train_epoch_start(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Forgets the time between epochs, in which loaders start."""
        self._loader_wait.forget()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the time of a validation."""
        self._loader_wait.forget()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the wait for this batch."""
        self._loader_wait.batch_came(pl_module.device)

    def step_ended(self, module: LightningModule) -> None:
        """Judges what was noted; begins to wait for the next batch.

        Called behind all callbacks: a checkpoint that is saved is no wait for data.
        """
        self._loader_wait.step_ended(module.device)
        if "gradient_norm" in self._noted:  # the last batch, if they accumulate
            self._judge_loader(module)
            values = torch.stack([x.float() for x in self._noted.values()]).tolist()
            figures = dict(zip(self._noted, values, strict=True))
            self._noted = {}
            if module.global_step > self._start:
                self._judge(figures, module)
            self._loader_wait.begin(module.device)  # without the time of all this

    def _judge_loader(self, module: LightningModule) -> None:
        share = self._loader_wait.share()
        if share is not None:
            module.log("health/loader_wait", share)
        share = self._loader_wait.too_long()
        if share is None:
            return
        trainer: Any = module.trainer
        workers = getattr(trainer.train_dataloader, "num_workers", 0)
        cores = max(1, num_cpus() // trainer.num_devices)
        shown = (
            f"Warning at step {module.global_step - 1}: training waits for images "
            f"{share:.0%} of the time (health/loader_wait). "
            f"{advice(workers, cores, module.device.type == 'cpu')}"
        )
        module.print(shown)
        tell(trainer, "health", shown)

    def _judge(self, figures: dict[str, float], module: LightningModule) -> None:
        norm = figures.get("gradient_norm", math.nan)
        if self._norms:
            figures["gradient_norm_over_median"] = norm / median(self._norms)
        if math.isfinite(norm) and norm > 0:
            self._norms.append(norm)
        # What one cause explains is said in one sentence.
        said: dict[str, list[str]] = {}
        for symptom in SYMPTOMS:
            name = symptom.figure
            if name not in figures or not self._turns(symptom, figures[name]):
                continue
            value = f"health/{name} {figures[name]:.3g}"
            if name in self._sick:
                value = f"{value} ({symptom.side} {symptom.limit:g})"
                said.setdefault(symptom.cause, []).append(value)
            else:
                said.setdefault("", []).append(value)
        for cause, values in said.items():
            shown = f"at step {module.global_step - 1}: {', '.join(values)}."
            shown = f"Warning {shown} {cause}" if cause else f"Well again {shown}"
            module.print(shown)
            tell(module.trainer, "health", shown)

    def _turns(self, symptom: Symptom, value: float) -> bool:
        """Whether a figure gets sick, or well again, with this value."""
        name = symptom.figure
        same = symptom.is_seen(value) == (name in self._sick)
        self._streaks[name] = 0 if same else self._streaks[name] + 1
        if self._streaks[name] < PATIENCE:
            return False
        self._streaks[name] = 0
        self._sick ^= {name}
        return True
