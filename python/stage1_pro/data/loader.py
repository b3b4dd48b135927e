"""Batches for training and evaluation, decoded in worker processes and the same for any number of them.

The order of an epoch is a function of (seed, epoch), an image's augmentation of (seed, epoch, row); workers and
processes decide nothing.
"""

from __future__ import annotations

import functools
import gc
import math
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from torch.utils.data import DataLoader, Dataset

from stage1_pro.config import AugmentConfig
from stage1_pro.data.images import ImageError, PreprocessSpec, normalise, preprocess, read_image
from stage1_pro.data.photos import MOVED, ImageFile
from stage1_pro.errors import InputError
from stage1_pro.progress import track

# Decoded pictures kept over all workers: small data sets are decoded once, not once an epoch.
CACHE_BYTES = 512 << 20
_GREY = np.asarray([0.299, 0.587, 0.114], dtype=np.float64)
_YIQ = np.asarray([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Batch:
    """A process's rows: ``inputs``, ``labels`` and row numbers ``index`` [B] int64, ``files``.

    Inputs are pixels [B, 3, H, W] float32, or both stages' features [B, F] each.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    index: torch.Tensor
    files: list[str]

    @property
    def pixels(self) -> torch.Tensor:
        """The one input of a batch of images."""
        return self.inputs[0]


_ORDER = (1 << 32) - 1


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of ``n`` rows that an epoch goes through."""
    return _generator(seed, epoch, _ORDER).permutation(n)


def _generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    key = np.asarray([seed & (2**64 - 1), (epoch << 32) | row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class TrainLoader:
    """Augmented training batches; its workers live until ``close``.

    The last rows of an epoch that make no full batch are dropped (other ones each epoch); with fewer rows than
    ``batch_size`` an epoch is one batch of all.

    Of ``photos`` [N] with class indices ``labels`` [N], process ``rank`` of ``world`` gets every ``world``-th row of a
    batch; ``batch_size`` counts the rows of all processes. ``workers`` decode; 0 = none but this process.
    """

    def __init__(
        self,
        photos: Sequence[ImageFile],
        labels: NDArray[Any] | Sequence[int],
        spec: PreprocessSpec,
        augment: AugmentConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if len(photos) == 0 or len(photos) != len(labels):
            raise InputError(f"photos and labels must be as many and not empty, got {len(photos)} and {len(labels)}")
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        self._n = len(photos)
        self._labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self._photos = list(photos)
        self._seed, self._rank, self._world = seed, rank, world
        self._batch = min(batch_size, self._n)
        self.steps_per_epoch = self._n // self._batch
        self._plan = _Plan()
        images = _Images(self._photos, spec, augment if augment.enabled else None, seed, max(1, workers))
        self._loader = _loader(images, self._plan, workers, math.ceil(self._batch / world) * _bytes(spec))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``start_step`` on; skipped ones are not decoded.

        Raises:
            InputError: an image that could be read when the data was split cannot be read any more.
        """
        order = epoch_order(self._n, self._seed, epoch)
        steps = range(start_step, self.steps_per_epoch)
        shares = [order[step * self._batch : (step + 1) * self._batch][self._rank :: self._world] for step in steps]
        self._plan.keys = [[(epoch, int(i)) for i in share] for share in shares]
        with _no_loader_warnings():
            batches = iter(self._loader)
        for share, pixels in zip(shares, batches, strict=True):
            index = torch.from_numpy(share)
            yield Batch((_checked(pixels),), self._labels[index], index, [str(self._photos[i]) for i in share])

    def close(self) -> None:
        """Stop the workers; an epoch asked for later starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            self._loader._iterator = None


def iterate(
    photos: Sequence[ImageFile],
    spec: PreprocessSpec,
    batch_size: int = 64,
    workers: int = 0,
    description: str = "",
    draw: tuple[AugmentConfig, int, int] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield images [B, 3, H, W] float32 in order; with a description, behind a progress bar.

    The last batch may be smaller. With ``draw`` (augmentation, seed, epoch) images are as that epoch of training draws
    them, not as evaluation sees them.

    Raises:
        InputError: an image cannot be read.
    """
    augment, seed, epoch = draw or (None, 0, 0)
    keys = [[(epoch, i) for i in range(k, min(k + batch_size, len(photos)))] for k in range(0, len(photos), batch_size)]
    images = _Images(list(photos), spec, augment, seed, 0)
    loader = _loader(images, _Plan(keys), min(workers, len(keys) - 1), batch_size * _bytes(spec), persistent=False)
    with _no_loader_warnings():
        batches = iter(loader)
    for pixels in track(batches, description, total=len(keys)) if description else batches:
        yield _checked(pixels)


# --------------------------------------------------------------------------------------------
# Workers


class _Images(Dataset[Any]):
    def __init__(
        self, photos: list[ImageFile], spec: PreprocessSpec, augment: AugmentConfig | None, seed: int, sharing: int
    ) -> None:
        self._photos, self._spec, self._augment, self._seed = photos, spec, augment, seed
        self._room = CACHE_BYTES // sharing if sharing else 0
        self._cache: dict[int, Image.Image] = {}

    def __getitems__(self, keys: list[tuple[int, int]]) -> NDArray[np.float32] | str:
        """A batch, or the message of what went wrong: an exception would come out of a worker as a traceback."""
        spec = self._spec
        batch = np.empty((len(keys), 3, spec.height, spec.width), dtype=np.float32)
        for pixels, (epoch, row) in zip(batch, keys, strict=True):
            try:
                image = self._image(row)
            except ImageError as error:
                return f"{error}; it was readable when the data was split, so restore it; if photos moved, {MOVED}"
            if self._augment is None:
                pixels[:] = preprocess(image, spec)
            else:
                pixels[:] = augmented(image, spec, self._augment, self._seed, epoch, row)
        return batch

    def _image(self, row: int) -> Image.Image:
        image = self._cache.get(row)
        if image is None:
            image = read_image(self._photos[row])
            size = 4 * image.width * image.height
            if size <= self._room:
                self._room -= size
                self._cache[row] = image
        return image


class _Plan:
    """Batches of (epoch, row) still to be made; replaced before each pass, which the loader and its workers outlive."""

    def __init__(self, keys: list[list[tuple[int, int]]] | None = None) -> None:
        self.keys = keys or []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _sent(shared: bool, batch: Any) -> Any:
    """What a worker sends: a tensor in shared memory, or an array through the pipe where that is too small."""
    return torch.from_numpy(batch) if shared and not isinstance(batch, str) else batch


def _loader(images: _Images, plan: _Plan, workers: int, size: int, *, persistent: bool = True) -> DataLoader[Any]:
    """Batches of the (epoch, row) that ``plan`` lists, each of so many bytes."""
    workers = max(0, workers)
    with _no_loader_warnings():
        return DataLoader(
            images,
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=functools.partial(_sent, _shared_memory() > 4 * workers * size),
            persistent_workers=persistent and workers > 0,
            # Linux: workers start at once, with what is loaded already.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_leave_inherited,
            # Its own: drawing from the global one would make training depend on how often a loader was started.
            generator=torch.Generator(),
        )


def _leave_inherited(_: int) -> None:
    """Keep a forked worker from collecting what its parent has dropped, and from signals that are its parent's.

    Only the parent's threads can take it down: an onnxruntime session that the worker destroyed would wait for threads
    that no fork copies, for ever. Ctrl-C reaches every process of a terminal, and the parent needs its step's batches.
    """
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _shared_memory() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108
    except OSError:
        return sys.maxsize


def _bytes(spec: PreprocessSpec) -> int:
    return 12 * spec.height * spec.width


def _checked(pixels: torch.Tensor | NDArray[np.float32] | str) -> torch.Tensor:
    if isinstance(pixels, str):
        raise InputError(pixels)
    return torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels


class _no_loader_warnings(warnings.catch_warnings):  # noqa: N801
    """More workers than cores, and forking beside idle torch threads, are both fine here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*worker processes in total.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)


# --------------------------------------------------------------------------------------------
# Augmentation


def augmented(
    image: Image.Image, spec: PreprocessSpec, augment: AugmentConfig, seed: int, epoch: int, row: int
) -> NDArray[np.float32]:
    """One augmented training input [3, H, W] float32, a function of (seed, epoch, row) and the picture alone.

    A random part of the original is resized to the target and turned (what a turn takes from outside the picture
    is black), mirrored, blurred and recoloured. The part's area and aspect ratio are relative to what evaluation
    sees: the whole picture for ``stretch``, the largest part of the target's shape for ``crop``.
    """
    # All draws in a fixed order, used or not: switching one step off leaves the others as they are.
    u = _generator(seed, epoch, row).random(13)

    def between(k: int, low: float, high: float) -> float:
        return low + (high - low) * float(u[k])

    width, height = image.size
    base_w, base_h = float(width), float(height)
    if spec.resize == "crop":
        base_w, base_h = min(base_w, base_h * spec.width / spec.height), min(base_h, base_w * spec.height / spec.width)
    area = between(0, *augment.crop_scale)
    ratio = math.exp(between(1, *(math.log(r) for r in augment.crop_ratio)))
    w, h = min(width, base_w * math.sqrt(area * ratio)), min(height, base_h * math.sqrt(area / ratio))
    left, top = between(2, 0, width - w), between(3, 0, height - h)
    angle = between(4, -augment.rotation, augment.rotation) if u[5] < augment.rotation_probability else 0.0
    pixels = _region(image, (left, top, left + w, top + h), math.radians(angle), spec)
    if u[6] < augment.horizontal_flip:
        pixels = np.ascontiguousarray(pixels[:, :, ::-1])
    if u[7] < augment.blur_probability:
        sigma = between(8, *augment.blur_sigma)
        for axis in (1, 2):
            pixels = gaussian_filter1d(pixels, sigma, axis=axis, mode="nearest")
    brightness, contrast, saturation = (
        between(9 + k, 1 - most, 1 + most)
        for k, most in enumerate((augment.brightness, augment.contrast, augment.saturation))
    )
    hue = between(12, -augment.hue, augment.hue)
    return normalise(_recolour(pixels, brightness, contrast, saturation, hue), spec)


def _recolour(
    pixels: NDArray[np.float32], brightness: float, contrast: float, saturation: float, hue: float
) -> NDArray[np.float32]:
    """Brightness, contrast around the mean grey, saturation and hue (in turns) as one affine map of colours."""
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = _RGB @ np.asarray([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
    colour = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), _GREY)
    matrix = (turn @ colour * (contrast * brightness)).astype(np.float32)
    flat = pixels.reshape(3, -1)
    mean = float(_GREY @ flat.mean(axis=1))
    shift = np.float32((1 - contrast) * brightness * mean)
    # Not by BLAS, whose threads and a forked worker get on badly.
    out = cast("NDArray[np.float32]", np.einsum("ij,jk->ik", matrix, flat))
    out += shift
    return np.clip(out, 0, 255, out=out).reshape(pixels.shape)


def _region(
    image: Image.Image, box: tuple[float, float, float, float], angle: float, spec: PreprocessSpec
) -> NDArray[np.float32]:
    """The box (left, top, right, bottom), turned about its centre, as floats 0..255 [3, H, W]."""
    target = (spec.width, spec.height)
    resample = Image.Resampling.BILINEAR if spec.resample == "bilinear" else Image.Resampling.BICUBIC
    if angle == 0:
        return _floats(_part(image, box, target, resample))
    left, top, right, bottom = box
    w, h, x, y = right - left, bottom - top, (left + right) / 2, (top + bottom) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    # The upright box around the turned one, as far as there is picture, at the target's scale; then one small turn.
    reach_x, reach_y = (w * abs(cos) + h * abs(sin)) / 2, (w * abs(sin) + h * abs(cos)) / 2
    near_x, near_y = max(0.0, x - reach_x), max(0.0, y - reach_y)
    far_x, far_y = min(float(image.width), x + reach_x), min(float(image.height), y + reach_y)
    outer_w, outer_h = far_x - near_x, far_y - near_y
    size = (max(1, round(outer_w * target[0] / w)), max(1, round(outer_h * target[1] / h)))
    upright = _part(image, (near_x, near_y, far_x, far_y), size, resample)
    # From target coordinates to the picture, then to the upright part.
    to_x, to_y, step_x, step_y = size[0] / outer_w, size[1] / outer_h, w / target[0], h / target[1]
    a, b, d, e = cos * step_x * to_x, -sin * step_y * to_x, sin * step_x * to_y, cos * step_y * to_y
    c = (x - near_x) * to_x - a * target[0] / 2 - b * target[1] / 2
    f = (y - near_y) * to_y - d * target[0] / 2 - e * target[1] / 2
    turn = (a, b, c, d, e, f)
    return _floats(upright.transform(target, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR, fillcolor=0))


def _part(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    # On 8 bits, unlike evaluation: twice as fast, and half a level is nothing beside the change of colours.
    return image.resize(size, resample, box=box, reducing_gap=2.0)


def _floats(image: Image.Image) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), dtype=np.float32)
