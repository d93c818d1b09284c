"""The worst difference to the reference numbers, per quantity.

Everything goes through the classes that users use: the reference weights are written
as an official file that `Stellar.from_pretrained` and `StellarPretraining` read.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightly_ext.loss import (
    SetKoLeoLoss,
    SparseViews,
    STELLARLoss,
    STELLARLossTerms,
    assign_prototypes,
    contract_targets,
    match_tokens,
    prototype_cross_entropy,
    sinkhorn_knopp,
)
from lightly_ext.modules import STELLARProjectionHead, focal_bump
from lightly_ext.pretrain import StellarPretraining
from stellar_plugin import Stellar
from stellar_plugin.decoder import FourierPositionEncoding
from tests import reference
from tests.pretraining import reference_batch
from tests.tokenizer_weights import reference_tokenizer

# Suggested by who made the reference numbers.
ACTIVATION, LOSS, GRADIENT, KEY_BIAS, IMAGE = 2e-5, 1e-5, 5e-5, 1e-6, 5e-5
ABSOLUTE, RELATIVE, COUNT = "absolute", "relative", "number that differ"
OF_LARGEST = "of the tensor's largest entry"


class Row(NamedTuple):
    """One line of the report.

    Attributes:
        quantity:
            What is compared.
        difference:
            Worst difference over all tensors of that quantity.
        tolerance:
            What is allowed.
        measure:
            What the difference is.
    """

    quantity: str
    difference: float
    tolerance: float
    measure: str = ABSOLUTE

    @property
    def is_within(self) -> bool:
        """Whether the difference is allowed; not a number is not."""
        return self.difference <= self.tolerance


def rows() -> list[Row]:
    """All comparisons, in the order of the method."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.safetensors"
        save_file(reference.weights(), path)
        parts = [
            *forward_rows(path),
            *decoder_rows(path),
            *clustering_rows(path),
            *step_rows(path, teacher=False),
            *step_rows(path, teacher=True),
            *momentum_rows(path),
        ]
    return [*parts, *operation_rows(), *tokenizer_rows()]


def table(report: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| quantity | worst difference | tolerance | measure |",
        "| --- | --- | --- | --- |",
    ]
    for row in report:
        if row.measure == COUNT:
            numbers = f"{row.difference:.0f} | {row.tolerance:.0f}"
        else:
            numbers = f"{row.difference:.1e} | {row.tolerance:.0e}"
        lines.append(f"| {row.quantity} | {numbers} | {row.measure} |")
    return "\n".join(lines)


@torch.no_grad()
def forward_rows(path: Path) -> Iterator[Row]:
    """Encoder outputs at the trained, a smaller, a larger and a non-square size."""
    model, expected = _model(path), reference.load("forward")
    for size in ("", "small.", "large.", "nonsquare."):
        images = expected[f"{size}image"]
        result = model(reference.normalized(images))
        shape = " x ".join(map(str, images.shape[-2:]))
        for name, ours in (
            ("cls", result.cls),
            ("sparse", result.sparse),
            ("dense", result.dense),
            ("spatial", result.localization),
        ):
            theirs = expected[f"{size or 'out.'}{name}"]
            label = "localization" if name == "spatial" else name
            yield Row(f"{label}, {shape} px", _distance(ours, theirs), ACTIVATION)
        if not size:
            lowrank = _distance(result.lowrank, expected["out.lowrank"])
            yield Row(f"low-rank latent, {shape} px", lowrank, ACTIVATION)


@torch.no_grad()
def decoder_rows(path: Path) -> Iterator[Row]:
    """Position code, decoder tokens and pixels."""
    model, expected = _model(path), reference.load("forward")
    images = expected["image"]
    code = model.decoder.position((4, 4))
    yield Row("Fourier code, 4 x 4", _distance(code, expected["mid.decoder_pos"]), 2e-5)
    code = model.decoder.position((3, 5))
    plain = plain_fourier_code(model.decoder.position, 3, 5)
    yield Row("Fourier code, 3 x 5, against loops", _distance(code, plain), ACTIVATION)
    tokens: list[Tensor] = []
    model.decoder.norm.register_forward_hook(lambda *args: tokens.append(args[2]))
    result = model(reference.normalized(images))
    pixels = model.decode(result.lowrank, result.grid_size)
    theirs = expected["out.decoder_tokens"]
    yield Row("decoder tokens", _distance(tokens[0], theirs), ACTIVATION)
    yield Row("pixels", _distance(pixels, expected["out.x_hat"]), ACTIVATION)


