"""Where a training's batches come from: augmented images, or cached features of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from stage1_pro.config import Config
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import TrainLoader, epoch_order
from stage1_pro.data.photos import ImageFile


@dataclass(frozen=True)
class Batch:
    """Inputs of the trained module (one tensor or several, rows first), labels [N], file names."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    files: list[str]


class TrainingSource(Protocol):
    """Where an epoch's batches of this process come from."""

    steps_per_epoch: int

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of one epoch from a step on, the same whenever asked."""

    def close(self) -> None:
        """Stop workers."""


class ImageSource:
    """Augmented training images.

    Args:
        photos: [N].
        labels: class index of each [N].
        spec: what the model takes.
        config: augmentation, seed, batch size and workers.
        rank: number of this process, 0 .. world - 1.
        world: how many processes there are.
    """

    def __init__(
        self,
        photos: Sequence[ImageFile],
        labels: NDArray[Any],
        spec: PreprocessSpec,
        config: Config,
        rank: int,
        world: int,
    ) -> None:
        self._loader = TrainLoader(
            photos,
            labels,
            spec,
            config.augment,
            seed=config.seed,
            batch_size=config.train.batch_size,
            rank=rank,
            world=world,
            workers=config.train.workers,
        )
        self.steps_per_epoch = self._loader.steps_per_epoch

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of pixels [N, 3, H, W]."""
        for item in self._loader.epoch(epoch, start_step):
            yield Batch((item.pixels,), item.labels, item.files)

    def close(self) -> None:
        """Stop the decoding workers."""
        self._loader.close()


class FeatureSource:
    """Cached features of a frozen backbone, in the same order the images would come.

    Args:
        arrays: ``features_a`` and ``features_b``, each [N, F].
        files: their names [N].
        labels: class index of each [N].
        config: seed and batch size.
        rank: number of this process, 0 .. world - 1.
        world: how many processes there are.
    """

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], files: list[str], labels: NDArray[Any], config: Config, rank: int,
        world: int,
    ) -> None:  # fmt: skip
        self._inputs = [torch.from_numpy(arrays[name]) for name in ("features_a", "features_b")]
        self._labels, self._files = torch.from_numpy(labels), files
        self._seed, self._rank, self._world = config.seed, rank, world
        self._batch = min(config.train.batch_size, len(files))
        self.steps_per_epoch = len(files) // self._batch

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of both stages' features [N, F]."""
        order = torch.from_numpy(epoch_order(len(self._files), self._seed, epoch))
        for step in range(start_step, self.steps_per_epoch):
            index = order[step * self._batch : (step + 1) * self._batch][self._rank :: self._world]
            inputs = tuple(array[index] for array in self._inputs)
            yield Batch(inputs, self._labels[index], [self._files[i] for i in index.tolist()])

    def close(self) -> None:
        """Nothing to stop."""
