from __future__ import annotations

import numpy as np
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from lightly_ext.transforms import STELLARTransform
from stellar_plugin.image_conversion import to_uint8_rgb

SMALL = {"global_crop_size": 24, "local_crop_size": 12}


def _image(height: int = 40, width: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _coordinates(size: int = 200) -> Tensor:
    """An image whose red is its column and whose green is its row."""
    steps = torch.arange(size, dtype=torch.uint8)
    red, green = steps.expand(size, size), steps[:, None].expand(size, size)
    return torch.stack((red, green, torch.zeros_like(red)))


def _by_torchvision(image: Tensor, size: int, scale: list[float]) -> Tensor:
    """A view by torchvision's functions."""
    box = RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])
    bicubic = InterpolationMode.BICUBIC
    view = F.resized_crop(image, *box, [size, size], bicubic, antialias=True)
    return F.horizontal_flip(view) if torch.rand(()) < 0.5 else view


class TestSTELLARTransform:
    def test_call__default_views(self) -> None:
        transform = STELLARTransform()
        views = transform(_image(60, 90))
        assert isinstance(transform, MultiViewTransform)
        assert [tuple(view.shape) for view in views] == (
            [(3, 224, 224)] * 8 + [(3, 96, 96)] * 8
        )
        assert {view.dtype for view in views} == {torch.uint8}

    @pytest.mark.parametrize(
        "size", [(80, 70), (21, 33), (12, 12), (300, 20), (20, 300), (1, 1)]
    )
    def test_call__equals_torchvision(self, size: tuple[int, int]) -> None:
        # Bit by bit, at the same seed, and with the same draws left for what follows.
        transform = STELLARTransform(3, 3, **SMALL)
        for image in (_image(*size), to_uint8_rgb(_image(*size))):
            torch.manual_seed(3)
            views = [*transform(image), torch.rand(())]
            torch.manual_seed(3)
            sizes, scales = [24] * 3 + [12] * 3, [[0.36, 1.0]] * 3 + [[0.06, 0.36]] * 3
            expected = list(map(_by_torchvision, [image] * 6, sizes, scales))
            assert all(map(torch.equal, views, [*expected, torch.rand(())]))

    def test_call__pil_equals_tensor(self) -> None:
        image = _image()
        transform = STELLARTransform(3, 2, **SMALL)
        torch.manual_seed(0)
        from_tensor = transform(image)
        torch.manual_seed(0)
        from_pil = transform(F.to_pil_image(image))
        assert all(map(torch.equal, from_tensor, from_pil))

    def test_call__full_crop_is_identity(self) -> None:
        board = _image(60, 60)
        transform = STELLARTransform(
            num_global_views=4,
            num_local_views=0,
            global_crop_size=60,
            global_crop_scale=(1.0, 1.0),
            hf_prob=0.0,
        )
        for image in (board, F.to_pil_image(board)):
            views = transform(image)
            assert len(views) == 4
            assert all(torch.equal(view, board) for view in views)

    def test_call__always_flipped(self) -> None:
        board = _image(60, 60)
        transform = STELLARTransform(1, 0, 60, (1.0, 1.0), hf_prob=1.0)
        assert torch.equal(transform(board)[0], board.flip(-1))

    def test_call__areas_and_flips(self) -> None:
        # Corner pixels tell each crop's box, as red counts columns, green rows.
        transform = STELLARTransform(1, 1, 40, (0.36, 1.0), 20, (0.06, 0.36))
        image = _coordinates()
        areas: list[list[float]] = [[], []]
        flipped = 0
        torch.manual_seed(0)
        for _ in range(300):
            for kind, view in enumerate(transform(image)):
                values = view.float()
                # Edge pixels lie half an output pixel inside the crop.
                stretch = view.shape[-1] / (view.shape[-1] - 1) / 200
                width = float(values[0, 10, -1] - values[0, 10, 0]) * stretch
                height = float(values[1, -1, 10] - values[1, 0, 10]) * stretch
                flipped += width < 0
                areas[kind].append(abs(width) * height)
        for values_, low, high in zip(areas, (0.36, 0.06), (1.0, 0.36), strict=True):
            assert min(values_) > low - 0.03
            assert max(values_) < high + 0.03
            assert max(values_) - min(values_) > 0.8 * (high - low)
        assert flipped == pytest.approx(300, abs=37)  # of 600, three standard errors

    def test_call__views_differ(self) -> None:
        views = STELLARTransform(6, 6, **SMALL)(_image())
        for group in (views[:6], views[6:]):
            pairs = [(a, b) for a in range(6) for b in range(a)]
            assert not any(torch.equal(group[a], group[b]) for a, b in pairs)

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 3)])
    def test_call__extreme_sizes(self, size: tuple[int, int]) -> None:
        views = STELLARTransform(2, 1, **SMALL)(_image(*size))
        assert [tuple(v.shape) for v in views] == [(3, 24, 24)] * 2 + [(3, 12, 12)]

    def test_call__normalize_gives_clean_target_and_coloured_views(self) -> None:
        mean = torch.tensor(IMAGENET_NORMALIZE["mean"]).view(3, 1, 1)
        std = torch.tensor(IMAGENET_NORMALIZE["std"]).view(3, 1, 1)
        image = _image(24, 24)
        transform = STELLARTransform(
            2,
            3,
            **SMALL,
            global_crop_scale=(1.0, 1.0),
            hf_prob=0.0,
            cj_prob=1.0,
            normalize=IMAGENET_NORMALIZE,
        )
        views = transform(image)
        assert [v.shape[-1] for v in views] == [24] * 3 + [12] * 3
        assert {v.dtype for v in views} == {torch.float32}
        expected = (image / 255 - mean) / std
        torch.testing.assert_close(views[0], expected, atol=1e-6, rtol=0)
        for coloured in views[1:3]:
            assert float((coloured - views[0]).abs().mean()) > 0.01

    def test_call__normalize_without_colours(self) -> None:
        off = {"cj_prob": 0.0, "random_gray_scale": 0.0, "gaussian_blur": 0.0}
        transform = STELLARTransform(2, 0, **SMALL, **off, normalize=IMAGENET_NORMALIZE)
        target, first, second = transform(_image())
        assert torch.equal(target, first)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "HSV"])
    def test_call__other_pil_modes(self, mode: str) -> None:
        image = F.to_pil_image(_image(24, 24)).convert(mode)
        transform = STELLARTransform(1, 0, 24, (1.0, 1.0), hf_prob=0.0)
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(transform(image)[0], expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_global_views": 0}, "num_global_views must be an integer >= 1"),
            ({"num_local_views": -1}, "num_local_views must be an integer >= 0"),
            ({"global_crop_size": 0}, "global_crop_size must be an integer >= 1"),
            ({"local_crop_size": 9.5}, "local_crop_size must be an integer >= 1"),
            ({"global_crop_scale": (0.5, 0.3)}, "global_crop_scale must be"),
            ({"local_crop_scale": (0.0, 0.3)}, "local_crop_scale must be"),
            ({"hf_prob": 2}, "hf_prob must be a probability"),
            ({"cj_prob": 0.0}, "cj_prob would have no effect with normalize=None"),
            ({"normalize": {"mean": [0.5] * 3}}, "keys 'mean' and 'std'"),
            (
                {"normalize": IMAGENET_NORMALIZE, "kernel_size": 4},
                "kernel_size must be odd",
            ),
        ],
    )
    def test_init__bad_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            STELLARTransform(**arguments)

    @pytest.mark.parametrize(
        "image",
        [_image().float(), _image()[0], _image()[:2], _image()[None]],
        ids=["float", "2d", "2 channels", "batch"],
    )
    def test_call__bad_tensor(self, image: Tensor) -> None:
        with pytest.raises(ValueError, match="must be uint8 with shape"):
            STELLARTransform()(image)


class TestToUint8Rgb:
    def test_to_uint8_rgb__gray_tensor(self) -> None:
        gray = _image()[:1]
        assert torch.equal(to_uint8_rgb(gray), gray.expand(3, -1, -1))

    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    def test_to_uint8_rgb__sixteen_bits_keep_the_upper_eight(self, dtype: str) -> None:
        values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=dtype)
        image = to_uint8_rgb(Image.fromarray(values))
        assert image.tolist() == [[[0, 0, 1], [128, 254, 255]]] * 3

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_to_uint8_rgb__unknown_range(self, mode: str) -> None:
        with pytest.raises(ValueError, match=f"mode '{mode}' has no known range"):
            to_uint8_rgb(Image.new(mode, (4, 4)))

    def test_to_uint8_rgb__colours_beside_each_other(self) -> None:
        for image in (_image(), F.to_pil_image(_image())):
            assert to_uint8_rgb(image).stride() == (1, 150, 3)
