"""The data room: reading any file, the input's pixels, splits that cannot leak, loaders, rendered scenes."""

from __future__ import annotations

import codecs
import csv
import gc
import io
import itertools
import os
import shutil
import struct
import sys
import threading
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFile

import stage1_pro
from stage1_pro.arguments import check_share
from stage1_pro.config import AugmentConfig
from stage1_pro.data import images
from stage1_pro.data.duplicates import WHOLE, near_duplicates, read_pictures
from stage1_pro.data.images import ImageError, PreprocessSpec, crop_geometry, preprocess, read_image, read_opened
from stage1_pro.data.photos import Folder
from stage1_pro.data.splits import Splits, assign, make_splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import InputError
from stage1_pro.words import SPLITS

HALVES = ("val_calib.fit", "val_calib.certify")


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random picture; no two seeds look alike."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(read_image(data)).astype(int)


# --------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    grid = np.zeros((32, 48, 3), dtype=np.uint8)
    grid[:16, :24], grid[:16, 24:], grid[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    upright = Image.fromarray(grid)
    undo = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"],
        6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }[orientation]  # fmt: skip
    stored = upright
    for name in undo:
        stored = stored.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = read_image(encode(stored, kind, exif=exif, **options))
    # Read once more as a caller may who hands it on: it stays as it is.
    for got in (np.asarray(picture).astype(int), np.asarray(read_opened(picture)).astype(int)):
        assert got.shape == grid.shape
        for y, x in ((4, 4), (4, 40), (28, 4), (28, 40)):
            np.testing.assert_allclose(got[y, x], grid[y, x], atol=12)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(picture(0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f broken")
    assert read_image(data).size == (40, 30)


def test_grey_of_8_and_16_bits() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(pixels_of(encode(Image.fromarray(ramp)))[:, :, 1], ramp)
    wide = ramp.astype(np.uint16) * 256 + 200
    for kind in ("PNG", "TIFF"):
        got = pixels_of(encode(Image.fromarray(wide), kind))
        assert got.shape == (16, 16, 3)
        np.testing.assert_array_equal(got[:, :, 2], ramp)  # >> 8, not clipped to white
    pgm = b"P5 16 16 65535\n" + wide.astype(">u2").tobytes()  # Pillow's mode I
    np.testing.assert_array_equal(pixels_of(pgm)[:, :, 0], ramp)
    np.testing.assert_array_equal(pixels_of(encode(Image.fromarray(ramp > 99)))[:, :, 0], np.where(ramp > 99, 255, 0))


def grey_tiff(values: np.ndarray, bits: int, *, white_is_zero: bool, kind: int) -> bytes:
    """A little-endian grey TIFF made by hand; kind 1: unsigned, 2: signed, 3: floating-point."""
    if bits == 12:
        high, low = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        triples = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=2)
        data = triples.astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<{' uif'[kind]}{bits // 8}").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height,
            279: len(data), 339: kind}  # fmt: skip
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize(
    ("bits", "kind"), [(8, 1), (8, 2), (12, 1), (12, 2), (16, 1), (16, 2), (32, 1), (32, 2), (32, 3)]
)
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_is_read_by_the_range_that_a_file_states_or_not_at_all(bits: int, white_is_zero: bool, kind: int) -> None:
    top = 2 ** (min(bits, 31) - (kind == 2)) - 1
    values = np.tile(np.linspace(0, top, 64).round(), (8, 1))
    data = grey_tiff(values, bits, white_is_zero=white_is_zero, kind=kind)
    if kind == 1 and bits <= 16 and not (bits == 12 and white_is_zero):  # Pillow does not know that one
        wanted = values[0] / top * 255
        assert np.abs(pixels_of(data)[0, :, 1] - (255 - wanted if white_is_zero else wanted)).max() <= 1.1
    else:
        with pytest.raises(ImageError):
            read_image(data)


def test_whole_numbers_of_no_file_have_no_range() -> None:
    with pytest.raises(ImageError, match="unsupported"):
        read_opened(Image.fromarray(np.zeros((8, 8), np.int32)))


def test_16_bit_grey_that_is_transparent_lies_on_white() -> None:
    values = np.full((8, 8), 9000, dtype=np.uint16)
    values[:, 4:] = 300
    data = encode(Image.fromarray(values), "PNG", transparency=300)
    assert pixels_of(data)[0, :, 0].tolist() == [9000 >> 8] * 4 + [255] * 4


def test_16_bit_colour() -> None:
    import zlib

    values = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(pixels_of(png), values.astype(int) >> 8)


def test_cmyk_also_inverted() -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 20))
    got = pixels_of(encode(flat.convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(got[8, 8], (200, 60, 20), atol=6)  # Pillow writes Adobe's inverted kind
    assert b"Adobe" in encode(flat.convert("CMYK"), "JPEG")
    np.testing.assert_allclose(pixels_of(encode(flat.convert("CMYK"), "TIFF"))[8, 8], (200, 60, 20), atol=2)


def test_transparency_is_laid_on_white() -> None:
    overlay = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    overlay.putpixel((1, 1), (10, 20, 30, 255))
    overlay.putpixel((2, 2), (0, 0, 0, 128))
    got = pixels_of(encode(overlay))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [10, 20, 30]
    np.testing.assert_allclose(got[2, 2], 127, atol=1)
    assert pixels_of(encode(Image.new("LA", (4, 4), (90, 0))))[0, 0].tolist() == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    got = pixels_of(encode(palette, transparency=0))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [0, 0, 255]
    assert pixels_of(encode(palette, transparency=b"\x80\xff"))[0, 0].tolist() == [255, 127, 127]
    keyed = Image.new("RGB", (4, 4), (9, 9, 9))
    assert pixels_of(encode(keyed, transparency=(9, 9, 9)))[0, 0].tolist() == [255] * 3


HEIC = Path(__file__).parent / "data" / "heic"


@pytest.mark.parametrize("name", ["upright", "turned5", "turned6", "alpha"])
def test_heic_is_read_upright_and_on_white(name: str) -> None:
    """Files of pillow-heif's encoder, lossless: a ramp of colours, lying as EXIF may say, or clear on the right."""
    pytest.importorskip("pi_heif", reason="HEIC is read by the extra [heif]")
    y, x = np.mgrid[:48, :64]
    wanted = np.stack([x * 3, y * 4, (x + y) * 2], axis=2).clip(0, 255).astype(np.uint8)
    if name == "alpha":
        wanted[:, 32:] = 255
    picture = Image.fromarray(wanted)
    if name.startswith("turned"):
        turns = {"5": Image.Transpose.TRANSPOSE, "6": Image.Transpose.ROTATE_270}
        picture = picture.transpose(turns[name[-1]])
    wanted = np.asarray(picture).astype(int)
    path = HEIC / f"{name}.heic"
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        found = np.asarray(read_image(source)).astype(int)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2
    with pytest.raises(ImageError, match="oversized"):
        read_image(path, max_pixels=1000)


def test_a_heic_larger_than_its_header_says_is_refused() -> None:
    """A header that says 8 x 8 of a picture of 64 x 48; libheif decodes nothing far larger than that."""
    pytest.importorskip("pi_heif", reason="HEIC is read by the extra [heif]")
    content = (HEIC / "upright.heic").read_bytes()
    place = content.index(b"ispe") + 8
    small = content[:place] + struct.pack(">II", 8, 8) + content[place + 8 :]
    with pytest.raises(ImageError, match="size"):
        read_image(small)


@pytest.mark.parametrize("cut", [12, 40, 400, 2000, -1])
def test_a_damaged_heic_has_a_reason(cut: int) -> None:
    with pytest.raises(ImageError):
        read_image((HEIC / "upright.heic").read_bytes()[:cut])


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    images._heif.cache_clear()
    with pytest.raises(ImageError, match=r"unsupported.*stage1_pro\[heif\]"):
        read_image(HEIC / "upright.heic")
    images._heif.cache_clear()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels_of(data)[3, 3].tolist() == [255, 0, 0], kind


def test_sources_are_paths_bytes_and_files(tmp_path: Path) -> None:
    data = encode(picture(1))
    (tmp_path / "a.png").write_bytes(data)
    with (tmp_path / "a.png").open("rb") as file:
        images = [
            read_image(tmp_path / "a.png"),
            read_image(str(tmp_path / "a.png")),
            read_image(data),
            read_image(file),
        ]
        assert not file.closed
    assert len({image.tobytes() for image in images}) == 1


def reason(source: object, **options: float) -> str:
    with pytest.raises(ImageError) as error:
        read_image(source, **options)  # type: ignore[arg-type]
    assert isinstance(error.value, InputError)
    assert error.value.reason in str(error.value)
    return error.value.reason


def test_every_broken_file_has_a_reason(tmp_path: Path) -> None:
    assert reason(tmp_path / "missing.jpg") == "unreadable"
    assert reason(tmp_path) == "unreadable"
    assert reason("a\0b") == "unreadable"
    os.mkfifo(tmp_path / "pipe")
    assert reason(tmp_path / "pipe") == "unreadable"
    assert reason(b"") == "empty"
    assert reason(b"just a text, and not a short one either") == "not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n") == "not an image"
    assert reason(encode(picture(2), "JPEG")[:500]) == "truncated"
    assert reason(encode(picture(2))[:900]) == "truncated"
    assert reason(encode(picture(2), "BMP")[:2000]) == "truncated"
    assert reason(encode(picture(2)), max_pixels=1000) == "oversized"
    assert reason(encode(Image.new("F", (4, 4), 0.5), "TIFF")) == "unsupported"
    assert reason(encode(Image.new("L", (1, 3000)))) == "unsupported"
    broken = bytearray(encode(picture(2)))
    broken[60:70] = b"\xff" * 10
    assert reason(bytes(broken)) in ("damaged", "truncated")


def test_huge_pictures_are_refused_by_their_header() -> None:
    import struct
    import zlib

    def png(width: int, height: int) -> bytes:
        body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for side in (8_100, 10_000, 30_000, 2**31 - 1):  # above ours, Pillow's warning, Pillow's error, and absurd
            assert reason(png(side, side)) == "oversized"
    assert not caught


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    cut=st.integers(0, 1500),
    edits=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=12),
)
def test_damage_gives_a_picture_or_an_image_error(kind: str, cut: int, edits: list[tuple[int, int]]) -> None:
    data = bytearray(encode(picture(3, (24, 20)), kind))
    for place, value in edits:
        data[place % len(data)] = value
    data = data[: len(data) - cut % len(data)] if cut % 2 else data
    try:
        image = read_image(bytes(data))
    except ImageError:
        pass
    else:
        assert image.mode == "RGB"