@torch.no_grad()
def clustering_rows(path: Path) -> Iterator[Row]:
    """Both heads: logits, balanced assignments and their cross-entropy."""
    module, expected = _pretraining(path), reference.load("forward")
    result = module(reference.normalized(expected["image"]))
    for name, head, tokens in (
        ("sparse", module.sparse_head, result.sparse),
        ("cls", module.cls_head, result.cls),
    ):
        assert isinstance(head, STELLARProjectionHead)
        theirs = {
            kind: expected[f"cluster.{name}.{kind}"]
            for kind in ("logits", "assignments", "loss")
        }
        embeddings, prototypes = head(tokens), head.prototypes.weight
        logits = embeddings @ prototypes.mT
        q = assign_prototypes(embeddings, prototypes)
        target = contract_targets(q, prototypes)
        loss = prototype_cross_entropy(embeddings, prototypes, target).mean()
        label = f"clustering of {name} tokens"
        yield Row(f"{label}, logits", _distance(logits, theirs["logits"]), ACTIVATION)
        distance = _distance(q, theirs["assignments"])
        yield Row(f"{label}, assignments", distance, ACTIVATION)
        yield Row(f"{label}, loss", _relative(loss, theirs["loss"]), LOSS, RELATIVE)


def step_rows(path: Path, teacher: bool) -> Iterator[Row]:
    """One training step: terms, matching and the gradient of every parameter."""
    module = _pretraining(path, teacher)
    name = "step with teacher" if teacher else "step"
    expected = reference.load("train_teacher" if teacher else "train")
    views, keep = reference_batch()
    terms, sparse, _ = module.loss_terms(views, keep)
    for label, ours, theirs in _terms(terms):
        distance = _relative(ours, expected[f"loss.{theirs}"])
        yield Row(f"{name}, {label}", distance, LOSS, RELATIVE)
    targets, predictions = sparse.tokens, sparse.view_tokens
    distance = _distance(predictions, expected["mid.sparse_masked"])
    yield Row(f"{name}, tokens of masked views", distance, ACTIVATION)
    if teacher:
        encoder = module.teacher["encoder"]
        targets = encoder(views.global_views[:, 1]).sparse
        distance = _distance(targets, expected["target.sparse_tokens"])
        yield Row(f"{name}, tokens of the teacher", distance, ACTIVATION)
        yield from _matching_rows(name, "image", expected, sparse.tokens, targets)
    yield from _matching_rows(name, "masked", expected, predictions, targets[:, None])
    terms.total.backward()
    yield from _gradient_rows(name, module, teacher)


@torch.no_grad()
def momentum_rows(path: Path) -> Iterator[Row]:
    """The teacher after one update, and the losses that it then makes."""
    module, expected = _pretraining(path, teacher=True), reference.load("train_teacher")
    module._update_teacher()
    after = _renamed_teacher(expected, "ema.after.")
    theirs = _teacher_state({**_averaged_teacher(), **after})
    ours = module.teacher.state_dict()
    worst = _worst(_distance(value, theirs[name]) for name, value in ours.items())
    yield Row("teacher after one update, weights", worst, 1e-6)
    terms, *_ = module.loss_terms(*reference_batch())
    for label, ours, name in _terms(terms):
        distance = _relative(ours, expected[f"ema.then_loss.{name}"])
        yield Row(f"step after that, {label}", distance, LOSS, RELATIVE)


def operation_rows() -> Iterator[Row]:
    """Single operations on inputs of their own, extreme ones among them."""
    data = reference.load("ops")
    for case in ("normal", "large", "single_row", "outlier_rows", "tall"):
        logits = data[f"sinkhorn.{case}.logits"]
        worst = _worst(
            _distance(
                sinkhorn_knopp(logits, n), data[f"sinkhorn.{case}.scale1.0.it{n}"]
            )
            for n in (1, 3, 10)
        )
        yield Row(f"Sinkhorn, {case}", worst, ACTIVATION)
    for case in ("soft", "far", "collision", "rect"):
        tokens = (data[f"match.{case}.preds"], data[f"match.{case}.targets"])
        plan, indices = data[f"match.{case}.P"], data[f"match.{case}.index"]
        yield from _matching(f"matching, {case}", *tokens, plan, indices)
    for case in ("normal", "identical_pair", "near_pair", "two_tokens"):
        x = data[f"koleo.{case}.x"].requires_grad_()
        loss = SetKoLeoLoss()(x)
        distance = _relative(loss, data[f"koleo.{case}.loss"])
        yield Row(f"set KoLeo, {case}", distance, LOSS, RELATIVE)
        (ours,) = torch.autograd.grad(loss, x)
        distance = _of_largest(ours, data[f"koleo.{case}.grad"])
        yield Row(f"set KoLeo, {case}, gradient", distance, GRADIENT, OF_LARGEST)
    yield from _cross_entropy_rows(data)
    yield from _code_rows(data)
    yield from _mask_rows(data)


