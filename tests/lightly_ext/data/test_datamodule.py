from __future__ import annotations

import os
import platform
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.data import (
    ImageFolderDataset,
    StellarDataModule,
    ViewBatch,
    collate_views,
)
from lightly_ext.transforms import STELLARTransform
from tests.lightly_ext.data.image_files import write_folder, write_image, write_noise

SMALL = STELLARTransform(2, 3, global_crop_size=24, local_crop_size=12)


class _Module(LightningModule):
    """Remembers what the loaders give."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated: list[tuple[int, list[int]]] = []
        self.trained: list[tuple[torch.Size, torch.Size | None]] = []

    def training_step(self, batch: tuple[Tensor, Tensor | None], _: int) -> Tensor:
        global_views, local_views, *_ = batch
        local_shape = None if local_views is None else local_views.shape
        self.trained.append((global_views.shape, local_shape))
        return self.weight

    def validation_step(
        self, batch: tuple[Tensor, Tensor], _: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append((dataloader_idx, batch[1].tolist()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Narrow(STELLARTransform):
    """Fails on wide images."""

    def __init__(self, transform: STELLARTransform) -> None:
        self.__dict__.update(transform.__dict__)

    def __call__(self, image: Tensor) -> list[Tensor]:
        views = super().__call__(image)
        assert image.shape[2] <= 40
        return views


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
        bank = ["bank/a/1.png", *(f"bank/b/{i:02}.png" for i in range(19))]
        for name in (*bank, "query/a/1.png", "query/b/1.png"):
            write_image(tmp_path / name)
        data = StellarDataModule(
            str(write_folder(tmp_path / "train", 7)),
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
        batches = [[0, 1, 1], *[[1, 1, 1]] * 5, [1, 1]]
        assert module.validated == [*((0, b) for b in batches), (1, [0, 1])]
        view, _ = next(iter(data.val_dataloader()[0]))
        assert view.shape == (3, 3, 24, 24)
        assert view.dtype == torch.uint8
        assert data.train_dataset.num_unreadable == 0

    def test_fit__without_knn_and_local_views(self, tmp_path: Path) -> None:
        data = StellarDataModule(
            str(write_folder(tmp_path / "train")),
            batch_size=8,
            num_workers=0,
            transform=STELLARTransform(1, 0, global_crop_size=24),
        )
        module = _Module()
        self._trainer(tmp_path).fit(module, datamodule=data)
        assert module.trained == [(torch.Size([8, 1, 3, 24, 24]), None)]
        assert module.validated == []

    def _epochs(self, path: Path, seed: int, workers: int = 2) -> list[ViewBatch]:
        """Eight batches of two epochs."""
        seed_everything(seed, workers=True, verbose=False)
        data = StellarDataModule(str(path), None, None, 2, workers, SMALL)
        loader, batches = data.train_dataloader(), []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches += list(loader)
        return batches

    def test_train_dataloader__random_but_reproducible(self, tmp_path: Path) -> None:
        # Eight copies of one image: all differences come from the views.
        for number in range(8):
            write_noise(tmp_path / f"{number}.png")
        first, again = self._epochs(tmp_path, 1), self._epochs(tmp_path, 1, workers=0)
        other = self._epochs(tmp_path, 2)
        for batch, repeated in zip(first, again, strict=True):
            assert all(map(torch.equal, batch, repeated))
        # Both workers, two epochs and another seed: every view is a new one.
        views = torch.stack([batch.global_views for batch in first + other])
        views = views.flatten(0, 2).flatten(1)  # of 16 batches, 2 images and 2 views
        assert views.shape[0] == 64
        assert len(torch.unique(views, dim=0)) == 64
        seeds = torch.cat([batch.seeds for batch in first + other])
        assert len(torch.unique(seeds)) == 32

    def test_train_dataloader__goes_on_behind_the_images_seen(
        self, tmp_path: Path
    ) -> None:
        write_folder(tmp_path)
        whole = self._epochs(tmp_path, 1)
        data = StellarDataModule(str(tmp_path), None, None, 2, 0, SMALL)
        data.continue_from(epoch=1, num_images=4)
        rest = list(data.train_dataloader())
        assert len(data.train_dataloader()) == 4
        for batch, expected in zip(rest, whole[6:], strict=True):
            assert all(map(torch.equal, batch, expected))

    def test_train_dataloader__unreadable_image_found_before_or_now(
        self, tmp_path: Path
    ) -> None:
        write_folder(tmp_path)
        # A transform that draws before it fails: of one image nothing else is found.
        write_image(tmp_path / "003.png", size=(41, 30))
        data = StellarDataModule(str(tmp_path), None, None, 2, 0, _Narrow(SMALL))
        loader = data.train_dataloader()
        found, known = list(loader), list(loader)
        for batch, expected in zip(known, found, strict=True):
            assert all(map(torch.equal, batch, expected))
        indices = torch.cat([batch.indices for batch in found])
        assert sorted(indices.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7]

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_train_dataloader__processes_share_the_global_batch(
        self, tmp_path: Path, world_size: int
    ) -> None:
        write_folder(tmp_path)
        one = StellarDataModule(str(tmp_path), None, None, 4, 0, SMALL)
        shares = []
        for rank in range(world_size):
            size = 4 // world_size
            data = StellarDataModule(str(tmp_path), None, None, size, 0, SMALL)
            data.trainer = Mock(global_rank=rank, world_size=world_size)
            shares.append(data.train_dataloader())
        batches = list(one.train_dataloader())
        assert len(batches) == 2
        for batch, *parts in zip(batches, *shares, strict=True):
            for whole, *dealt in zip(batch, *parts, strict=True):
                turns = torch.stack(dealt, dim=1).flatten(0, 1)
                assert torch.equal(turns, whole)

    @pytest.mark.parametrize("rank, expected", [(0, [0, 2]), (1, [1, 0])])
    def test_val_dataloader__dealt_out_in_turn(
        self, tmp_path: Path, rank: int, expected: list[int]
    ) -> None:
        for name in ("a/1.png", "b/1.png", "c/1.png"):
            write_image(tmp_path / name)
        path = str(tmp_path)
        data = StellarDataModule(path, path, path, batch_size=2, num_workers=0)
        data.trainer = Mock(global_rank=rank, world_size=2)
        for loader in data.val_dataloader():
            assert [labels.tolist() for _, labels in loader] == [expected]

    def test_val_dataloader__order_is_fixed(self, tmp_path: Path) -> None:
        for name in ("a/1.png", "b/1.png", "c/1.png"):
            write_image(tmp_path / name)
        path = str(tmp_path)
        data = StellarDataModule(path, path, path, batch_size=2, num_workers=0)
        for loader in data.val_dataloader():
            assert [labels.tolist() for _, labels in loader] == [[0, 1], [2]]

    def test_train_dataloader__workers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.data.datamodule.num_cpus", lambda: 6)
        data = StellarDataModule(str(write_folder(tmp_path)))
        loader = data.train_dataloader()
        assert loader.num_workers == 6
        assert loader.persistent_workers

    @pytest.mark.parametrize(
        ("here", "elsewhere", "workers"),
        [
            # Slurm gives each process cores of its own.
            ([{0, 1, 2, 3, 4, 5}], [], 6),
            ([{0, 1, 2, 3, 4, 5}, {6, 7}], [{0, 1}, {2, 3}], 6),
            # torchrun and Lightning give all processes of a machine the same.
            (2 * [{0, 1, 2, 3, 4, 5}], 2 * [{0, 1, 2, 3, 4, 5}], 3),
            (4 * [{0, 1, 2, 3, 4, 5}], 4 * [{0, 1, 2, 3, 4, 5}], 1),
            (8 * [{0, 1, 2, 3, 4, 5}], [], 1),
        ],
    )
    def test_train_dataloader__processes_share_the_cores(
        self,
        tmp_path: Path,
        here: list[set[int]],
        elsewhere: list[set[int]],
        workers: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        everywhere = [(platform.node(), cores) for cores in here]
        everywhere += [("another", cores) for cores in elsewhere]

        def gather(values: list[Any], value: Any) -> None:
            assert value == everywhere[0]
            values[:] = everywhere

        group = {"is_initialized": lambda: True, "all_gather_object": gather}
        group |= {"get_world_size": lambda: len(everywhere)}
        for name, function in group.items():
            monkeypatch.setattr(f"torch.distributed.{name}", function)
        monkeypatch.setattr("lightly_ext.data.datamodule._cores", lambda: here[0])
        data = StellarDataModule(str(write_folder(tmp_path)), batch_size=1)
        data.setup()
        assert data.train_dataloader().num_workers == workers

    def test_setup__fewer_images_than_a_batch(self, tmp_path: Path) -> None:
        data = StellarDataModule(str(write_folder(tmp_path)), batch_size=9)
        with pytest.raises(
            ValueError, match=r"The 8 images .*batch_size=9 on 1.* Set it to 8 or less"
        ):
            data.setup()

    def test_setup__different_classes(self, tmp_path: Path) -> None:
        for name in ("bank/a/1.png", "bank/b/1.png", "query/a/1.png", "query/c/1.png"):
            write_image(tmp_path / name)
        data = StellarDataModule(
            str(tmp_path),
            str(tmp_path / "bank"),
            str(tmp_path / "query"),
            batch_size=1,
        )
        with pytest.raises(ValueError, match=r"same class folders.*: b, c"):
            data.setup()

    def _with_knn(self, path: Path, images: int, queries: int) -> StellarDataModule:
        write_folder(path / "bank/a", images)
        write_folder(path / "query/a", queries)
        bank, query = str(path / "bank"), str(path / "query")
        return StellarDataModule(bank, bank, query, batch_size=8, transform=SMALL)

    @pytest.mark.parametrize(
        ("images", "queries", "processes", "limit", "message"),
        [
            (19, 9, 1, 1.0, "20 images or more below .*bank .* reads 19 of 19"),
            (30, 9, 1, 2, r"bank .* reads 16 of 30.*limit_val_batches"),
            (30, 9, 1, 0.5, "bank .* reads 16 of 30"),
            (40, 2, 3, 1.0, r"3 images or more below .*query .*3 process\(es\)"),
            (20, 1, 1, 1.0, None),
            (9, 1, 1, 0, "reads 9 of 9"),
            (30, 9, 1, 3, None),
        ],
    )
    def test_setup__too_few_images_for_knn(
        self,
        tmp_path: Path,
        images: int,
        queries: int,
        processes: int,
        limit: float,
        message: str | None,
    ) -> None:
        data = self._with_knn(tmp_path, images, queries)
        data.trainer = Mock(world_size=processes, limit_val_batches=limit)
        if message is None:
            data.setup()
            return
        with pytest.raises(ValueError, match=message):
            data.setup()

    def test_setup__no_readable_query(self, tmp_path: Path) -> None:
        data = self._with_knn(tmp_path, 20, 2)
        for path in (tmp_path / "query/a").iterdir():
            path.write_bytes(b"")
        with (
            pytest.warns(UserWarning),
            pytest.raises(RuntimeError, match=r"2 of 2 images below .*query.* unread"),
        ):
            data.setup()

    def test_setup__draws_nothing(self, tmp_path: Path) -> None:
        data = self._with_knn(tmp_path, 20, 2)
        before = torch.get_rng_state()
        data.setup()
        assert torch.equal(torch.get_rng_state(), before)

    def test_setup__limit_of_pixels(self, tmp_path: Path) -> None:
        data = self._with_knn(tmp_path, 20, 2)
        data.max_pixels = 1
        with (
            pytest.warns(UserWarning),
            pytest.raises(RuntimeError, match="max_pixels=1"),
        ):
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

    def test_datasets__limit_of_pixels(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_folder(tmp_path / name, 3)
        folder = str(tmp_path)
        data = StellarDataModule(folder, folder, folder, 2, max_pixels=77)
        for dataset in (data.train_dataset, *data.knn_datasets):
            assert dataset.max_pixels == 77

    def test_loader__workers_outlive_signals(self, tmp_path: Path) -> None:
        data = StellarDataModule(str(write_folder(tmp_path)), batch_size=2)
        child = os.fork()
        if child == 0:
            data.train_dataloader().worker_init_fn(0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    @pytest.mark.slow
    def test_loader__with_spawned_workers(self, tmp_path: Path) -> None:
        # macOS and Windows start workers this way: everything must be picklable.
        dataset = ImageFolderDataset(write_folder(tmp_path), SMALL)
        dataset.file(5).write_bytes(b"not an image")
        loader = DataLoader(
            dataset,
            batch_size=4,
            num_workers=1,
            multiprocessing_context="spawn",
            collate_fn=partial(collate_views, num_global_views=2),
        )
        assert len(list(loader)) == 2
        assert dataset.num_unreadable == 1
