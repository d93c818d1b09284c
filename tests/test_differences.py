"""Where this package differs from the published implementation on purpose.

The numbers of the published code are those of its own formulas, written out here;
docs/parity.md lists the differences and their reasons.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightly_ext.loss import SetKoLeoLoss, sinkhorn_knopp
from lightly_ext.modules import focal_bump, random_focal_mask
from lightly_ext.transforms import STELLARColorAugment
from tests import parity, reference
from tests.pretraining import reference_module, reference_step, tiny


class TestColours:
    def test_color_augment__drawn_per_image_and_view(self) -> None:
        # Theirs: one draw for the whole stacked batch, so equal views stay equal.
        torch.manual_seed(0)
        view = torch.randint(256, (1, 1, 3, 16, 16)).to(torch.uint8)
        augment = STELLARColorAugment(cj_prob=1.0, gaussian_blur=0.0)
        coloured = augment(view.expand(4, 4, 3, 16, 16), None).global_views
        different = {tuple(v.flatten().tolist()) for v in coloured.flatten(0, 1)}
        assert len(different) == 16


class TestMasks:
    @pytest.mark.parametrize("grid, theirs, ours", [((10, 10), 9, 10), ((2, 5), 0, 1)])
    def test_random_focal_mask__ratio_is_not_rounded_away(
        self, grid: tuple[int, int], theirs: int, ours: int
    ) -> None:
        assert int(math.prod(grid) * (1 - 0.9)) == theirs
        assert random_focal_mask(2, grid, 0.9).shape == (2, ours)

    def test_focal_bump__any_grid_and_theirs_on_a_square(self) -> None:
        centre, sigma = torch.tensor([[2, 1]]), torch.tensor([0.3])
        bump = focal_bump((4, 4), centre, sigma).view(4, 4)
        for row in range(4):
            for column in range(4):
                distance = (row - 2) ** 2 + (column - 1) ** 2
                theirs = math.exp(-distance / (2 * (0.3 * 4) ** 2))
                assert bump[row, column].item() == pytest.approx(theirs, rel=1e-5)
        assert focal_bump((2, 8), centre, sigma).shape == (1, 16)


class TestGrids:
    def test_decoder__true_height_and_width(self) -> None:
        # Theirs takes 2 x 8 patches for 4 x 4.
        model = reference.stellar()
        code = model.decoder.position((2, 8)).double()
        plain = parity.plain_fourier_code(model.decoder.position, 2, 8)
        torch.testing.assert_close(code, plain, rtol=0, atol=2e-5)
        theirs = parity.plain_fourier_code(model.decoder.position, 4, 4)
        assert (code - theirs).abs().max() > 0.5
        lowrank = torch.randn(1, 16, 48)
        assert model.decode(lowrank, (2, 8)).shape == (1, 3, 32, 128)
        # 3 x 5 patches are no square number: an error in theirs.
        assert model.reconstruct(torch.randn(1, 3, 48, 80)).shape == (1, 3, 48, 80)

    def test_encoder__remainder_of_the_patch_size_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="72 x 64 is no multiple of the patch"):
            reference.stellar()(torch.randn(1, 3, 72, 64))


class TestTeacher:
    def test_loss_terms__no_forward_pass_moves_the_teacher(self) -> None:
        # Theirs moves it in every forward pass of the default mode, also in eval().
        module = reference_module(teacher=True)
        before = copy.deepcopy(module.teacher.state_dict())
        totals = []
        for mode in (True, False, True):
            module.train(mode)
            with torch.no_grad():
                totals.append(reference_step(module).total)
        assert totals[0] == totals[1] == totals[2]
        for name, value in module.teacher.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_update_teacher__theirs_one_forward_pass_later(self) -> None:
        # The loss that theirs computes after moving the teacher is ours of the next
        # step, if the student stays.
        expected = reference.load("train_teacher")
        module = reference_module(teacher=True)
        ours = [reference_step(module).total]
        module._update_teacher()
        ours.append(reference_step(module).total)
        theirs = [expected["loss.total"], expected["ema.then_loss.total"]]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        assert (theirs[0] - theirs[1]).abs() > 1e-4 * theirs[0]


class TestLosses:
    def test_sinkhorn_knopp__input_is_kept(self) -> None:
        logits = reference.load("ops")["sinkhorn.normal.logits"]
        before = logits.clone()
        sinkhorn_knopp(logits)
        assert torch.equal(logits, before)

    def test_set_koleo__single_token_is_an_error(self) -> None:
        # Theirs: the token is its own neighbour, a constant without gradient.
        with pytest.raises(ValueError, match="at least two tokens"):
            SetKoLeoLoss()(torch.randn(2, 1, 48))

    @pytest.mark.parametrize(
        "off, absent",
        [
            ({"reconstruction_weight": 0.0}, ("model.decoder.", "_proj.")),
            ({"clustering_weight": 0.0, "alignment_weight": 0.0}, ("sparse_head.",)),
            (
                {"cls_clustering_weight": 0.0, "cls_alignment_weight": 0.0},
                ("cls_head.",),
            ),
        ],
    )
    def test_pretraining__switched_off_terms_build_nothing(
        self, off: dict[str, float], absent: tuple[str, ...]
    ) -> None:
        names = [name for name, _ in tiny(loss=off).named_parameters()]
        assert not any(part in name for part in absent for name in names)
        assert names