@torch.no_grad()
def tokenizer_rows() -> Iterator[Row]:
    """The frozen tokenizer, at square, odd and non-square sizes."""
    tokenizer, data = reference_tokenizer(), reference.load("tokenizer_io")
    for case in ("square64", "square48", "odd50", "nonsquare32x64"):
        images, theirs = data[f"{case}.image"], data[f"{case}.codes"]
        hidden = tokenizer.encoder(images)
        distance = _distance(hidden, data[f"{case}.hidden"])
        yield Row(f"tokenizer, {case}, hidden states", distance, ACTIVATION)
        codes = tokenizer.encode(images)
        differ = _differing(codes, theirs.view_as(codes))
        yield Row(f"tokenizer, {case}, codes", differ, 0, COUNT)
        distance = _distance(tokenizer.decode(codes), data[f"{case}.decoded"])
        yield Row(f"tokenizer, {case}, decoded image", distance, IMAGE)


def plain_fourier_code(
    position: FourierPositionEncoding, height: int, width: int
) -> Tensor:
    """The position code by loops, in float64: (height * width, dim)."""
    g = position.frequencies.double()
    code = []
    for row in range(height):
        for column in range(width):
            x, y = 2 * (column + 0.5) / width - 1, 2 * (row + 0.5) / height - 1
            phase = 2 * math.pi * (x * g[0] + y * g[1])
            code.append(torch.stack([phase.sin(), phase.cos()], dim=1).flatten())
    return torch.stack(code)


def _model(path: Path) -> Stellar:
    return Stellar.from_pretrained(path, num_heads=3, decoder_num_heads=4)


def _pretraining(path: Path, teacher: bool = False) -> StellarPretraining:
    module = StellarPretraining(
        model=reference.model_arguments(),
        head=reference.head_arguments(),
        weights=str(path),
        teacher_momentum=0.9 if teacher else None,
    )
    if teacher:
        state = _teacher_state(reference.teacher_weights())
        module.teacher.load_state_dict(state)
    return module


def _teacher_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reference names without `teacher_` to those of the module's teacher."""
    model = reference.model_state(state)
    result = {k: v for k, v in model.items() if k.startswith("encoder.")}
    for ours, theirs in reference.HEADS.items():
        head = reference.head_state(state, theirs)
        result |= {f"{ours}.{name}": value for name, value in head.items()}
    return result


def _averaged_teacher() -> dict[str, Tensor]:
    student, teacher = reference.weights(), reference.teacher_weights()
    return {name: 0.9 * teacher[name] + 0.1 * student[name] for name in teacher}