def test_reading_in_threads_leaves_the_process_as_it_was() -> None:
    filters, flag, limit = list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    good, bad = encode(picture(4)), encode(picture(4), "JPEG")[:300]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(60):
            if read_image(good).size != (40, 30):
                wrong.append("size")
            try:
                read_image(bad)
                wrong.append("truncated file was read")
            except ImageError:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(warnings.filters) == filters
    assert (flag, limit) == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    assert not flag


def test_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    (tmp_path / "b.png").write_bytes(b"text")
    pictures, found = read_pictures(Folder(str(tmp_path)), ["a.png", "b.png", "c.png"])
    assert list(pictures) == ["a.png"]
    assert [(row.file, row.reason.split(":")[0]) for row in found] == [
        ("b.png", "not an image"),
        ("c.png", "unreadable"),
    ]


# --------------------------------------------------------------------------------------------
# Preprocessing


def photos(folder: Path, count: int) -> list[Path]:
    return sorted((folder / "images").iterdir())[:: max(1, len(list((folder / "images").iterdir())) // count)][:count]


def test_stretch_is_dinov3s_processor(shared) -> None:
    torch = pytest.importorskip("torch")
    spec = PreprocessSpec(height=48, width=64)
    for path in [*photos(shared("data/roadwork_signs"), 12), *photos(shared("data/roadwork_mini"), 6)]:
        image = read_image(path)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        expected = torch.nn.functional.interpolate(pixels, (48, 64), mode="bilinear", antialias=True)[0].numpy()
        got = preprocess(image, spec)
        assert got.dtype == np.float32
        unscaled = got * np.asarray(spec.std)[:, None, None] + np.asarray(spec.mean)[:, None, None]
        np.testing.assert_allclose(unscaled, expected, atol=1.5e-6)


@pytest.mark.parametrize("size", [(384, 216), (216, 384), (50, 47), (33, 33), (20, 90), (225, 224)])
def test_crop_is_dinov2s_processor_to_its_rounding(size: tuple[int, int]) -> None:
    # Its Pillow processor resizes in 8 bits, rounding after each direction: up to about one level apart.
    pytest.importorskip("transformers")
    from transformers import BitImageProcessorPil

    spec = PreprocessSpec(height=56, width=56, resize="crop", resample="bicubic")
    processor = BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, image_mean=spec.mean, image_std=spec.std
    )
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), picture(7, size)):
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        levels = np.abs(preprocess(image, spec) - expected) * np.asarray(spec.std)[:, None, None] * 255
        assert levels.max() < 1.2  # a crop that is one pixel off gives tens on noise
        assert levels.mean() < 0.4


