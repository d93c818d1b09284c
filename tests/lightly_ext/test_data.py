from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.data import (
    ImageFolderDataset,
    SingleViewTransform,
    StellarDataModule,
    collate_views,
)
from lightly_ext.image_folder import read_image
from lightly_ext.transforms import STELLARTransform

SMALL = STELLARTransform(2, 3, global_crop_size=24, local_crop_size=12)


def _write(path: Path, value: int = 128, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(path)
    return path


def _folder(path: Path, count: int = 8) -> Path:
    for number in range(count):
        _write(path / f"{number:03}.png", value=number)
    return path


def _break(path: Path) -> Path:
    path.write_bytes(b"not an image")
    return path


def _noise(path: Path, mode: str = "RGB", **options: object) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    image.save(path, **options)
    return np.array(image.convert("RGB"))


class TestReadImage:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif", "ppm", "TIFF"])
    def test_read_image__lossless_formats(self, tmp_path: Path, suffix: str) -> None:
        options = {"lossless": True} if suffix == "webp" else {}
        expected = _noise(tmp_path / f"image.{suffix}", **options)
        actual = read_image(tmp_path / f"image.{suffix}")
        assert np.array_equal(actual.permute(1, 2, 0).numpy(), expected)

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_read_image__jpeg_as_pillow_reads_it(
        self, tmp_path: Path, mode: str
    ) -> None:
        _noise(tmp_path / "image.jpg", mode=mode, quality=90)
        expected = np.array(Image.open(tmp_path / "image.jpg").convert("RGB"))
        actual = read_image(tmp_path / "image.jpg").permute(1, 2, 0).numpy()
        assert np.abs(actual.astype(int) - expected).max() <= 1

    def test_read_image__without_torchvision_decoder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _noise(tmp_path / "image.jpg")
        expected = read_image(tmp_path / "image.jpg")
        monkeypatch.delattr("torchvision.io.decode_jpeg")
        actual = read_image(tmp_path / "image.jpg")
        assert int((actual.int() - expected.int()).abs().max()) <= 1

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
    def test_read_image__other_modes(self, tmp_path: Path, mode: str) -> None:
        expected = _noise(tmp_path / "image.png", mode=mode)
        actual = read_image(tmp_path / "image.png").permute(1, 2, 0).numpy()
        assert np.array_equal(actual, expected)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_read_image__sixteen_bits(self, tmp_path: Path, suffix: str) -> None:
        values = np.array([[0, 256, 65535], [511, 32768, 4096]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"image.{suffix}")
        image = read_image(tmp_path / f"image.{suffix}")
        assert image.tolist() == [[[0, 1, 255], [1, 128, 16]]] * 3

    def test_read_image__first_frame_of_animation(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        image = read_image(tmp_path / "a.gif")
        assert image.shape == (3, 4, 6)
        assert image[:, 0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_read_image__exif_orientation(self, tmp_path: Path, suffix: str) -> None:
        values = np.zeros((32, 64, 3), dtype=np.uint8)
        values[:, :32] = 255  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif)
        image = read_image(tmp_path / f"a.{suffix}")
        assert image.shape == (3, 64, 32)
        assert float(image[:, :30].float().mean()) > 250
        assert float(image[:, 34:].float().mean()) < 5

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    @pytest.mark.parametrize("kept", [0.0, 0.01, 0.5])
    def test_read_image__truncated(
        self, tmp_path: Path, suffix: str, kept: float
    ) -> None:
        path = tmp_path / f"image.{suffix}"
        _noise(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
        with pytest.raises(Exception):  # noqa: B017 - whatever the decoder raises
            read_image(path)


class TestImageFolderDataset:
    def test_init__lists_nested_images_in_order(self, tmp_path: Path) -> None:
        names = ["b/x.JPG", "a/deep/er/1.png", "z.Jpeg", "a/0.bmp", "a/9.tiff"]
        for name in names:
            _write(tmp_path / name)
        for other in ("notes.txt", ".hidden.png", ".cache/1.png", "c.npy"):
            (tmp_path / other).parent.mkdir(exist_ok=True)
            (tmp_path / other).write_bytes(b"")
        dataset = ImageFolderDataset(tmp_path)
        files = [dataset.file(i) for i in range(len(dataset))]
        expected = ["a/0.bmp", "a/9.tiff", "a/deep/er/1.png", "b/x.JPG", "z.Jpeg"]
        assert files == [tmp_path / name for name in expected]

    def test_init__follows_links_but_not_in_circles(self, tmp_path: Path) -> None:
        _write(tmp_path / "elsewhere/1.png")
        _write(tmp_path / "images/0.png")
        os.symlink(tmp_path / "elsewhere", tmp_path / "images/linked")
        os.symlink(tmp_path / "images", tmp_path / "images/circle")
        assert len(ImageFolderDataset(tmp_path / "images")) == 2

    def test_init__names_beyond_ascii(self, tmp_path: Path) -> None:
        _write(tmp_path / "été/画像 1.png", value=7)
        image, index = ImageFolderDataset(tmp_path)[0]
        assert (int(image[0, 0, 0]), index) == (7, 0)

    def test_init__missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
            ImageFolderDataset(tmp_path / "nowhere")

    def test_init__empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").write_text("no images")
        with pytest.raises(ValueError, match=r"no image below .*\.jpg, \.jpeg"):
            ImageFolderDataset(tmp_path)

    def test_getitem__index_or_label(self, tmp_path: Path) -> None:
        for number, name in enumerate(["cat/a/1.png", "dog/1.png", "cat/2.png"]):
            _write(tmp_path / name, value=number)
        unlabelled = ImageFolderDataset(tmp_path)
        labelled = ImageFolderDataset(tmp_path, labelled=True)
        # Order: cat/2.png, cat/a/1.png, dog/1.png.
        values = [(int(image[0, 0, 0]), number) for image, number in unlabelled]
        assert values == [(2, 0), (0, 1), (1, 2)]
        assert labelled.classes == ["cat", "dog"]
        assert [label for _, label in labelled] == [0, 0, 1]
        assert labelled.labels is not None
        assert labelled.labels.tolist() == [0, 0, 1]

    def test_getitem__applies_transform(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path), transform=SMALL)
        views, index = dataset[3]
        assert index == 3
        assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12]
        assert {int(view[0].max()) for view in views} == {3}

    def test_getitem__errors_of_the_transform_are_not_hidden(
        self, tmp_path: Path
    ) -> None:
        def fail(image: Tensor) -> Tensor:
            raise RuntimeError("bug")

        dataset = ImageFolderDataset(_folder(tmp_path), transform=fail)
        with pytest.raises(RuntimeError, match="bug"):
            dataset[0]
        assert dataset.num_unreadable == 0

    def test_getitem__outside(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path))
        for index in (-1, 8):
            with pytest.raises(IndexError, match="among 8"):
                dataset[index]

    def test_init__image_outside_of_class(self, tmp_path: Path) -> None:
        _write(tmp_path / "cat/1.png")
        _write(tmp_path / "stray.png")
        with pytest.raises(ValueError, match=r"stray\.png does not"):
            ImageFolderDataset(tmp_path, labelled=True)

    def test_getitem__next_readable_takes_the_place(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path))
        broken = [_break(dataset.file(i)) for i in (3, 4, 7)]
        with pytest.warns(UserWarning, match=r"unreadable image .*003\.png"):
            assert dataset[3][1] == 5
        with pytest.warns(UserWarning, match=r"007\.png"):
            assert dataset[7][1] == 0  # the first one follows the last one
        assert dataset.num_unreadable == 3
        assert dataset.unreadable_files() == broken

    def test_getitem__reads_a_broken_file_once(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path))
        _break(dataset.file(2))
        with pytest.warns(UserWarning):
            assert dataset[2][1] == 3
        _write(dataset.file(2))  # would be readable now
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dataset[2][1] == 3
        assert dataset.num_unreadable == 1

    def test_getitem__counts_across_workers(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path, 40))
        broken = [_break(dataset.file(i)) for i in (0, 1, 13, 26, 39)]
        loader = DataLoader(dataset, batch_size=4, num_workers=2)
        for _ in range(2):
            indices = torch.cat([index for _, index in loader])
            assert len(indices) == 40
            assert not {0, 1, 13, 26, 39} & set(indices.tolist())
            assert dataset.num_unreadable == 5
        assert dataset.unreadable_files() == broken

    def test_getitem__all_broken(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path, 3))
        for index in range(3):
            _break(dataset.file(index))
        with (
            pytest.warns(UserWarning),
            pytest.raises(RuntimeError, match=r"3 of 3 images below .*unreadable"),
        ):
            dataset[0]
        with pytest.raises(RuntimeError, match="None of the 3 images"):
            dataset[1]

    @pytest.mark.parametrize(("size", "tolerated"), [(150, 100), (2400, 120)])
    def test_getitem__too_many_broken(
        self, tmp_path: Path, size: int, tolerated: int
    ) -> None:
        _write(tmp_path / "image.png")
        for number in range(size - 1):
            (tmp_path / f"{number:04}.png").write_bytes(b"")
        dataset = ImageFolderDataset(tmp_path)
        with (
            pytest.warns(UserWarning) as record,
            pytest.raises(RuntimeError, match=f"{tolerated + 1} of {size} images"),
        ):
            dataset[0]
        assert len(record) == tolerated

    def test_getitem__unreachable_files_are_unreadable(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(_folder(tmp_path))
        dataset.file(0).unlink()
        with pytest.warns(UserWarning, match="FileNotFoundError"):
            assert dataset[0][1] == 1


class TestCollateViews:
    def test_collate_views__order(self) -> None:
        samples = [
            (
                [
                    torch.full((3, 4, 4), 10 * i + v, dtype=torch.uint8)
                    for v in range(2)
                ],
                i,
            )
            for i in range(3)
        ]
        for index in range(3):
            for view in range(2, 5):
                samples[index][0].append(
                    torch.full((3, 2, 2), 10 * index + view, dtype=torch.uint8)
                )
        batch = collate_views(samples, num_global_views=2)
        assert batch.local_views is not None
        assert batch.global_views.shape == (3, 2, 3, 4, 4)
        assert batch.local_views.shape == (3, 3, 3, 2, 2)
        assert batch.global_views[:, :, 0, 0, 0].tolist() == [
            [0, 1],
            [10, 11],
            [20, 21],
        ]
        assert batch.local_views[:, :, 2, 1, 1].tolist() == [
            [2, 3, 4],
            [12, 13, 14],
            [22, 23, 24],
        ]

    def test_collate_views__without_local_views(self) -> None:
        views = [torch.zeros(3, 4, 4, dtype=torch.uint8)]
        batch = collate_views([(views, 0), (views, 1)], num_global_views=1)
        assert batch.global_views.shape == (2, 1, 3, 4, 4)
        assert batch.local_views is None


class TestSingleViewTransform:
    def test_call__identity_on_fitting_image(self) -> None:
        image = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
        assert torch.equal(SingleViewTransform(60)(image), image)

    @pytest.mark.parametrize("size", [(30, 90), (90, 30)])
    def test_call__centre_of_the_longer_side(self, size: tuple[int, int]) -> None:
        columns = torch.arange(90, dtype=torch.uint8).expand(3, 30, 90)
        image = columns if size == (30, 90) else columns.transpose(1, 2)
        view = SingleViewTransform(30)(image)
        assert view.shape == (3, 30, 30)
        assert sorted(set(view.flatten().tolist())) == list(range(30, 60))


class _Module(LightningModule):
    """Remembers what the loaders give."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated: list[tuple[int, list[int]]] = []
        self.trained: list[tuple[torch.Size, torch.Size | None]] = []

    def training_step(self, batch: tuple[Tensor, Tensor | None], _: int) -> Tensor:
        global_views, local_views = batch
        local_shape = None if local_views is None else local_views.shape
        self.trained.append((global_views.shape, local_shape))
        return self.weight

    def validation_step(
        self, batch: tuple[Tensor, Tensor], _: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append((dataloader_idx, batch[1].tolist()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestStellarDataModule:
    def _trainer(self, path: Path) -> Trainer:
        return Trainer(
            default_root_dir=path,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    def test_fit__views_and_knn(self, tmp_path: Path) -> None:
        for name in ("bank/a/1.png", "bank/b/1.png", "bank/b/2.png", "query/a/1.png"):
            _write(tmp_path / name)
        _write(tmp_path / "query/b/1.png")
        data = StellarDataModule(
            str(_folder(tmp_path / "train", 7)),
            knn_train=str(tmp_path / "bank"),
            knn_val=str(tmp_path / "query"),
            batch_size=3,
            num_workers=0,
            transform=SMALL,
        )
        module = _Module()
        self._trainer(tmp_path).fit(module, datamodule=data)
        shapes = (torch.Size([3, 2, 3, 24, 24]), torch.Size([3, 3, 3, 12, 12]))
        assert module.trained == [shapes, shapes]
        assert module.validated == [(0, [0, 1, 1]), (1, [0, 1])]
        view, _ = next(iter(data.val_dataloader()[0]))
        assert view.shape == (3, 3, 24, 24)
        assert view.dtype == torch.uint8
        assert data.train_dataset.num_unreadable == 0

    def test_fit__without_knn_and_local_views(self, tmp_path: Path) -> None:
        data = StellarDataModule(
            str(_folder(tmp_path / "train")),
            batch_size=8,
            num_workers=0,
            transform=STELLARTransform(1, 0, global_crop_size=24),
        )
        module = _Module()
        self._trainer(tmp_path).fit(module, datamodule=data)
        assert module.trained == [(torch.Size([8, 1, 3, 24, 24]), None)]
        assert module.validated == []

    def _epochs(self, path: Path, seed: int) -> Tensor:
        """Global views of two epochs, (2 x 4 batches, 2, 2, 3, 24, 24)."""
        seed_everything(seed, workers=True, verbose=False)
        data = StellarDataModule(str(path), None, None, 2, 2, SMALL)
        loader = data.train_dataloader()
        return torch.stack([batch.global_views for _ in range(2) for batch in loader])

    def test_train_dataloader__random_but_reproducible(self, tmp_path: Path) -> None:
        # Eight copies of one image: all differences come from the views.
        for number in range(8):
            _noise(tmp_path / f"{number}.png")
        first, again = self._epochs(tmp_path, 1), self._epochs(tmp_path, 1)
        other = self._epochs(tmp_path, 2)
        assert torch.equal(first, again)
        # Both workers, two epochs and another seed: every view is a new one.
        views = torch.cat([first, other]).flatten(0, 2).flatten(1)
        assert views.shape[0] == 64
        assert len(torch.unique(views, dim=0)) == 64

    def test_val_dataloader__order_is_fixed(self, tmp_path: Path) -> None:
        for name in ("a/1.png", "b/1.png", "c/1.png"):
            _write(tmp_path / name)
        path = str(tmp_path)
        data = StellarDataModule(path, path, path, batch_size=2, num_workers=0)
        for loader in data.val_dataloader():
            assert [labels.tolist() for _, labels in loader] == [[0, 1], [2]]

    def test_train_dataloader__workers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.data.num_cpus", lambda: 6)
        data = StellarDataModule(str(_folder(tmp_path)))
        loader = data.train_dataloader()
        assert loader.num_workers == 6
        assert loader.drop_last
        assert loader.persistent_workers

    def test_setup__fewer_images_than_a_batch(self, tmp_path: Path) -> None:
        data = StellarDataModule(str(_folder(tmp_path)), batch_size=9)
        with pytest.raises(ValueError, match=r"The 8 images .*batch_size=9 on 1"):
            data.setup()

    def test_setup__different_classes(self, tmp_path: Path) -> None:
        for name in ("bank/a/1.png", "bank/b/1.png", "query/a/1.png", "query/c/1.png"):
            _write(tmp_path / name)
        data = StellarDataModule(
            str(tmp_path),
            str(tmp_path / "bank"),
            str(tmp_path / "query"),
            batch_size=1,
        )
        with pytest.raises(ValueError, match=r"same class folders.*: b, c"):
            data.setup()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"num_workers": -1}, "num_workers must be at least 0"),
            ({"knn_train": "a"}, "needs both knn_train and knn_val"),
            ({"knn_val": "a"}, "needs both knn_train and knn_val"),
            (
                {
                    "transform": STELLARTransform(
                        normalize={"mean": [0.5] * 3, "std": [0.5] * 3}
                    )
                },
                "normalize=None",
            ),
        ],
    )
    def test_init__bad_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StellarDataModule("path", **arguments)

    @pytest.mark.parametrize("with_class_path", [True, False])
    def test_init__from_yaml(self, tmp_path: Path, with_class_path: bool) -> None:
        arguments = {
            "num_global_views": "6",
            "global_crop_size": "60",
            "global_crop_scale": "[1.0, 1.0]",
            "num_local_views": "0",
        }
        indent = "      " if with_class_path else "    "
        lines = [f"{indent}{name}: {value}" for name, value in arguments.items()]
        if with_class_path:
            name = "lightly_ext.transforms.STELLARTransform"
            lines = [f"    class_path: {name}", "    init_args:", *lines]
        text = ["data:", "  path: photos", "  batch_size: 4", "  transform:", *lines]
        (tmp_path / "recipe.yaml").write_text("\n".join(text))
        cli = LightningCLI(
            _Module,
            StellarDataModule,
            args=["--config", str(tmp_path / "recipe.yaml"), "--data.batch_size=5"],
            run=False,
            save_config_callback=None,
        )
        data = cli.datamodule
        assert data.batch_size == 5
        assert data.transform.num_global_views == 6
        assert data.transform.global_crop_size == 60
        views = data.transform(torch.zeros(3, 60, 60, dtype=torch.uint8))
        assert len(views) == 6

    @pytest.mark.slow
    def test_loader__with_spawned_workers(self, tmp_path: Path) -> None:
        # macOS and Windows start workers this way: everything must be picklable.
        dataset = ImageFolderDataset(_folder(tmp_path), SMALL)
        _break(dataset.file(5))
        loader = DataLoader(
            dataset,
            batch_size=4,
            num_workers=1,
            multiprocessing_context="spawn",
            collate_fn=partial(collate_views, num_global_views=2),
        )
        assert len(list(loader)) == 2
        assert dataset.num_unreadable == 1