def _renamed_teacher(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return reference.without_teacher(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )


def _terms(terms: STELLARLossTerms) -> Iterator[tuple[str, Tensor, str]]:
    """Name, our value and the reference's name of each term."""
    parts = {k: v for k, v in terms._asdict().items() if v is not None}
    yield "reconstruction", parts["reconstruction"], "MSE"
    yield "clustering", parts["clustering"], "clustering_loss"
    yield "alignment", parts["alignment"], "mask_loss"
    yield "CLS clustering", parts["cls_clustering"], "cls_clustering_loss"
    cls_loss = parts["cls_alignment"] + parts["cls_local_alignment"]
    yield "CLS alignment, masked views and local crops", cls_loss, "cls_loss"
    yield "KoLeo", 0.1 * (parts["koleo"] + parts["koleo_views"]), "koleo_loss"
    yield "total", parts["total"], "total"


def _matching_rows(
    name: str, what: str, expected: dict[str, Tensor], *tokens: Tensor
) -> Iterator[Row]:
    plan, indices = expected[f"match.{what}.P"], expected[f"match.{what}.index"]
    views = "masked views" if what == "masked" else "the image"
    yield from _matching(f"{name}, matching of {views}", *tokens, plan, indices)


def _matching(
    label: str, predictions: Tensor, targets: Tensor, plan: Tensor, indices: Tensor
) -> Iterator[Row]:
    result = match_tokens(predictions, targets)
    differ = _differing(result.indices, indices.view_as(result.indices))
    yield Row(f"{label}, indices", differ, 0, COUNT)
    yield Row(f"{label}, transport plan", _distance(result.plan, plan), ACTIVATION)


def _gradient_rows(
    name: str, module: StellarPretraining, teacher: bool
) -> Iterator[Row]:
    expected = _reference_gradients(teacher)
    groups = {
        "model.encoder.": "encoder",
        "model.decoder.": "decoder",
        "sparse_head.": "sparse head",
        "cls_head.": "CLS head",
    }
    differences: dict[str, list[float]] = {group: [] for group in groups.values()}
    key_biases = []
    for parameter_name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        ours, theirs = parameter.grad, expected[parameter_name]
        assert ours is not None
        if parameter_name.endswith("qkv.bias"):
            # Gradients of key biases are zero in exact arithmetic: compared by itself.
            (q, k, v), (q2, k2, v2) = ours.chunk(3), theirs.chunk(3)
            key_biases.append(_distance(k, k2))
            ours, theirs = torch.cat([q, v]), torch.cat([q2, v2])
        group = next(g for p, g in groups.items() if parameter_name.startswith(p))
        differences[group].append(_of_largest(ours, theirs))
    for group, values in differences.items():
        label = f"{name}, gradients, {group}, worst parameter"
        yield Row(label, _worst(values), GRADIENT, OF_LARGEST)
    yield Row(f"{name}, gradients, key biases", _worst(key_biases), KEY_BIAS)


def _reference_gradients(teacher: bool) -> dict[str, Tensor]:
    """Gradients by the names of `StellarPretraining`."""
    # What only reconstruction trains is stored once.
    stored = reference.load("train")
    if teacher:
        stored |= reference.load("train_teacher")
    state = {
        name: stored.get(f"grad.{name}", torch.zeros_like(weight))
        for name, weight in reference.weights().items()
    }
    result = {f"model.{k}": v for k, v in reference.model_state(state).items()}
    # The folded CLS token has the gradient of the token itself.
    result["model.encoder.vit.cls_token"] = state["encoder.embeddings.cls_token"]
    for ours, theirs in reference.HEADS.items():
        head = reference.head_state(state, theirs)
        result |= {f"{ours}.{name}": value for name, value in head.items()}
    return result


def _cross_entropy_rows(data: dict[str, Tensor]) -> Iterator[Row]:
    """With identity prototypes, embeddings are the logits of the fixtures."""
    eye, targets = torch.eye(20), data["contrastive.targets"]
    image, index = torch.arange(4) // 2, data["contrastive.index"]
    for case, logits, q in (
        ("no_index", "logits", targets[image]),
        ("with_index", "logits", targets[image[:, None], index]),
        ("single_view", "single_view_logits", targets),
    ):
        x = data[f"contrastive.{logits}"].detach().clone().requires_grad_()
        loss = prototype_cross_entropy(x, eye, contract_targets(q, eye)).mean()
        distance = _relative(loss, data[f"contrastive.{case}.loss"])
        yield Row(f"cross-entropy, {case}", distance, LOSS, RELATIVE)
        (ours,) = torch.autograd.grad(loss, x)
        distance = _of_largest(ours, data[f"contrastive.{case}.grad"])
        yield Row(f"cross-entropy, {case}, gradient", distance, GRADIENT, OF_LARGEST)


def _code_rows(data: dict[str, Tensor]) -> Iterator[Row]:
    """The target "tokens": reconstruction alone, with all other weights zero."""
    off = ("clustering", "alignment", "cls_clustering", "cls_alignment", "koleo")
    weights = {f"{name}_weight": 0.0 for name in off}
    criterion = STELLARLoss(target="tokens", **weights)
    logits = data["vqce.logits"].detach().clone().requires_grad_()
    empty = SparseViews(torch.empty(0), torch.empty(0))
    terms = criterion.terms(empty, reconstruction=logits, codes=data["vqce.codes"])
    loss = terms.reconstruction
    assert loss is not None
    distance = _relative(loss, data["vqce.loss"])
    yield Row("VQ cross-entropy", distance, LOSS, RELATIVE)
    (ours,) = torch.autograd.grad(loss, logits)
    distance = _of_largest(ours, data["vqce.grad"])
    yield Row("VQ cross-entropy, gradient", distance, GRADIENT, OF_LARGEST)


def _mask_rows(data: dict[str, Tensor]) -> Iterator[Row]:
    prefix = "masking.gaussian."
    f = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    centre = torch.stack([f["center_y"], f["center_x"]], dim=1)
    bump = focal_bump((4, 4), centre, f["sigma"])
    biased = f["noise"] - f["use_focus"][:, None] * bump
    yield Row("mask, biased noise", _distance(biased, f["biased_noise"]), 2e-5)
    kept = biased.argsort(dim=1)[:, :4]
    yield Row("mask, kept patches", _differing(kept, f["ids_keep"]), 0, COUNT)


def _worst(differences: Iterable[float]) -> float:
    # Unlike max(), keeps what is not a number.
    return torch.tensor(list(differences), dtype=torch.float64).max().item()


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs.view_as(ours)).abs().max().item()


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs) / theirs).abs().item()


def _of_largest(ours: Tensor, theirs: Tensor) -> float:
    return _distance(ours, theirs) / theirs.abs().max().item()


def _differing(ours: Tensor, theirs: Tensor) -> float:
    return float((ours != theirs).sum())