@settings(max_examples=60, deadline=None)
@given(
    w=st.integers(1, 300), h=st.integers(1, 300), height=st.integers(8, 70), width=st.integers(8, 70),
    resize=st.sampled_from(["stretch", "crop"]), resample=st.sampled_from(["bilinear", "bicubic"]),
)  # fmt: skip
def test_any_shape_gives_the_specified_one(w: int, h: int, height: int, width: int, resize: str, resample: str) -> None:
    spec = PreprocessSpec(height=height, width=width, resize=resize, resample=resample, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    new = crop_geometry((w, h), spec)
    assert new[0] >= width
    assert new[1] >= height
    got = preprocess(Image.new("RGB", (w, h), (0, 128, 255)), spec)
    assert got.shape == (3, height, width)
    np.testing.assert_allclose(got[:, 0, 0], [0, 128 / 255, 1], atol=1e-5)
    np.testing.assert_allclose(got.std(axis=(1, 2)), 0, atol=1e-5)


def test_a_strip_is_cropped_without_blowing_it_up() -> None:
    spec = PreprocessSpec(height=32, width=32, resize="crop", resample="bicubic")
    image = picture(5, (2, 1500))
    whole = preprocess(image.crop((0, 700, 2, 800)), spec)
    np.testing.assert_allclose(preprocess(image, spec), whole, atol=0.3)


# --------------------------------------------------------------------------------------------
# Splits

COLUMNS = ("file", "label", "label_name", "group", "source")


def write_rows(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """90 pictures in 45 groups of 1 to 3, a third of them positive."""
    root = tmp_path_factory.mktemp("pool")
    rows: list[dict[str, object]] = []
    group = 0
    while len(rows) < 90:
        for _ in range(1 + group % 3):
            name = f"p{len(rows):03d}.png"
            (root / name).write_bytes(encode(picture(len(rows))))
            label = int(group % 3 == 0)
            rows.append(
                {
                    "file": name,
                    "label": label,
                    "label_name": ("none", "work")[label],
                    "group": f"g{group:02d}",
                    "source": "x",
                }
            )
        group += 1
    return root, rows


def table(pool: tuple[Path, list[dict[str, object]]], tmp_path: Path, **changes: object) -> Path:
    """The pool's CSV in a folder of its own, with cells replaced: ``row3_label="x"``."""
    root, rows = pool
    rows = [dict(row) for row in rows]
    for key, value in changes.items():
        number, column = key.removeprefix("row").split("_", 1)
        rows[int(number)][column] = value
    for row in rows:
        if not (tmp_path / str(row["file"])).exists() and (root / str(row["file"])).exists():
            shutil.copy(root / str(row["file"]), tmp_path / str(row["file"]))
    return write_rows(tmp_path / "labels.csv", rows)


def check(splits: Splits) -> None:
    """What holds for all splits."""
    rows = splits.rows
    assert [row.file for row in rows] == sorted(row.file for row in rows)
    assert len({row.id for row in rows}) == len(rows)
    where: dict[str, set[str]] = defaultdict(set)
    halves: dict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        where[row.group].add(row.split)
        where[row.sha256].add(row.split)
        halves[row.group].add(row.half)
        assert (row.half is not None) == (row.split == "val_calib")
    assert all(len(found) == 1 for found in (*where.values(), *halves.values()))
    by_group: dict[str, list[str]] = defaultdict(list)
    for row in splits.of("val_calib"):
        by_group[row.group].append(row.label)
    assert splits.summary().group_shares == pytest.approx(
        {name: np.mean([given.count(name) / len(given) for given in by_group.values()]) for name in splits.classes}
    )
    for split in SPLITS:
        assert splits.counts[split] == {c: sum(r.label == c for r in splits.of(split)) for c in splits.classes}
        assert all(splits.counts[split].values())
        assert splits.groups[split] == len({row.group for row in splits.of(split)})
    assert set(splits.hashes) == {*SPLITS, *HALVES}
    assert len(set(splits.hashes.values())) == 6


def test_split_is_stratified_by_rows_and_groups(pool, tmp_path: Path) -> None:
    splits = stage1_pro.split(table(pool, tmp_path), tmp_path / "run")
    check(splits)
    assert splits == Splits.read(tmp_path / "run" / "splits.json")
    assert (splits.classes, splits.positive) == (["none", "work"], "work")
    assert (tmp_path / "run" / "quarantine.csv").read_text() == "file,reason\n"
    totals = {name: sum(splits.counts[s][name] for s in SPLITS) for name in splits.classes}
    for split, share in splits.fractions.items():
        for name in splits.classes:
            assert abs(splits.counts[split][name] / totals[name] - share) < 0.07
        assert abs(splits.groups[split] / 45 - share) < 0.05
    for half in ("fit", "certify"):
        assert {row.label for row in splits.of("val_calib", half)} == {"none", "work"}  # type: ignore[arg-type]


def test_split_depends_on_rows_and_seed_alone(pool, tmp_path: Path) -> None:
    root, rows = pool
    first, _ = make_splits(table(pool, tmp_path))
    shuffled = list(np.random.default_rng(0).permutation(np.asarray(rows, dtype=object)))
    again, _ = make_splits(write_rows(tmp_path / "other.csv", shuffled))
    assert again == first
    elsewhere, _ = make_splits(write_rows(tmp_path / "third.csv", rows), images=root)
    assert elsewhere.hashes == first.hashes
    assert elsewhere.root == str(root)
    tests = {
        tuple(r.file for r in make_splits(tmp_path / "labels.csv", seed=seed)[0].of("val_test")) for seed in range(5)
    }
    assert len(tests) == 5


def test_hashes_are_of_contents_labels_and_groups(pool, tmp_path: Path) -> None:
    import hashlib

    splits, _ = make_splits(table(pool, tmp_path))
    for name, rows in [(s, splits.of(s)) for s in SPLITS] + [("val_calib.fit", splits.of("val_calib", "fit"))]:
        lines = sorted(
            f"{hashlib.sha256((tmp_path / row.file).read_bytes()).hexdigest()} {row.label} {row.group}" for row in rows
        )
        assert splits.hashes[name] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert splits.rows[0].id == hashlib.sha256(b"p000.png").hexdigest()[:16]


def test_folds_hold_every_group_once(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    seen: Counter[str] = Counter()
    for fold in range(5):
        splits, _ = make_splits(labels, folds=5, fold=fold, seed=3)
        check(splits)
        assert (splits.folds, splits.fold) == (5, fold)
        assert sum(splits.fractions.values()) == pytest.approx(1)
        seen.update({row.group for row in splits.of("val_test")})
        assert 0.12 < len(splits.of("val_test")) / 90 < 0.28
    assert set(seen.values()) == {1}
    assert len(seen) == 45
    with pytest.raises(InputError, match="--fold must be 0 to 4, got 5"):
        make_splits(labels, folds=5, fold=5)
    with pytest.raises(InputError, match="--fold must come with --folds"):
        make_splits(labels, fold=1)
    with pytest.raises(InputError, match=r"class 'work' must be in at least 20 groups.*each of 20 folds"):
        make_splits(labels, folds=20, fold=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any), min_size=1, max_size=40), st.integers(0, 5)
)
def test_assign_gives_every_part_every_class_when_it_can(units: list[tuple[int, int]], seed: int) -> None:
    counts = {f"u{i:02d}": np.asarray(unit) for i, unit in enumerate(units)}
    shares = {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}
    placed = assign(counts, shares, f"{seed}")
    assert placed == assign(dict(reversed(counts.items())), shares, f"{seed}")
    assert set(placed) == set(counts)
    pure = [sum(bool(u[k]) and not u[1 - k] for u in units) for k in (0, 1)]
    if min(pure) >= 4:  # enough groups of one class alone: nothing stands in the way
        for part in shares:
            total = sum((counts[name] for name, to in placed.items() if to == part), np.zeros(2))
            assert total.all()


def test_large_balanced_data_meets_the_fractions_closely() -> None:
    rng = np.random.default_rng(0)
    counts = {f"g{i}": rng.integers(0, 6, 3) for i in range(800)}
    shares = {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}
    placed = assign(counts, shares, "0")
    total = sum(counts.values())
    for part, share in shares.items():
        got = sum(counts[name] for name, to in placed.items() if to == part)
        np.testing.assert_allclose(got / total, share, atol=0.005)


# ------------------------------------------------------------------ labels


def test_folder_of_class_folders(pool, tmp_path: Path) -> None:
    root, rows = pool
    for row in rows:
        folder = tmp_path / "photos" / str(row["label_name"]) / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / str(row["file"]), folder / str(row["file"]))
    (tmp_path / "photos" / "work" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "photos" / "work" / "notes.txt").write_text("not a picture")
    (tmp_path / "photos" / "work" / "broken.png").write_text("not a picture")
    splits, quarantined = make_splits(tmp_path / "photos")
    check(splits)
    assert (splits.classes, splits.positive, len(splits.rows)) == (["none", "work"], "work", 90)
    assert [(q.file, q.reason.split(":")[0]) for q in quarantined] == [("work/broken.png", "not an image")]
    assert all(row.group == row.file and row.file.startswith(f"{row.label}/deep/") for row in splits.rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_any_program(pool, tmp_path: Path, encoding: str, delimiter: str) -> None:
    labels = table(pool, tmp_path)
    expected, _ = make_splits(labels)
    text = labels.read_text().replace(",", delimiter).replace("\n", "\r\n")
    (tmp_path / "other.csv").write_text(text, encoding=encoding, newline="")
    assert make_splits(tmp_path / "other.csv")[0] == expected


def test_label_alone_names_the_class(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    splits, _ = make_splits(write_rows(tmp_path / "plain.csv", rows, ("file", "label")))
    assert (splits.classes, splits.positive) == (["0", "1"], "1")
    assert all(row.group == row.file for row in splits.rows)
    for k, row in enumerate(rows):
        row["label"] = ("10", "9", "2")[k % 3]
    many, _ = make_splits(write_rows(tmp_path / "many.csv", rows, ("file", "label")), positive="2")
    assert many.classes == ["2", "9", "10"]  # by number, not by text
    assert make_splits(tmp_path / "many.csv")[0].positive is None


def test_positive_by_name_or_label(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    assert make_splits(labels, positive="none")[0].positive == "none"
    assert make_splits(labels, positive="1")[0].positive == "work"
    with pytest.raises(InputError, match=r"--positive must .*got 'wrk'; did you mean 'work'\?"):
        make_splits(labels, positive="wrk")
    swapped, _ = make_splits(labels, classes=["work", "none"])
    assert (swapped.classes, swapped.positive) == (["work", "none"], "work")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row5_label_name": "wrok", "row5_label": 2}, r"unknown label 'wrok' in labels.csv line 7; did you mean"),
        ({"row5_label": ""}, r"label must not be empty, got an empty label in labels.csv line 7"),
        ({"row5_file": ""}, r"file must not be empty, got an empty file in labels.csv line 7"),
        ({"row5_file": "p000.png"}, r"listed once, got p000.png in labels.csv line 2 and labels.csv line 7"),
        ({"row5_file": "./p000.png"}, r"every file must be listed once"),
        ({"row5_file": "../../etc/passwd"}, r"file must be inside .*, got '../../etc/passwd' in labels.csv line 7"),
        ({"row5_file": "/etc/passwd"}, r"file must be inside"),
        ({"row5_label_name": ""}, r"in every row or in none, got an empty one in labels.csv line 7"),
        ({"row5_label": 3}, r"must be one to one, got 0 = 'none' in .* and 3 = 'none' in labels.csv line 7"),
    ],
)  # fmt: skip
def test_wrong_cells(pool, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_splits(table(pool, tmp_path, **changes), classes=["none", "work"])


def test_wrong_tables(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    rows = list(csv.DictReader(labels.read_text().splitlines()))

    def fails(text: str | bytes, message: str) -> None:
        (tmp_path / "bad.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(InputError, match=message):
            make_splits(tmp_path / "bad.csv")

    fails("file,lable\na,1\n", r"must have a column 'label', got file, lable; did you mean 'lable'\?")
    fails("path,label\na,1\n", r"must have a column 'file', got path, label")
    fails("", r"must have a column 'file', got an empty file")
    fails("file,label\n", r"must have at least one row under its header, got none")
    fails("file,label\na.png,1,2\n", r"must have 2 cells in every row.*got 3 in line 2")
    fails(b"file,label\na.png,stra\xdfe\n", r"must be UTF-8 text, got other bytes in line 2; save it as CSV UTF-8")
    fails(codecs.BOM_UTF8 + b"file,label\np000.png,1\np001.png,1\n", r"two classes or more, got one class only: '1'")
    with pytest.raises(InputError, match="which does not exist"):
        make_splits(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="--images must be a folder"):
        make_splits(labels, images=tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="one sub-folder of images per class"):
        make_splits(tmp_path / "void")
    with pytest.raises(InputError, match="every class must .*got none of 'third'"):
        make_splits(labels, classes=["none", "work", "third"], positive="work")
    few = [row for row in rows if row["label"] == "0"] + [row for row in rows if row["group"] in ("g03", "g06", "g09")]
    with pytest.raises(InputError, match="class 'work' must .*4.*got 3"):
        make_splits(write_rows(tmp_path / "few.csv", few))


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.7, "val_select": 0.0, "val_calib": 0.15, "val_test": 0.15}, "no split may be empty"),
        ({"train": 0.7, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}, "sum to 1"),
        ({"train": 0.7, "val_selekt": 0.3}, r"got 'val_selekt'; did you mean 'val_select'\?"),
    ],
)
def test_wrong_fractions(pool, tmp_path: Path, fractions: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_splits(table(pool, tmp_path), fractions=fractions)


# ------------------------------------------------------------------ quarantine and run folder


def test_broken_files_are_listed_and_skipped(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    (tmp_path / "p004.png").write_bytes(b"text")
    splits = stage1_pro.split(labels, tmp_path / "run")
    check(splits)
    assert splits.quarantined == 1
    assert len(splits.rows) == 89
    listed = list(csv.DictReader((tmp_path / "run" / "quarantine.csv").read_text().splitlines()))
    assert [row["file"] for row in listed] == ["p004.png"]
    assert listed[0]["reason"].startswith("not an image")
    (tmp_path / "p005.png").unlink()
    with pytest.raises(
        InputError,
        match=r"all but 2.0% of the rows, got 2 of 90.*p004.png: not an image.*--max-quarantine.*quarantine.csv",
    ):
        stage1_pro.split(labels, tmp_path / "other")
    assert "p005.png" in (tmp_path / "other" / "quarantine.csv").read_text()
    assert not (tmp_path / "other" / "splits.json").exists()
    # Beside splits, of a run that may be trained, a refusal changes nothing.
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match=r"got 2 of 90.*--out has no splits yet"):
        stage1_pro.split(labels, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert stage1_pro.split(labels, tmp_path / "other", max_quarantine=0.03).quarantined == 2
    for name, wrong in itertools.product(("max_quarantine", "max_component"), (float("nan"), 2.0, -1.0, True, "0.1")):
        with pytest.raises(InputError, match=f"^{name} must be "):
            make_splits(labels, **{name: wrong})


@pytest.mark.parametrize(("least", "most"), [(False, False), (False, True), (True, False), (True, True)])
def test_shares_have_the_ends_that_are_asked_for(least: bool, most: bool) -> None:
    for value, held in ((0.0, least), (1.0, most), (0.5, True), (float("nan"), False), (-0.1, False), (1.1, False)):
        if held:
            assert check_share("x", value, least=least, most=most) == value
        else:
            with pytest.raises(InputError, match=r"^x must be in"):
                check_share("x", value, least=least, most=most)


def test_splits_of_a_trained_run_stay(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    first = stage1_pro.split(labels, tmp_path / "run")
    stage1_pro.split(labels, tmp_path / "run", seed=1)
    (tmp_path / "run" / "last.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"not been trained, got .* with last.pth.*--overwrite"):
        stage1_pro.split(labels, tmp_path / "run")
    assert stage1_pro.split(labels, tmp_path / "run", overwrite=True) == first


# ------------------------------------------------------------------ near-duplicates


def test_copies_across_groups_stay_together(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    rows = [row for row in rows if row["file"] not in ("p020.png", "p040.png")]
    shutil.copy(tmp_path / "p000.png", tmp_path / "same.png")
    picture(50).resize((60, 45)).save(tmp_path / "close.jpg", quality=70)
    none = {"label": "0", "label_name": "none", "source": ""}
    of = {row["file"]: row for row in rows}
    rows.append(
        {"file": "same.png", "group": "zz1", **{k: of["p000.png"][k] for k in ("label", "label_name", "source")}}
    )
    rows.append({"file": "close.jpg", "group": "aa1", **none})
    for seed in range(4):
        splits, _ = make_splits(write_rows(tmp_path / "more.csv", rows), seed=seed, max_component=0.1)
        check(splits)
        unit = {row.file: row.group for row in splits.rows}
        assert unit["same.png"] == unit["p000.png"] == of["p000.png"]["group"]  # the first name of both
        assert unit["close.jpg"] == unit["p050.png"] == "aa1"
        assert (splits.merging.pairs, splits.merging.components) == (2, 2)
        assert splits.merging.largest_groups == sorted(splits.merging.largest_groups)


def test_one_content_with_two_labels_is_an_error(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    target = next(row["file"] for row in rows if row["label"] != rows[0]["label"])
    shutil.copy(tmp_path / rows[0]["file"], tmp_path / target)
    with pytest.raises(
        InputError, match=rf"one image must have one label.*p000.png \('work'\) and {target} \('none'\)"
    ):
        make_splits(labels)


def test_too_large_a_component_is_an_error(pool, tmp_path: Path) -> None:
    labels = table(pool, tmp_path)
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    for k in range(6):
        ImageEnhance.Brightness(picture(1)).enhance(1 - 0.01 * k).save(tmp_path / f"c{k}.png")
        rows.append({"file": f"c{k}.png", "label": "0", "label_name": "none", "group": f"c{k}", "source": ""})
    with pytest.raises(
        InputError, match=r"at most 5.0% of the rows.*got \d+ of 96 rows in 7 groups.*--max-component 0\.\d+"
    ):
        make_splits(write_rows(tmp_path / "more.csv", rows))
    splits, _ = make_splits(tmp_path / "more.csv", max_component=0.2)
    check(splits)
    assert len(splits.merging.largest_groups) == 7


def test_near_duplicates_are_found_by_brute_force_too() -> None:
    rng = np.random.default_rng(0)
    small = np.stack([np.asarray(picture(k, (32, 32))) for k in range(300)])
    copies = np.clip(small[::3].astype(int) + rng.integers(-6, 7, small[::3].shape), 0, 255).astype(np.uint8)
    both = np.concatenate([small, copies])
    grey = (both @ [0.299, 0.587, 0.114]).reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(len(both), -1)
    correlation = np.corrcoef(grey)
    expected = {(i, j) for i in range(400) for j in range(i + 1, 400) if correlation[i, j] >= WHOLE}
    assert len(expected) == 100
    assert set(near_duplicates(both, np.arange(400))) == expected
    assert near_duplicates(both, np.zeros(400, dtype=np.int64)) == []
    blank = np.stack([np.full((32, 32, 3), v, dtype=np.uint8) for v in (0, 0, 90, 91)])
    assert near_duplicates(blank, np.arange(4)) == [(0, 1), (2, 3)]
    assert near_duplicates(both[:1], np.zeros(1, dtype=np.int64)) == []


def test_pictures_that_differ_in_colour_alone_are_two() -> None:
    """A red and a blue sign of one shape and one grey: whatever looks at grey alone takes them for copies."""
    rng = np.random.default_rng(0)
    shape = np.kron(rng.integers(0, 2, (8, 8)), np.ones((4, 4)))[..., None]
    red, blue = np.array([150.0, 60, 60]), np.array([75.0, 85, 131])
    weights = np.array([0.299, 0.587, 0.114])
    blue *= (red @ weights) / (blue @ weights)
    signs = [np.clip(200 * shape + (1 - shape) * colour, 0, 255).round().astype(np.uint8) for colour in (red, blue)]
    whole = [(one @ weights).reshape(8, 4, 8, 4).mean((1, 3)).ravel() for one in signs]
    assert np.corrcoef(*whole)[0, 1] > WHOLE
    again = np.clip(signs[0].astype(int) + rng.integers(-3, 4, signs[0].shape), 0, 255).astype(np.uint8)
    assert near_duplicates(np.stack([*signs, again]), np.arange(3)) == [(0, 2)]


def thumb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))


def test_reencoded_photos_are_found(shared) -> None:
    originals = [read_image(path) for path in photos(shared("data/roadwork_scenes"), 60)]
    copies = []
    for image in originals:
        w, h = image.size
        for change in (
            image,
            image.resize((w // 2, h // 2), Image.Resampling.BICUBIC),
            image.resize((w * 2, h * 2), Image.Resampling.BICUBIC),
            ImageEnhance.Brightness(image).enhance(0.9),
            ImageEnhance.Brightness(image).enhance(1.1),
        ):
            copies += [read_image(encode(change, "JPEG", quality=quality)) for quality in (50, 95)]
    n = len(originals)
    small = np.stack([thumb(image) for image in originals + copies])
    found = set(near_duplicates(small, np.arange(len(small))))
    hits = [(k // 10, n + k) in found for k in range(len(copies))]
    assert np.mean(hits) > 0.99
    assert not any(i < n and j < n for i, j in found)


def test_reencoded_small_crops_are_found(shared) -> None:
    originals = [
        image for path in photos(shared("data/roadwork_signs"), 300) if min((image := read_image(path)).size) >= 32
    ]
    for change, least in ((1, 0.95), (2, 0.95), (0.75, 0.92), (0.5, 0.75)):
        copies = [
            im.resize((int(im.width * change), int(im.height * change)), Image.Resampling.BICUBIC) for im in originals
        ]
        small = np.stack([thumb(image) for image in originals])
        again = np.stack([thumb(read_image(encode(image, "JPEG", quality=80))) for image in copies])
        n = len(originals)
        found = set(near_duplicates(np.concatenate([small, again]), np.arange(2 * n)))
        assert np.mean([(k, n + k) in found for k in range(n)]) > least, change


def test_different_signs_are_not_merged(shared, tmp_path: Path) -> None:
    """A perceptual hash alone would merge half of all signs; distinct tracks must stay apart."""
    splits, quarantined = make_splits(shared("data/roadwork_signs") / "labels.csv")
    check(splits)
    assert not quarantined
    assert splits.merging.pairs == 0
    assert splits.positive == "roadwork"
    for split, share in splits.fractions.items():
        assert abs(len(splits.of(split)) / 6296 - share) < 0.01
        assert abs(splits.counts[split]["roadwork"] / 1500 - share) < 0.04


def test_copies_in_scenes_are_merged(shared) -> None:
    splits, _ = make_splits(shared("data/roadwork_scenes") / "labels.csv", seed=1)
    check(splits)
    assert (splits.merging.pairs, splits.merging.components) == (7, 2)
    assert splits.merging.largest_groups == ["ud_udacity_p4", "ud_udacity_p5"]


# --------------------------------------------------------------------------------------------
# Loader

torch = pytest.importorskip("torch")
from stage1_pro.data import loader
from stage1_pro.data.loader import TrainLoader, augmented, epoch_order, iterate

SPEC = PreprocessSpec(height=24, width=32)


@pytest.fixture(scope="module")
def files(pool) -> list[Path]:
    root, rows = pool
    return [root / str(row["file"]) for row in rows]


def load(files: list[Path], epochs: list[tuple[int, int]], **options: object) -> list:
    arguments = {"seed": 5, "batch_size": 16, **options}
    loader = TrainLoader(files, np.arange(len(files)) % 2, SPEC, AugmentConfig(), **arguments)  # type: ignore[arg-type]
    try:
        return [batch for epoch, start in epochs for batch in loader.epoch(epoch, start)]
    finally:
        loader.close()


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        for a, b in zip(first, second, strict=True)
    )


def test_batches_do_not_depend_on_workers(files: list[Path]) -> None:
    epochs = [(0, 0), (1, 0), (0, 0)]
    alone = load(files, epochs, workers=0)
    assert same(alone, load(files, epochs, workers=1))
    assert same(alone, load(files, epochs, workers=3))
    assert same(alone[:5], alone[10:])
    assert not torch.equal(alone[0].pixels, alone[5].pixels)
    assert alone[0].pixels.dtype == torch.float32
    assert alone[0].pixels.shape == (16, 3, 24, 32)
    assert alone[0].files == [str(files[i]) for i in alone[0].index]
    torch.testing.assert_close(alone[0].labels, alone[0].index % 2)


def test_an_epoch_is_a_permutation_and_drops_its_remainder(files: list[Path]) -> None:
    seen = torch.cat([batch.index for batch in load(files, [(2, 0)])])
    assert len(seen) == 80
    assert len(set(seen.tolist())) == 80
    np.testing.assert_array_equal(seen, epoch_order(90, 5, 2)[:80])
    assert [len(batch.labels) for batch in load(files, [(0, 0)], batch_size=500)] == [90]
    assert not np.array_equal(epoch_order(90, 5, 2), epoch_order(90, 6, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_inside_an_epoch(files: list[Path], workers: int) -> None:
    assert same(load(files, [(1, 3)], workers=workers), load(files, [(1, 0)])[3:])


def test_skipped_batches_are_not_decoded(files: list[Path], tmp_path: Path) -> None:
    order = epoch_order(90, 5, 0)
    moved = list(files)
    moved[int(order[0])] = tmp_path / "gone.png"
    assert same(load(moved, [(0, 1)]), load(files, [(0, 1)]))
    for workers in (0, 2):
        with pytest.raises(
            InputError, match=r"gone.png must be a readable image, got: unreadable.*where they lie now by --images"
        ) as error:
            load(moved, [(0, 0)], workers=workers)
        assert "Traceback" not in str(error.value)


def test_processes_share_a_batch(files: list[Path]) -> None:
    whole = load(files, [(0, 0)])
    shares = [load(files, [(0, 0)], rank=rank, world=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch.pixels[0::2], first.pixels)
        assert torch.equal(batch.pixels[1::2], second.pixels)


def test_two_epochs_at_once_keep_their_own_order(files: list[Path]) -> None:
    loader = TrainLoader(files, np.arange(90), SPEC, AugmentConfig(), seed=5, batch_size=16, workers=0)
    alone = [[batch.index.tolist() for batch in loader.epoch(epoch)] for epoch in (0, 1)]
    pixels = [[batch.pixels for batch in loader.epoch(epoch)] for epoch in (0, 1)]
    for step, both in enumerate(zip(loader.epoch(0), loader.epoch(1), strict=True)):
        for epoch, batch in enumerate(both):
            assert batch.index.tolist() == alone[epoch][step] and torch.equal(batch.pixels, pixels[epoch][step])


def test_an_abandoned_epoch_leaves_the_workers_usable(files: list[Path]) -> None:
    loader = TrainLoader(files, [0] * 90, SPEC, AugmentConfig(), seed=5, batch_size=16, workers=2)
    before = torch.random.get_rng_state()
    next(iter(loader.epoch(0)))
    assert same(list(loader.epoch(1)), [b for b in load(files, [(1, 0)]) if b.labels.zero_() is not None])
    loader.close()
    assert len(list(loader.epoch(0))) == 5
    loader.close()
    assert torch.equal(before, torch.random.get_rng_state())  # training's own randomness is left alone


def test_a_row_is_augmented_alike_in_any_company(files: list[Path]) -> None:
    batch = load(files, [(3, 0)])[2]
    for pixels, row in zip(batch.pixels, batch.index.tolist(), strict=True):
        np.testing.assert_array_equal(
            pixels.numpy(), augmented(read_image(files[row]), SPEC, AugmentConfig(), 5, 3, row)
        )


STILL = {
    "crop_scale": (1, 1), "crop_ratio": (1, 1), "horizontal_flip": 0, "rotation_probability": 0, "brightness": 0,
    "contrast": 0, "saturation": 0, "hue": 0, "blur_probability": 0,
}  # fmt: skip


def test_no_change_is_evaluations_input() -> None:
    image = picture(8, (90, 60))
    still = augmented(image, SPEC, AugmentConfig(**STILL), 0, 0, 0)  # type: ignore[arg-type]
    np.testing.assert_allclose(still, preprocess(image, SPEC), atol=1.05 / 255 / 0.224)  # 8 bits
    crop = PreprocessSpec(height=32, width=32, resize="crop")
    flat = augmented(Image.new("RGB", (90, 60), (9, 99, 199)), crop, AugmentConfig(**STILL), 0, 0, 0)  # type: ignore[arg-type]
    np.testing.assert_allclose(flat, preprocess(Image.new("RGB", (90, 60), (9, 99, 199)), crop), atol=1e-5)


def test_each_step_does_what_it_says() -> None:
    image = picture(9, (64, 48))
    spec = PreprocessSpec(height=48, width=64, mean=(0, 0, 0), std=(1, 1, 1))

    def change(**options: object) -> np.ndarray:
        return augmented(image, spec, AugmentConfig(**{**STILL, **options}), 0, 0, 1)  # type: ignore[arg-type]

    plain = change()
    np.testing.assert_array_equal(change(horizontal_flip=1), plain[:, :, ::-1])
    blurred = change(blur_probability=1, blur_sigma=(2, 2))
    assert np.abs(np.diff(blurred)).mean() < 0.9 * np.abs(np.diff(plain)).mean()
    grey = np.asarray([0.299, 0.587, 0.114])
    hue = change(hue=0.5)
    assert np.abs(hue - plain).max() > 0.05
    dark = picture(9, (64, 48)).point(lambda v: 60 + v // 4)  # far from both ends, where nothing is clipped
    moved = augmented(dark, spec, AugmentConfig(**{**STILL, "hue": 0.2, "saturation": 0.3}), 0, 0, 1)  # type: ignore[arg-type]
    before = augmented(dark, spec, AugmentConfig(**STILL), 0, 0, 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.tensordot(grey, moved, 1), np.tensordot(grey, before, 1), atol=2e-3)
    brighter = augmented(dark, spec, AugmentConfig(**{**STILL, "brightness": 0.3}), 0, 0, 1)  # type: ignore[arg-type]
    ratio = brighter / before
    assert ratio.std() < 1e-4
    assert abs(ratio.mean() - 1) > 0.01
    # Contrast is about the mean grey, and one draw of brightness is the same beside it.
    strong = augmented(dark, spec, AugmentConfig(**{**STILL, "contrast": 0.3}), 0, 0, 1)  # type: ignore[arg-type]
    assert np.tensordot(grey, strong, 1).mean() == pytest.approx(np.tensordot(grey, before, 1).mean(), abs=1e-5)
    assert abs(np.std(strong) / np.std(before) - 1) > 0.01
    both = augmented(dark, spec, AugmentConfig(**{**STILL, "contrast": 0.3, "brightness": 0.3}), 0, 0, 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(both, strong * ratio.mean(), atol=1e-4)


def test_rotation_turns_about_the_middle() -> None:
    spec = PreprocessSpec(height=60, width=60, mean=(0, 0, 0), std=(1, 1, 1))
    image = picture(10, (60, 60))
    turned = augmented(image, spec, AugmentConfig(**{**STILL, "rotation": 25, "rotation_probability": 1}), 0, 0, 3)  # type: ignore[arg-type]
    best = min(
        np.abs(np.asarray(image.rotate(angle, Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255 - turned).mean()
        for angle in np.arange(-25, 25.25, 0.25)
    )
    assert best < 0.004
    wide = Image.new("RGB", (400, 100), (200, 200, 200))
    part = AugmentConfig(**{**STILL, "crop_scale": (0.05, 0.05), "rotation": 20, "rotation_probability": 1})  # type: ignore[arg-type]
    inside = np.stack([augmented(wide, spec, part, 0, 0, row) for row in range(40)])
    assert (inside.min(axis=(1, 2, 3)) > 0.78).any()  # a part amid the picture takes its corners from the picture
    assert (inside.max(axis=(1, 2, 3)) < 0.79).all()


def test_a_worker_leaves_alone_what_its_parent_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker that collects a session of its parent waits for ever for threads that no fork copied."""
    files = []
    for k in range(8):
        files.append(tmp_path / f"{k}.png")
        Image.new("RGB", (20, 20), (k, 0, 0)).save(files[-1])
    told = tmp_path / "collected"

    class Session:
        def __init__(self) -> None:
            self.itself = self  # only the collector frees it

        def __del__(self) -> None:
            with told.open("a") as file:
                file.write(f"{os.getpid()}\n")

    def collecting(*arguments: object) -> Image.Image:
        gc.collect()
        return read(*arguments)

    read = loader.read_image
    monkeypatch.setattr(loader, "read_image", collecting)
    gc.collect()
    gc.disable()
    try:
        Session()
        assert sum(len(batch) for batch in iterate(files, SPEC, 4, 2)) == 8
        assert not told.exists(), "no worker collected it"
    finally:
        gc.enable()
    gc.collect()
    assert told.read_text().split() == [str(os.getpid())]


def test_never_upside_down() -> None:
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))
    outputs = [augmented(image, SPEC, AugmentConfig(), 1, 0, row) for row in range(200)]
    assert all(x[:, :8].mean() > x[:, -8:].mean() for x in outputs)
    assert all(np.isfinite(x).all() for x in outputs)


def test_iterate_is_in_order_and_plain(files: list[Path]) -> None:
    expected = np.stack([preprocess(read_image(path), SPEC) for path in files])
    for workers in (0, 2):
        batches = list(iterate(files, SPEC, 32, workers))
        assert [len(batch) for batch in batches] == [32, 32, 26]
        np.testing.assert_array_equal(torch.cat(batches).numpy(), expected)
    assert list(iterate([], SPEC, 8, 2)) == []
    with pytest.raises(InputError, match="nowhere.png must be a readable image"):
        list(iterate([*files, Path("nowhere.png")], SPEC, 32, 2))


# --------------------------------------------------------------------------------------------
# Rendered scenes


def test_rendered_scenes(tmp_path: Path) -> None:
    labels = render_pool(tmp_path / "a", 60, seed=3, size=48)
    again = render_pool(tmp_path / "b", 60, seed=3, size=48)
    other = render_pool(tmp_path / "c", 60, seed=4, size=48)
    assert labels.read_bytes() == again.read_bytes()
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 60
    for row in rows:
        data = (tmp_path / "a" / row["file"]).read_bytes()
        assert data == (tmp_path / "b" / row["file"]).read_bytes()
        assert read_image(data).size == (48, 48)
    assert (tmp_path / "a" / rows[0]["file"]).read_bytes() != (tmp_path / "c" / rows[0]["file"]).read_bytes()
    assert other.exists()
    by_group = defaultdict(set)
    for row in rows:
        by_group[row["group"]].add((row["label"], row["source"]))
    assert all(len(found) == 1 for found in by_group.values())
    assert max(Counter(row["group"] for row in rows).values()) <= 3
    assert {row["source"] for row in rows} == {"day", "dusk", "night"}
    assert 0.35 < np.mean([row["label"] == "1" for row in rows]) < 0.65


def test_rendering_replaces_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="must be new, empty or an earlier pool"):
        render_pool(tmp_path, 4, size=48)
    assert (tmp_path / "mine.txt").read_text() == "keep"
