"""Batches for torch: decoded in workers, the same for any number of them.

An epoch's order is a function of (seed, epoch), an image's augmentation of (seed, epoch, row); nothing depends on
which worker does it, so training can start again at any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, Sampler

from stage1_pro.artifacts import PreprocessSpec
from stage1_pro.config import AugmentConfig
from stage1_pro.data.images import ImageError, normalise, preprocess, read_image
from stage1_pro.errors import InputError
from stage1_pro.progress import track

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.linalg.inv(_YIQ)
# Below this many images, starting workers costs more than they save.
_WORTH_WORKERS = 64


class Batch(NamedTuple):
    """``pixels`` [b, 3, H, W] float32, ``labels`` [b] int64, ``index`` [b] int64 into the loader's rows."""

    pixels: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order [rows] in which an epoch takes its rows; a function of (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def augment(image: Image.Image, spec: PreprocessSpec, options: AugmentConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    """One random view of an RGB image as the model's input [3, H, W] float32.

    Crop and resize, rotation (corners black), mirror, blur, then brightness, contrast, saturation and hue as
    one linear map of the colours. Never flips vertically.
    """
    left, top, width, height = _crop(image.size, options, rng)
    angle = rng.uniform(-options.rotation, options.rotation) if rng.random() < options.rotation_probability else 0.0
    target = (spec.width, spec.height)
    if angle:
        image, left, top, width, height = _rotated(image, (left, top, width, height), angle, target)
    view = image.resize(target, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if rng.random() < options.horizontal_flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < options.blur_probability:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(*options.blur_sigma)))
    colours = np.asarray(view, dtype=np.float32).reshape(-1, 3)
    matrix, offset = _colour_map(colours, options, rng)
    mixed = (colours @ matrix.T + offset).clip(0, 255).T.reshape(3, spec.height, spec.width)
    return normalise(np.ascontiguousarray(mixed, dtype=np.float32), spec)


def _crop(size: tuple[int, int], options: AugmentConfig, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a random part: area share and relative aspect ratio from the options.

    The ratio is relative to the image's own: what follows stretches to the input, as evaluation does.
    """
    area = rng.uniform(*options.crop_scale)
    ratio = math.exp(rng.uniform(math.log(options.crop_ratio[0]), math.log(options.crop_ratio[1])))
    width = size[0] * min(1.0, math.sqrt(area * ratio))
    height = size[1] * min(1.0, math.sqrt(area / ratio))
    return rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height), width, height


def _rotated(
    image: Image.Image, box: tuple[float, float, float, float], angle: float, target: tuple[int, int]
) -> tuple[Image.Image, float, float, float, float]:
    """The surroundings of a crop, scaled to at most twice the target and turned about the crop's centre."""
    left, top, width, height = box
    reach = abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))
    side = max(width, height) * reach / 2
    x, y = left + width / 2, top + height / 2
    outer = (max(0.0, x - side), max(0.0, y - side), min(float(image.width), x + side), min(float(image.height), y + side))
    scale = min(1.0, 2 * max(target) / min(width, height))
    size = (max(1, round((outer[2] - outer[0]) * scale)), max(1, round((outer[3] - outer[1]) * scale)))
    region = image.resize(size, Image.Resampling.BILINEAR, box=outer)
    sx, sy = size[0] / (outer[2] - outer[0]), size[1] / (outer[3] - outer[1])
    centre = ((x - outer[0]) * sx, (y - outer[1]) * sy)
    turned = region.rotate(angle, Image.Resampling.BILINEAR, center=centre)
    return turned, (left - outer[0]) * sx, (top - outer[1]) * sy, width * sx, height * sy


