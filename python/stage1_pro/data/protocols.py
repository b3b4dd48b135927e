"""What StreetVision's validator does to a photo before it asks: protocols to measure robustness with.

NumPy and Pillow alone. Everything drawn is a function of (seed, row): the same photo is changed alike on every machine,
whatever is done to the others. Levels as the subnet's public code has them, but no flips:

- L0: ``crop224`` cuts the largest square from the middle, ``letterbox224`` adds black bars; both resize to 224 x 224;
- L1: turned by up to 20 degrees (nearest, black outside), then, in ``crop224``, a random square of 20% to 100% of the
  area (as torchvision's RandomResizedCrop draws it), in ``letterbox224`` the bars again;
- L2: L1, then chroma scaled, brightness scaled, down- and up-sampled, each at a strength of 0 (not at all) or 1;
- L3: as L2 with strengths 0 to 2, then also Gaussian noise in YCbCr and Gaussian blur.

``native`` leaves the pixels alone and has L0 only. In the end all are JPEG, quality 75, 4:2:0.
"""

from __future__ import annotations

import io
import math
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.errors import InputError, nearest
from stage1_pro.words import ProtocolName

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
SIZE = 224
JPEG_QUALITY = 75
MAX_TURN = 20.0
CROP_AREA = (0.2, 1.0)
# By strength; 0 does nothing.
CHROMA = (1.0, 0.4, 0.3)
BRIGHTNESS = (1.0, 0.85, 0.725)
RESAMPLE = (1, 2, 3)
NOISE_VARIANCE = (0.0, 0.001, 0.002)
BLUR_KERNEL = (1, 7, 9)
# One unit of the validator's noise in levels of luma and chroma: it is added to video-range values divided by 255 once
# more, so the standard deviation of variance .001 is nine levels, not eight.
_NOISE_LEVELS = (255 * 255 / 219, 255 * 255 / 224)
_LUMA = np.asarray([0.299, 0.587, 0.114])
_LEVEL_DRAW = 1 << 32

Pixels = NDArray[np.float64]


def levels(protocol: str) -> tuple[int, ...]:
    """Levels of a protocol, from 0; raise InputError naming those there are."""
    if protocol not in PROTOCOLS:
        raise InputError(
            f"protocol must be one of {', '.join(PROTOCOLS)}, got '{protocol}'{nearest(protocol, PROTOCOLS)}"
        )
    return (0,) if protocol == "native" else (0, 1, 2, 3)


def draw_level(protocol: str, *, seed: int, row: int) -> int:
    """The level that a row is asked at when levels are mixed: uniform over those of the protocol."""
    choices = levels(protocol)
    return choices[int(_generator(seed, _LEVEL_DRAW | row).integers(len(choices)))]


def challenge(image: Image.Image, protocol: str, level: int, *, seed: int, row: int) -> bytes:
    """One photo as the validator would send it: JPEG bytes.

    Args:
        image: RGB, upright.
        protocol: one of ``PROTOCOLS``.
        level: one of ``levels(protocol)``.
        seed: of all that is drawn.
        row: number of the photo, 0 .. 2^32 - 1.

    Raises:
        InputError: no such protocol or level, or a row out of range.
    """
    if level not in levels(protocol):
        raise InputError(f"level must be one of {levels(protocol)} for {protocol}, got {level}")
    if not 0 <= row < _LEVEL_DRAW:
        raise InputError(f"row must be 0 .. {_LEVEL_DRAW - 1}, got {row}")
    image = image.convert("RGB")
    if protocol != "native":
        rng = _generator(seed, row)
        # Drawn in a fixed order, used or not: what a higher level adds leaves the rest as it was.
        angle = float(rng.uniform(-MAX_TURN, MAX_TURN))
        box = _random_square(image.size, rng)
        strengths = rng.integers(0, (2, 2, 2, 3, 3, 3, 3, 3)).tolist()
        if level:
            image = image.rotate(angle, Image.Resampling.NEAREST)
        if protocol == "letterbox224":
            image = _letterbox(image)
        else:
            image = _resize(image, (SIZE, SIZE), box if level else _middle_square(image.size))
        if level == 2:
            image = _recolour(image, *strengths[:3])
        elif level == 3:
            image = _blur(_noise(_recolour(image, *strengths[3:6]), strengths[6], rng), strengths[7])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.asarray([seed & (2**64 - 1), stream], dtype=np.uint64)))


