"""Data for pretraining with Lightning."""

from __future__ import annotations

import os
import platform
import signal
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from lightly_ext.data.image_folder import ImageFolderDataset
from lightly_ext.data.images import ImageDataset
from lightly_ext.data.reading import MAX_PIXELS
from lightly_ext.data.streams import (
    SHUFFLE_BUFFER,
    LabelledStreamDataset,
    StreamDataset,
    find_source,
)
from lightly_ext.data.views import (
    EpochSampler,
    SingleViewTransform,
    TrainingViews,
    ViewBatch,
    collate_views,
)
from lightly_ext.randomness import run_seed
from lightly_ext.transforms import STELLARTransform
from stellar_plugin.protocols import KNN


class StellarDataModule(LightningDataModule):
    """Unlabelled images to train on and, optionally, labelled ones for online kNN.

    Training batches are :class:`ViewBatch`. With kNN folders there are two validation
    loaders, bank and queries in this order; their batches are tuples of plain views, a
    uint8 tensor with shape (B, 3, S, S), and labels, an int64 tensor with shape (B,).
    Without, there is none.

    The order of the images and their views are functions of the seed of Lightning's
    `seed_everything` (0 without it), the epoch and the number of the image: the number
    of workers changes nothing, nor that of processes at the same global batch.

    Args:
        path:
            The training images, without labels: a folder, nested to any depth, or
            tars, parquet or a data set of the hub, see `find_source`.
        knn_train:
            The bank of online kNN: a folder with a subfolder of images per class, or
            what `find_source` takes, with labels.
        knn_val:
            The queries of online kNN, of the same classes.
        batch_size:
            Number of images per process and step.
        num_workers:
            Number of processes that load images, for each training process. None is
            the number of its CPU cores, shared with other training processes that may
            run on the same ones.
        transform:
            What makes the views, with `normalize=None`. None is STELLARTransform().
        max_pixels:
            Images with more pixels are skipped, as unreadable ones are.
        shuffle_buffer:
            Images of tars, parquet or of the hub that are shuffled with each other, of
            all processes; of parquet, so many encoded ones are in their memory.

    Raises:
        ValueError: If a number is impossible, only one kNN folder is given, or the
            transform colours the views already. Later, in `setup`: if a folder is
            missing or empty, there are fewer images than one batch or online kNN needs,
            or the two kNN folders have different classes.
        RuntimeError: In `setup`, if no image of a folder is readable.

    Examples:
        >>> data = StellarDataModule("photos", batch_size=128)
        >>> trainer.fit(model, datamodule=data)
        >>> data.train_dataset.num_unreadable

    """

    def __init__(
        self,
        path: str,
        knn_train: str | None = None,
        knn_val: str | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        transform: STELLARTransform | None = None,
        max_pixels: int = MAX_PIXELS,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
        if (knn_train is None) != (knn_val is None):
            raise ValueError(
                "Online kNN needs both knn_train and knn_val, got "
                f"knn_train={knn_train} and knn_val={knn_val}."
            )
        transform = STELLARTransform() if transform is None else transform
        if transform.color_augment is not None:
            raise ValueError(
                "The views are coloured on the device: use a STELLARTransform with "
                "normalize=None."
            )
        # Shells leave ~ as it is in options with = and in patterns in quotes.
        self.path = Path(path).expanduser()
        knn_paths = (knn_train, knn_val)
        self.knn_paths = [Path(p).expanduser() for p in knn_paths if p is not None]
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform
        self.max_pixels = max_pixels
        self.shuffle_buffer = shuffle_buffer
        self._start = (0, 0)
        self._sharing = 1

    @cached_property
    def train_dataset(self) -> ImageFolderDataset | StreamDataset:
        """The training images; samples are (views, index)."""
        source = find_source(self.path)
        if source is None:
            return ImageFolderDataset(
                self.path, self.transform, max_pixels=self.max_pixels
            )
        return StreamDataset(
            source, self.transform, self.shuffle_buffer, self.max_pixels
        )

    @cached_property
    def knn_datasets(self) -> list[ImageDataset]:
        """Bank and queries of online kNN, or none; samples are (view, label)."""
        return [self._knn_dataset(path) for path in self.knn_paths]

    def _knn_dataset(self, path: Path) -> ImageDataset:
        view = SingleViewTransform(self.transform.global_crop_size)
        source = find_source(path)
        if source is None:
            return ImageFolderDataset(path, view, True, self.max_pixels)
        return LabelledStreamDataset(source, view, self.max_pixels)

    def setup(self, stage: str | None = None) -> None:
        """Lists the images and checks that there are enough, and readable ones."""
        self._sharing = _processes_on_these_cores()
        images, world_size = len(self.train_dataset), self._world_size()
        most = images // world_size
        if most < self.batch_size:
            way_out = f"Set it to {most} or less" if most else "Use fewer processes"
            raise ValueError(
                f"The {images} images below {self.path} are fewer than one batch "
                f"needs: batch_size={self.batch_size} on {world_size} process(es). "
                f"{way_out}, or add images."
            )
        if self.knn_datasets:
            self._check_knn(*self.knn_datasets)
        with torch.random.fork_rng(devices=[]):
            for dataset in (self.train_dataset, *self.knn_datasets):
                dataset[0]
        if isinstance(self.train_dataset, StreamDataset):
            rank_zero_only(print)(self.train_dataset.how_it_is_read())

    def continue_from(self, epoch: int, num_images: int) -> None:
        """Makes training go on in an epoch, behind the images seen.

        Args:
            epoch:
                Number of the epoch.
            num_images:
                Images of all processes that are passed over, whole global batches.

        """
        self._start = (epoch, num_images)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the shuffled training batches, all of the same size.

        `set_epoch` of its sampler, which Lightning calls, chooses the epoch.
        """
        rank, world_size = self._rank(), self._world_size()
        views = TrainingViews(self.train_dataset, run_seed())
        sampler = EpochSampler(views, rank, world_size, self.batch_size * world_size)
        # Lightning starts the loader of a continued run before it sets the epoch.
        sampler.epoch, sampler.start = self._start
        collate = partial(
            collate_views, num_global_views=self.transform.num_global_views
        )
        return self._loader(
            views,
            sampler,
            collate_fn=collate,
            persistent_workers=self._workers() > 0,
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Returns the bank and the queries of online kNN, or nothing.

        Images are dealt out to the processes in turn, some twice where shares differ.
        """
        rank, world_size = self._rank(), self._world_size()
        return [
            self._loader(
                dataset, DistributedSampler(dataset, world_size, rank, shuffle=False)
            )
            for dataset in self.knn_datasets
        ]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves the views; seeds and indices stay with the host, which reads them."""
        if not isinstance(batch, ViewBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        global_views, local_views = super().transfer_batch_to_device(
            batch[:2], device, dataloader_idx
        )
        return batch._replace(global_views=global_views, local_views=local_views)

    def _loader(
        self, dataset: Dataset[Any], sampler: Sampler[Any], **arguments: Any
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self._workers(),
            worker_init_fn=_outlive_signals,
            pin_memory=torch.cuda.is_available(),
            **arguments,
        )

    def _check_knn(self, bank: ImageDataset, queries: ImageDataset) -> None:
        _check_classes(bank, queries)
        processes = self._world_size()
        for dataset, least in ((bank, KNN.neighbours), (queries, 1)):
            least, images = max(least, processes), self._num_validated(dataset)
            if images < least:
                raise ValueError(
                    f"Online kNN needs {least} images or more below {dataset.path} "
                    f"({KNN.neighbours} neighbours, {processes} process(es)), and "
                    f"reads {images} of {len(dataset)}. Add images, raise "
                    "--trainer.limit_val_batches, or leave out --data.knn_train and "
                    "--data.knn_val."
                )

    def _num_validated(self, dataset: ImageDataset) -> int:
        """Images of a dataset that are read where Lightning limits the batches."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_val_batches
        at_once = self.batch_size * self._world_size()
        batches = -(-len(dataset) // at_once)
        if limit == 0:  # no validation at all
            return len(dataset)
        batches = min(
            batches, limit if isinstance(limit, int) else int(limit * batches)
        )
        return min(len(dataset), batches * at_once)

    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return max(1, num_cpus() // self._sharing)


def _processes_on_these_cores() -> int:
    """Training processes that may run on the cores of this one, itself included.

    Slurm may give each process cores of its own, torchrun gives all of them the same.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    node, cores = platform.node(), _cores()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (node, cores))
    return sum(place == node and bool(cores & theirs) for place, theirs in everywhere)


def _cores() -> set[int]:
    # Containers and schedulers often grant fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _outlive_signals(worker: int) -> None:
    """Leaves signals that end a run to its main process, which ends the workers.

    Terminals and schedulers send them to all processes: the step would fail that the
    main process has still to do and to save.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _check_classes(bank: ImageDataset, queries: ImageDataset) -> None:
    different = sorted(set(bank.classes) ^ set(queries.classes))
    if different:
        raise ValueError(
            f"{bank.path} and {queries.path} must have the same class folders; "
            f"only one of them has images of: {', '.join(different[:10])}."
        )


def num_cpus() -> int:
    """CPU cores that this process may use."""
    return len(_cores())