def _colour_map(
    colours: NDArray[np.float32], options: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrix [3, 3] and offset [3] that change brightness, contrast, saturation and hue at once."""
    brightness, contrast, saturation = (
        rng.uniform(1 - span, 1 + span) for span in (options.brightness, options.contrast, options.saturation)
    )
    turn = 2 * math.pi * rng.uniform(-options.hue, options.hue)
    hue = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    grey = np.outer(np.ones(3), _LUMA)
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ _FROM_YIQ @ hue @ _YIQ
    offset = brightness * (1 - contrast) * float(colours.mean(axis=0) @ _LUMA)
    return matrix.astype(np.float32), np.full(3, offset, dtype=np.float32)


class _Views(Dataset[Any]):
    """Augmented images by (epoch, row); errors come back as values, a worker cannot raise them whole."""

    def __init__(self, paths: Sequence[Path], spec: PreprocessSpec, options: AugmentConfig | None, seed: int) -> None:
        self._paths = [str(path) for path in paths]
        self._spec, self._options, self._seed = spec, options, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor | ImageError:
        try:
            return torch.from_numpy(np.stack([self._view(epoch, row) for epoch, row in keys]))
        except ImageError as error:
            return error

    def _view(self, epoch: int, row: int) -> NDArray[np.float32]:
        image = read_image(self._paths[row])
        if self._options is None or not self._options.enabled:
            return preprocess(image, self._spec)
        stream = np.random.Generator(np.random.Philox(key=[self._seed, (epoch << 32) | row]))
        return augment(image, self._spec, self._options, stream)


class _Plan(Sampler[list[tuple[int, int]]]):
    """The batches of keys that come next; set anew for every epoch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _loader(dataset: _Views, plan: _Plan, workers: int, *, persistent: bool) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_as_is,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own stream: otherwise every start of a loader would draw from the training's.
        generator=torch.Generator(),
    )


def _as_is(item: Any) -> Any:
    return item


def _checked(item: torch.Tensor | ImageError) -> torch.Tensor:
    if isinstance(item, ImageError):
        raise InputError(f"{item}; the file was readable at the split: restore it, or run `stage1 split` again")
    return item


class TrainLoader:
    """Shuffled, augmented batches of one process, with workers that live as long as the loader.

    Args:
        paths: image files, N.
        labels: class indices [N].
        spec: size and normalisation of the input.
        options: augmentation.
        seed: with epoch and row it determines everything.
        batch_size: rows of a batch over all processes.
        rank: this process, 0..world-1; it gets every ``world``-th row of each batch.
        world: number of processes.
        workers: decoding processes; 0 decodes in this one.

    An epoch has ``N // batch_size`` steps, the rest is left out (another rest each epoch); fewer rows than one
    batch make one smaller batch.
    """

    def __init__(
        self, paths: Sequence[Path], labels: NDArray[np.int64], spec: PreprocessSpec, options: AugmentConfig, *,
        seed: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 2,
    ) -> None:  # fmt: skip
        self._labels = torch.from_numpy(np.ascontiguousarray(labels))
        self._seed, self._rank, self._world = seed, rank, world
        self._batch = min(batch_size, len(paths))
        self.steps_per_epoch = len(paths) // self._batch
        self._plan = _Plan()
        self._loader = _loader(_Views(paths, spec, options, seed), self._plan, workers, persistent=True)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on; skipped ones are not decoded."""
        order = epoch_order(len(self._labels), self._seed, epoch)
        steps = range(start_step, self.steps_per_epoch)
        parts = [order[s * self._batch : (s + 1) * self._batch][self._rank :: self._world] for s in steps]
        self._plan.batches = [[(epoch, int(row)) for row in part] for part in parts]
        for part, pixels in zip(parts, self._loader, strict=True):
            index = torch.from_numpy(part)
            yield Batch(_checked(pixels), self._labels[index], index)

    def close(self) -> None:
        """Stop the workers."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            self._loader._iterator = None


def iterate(
    paths: Sequence[Path], spec: PreprocessSpec, *, batch_size: int = 64, workers: int = 2, description: str = ""
) -> Iterator[torch.Tensor]:
    """Preprocessed images in order, as batches [b, 3, H, W] float32; no augmentation.

    Raises:
        InputError: a file cannot be read any more.
    """
    plan = _Plan()
    plan.batches = [[(0, row) for row in range(s, min(s + batch_size, len(paths)))] for s in range(0, len(paths), batch_size)]
    used = workers if len(paths) >= _WORTH_WORKERS else 0
    loader = _loader(_Views(paths, spec, None, 0), plan, used, persistent=False)
    batches = track(loader, description, total=len(plan)) if description else iter(loader)
    for pixels in batches:
        yield _checked(pixels)
