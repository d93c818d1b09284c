from __future__ import annotations

from typing import Any

import pytest
import torch

from lightly_ext.loss import (
    CLSViews,
    SparseViews,
    STELLARLoss,
    TeacherTargets,
    match_tokens,
    sinkhorn_knopp,
)
from lightly_ext.loss.stellar_terms import named_tensors
from tests import reference

B, V, U, R, WIDTH, DIM, K = 2, 3, 2, 4, 8, 6, 10


def inputs(teacher: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, DIM), dim=-1)

    return {
        "sparse": SparseViews(
            torch.randn(B, R, WIDTH),
            torch.randn(B, V, R, WIDTH),
            unit(B, R).requires_grad_(),
            unit(B, V, R).requires_grad_(),
            torch.randn(K, DIM, requires_grad=True),
        ),
        "cls": CLSViews(
            unit(B).requires_grad_(),
            unit(B, V).requires_grad_(),
            unit(B, U).requires_grad_(),
            torch.randn(K, DIM, requires_grad=True),
        ),
        "reconstruction": torch.rand(B, 3, 4, 4, requires_grad=True),
        "images": torch.rand(B, 3, 4, 4),
        "teacher": TeacherTargets(
            torch.randn(B, R, WIDTH),
            unit(B, R).requires_grad_(),
            torch.randn(K, DIM, requires_grad=True),
            unit(B).requires_grad_(),
            torch.randn(K, DIM, requires_grad=True),
        )
        if teacher
        else None,
    }


def cast(data: Any, dtype: torch.dtype) -> Any:
    """Inputs as leaves of another precision."""
    if isinstance(data, dict):
        return {name: cast(value, dtype) for name, value in data.items()}
    if isinstance(data, tuple):
        return type(data)(*[cast(value, dtype) for value in data])
    return None if data is None else data.detach().to(dtype).requires_grad_()


def plain_alignment(sparse: SparseViews) -> torch.Tensor:
    """Alignment by loops over images, views and tokens, and plain cross-entropies."""
    logits = sparse.embeddings.flatten(0, 1) @ sparse.prototypes.T
    q = sinkhorn_knopp(logits.detach() / 0.06).view(B, R, K)
    losses = []
    for b in range(B):
        for v in range(V):
            index = match_tokens(sparse.view_tokens[b, v], sparse.tokens[b]).indices
            for r in range(R):
                z = sparse.view_embeddings[b, v, r] @ sparse.prototypes.T
                losses.append(-(q[b, index[r]] * (z / 0.12).log_softmax(0)).sum())
    return torch.stack(losses).mean()