Box = tuple[float, float, float, float]


def _middle_square(size: tuple[int, int]) -> Box:
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return (left, top, left + side, top + side)


def _random_square(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A square of a random share of the area at a random place; the middle one when ten draws do not fit."""
    found = None
    for area, x, y in zip(rng.uniform(*CROP_AREA, 10), rng.random(10), rng.random(10), strict=True):
        side = max(1, round(math.sqrt(float(area) * size[0] * size[1])))
        if found is None and side <= min(size):
            left, top = int(x * (size[0] - side + 1)), int(y * (size[1] - side + 1))
            found = (left, top, left + side, top + side)
    return found or _middle_square(size)


def _resize(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _letterbox(image: Image.Image) -> Image.Image:
    scale = SIZE / max(image.size)
    width, height = (min(SIZE, max(1, round(side * scale))) for side in image.size)
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(_resize(image, (width, height)), ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


def _recolour(image: Image.Image, chroma: int, brightness: int, resample: int) -> Image.Image:
    if chroma:
        pixels = _pixels(image)
        luma = (pixels @ _LUMA)[..., None]
        image = _image(luma + (pixels - luma) * CHROMA[chroma])
    if brightness:
        image = _image(_pixels(image) * BRIGHTNESS[brightness])
    if resample:
        # Without antialiasing, as the validator's library shrinks.
        rows, columns = (_places(side, side // RESAMPLE[resample]) for side in (image.height, image.width))
        small = _interpolate(_interpolate(_pixels(image), rows, 0), columns, 1)
        rows, columns = (_places(side // RESAMPLE[resample], side) for side in (image.height, image.width))
        image = _image(_interpolate(_interpolate(small, rows, 0), columns, 1))
    return image


def _places(size: int, target: int) -> NDArray[np.float64]:
    """Where the centres of ``target`` pixels lie among ``size``."""
    places: NDArray[np.float64] = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
    return places


def _interpolate(pixels: Pixels, places: NDArray[np.float64], axis: int) -> Pixels:
    low = places.astype(np.intp)
    high = np.minimum(low + 1, pixels.shape[axis] - 1)
    share = (places - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    mixed: Pixels = np.take(pixels, low, axis) * (1 - share) + np.take(pixels, high, axis) * share
    return mixed


def _noise(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    if not strength:
        return image
    deviation = math.sqrt(NOISE_VARIANCE[strength])
    luma, blue, red = np.moveaxis(rng.standard_normal((image.height, image.width, 3)), 2, 0) * deviation
    luma, blue, red = luma * _NOISE_LEVELS[0], blue * _NOISE_LEVELS[1], red * _NOISE_LEVELS[1]
    added = np.stack([luma + 1.403 * red, luma - 0.714 * red - 0.344 * blue, luma + 1.773 * blue], axis=2)
    return _image(_pixels(image) + added)


def _blur(image: Image.Image, strength: int) -> Image.Image:
    if not strength:
        return image
    size = BLUR_KERNEL[strength]
    offsets = np.arange(size) - size // 2
    kernel = np.exp(-0.5 * (offsets / (size / 6)) ** 2)
    kernel /= kernel.sum()
    pixels = _pixels(image)
    for axis in (0, 1):
        margin = [(size // 2, size // 2) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(pixels, margin, mode="reflect")
        length = pixels.shape[axis]
        pixels = np.sum(
            [weight * np.take(padded, np.arange(length) + k, axis) for k, weight in enumerate(kernel)], axis=0
        )
    return _image(pixels)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float64)


def _image(pixels: Pixels) -> Image.Image:
    # Cut off, not rounded: that is what the validator's conversions do. The hair keeps whole numbers whole.
    return Image.fromarray(np.clip(pixels + 1e-6, 0, 255).astype(np.uint8))
