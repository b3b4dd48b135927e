"""Reading images and turning them into the model's input: one implementation for evaluation, export and serving.

No torch in here. Whatever a file holds, reading it gives an 8-bit RGB picture the right way up, or an ImageError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field

from stage1_pro.data.photos import ImageFile, Photo, open_file
from stage1_pro.errors import InputError
from stage1_pro.files import write_csv
from stage1_pro.record import Record

_Mean = Annotated[float, Field(ge=-1e4, le=1e4)]
_Std = Annotated[float, Field(ge=1e-4, le=1e4)]


class PreprocessSpec(Record):
    """How pixels become the model's input; shared by evaluation, export and serving.

    ``stretch`` resizes to (height, width) ignoring the aspect ratio (DINOv3's processor);
    ``crop`` resizes the shorter side to ``round(size * crop_ratio)`` and crops the centre (DINOv2's).
    Resampling is antialiased on float pixels; values are scaled to [0, 1], then normalised.
    """

    # Upper limits: a received spec must not ask for gigabytes, nor push pixels out of float32.
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    resize: Literal["stretch", "crop"] = "stretch"
    crop_ratio: float = Field(default=256 / 224, ge=1.0, le=16.0)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)


Reason = Literal["unreadable", "empty", "not an image", "truncated", "damaged", "oversized", "unsupported"]
MAX_PIXELS = 64_000_000
# Enlarging the short side of a longer strip would take gigabytes.
MAX_ASPECT = 1000
# What a file may ask of memory and time beside its pixels. Eight bytes a pixel are 16 bits each of red, green, blue and
# opacity. Tags, chunks and comments are read one by one by Python: some thousands before a picture's data, and with
# its data in pieces of 8 KiB as many as the largest PNG has. Each scan of a progressive JPEG goes over all of its
# pixels: ordinary ones have ten.
_BYTES_A_PIXEL, _LEAST_BYTES = 8, 2**24
_HEAD_READS, _READS = 20_000, 400_000
_SCANNED_PIXELS = 3e9
# Its decoder holds three copies of a picture, others none.
_WEBP_SHARE = 0.6
_ROWS = 256
# Raster formats that Pillow decodes itself: an EPS, for one, would start an external program. An ICO is decoded when it
# is opened, before its size is known.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_HEIC = re.compile(rb"....ftyp(he[iv][cxms]|mif1|msf1)", re.DOTALL)
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# What EXIF says of how a picture lies; 1, the first of its orientations, is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_ORIENTATION = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}


class ImageError(InputError):
    """A file cannot be used as an image; ``reason`` is one of ``Reason``."""

    def __init__(self, name: str, reason: Reason, detail: str) -> None:
        super().__init__(f"{name} must be a readable image, got: {reason}: {detail}")
        self.name = name
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, Reason, str]]:
        return type(self), (self.name, self.reason, self.detail)


@dataclass(frozen=True)
class Quarantined:
    """A file left out, relative to the data's root, and why."""

    file: str
    reason: str


def read_image(source: ImageFile | BinaryIO | bytes, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Read the first frame of an image as 8-bit RGB, the right way up.

    EXIF orientation is applied. Grey, CMYK (Adobe's inverted kind too) and palette images are converted;
    grey of 9 to 16 bits keeps its upper 8 (as Pillow does for 16-bit colour); transparent pixels are laid on white.
    Pixels whose range no file states are refused: signed, of 32 bits, floating-point. Colour profiles are not applied.

    Args:
        source: path, photo of a source, binary file (read from its start, left open) or encoded bytes.
        max_pixels: width x height above which the file is refused by its header, before decoding; a WEBP above three
            fifths, since its decoder takes more. Sixteen bytes a pixel are the most that reading takes at once.

    Raises:
        ImageError: for every file that does not give a whole picture, with its ``reason``.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), "image", max_pixels)
    if not isinstance(source, str | Path | Photo):
        return _read(source, str(getattr(source, "name", "image")), max_pixels)
    name = str(source)
    try:
        file = source.open() if isinstance(source, Photo) else open_file(source)
    except (OSError, ValueError) as error:
        raise ImageError(name, "unreadable", getattr(error, "strerror", None) or str(error)) from None
    with file:
        return _read(file, name, max_pixels)


def _read(file: BinaryIO, name: str, max_pixels: float) -> Image.Image:
    with _explained(name, file):
        sparing = _Sparing(file, name, max(_LEAST_BYTES, _BYTES_A_PIXEL * max_pixels))
        with Image.open(cast("BinaryIO", sparing), formats=_formats(file)) as image:
            _check_work(image, name, max_pixels)
            sparing.reads = _READS
            return upright_rgb(image, name)


class _Sparing:
    """A file that ends a reader who asks too often, or for more than there should be."""

    def __init__(self, file: BinaryIO, name: str, limit: float) -> None:
        self.seek, self.tell, self.fileno = file.seek, file.tell, file.fileno
        self._file, self._name, self.reads = file, name, _HEAD_READS
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size > limit:
            raise ImageError(name, "oversized", f"{size} bytes, more than {limit:.0f}")

    def read(self, size: int = -1) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise ImageError(self._name, "oversized", "more parts than a picture has")
        return self._file.read(size)


def _formats(file: BinaryIO) -> tuple[str, ...]:
    """The formats that a file may be of; HEIC's decoder is an extra, which loads when the first one is met."""
    return (*FORMATS, *_heif()) if _is_heic(file) else FORMATS


def _is_heic(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    return _HEIC.match(start) is not None


@functools.cache
def _heif() -> tuple[str, ...]:
    try:
        import pi_heif
    except ImportError:
        return ()
    # Its library refuses a picture that is larger than its header says. One thread: callers have theirs.
    pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return ("HEIF",)


def read_opened(image: Image.Image, name: str = "image", max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Read an image that somebody else has opened, as ``read_image`` would; nothing is decoded before it is checked.

    Raises:
        ImageError: it does not give a whole picture, or is of a format that ``read_image`` does not open.
    """
    # MPO: how a JPEG plugin calls a JPEG with several pictures.
    if image.format not in (None, "MPO", "HEIF", *FORMATS):
        raise ImageError(name, "unsupported", f"the format {image.format}")
    with _explained(name, io.BytesIO(b"opened")):
        _check_work(image, name, max_pixels)
        return upright_rgb(image, name)


def _check_work(image: Image.Image, name: str, max_pixels: float) -> None:
    """Refuse an opened image that would take too much memory or time to decode."""
    width, height = image.size
    max_pixels *= _WEBP_SHARE if image.format == "WEBP" else 1
    if width * height > max_pixels:
        raise ImageError(name, "oversized", f"{width} x {height} pixels, more than {max_pixels:.0f}")
    if width * height == 0:
        raise ImageError(name, "damaged", "no pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(name, "unsupported", f"{width} x {height} pixels, a strip and no picture")
    if image.format in ("JPEG", "MPO") and getattr(image, "tile", None):  # not decoded yet
        scans = _count(image.fp, b"\xff\xda")  # type: ignore[attr-defined]
        if scans * width * height > _SCANNED_PIXELS:
            raise ImageError(name, "oversized", f"{scans} scans of {width} x {height} pixels")


def _count(file: Any, mark: bytes) -> int:
    """How often two bytes stand in a file, but where a piece of it ends; it is left where it was."""
    place, found = file.tell(), 0
    file.seek(0)
    while piece := file.read(2**20):
        found += piece.count(mark)
    file.seek(place)
    return found


@contextlib.contextmanager
def _explained(name: str, file: BinaryIO) -> Iterator[None]:
    """Silence Pillow's warnings, and say what was wrong with the file where it fails."""
    try:
        with _QUIET:
            yield
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow lets a dozen kinds out, of its parsers as of its decoders
        raise ImageError(name, *_explain(error, file)) from None


def _explain(error: Exception, file: BinaryIO) -> tuple[Reason, str]:
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return "oversized", text
    if isinstance(error, UnidentifiedImageError):
        with contextlib.suppress(Exception):
            file.seek(0)
            if not file.read(1):
                return "empty", "the file has no content"
            if _is_heic(file) and not _heif():
                return "unsupported", "HEIC is read by an extra: pip install 'stage1_pro[heif]'"
        return "not an image", "no known image format"
    if isinstance(error, EOFError) or any(word in text.lower() for word in ("truncated", "not large enough", "end of")):
        return "truncated", text
    if isinstance(error, NotImplementedError) or "not supported" in text:
        return "unsupported", text
    return "damaged", text


def upright_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Decode an opened image and give it as 8-bit RGB, the right way up; ``name`` is what errors call it."""
    image.load()
    transpose = None
    # Read after decoding: some formats keep it behind the pixels, and TIFF is turned by Pillow itself. A damaged EXIF
    # block is no reason to refuse the picture.
    with contextlib.suppress(Exception):
        transpose = _ORIENTATION.get(image.getexif().get(0x0112, 1))
    picture = _to_rgb(image, name)
    if transpose is None:
        return picture
    turned = picture.transpose(transpose)
    # What it is told about itself is about the picture as it lay: read again, it must not be turned again.
    turned.info = {}
    return turned


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    tags: dict[int, Any] = dict(getattr(image, "tag_v2", {}))
    if image.mode == "F" or set(tags.get(ExifTags.Base.SampleFormat, ())) - {1, 4}:  # unsigned or unknown
        raise ImageError(name, "unsupported", "signed or floating-point pixels have no stated range")
    if image.mode.startswith("I"):
        return Image.fromarray(_upper_bits(image, name, tags)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # By bands: whole, it would take four pictures more.
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        band = image.crop((0, top, image.width, min(top + _ROWS, image.height))).convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return flat


def _upper_bits(image: Image.Image, name: str, tags: dict[int, Any]) -> NDArray[np.uint8]:
    """Grey of more than 8 bits as [H, W] uint8; ``tags`` is what a TIFF says of itself."""
    stated = 16 if image.mode != "I" or image.format in ("PNG", "PPM") else 32
    bits = int(tags.get(ExifTags.Base.BitsPerSample, (stated,))[0])
    if bits > 16:
        raise ImageError(name, "unsupported", f"pixels of {bits} bits have no stated range")
    clear = image.info.get("transparency")
    whole = np.asarray(image)
    grey = np.empty(whole.shape, np.uint8)
    for top in range(0, len(whole), _ROWS):
        values = whole[top : top + _ROWS].astype(np.int64)
        band = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
            band = 255 - band
        grey[top : top + _ROWS] = np.where(values == clear, np.uint8(255), band) if isinstance(clear, int) else band
    return grey


class _Quiet:
    """Silences Pillow's warnings while any thread is reading.

    ``warnings.catch_warnings`` saves and restores global state, so overlapping threads would restore
    each other's; the first one in enters it and the last one out leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._saved: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0 and self._saved is not None:
                self._saved.__exit__(None, None, None)
                self._saved = None


_QUIET = _Quiet()


def _hush() -> None:
    """Keep Pillow, and libtiff, which it reads TIFF with, from writing what is wrong with a file to the terminal."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # Found among what Pillow's own library is linked with; where it is hidden there, it goes on talking.
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined]
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            hush = getattr(library, name)
            hush.argtypes, hush.restype = [ctypes.c_void_p], ctypes.c_void_p
            hush(None)


_hush()


# --------------------------------------------------------------------------------------------
# Pixels to input


def preprocess(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Turn an RGB image into the model's input [3, H, W] float32: resize, scale to [0, 1], normalise.

    Each channel is resized on floats with antialiasing, so nothing is rounded in between; bicubic overshoot
    is clipped to the range of pixels. In ``crop`` mode the picture is made just large enough to cover
    (height, width) times ``crop_ratio``, then cut in the middle.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    # One at a time: as floats a channel takes as much as the whole picture.
    return normalise(np.stack([_resize(image.getchannel(band).convert("F"), spec) for band in range(3)]), spec)


def normalise(pixels: NDArray[np.float32], spec: PreprocessSpec) -> NDArray[np.float32]:
    """Pixels [3, H, W] of 0..255 to (pixels / 255 - mean) / std, in place."""
    pixels *= np.float32(1 / 255)
    pixels -= np.asarray(spec.mean, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(spec.std, dtype=np.float32)[:, None, None]
    return pixels


def _resize(channel: Image.Image, spec: PreprocessSpec) -> NDArray[np.float32]:
    """One channel of floats 0..255 to [H, W], still 0..255."""
    target = (spec.width, spec.height)
    if spec.resize == "stretch":
        return _scale(channel, target, (0, 0, *channel.size), spec)
    size = crop_geometry(channel.size, spec)
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    if max(size) > 16 * max(target):
        # The whole of a long strip would be blown up to gigabytes; only its middle is resized.
        x, y = channel.width / size[0], channel.height / size[1]
        return _scale(channel, target, (left * x, top * y, (left + spec.width) * x, (top + spec.height) * y), spec)
    return _scale(channel, size, (0, 0, *channel.size), spec)[top : top + spec.height, left : left + spec.width]


def _scale(
    channel: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float], spec: PreprocessSpec
) -> NDArray[np.float32]:
    resample = _RESAMPLE[spec.resample]
    if spec.resample == "bilinear":
        return np.asarray(channel.resize(size, resample, box=box))
    # Bicubic overshoots; 8-bit processors clip after each direction, and clipping once differs by 15 levels.
    wide = channel.resize((size[0], channel.height), resample, box=(box[0], 0, box[2], channel.height))
    wide = Image.fromarray(np.clip(np.asarray(wide), 0, 255))
    pixels: NDArray[np.float32] = np.asarray(wide.resize(size, resample, box=(0, box[1], size[0], box[3])))
    return np.clip(pixels, 0, 255)


def crop_geometry(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """(width, height) an image is resized to before the centre crop.

    For a square target this is the shorter side at ``round(side * crop_ratio)`` and the longer one floored,
    as in transformers; otherwise the side that is short in relation to the target takes that part.
    """
    width, height = size
    if width * spec.height <= height * spec.width:
        new = round(spec.width * spec.crop_ratio)
        return new, max(spec.height, int(new * height / width))
    new = round(spec.height * spec.crop_ratio)
    return max(spec.width, int(new * width / height)), new


def write_quarantine(path: Path | str, rows: Sequence[Quarantined]) -> None:
    """Write ``quarantine.csv`` (file, reason), atomically."""
    write_csv(path, [{"file": row.file, "reason": row.reason} for row in rows], ["file", "reason"])