class TestSTELLARLoss:
    def test_forward__is_weighted_sum_of_terms(self) -> None:
        data = inputs()
        criterion = STELLARLoss(
            reconstruction_weight=2.0,
            clustering_weight=3.0,
            alignment_weight=5.0,
            cls_clustering_weight=7.0,
            cls_alignment_weight=11.0,
            koleo_weight=13.0,
        )
        t = criterion.terms(**data)
        expected = (
            2 * t.reconstruction
            + 3 * t.clustering
            + 5 * t.alignment
            + 7 * t.cls_clustering
            + 11 * (t.cls_alignment + t.cls_local_alignment)
            + 13 * (t.koleo + t.koleo_views)
        )
        torch.testing.assert_close(t.total, expected)
        torch.testing.assert_close(criterion(**data), expected)

    def test_terms__alignment_by_loops(self) -> None:
        data = inputs()
        terms = STELLARLoss().terms(**data)
        expected = plain_alignment(data["sparse"])
        torch.testing.assert_close(terms.alignment, expected)
        leaves = [data["sparse"].view_embeddings, data["sparse"].prototypes]
        for ours, plain in zip(
            torch.autograd.grad(terms.alignment, leaves),
            torch.autograd.grad(expected, leaves),
            strict=True,
        ):
            torch.testing.assert_close(ours, plain)

    def test_terms__matching_statistics(self) -> None:
        data = inputs()
        sparse = data["sparse"]
        order = torch.tensor([1, 0, 2, 3])
        views = sparse.tokens[:, None, order].expand(B, V, R, WIDTH)
        data["sparse"] = sparse._replace(view_tokens=views)
        terms = STELLARLoss().terms(**data)
        assert terms.non_identity_matches.item() == pytest.approx(0.5)
        assert terms.matching_entropy.item() == pytest.approx(0.0, abs=1e-3)

    def test_terms__identity_matching_ignores_distances(self) -> None:
        data = inputs()
        sparse = data["sparse"]
        permuted = sparse._replace(view_tokens=sparse.tokens[:, None].flip(2))
        permuted = permuted._replace(view_embeddings=sparse.view_embeddings[:, :1])
        identity = STELLARLoss(matching="identity", cls_alignment_weight=0)
        transport = STELLARLoss(cls_alignment_weight=0)
        flipped = permuted._replace(view_embeddings=permuted.view_embeddings.flip(2))
        torch.testing.assert_close(
            identity.terms(**{**data, "sparse": permuted}).alignment,
            transport.terms(**{**data, "sparse": flipped}).alignment,
        )
        terms = identity.terms(**{**data, "sparse": permuted})
        assert terms.non_identity_matches == 0 and terms.matching_entropy == 0

    def test_terms__teacher_by_number(self) -> None:
        # With its own tokens and prototypes, matched by number, a teacher says what
        # the target view says without one, however far the student's tokens are.
        data = inputs()
        sparse, cls = data["sparse"], data["cls"]
        teacher = TeacherTargets(
            torch.randn(B, R, WIDTH),
            sparse.embeddings,
            sparse.prototypes,
            cls.embeddings,
            cls.prototypes,
        )
        criterion = STELLARLoss(matching="identity")
        alone = criterion.terms(**data)
        taught = criterion.terms(**{**data, "teacher": teacher})
        torch.testing.assert_close(taught.total, alone.total)
        torch.testing.assert_close(taught.clustering, alone.clustering)

    @pytest.mark.parametrize(
        "off, missing",
        [
            ("reconstruction", {"reconstruction"}),
            ("clustering", {"clustering"}),
            (
                "alignment",
                {
                    *("alignment", "non_identity_matches"),
                    *("matching_collisions", "matching_entropy"),
                },
            ),
            ("cls_clustering", {"cls_clustering"}),
            ("cls_alignment", {"cls_alignment", "cls_local_alignment"}),
            ("koleo", {"koleo", "koleo_views"}),
        ],
    )
    def test_terms__each_term_off_by_itself(self, off: str, missing: set[str]) -> None:
        data = inputs()
        on = STELLARLoss().terms(**data)
        terms = STELLARLoss(**{f"{off}_weight": 0.0}).terms(**data)
        assert {k for k, v in terms._asdict().items() if v is None} == missing
        for name, value in terms._asdict().items():
            if name != "total" and value is not None:
                torch.testing.assert_close(value, getattr(on, name))

    def test_terms__off_terms_need_no_input(self) -> None:
        data = inputs()
        tokens = SparseViews(*data["sparse"][:2])
        criterion = STELLARLoss(
            reconstruction_weight=0,
            clustering_weight=0,
            alignment_weight=0,
            cls_clustering_weight=0,
            cls_alignment_weight=0,
        )
        terms = criterion.terms(tokens)
        torch.testing.assert_close(terms.total, 0.1 * (terms.koleo + terms.koleo_views))

    def test_terms__without_local_crops(self) -> None:
        data = inputs()
        data["cls"] = data["cls"]._replace(local_embeddings=None)
        assert STELLARLoss().terms(**data).cls_local_alignment is None

    def test_terms__no_gradient_to_targets(self) -> None:
        # Only through the predictions: assignments are constants.
        data = inputs(teacher=True)
        STELLARLoss()(**data).backward()
        teacher = data["teacher"]
        for tensor in (teacher.embeddings, teacher.prototypes, teacher.cls_embeddings):
            assert tensor.grad is None
        assert data["sparse"].prototypes.grad.abs().sum() > 0

    def test_terms__half_precision_inputs(self) -> None:
        data = inputs()
        expected = STELLARLoss().terms(**data)
        half = {
            "sparse": SparseViews(*[t.detach().bfloat16() for t in data["sparse"]]),
            "cls": CLSViews(*[t.detach().bfloat16() for t in data["cls"]]),
            "reconstruction": data["reconstruction"].detach().bfloat16(),
            "images": data["images"],
        }
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = STELLARLoss().terms(**half)
        assert terms.total.dtype == torch.float32
        torch.testing.assert_close(terms.total, expected.total, rtol=0.05, atol=0)

    @pytest.mark.parametrize("teacher", [False, True])
    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 3e-3)]
    )
    def test_terms__pure_half_precision(
        self, dtype: torch.dtype, tolerance: float, teacher: bool
    ) -> None:
        expected, half = (cast(inputs(teacher), to) for to in (torch.float32, dtype))
        theirs, ours = (STELLARLoss().terms(**data) for data in (expected, half))
        for name, loss in theirs.losses().items():
            found = getattr(ours, name).detach()
            torch.testing.assert_close(found, loss, rtol=tolerance, atol=0, msg=name)
        # One token of a masked view has two neighbours that are equally near.
        off = STELLARLoss(koleo_weight=0.0)
        for data in (expected, half):
            off(**data).backward()
        gradients = [
            {k: v.grad for k, v in named_tensors(**data).items() if v.grad is not None}
            for data in (expected, half)
        ]
        assert len(gradients[0]) == 9 and gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            distance = (gradients[1][name].float() - gradient).norm() / gradient.norm()
            assert distance < tolerance, name

    def test_forward__one_image_is_not_finite(self) -> None:
        for name in named_tensors(**inputs(teacher=True)):
            data = cast(inputs(teacher=True), torch.float32)
            with torch.no_grad():
                named_tensors(**data)[name][1] = torch.nan
            if name == "teacher.tokens":
                continue  # only decides on the matching
            what = "row" if "prototypes" in name else "image"
            with pytest.raises(
                ValueError, match=rf"loss is nan.*: {name} \({what} 1\)"
            ):
                STELLARLoss()(**data)

    def test_forward__overflow_of_finite_inputs(self) -> None:
        data = inputs()
        data["images"] = torch.full_like(data["images"], 1e30)
        with pytest.raises(ValueError, match=r"loss is inf.*: no input"):
            STELLARLoss()(**data)

    @pytest.mark.parametrize(
        "name, axis, match",
        [
            ("sparse.tokens", 0, r"sparse.tokens has shape \(0, 4, 8\)"),
            ("sparse.tokens", 1, r"sparse.tokens has shape \(2, 0, 8\)"),
            ("sparse.view_tokens", 1, r"sparse.view_tokens has shape \(2, 0, 4, 8\)"),
            ("cls.view_embeddings", 1, r"cls.view_embeddings has shape \(2, 0, 6\)"),
            ("cls.local_embeddings", 1, "local_embeddings is None"),
            ("reconstruction", 0, r"reconstruction has shape \(0, 3, 4, 4\)"),
        ],
    )
    def test_terms__empty_input(self, name: str, axis: int, match: str) -> None:
        data = inputs()
        group, _, field = name.partition(".")
        tensor = named_tensors(**data)[name].narrow(axis, 0, 0)
        data[group] = data[group]._replace(**{field: tensor}) if field else tensor
        with pytest.raises(ValueError, match=match):
            STELLARLoss().terms(**data)

    def test_terms__one_token(self) -> None:
        data = inputs()
        first = [t[..., :1, :] for t in data["sparse"][:4]]
        data["sparse"] = SparseViews(*first, data["sparse"].prototypes)
        with pytest.raises(ValueError, match=r"two tokens .*koleo_weight=0"):
            STELLARLoss().terms(**data)
        assert STELLARLoss(koleo_weight=0.0)(**data).isfinite()

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ({"koleo_weight": -1.0}, "Weights must be 0 or more"),
            ({"prediction_temperature": 0.0}, "Temperatures must be positive"),
            ({"matching": "hungarian"}, "optimal_transport"),
        ],
    )
    def test_init__bad_argument(self, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            STELLARLoss(**arguments)

    @pytest.mark.parametrize(
        "missing, match",
        [
            ("cls", "cls_clustering_weight"),
            ("reconstruction", "reconstruction_weight=0"),
            ("images", "reconstruction_weight=0"),
        ],
    )
    def test_terms__missing_input(self, missing: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            STELLARLoss().terms(**{**inputs(), missing: None})

    def test_terms__missing_embeddings(self) -> None:
        data = inputs()
        data["sparse"] = SparseViews(*data["sparse"][:2])
        with pytest.raises(ValueError, match="embeddings"):
            STELLARLoss().terms(**data)

    def test_terms__shapes_differ(self) -> None:
        data = inputs()
        data["images"] = data["images"][..., :3]
        with pytest.raises(ValueError, match="differ in shape"):
            STELLARLoss().terms(**data)

    def test_terms__nothing_to_minimise(self) -> None:
        criterion = STELLARLoss(0, 0, 0, 0, 0, 0)
        with pytest.raises(ValueError, match="Every weight"):
            criterion.terms(**inputs())


def only_codes(**kwargs: Any) -> STELLARLoss:
    """The token reconstruction by itself."""
    off = {f"{name}_weight": 0.0 for name in ("clustering", "alignment", "koleo")}
    off |= {"cls_clustering_weight": 0.0, "cls_alignment_weight": 0.0}
    return STELLARLoss(**off, target="tokens", **kwargs)


class TestTokenTargetParity:
    def test_terms__reference_numbers_and_gradient(self) -> None:
        data = reference.load("ops")
        logits = data["vqce.logits"].requires_grad_()
        tokens = SparseViews(*inputs()["sparse"][:2])
        terms = only_codes().terms(
            tokens, reconstruction=logits, codes=data["vqce.codes"]
        )
        expected = data["vqce.loss"]
        torch.testing.assert_close(terms.reconstruction, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(terms.total, 0.05 * expected, rtol=1e-5, atol=0)
        terms.reconstruction.backward()
        gradient = data["vqce.grad"]
        tolerance = 5e-5 * gradient.abs().max().item()
        torch.testing.assert_close(logits.grad, gradient, rtol=0, atol=tolerance)


class TestTokenTarget:
    def test_init__weight_follows_the_target(self) -> None:
        assert STELLARLoss().weights["reconstruction"] == 10
        assert STELLARLoss(target="tokens").weights["reconstruction"] == 0.05
        loss = STELLARLoss(2.0, target="tokens")
        assert loss.weights["reconstruction"] == 2

    def test_terms__half_precision_logits(self) -> None:
        logits, codes = torch.randn(2, 4, 6).bfloat16(), torch.arange(8).view(2, 4) % 6
        tokens = SparseViews(*inputs()["sparse"][:2])
        terms = only_codes().terms(tokens, reconstruction=logits, codes=codes)
        expected = -logits.float().log_softmax(-1).gather(-1, codes[..., None]).mean()
        torch.testing.assert_close(terms.reconstruction, expected)

    def test_init__unknown_target(self) -> None:
        with pytest.raises(ValueError, match="'pixels' or 'tokens', got 'vq'"):
            STELLARLoss(target="vq")

    def test_terms__missing_codes(self) -> None:
        data = inputs()
        with pytest.raises(ValueError, match="and `codes`; set reconstruction_weight"):
            only_codes().terms(data["sparse"], reconstruction=torch.zeros(2, 4, 6))

    def test_terms__codes_of_another_grid(self) -> None:
        data = inputs()
        with pytest.raises(ValueError, match=r"logits \(2, 4, 6\) and codes \(2, 5\)"):
            only_codes().terms(
                data["sparse"],
                reconstruction=torch.zeros(2, 4, 6),
                codes=torch.zeros(2, 5, dtype=torch.int64),
            )
