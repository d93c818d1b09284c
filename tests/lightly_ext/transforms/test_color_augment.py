from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightly_ext.transforms import STELLARColorAugment
from lightly_ext.transforms import color_augment as color_augment_module
from lightly_ext.transforms.color_draws import ColorDraws

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SINGLE = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def _views(batch: int = 2, views: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, views, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _plain(**arguments: float) -> STELLARColorAugment:
    """An augmentation that does nothing but what the arguments switch on."""
    off = {"cj_prob": 0.0, "random_gray_scale": 0.0, "gaussian_blur": 0.0}
    return STELLARColorAugment(**{**off, **arguments})


class TestSTELLARColorAugment:
    def test_forward__target_is_normalised_first_view(self) -> None:
        views = _views()
        result = STELLARColorAugment()(views, _views(size=8))
        expected = (views[:, 0] / 255.0 - MEAN) / STD
        torch.testing.assert_close(result.target, expected, atol=1e-6, rtol=0)
        # The raw images are not computed back: they are the pixels, exactly.
        assert torch.equal(result.images, views[:, 0].float() / 255)

    def test_forward__nothing_drawn_only_normalises(self) -> None:
        views, local_views = _views(), _views(views=5, size=8, seed=1)
        result = _plain()(views, local_views)
        expected = (local_views / 255.0 - MEAN) / STD
        torch.testing.assert_close(result.local_views, expected, atol=1e-6, rtol=0)
        assert torch.equal(result.target, result.global_views[:, 0])

    def test_forward__own_mean_and_std(self) -> None:
        augment = STELLARColorAugment(mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5))
        views = torch.full((1, 1, 3, 8, 8), 255, dtype=torch.uint8)
        channels = augment(views).target[0, :, 0, 0].tolist()
        assert channels == pytest.approx([1.0, 0.25, 0.0])

    def test_forward__shapes_and_type_without_local_views(self) -> None:
        result = STELLARColorAugment()(_views(batch=4, views=2))
        assert result.target.shape == (4, 3, 16, 16)
        assert result.global_views.shape == (4, 2, 3, 16, 16)
        assert result.local_views is None
        assert result.global_views.dtype == torch.float32

    @pytest.mark.parametrize("chunk", [1, 3, 1000])
    def test_forward__equals_torchvision_per_view(
        self, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The draws are replayed view by view with torchvision's functions.
        monkeypatch.setattr(color_augment_module, "_CPU_PIXELS", chunk * 16 * 16)
        augment = STELLARColorAugment()
        views = _views(batch=5, views=4)
        draws = augment.draw(20, _generator())
        expected = []
        for i, view in enumerate(views.flatten(0, 1)):
            image = view / 255.0
            if draws.jitter[i]:
                for step in draws.order:
                    image = SINGLE[step](image, float(draws.strengths[step, i]))
            if draws.gray[i]:
                image = F.rgb_to_grayscale(image, num_output_channels=3)
            if draws.blur[i]:
                image = F.gaussian_blur(image, [9, 9], [float(draws.sigmas[i])] * 2)
            expected.append((image - MEAN) / STD)
        actual = augment(views, generator=_generator()).global_views.flatten(0, 1)
        torch.testing.assert_close(actual, torch.stack(expected), atol=3e-5, rtol=0)

    def test_forward__so_many_images_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(color_augment_module, "_CPU_PIXELS", 3 * 16 * 16 + 1)
        augment, counts = STELLARColorAugment(), []
        colorize = augment.colorize

        def counted(images: Tensor, draws: ColorDraws) -> Tensor:
            counts.append(len(images))
            return colorize(images, draws)

        monkeypatch.setattr(augment, "colorize", counted)
        augment(_views(batch=2, views=4), _views(batch=2, views=1, size=32))
        # Of larger images there is always one.
        assert counts == [3, 3, 2, 1, 1]

    def test_forward__always_gray(self) -> None:
        result = _plain(random_gray_scale=1.0)(_views())
        raw = result.global_views * STD + MEAN
        assert float((raw - raw.mean(dim=2, keepdim=True)).abs().max()) < 1e-6

    def test_forward__keeps_input(self) -> None:
        views = _views()
        before = views.clone()
        STELLARColorAugment()(views)
        assert torch.equal(views, before)

    def test_forward__generator_decides(self) -> None:
        augment, views = STELLARColorAugment(), _views()
        first = augment(views, generator=_generator(1)).global_views
        again = augment(views, generator=_generator(1)).global_views
        other = augment(views, generator=_generator(2)).global_views
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_forward__equal_images_become_different(self) -> None:
        # 6 x 4 copies of one view: all 24 results differ from each other.
        views = _views(batch=1, views=1).expand(6, 4, -1, -1, -1)
        colored = _plain(cj_prob=1.0)(views).global_views.flatten(0, 1).flatten(1)
        distances = torch.cdist(colored, colored)
        distances.fill_diagonal_(1.0)
        assert float(distances.min()) > 0.01

    def test_forward__float32_under_autocast(self) -> None:
        augment, views = STELLARColorAugment(), _views()
        expected = augment(views, generator=_generator()).global_views
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = augment(views, generator=_generator()).global_views
        assert torch.equal(actual, expected)

    def test_draw__statistics(self) -> None:
        draws = STELLARColorAugment().draw(20_000, _generator())
        # Three standard errors of a probability are at most 0.011.
        assert float(draws.jitter.float().mean()) == pytest.approx(0.8, abs=0.011)
        assert float(draws.gray.float().mean()) == pytest.approx(0.2, abs=0.011)
        assert float(draws.blur.float().mean()) == pytest.approx(0.5, abs=0.011)
        ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
        for values, (low, high) in zip(
            [*draws.strengths, draws.sigmas], ranges, strict=True
        ):
            width = high - low
            assert float(values.min()) == pytest.approx(low, abs=width / 1000)
            assert float(values.max()) == pytest.approx(high, abs=width / 1000)
            assert float(values.mean()) == pytest.approx(
                (low + high) / 2, abs=width / 100
            )
            assert float(values.std()) == pytest.approx(width / 12**0.5, rel=0.02)

    def test_draw__independent(self) -> None:
        draws = STELLARColorAugment().draw(20_000, _generator())
        flags = torch.stack([draws.jitter, draws.gray, draws.blur]).float()
        rows = torch.cat([flags, draws.strengths, draws.sigmas[None]])
        between_parameters = torch.corrcoef(rows) - torch.eye(8)
        assert float(between_parameters.abs().max()) < 0.03
        for row in rows:  # neighbours in the batch
            assert abs(float(torch.corrcoef(row.view(-1, 2).T)[0, 1])) < 0.04

    def test_draw__every_order(self) -> None:
        augment, generator = STELLARColorAugment(), _generator()
        orders = {tuple(augment.draw(1, generator).order) for _ in range(300)}
        assert len(orders) == 24

    def test_draw__strength_scales_and_stays_positive(self) -> None:
        augment = STELLARColorAugment(cj_strength=4.0, cj_hue=0.1)
        assert augment.jitter_ranges[0] == (0.0, 2.6)
        assert augment.jitter_ranges[3] == (-0.4, 0.4)

    def test_state_dict__empty(self) -> None:
        assert STELLARColorAugment().state_dict() == {}

    def test_init__limits_are_allowed(self) -> None:
        augment = STELLARColorAugment(cj_hue=0.5, kernel_size=1, sigmas=(1.0, 1.0))
        assert augment.jitter_ranges[3] == (-0.5, 0.5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"cj_prob": 1.5}, "cj_prob must be a probability"),
            ({"random_gray_scale": -0.1}, "random_gray_scale must be a probability"),
            ({"gaussian_blur": float("nan")}, "gaussian_blur must be a probability"),
            ({"cj_bright": -0.4}, "cj_bright must be a number >= 0"),
            ({"cj_strength": float("inf")}, "cj_strength must be a number >= 0"),
            ({"cj_hue": 0.6}, "at most 0.5, half the hue circle, got 0.6"),
            ({"kernel_size": 8}, "kernel_size must be odd and positive, got 8"),
            ({"sigmas": (0.0, 2.0)}, "sigmas must be"),
            ({"sigmas": (2.0, 0.1)}, "0 < min <= max"),
            ({"mean": (0.5,)}, "three values"),
            ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ],
    )
    def test_init__bad_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            STELLARColorAugment(**arguments)

    @pytest.mark.parametrize(
        ("global_views", "local_views", "message"),
        [
            (_views().float(), None, "global_views must be uint8.*normalize=None"),
            (_views()[0], None, r"global_views must have shape \(batch, views, 3"),
            (_views()[:, :0], None, "at least one view"),
            (_views(size=4), None, "too small for kernel_size=9"),
            (_views(), _views()[:, :, :2], "local_views must have shape"),
        ],
    )
    def test_forward__bad_views(
        self, global_views: Tensor, local_views: Tensor | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            STELLARColorAugment()(global_views, local_views)

    def test_normalize__refuses_integers(self) -> None:
        with pytest.raises(ValueError, match="divide uint8 images by 255"):
            STELLARColorAugment().normalize(_views())

    @pytest.mark.slow
    def test_compile__any_number_and_size_of_images(self) -> None:
        plain, compiled = STELLARColorAugment(), STELLARColorAugment()
        compiled.compile(backend="aot_eager")
        for seed, (count, size) in enumerate([(1, 8), (3, 16), (4, 12)]):
            views, local_views = _views()[:, :count], _views(size=size)
            expected = plain(views, local_views, _generator(seed))
            actual = compiled(views, local_views, _generator(seed))
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("compiled", [False, True])
    def test_forward__cuda_equals_cpu_without_sync(self, compiled: bool) -> None:
        augment, views, local_views = STELLARColorAugment(), _views(), _views(size=8)
        expected = augment(views, local_views, generator=_generator())
        augment, views, local_views = augment.cuda(), views.cuda(), local_views.cuda()
        if compiled:
            augment.compile()
            augment(views, local_views, generator=_generator())  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = augment(views, local_views, generator=_generator())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for on_device, on_cpu in zip(actual, expected, strict=True):
            torch.testing.assert_close(on_device.cpu(), on_cpu, atol=3e-5, rtol=0)
