"""Arrays and images that people hand in, mutated by their grammar: NPZ and every format of images; see ``fuzz.py``."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image

from kit.fuzz_bundles import mutate_bytes
from kit.fuzz_texts import measured

# --------------------------------------------------------------------------------------------
# NPZ


class Npz:
    """Predictions for ``metrics``, logits for ``calibrate --logits``, reference outputs."""

    def __init__(self, folder):
        self.path = folder / "x.npz"
        random_state = np.random.default_rng(0)
        labels = random_state.integers(0, 2, 40)
        logits = random_state.normal(size=(40, 2)).astype(np.float32)
        self.seeds = {
            "probs": {"probs": np.full((40, 2), 0.5), "labels": labels, "groups": np.arange(40) // 4,
            "ids": np.arange(40).astype(str)},
            "metrics": {"logits": logits, "labels": labels, "classes": np.array(["none", "work"]),
            "positive": np.array("work")},
            "error": {"error": labels.astype(float), "confidence": random_state.random(40)},
            "calibrate": {
                "logits": logits, "labels": labels, "gate_logits": logits[:, 0], "logits_b": logits,
                "groups": np.arange(40) // 2,
                "classes": np.array(["none", "work"]), "positive": np.array("work"), "half": np.array(["fit",
                "certify"] * 20),
            },
            "reference": {
                "pixels": np.zeros((3, 3, 4, 6), np.uint8), "stage_a.logits": logits[:3],
                "stage_a.gate_logit": logits[:3, 0],
                "stage_b.logits": logits[:3],
            },
        }  # fmt: skip

    def make(self, rng):
        name = rng.choice(sorted(self.seeds))
        arrays, kinds = dict(self.seeds[name]), [name]
        kinds += [self.change(rng, arrays) for _ in range(rng.choice((0, 1, 1, 2)))]
        buffer = io.BytesIO()
        method = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for key, array in arrays.items():
                archive.writestr(f"{key}.npy", self.item(rng, array, kinds, packed=method != zipfile.ZIP_STORED))
            for _ in range(rng.choice((0,) * 9 + (1,))):
                archive.writestr(
                    rng.choice(("x.npy", "../x.npy", "labels.npy", "labels", "d/", "\x1b.npy")),
                    rng.choice((b"", b"x", bytes(4000))),
                )
            if rng.random() < 0.01:
                for i in range(rng.choice((100, 5000))):
                    archive.writestr(f"{i}.npy", b"")
        data = buffer.getvalue()
        if rng.random() < 0.2:
            kinds.append("bytes")
            data = mutate_bytes(rng, data)
        if rng.random() < 0.1:
            kinds.append("directory")
            end = data.rfind(b"PK\5\6")
            if end >= 0:
                at = end + rng.choice((8, 10, 12, 16, 20))
                data = (
                    data[:at]
                    + struct.pack("<I", rng.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, len(data))))[: len(data) - at]
                    + data[at + 4 :]
                )
        self.path.write_bytes(data)
        return name, kinds

    def change(self, rng, arrays):
        if not arrays:
            return "empty"
        key = rng.choice(sorted(arrays))
        kind = rng.choice(("drop", "rename", "kind", "shape", "values", "copy", "scalar", "zero"))
        array = arrays[key]
        if kind == "drop":
            del arrays[key]
        elif kind == "rename":
            arrays[
                rng.choice(
                    ("label", "probs", "logits", "logit", key.upper(), "error", "group", "half", "\x1b[31m", "x" * 300)
                )
            ] = arrays.pop(key)
        elif kind == "kind":
            wanted = rng.choice(
                (
                    "f2",
                    "f4",
                    "f8",
                    "i1",
                    "u8",
                    "i8",
                    "?",
                    "c8",
                    "U3",
                    "S2",
                    "M8[s]",
                    "m8[s]",
                    ">f8",
                    ">i4",
                    "U300",
                    "V4",
                    "f16",
                )
            )
            with np.errstate(all="ignore"):
                try:
                    arrays[key] = array.astype(wanted)
                except (ValueError, TypeError):
                    arrays[key] = np.zeros(array.shape, wanted)
        elif kind == "shape":
            line = np.atleast_1d(array)
            arrays[key] = rng.choice((line[:0], line[:1], line[::-1], array[None], array.reshape(-1), array[..., None]))
            if rng.random() < 0.2:
                arrays[key] = np.zeros(
                    rng.choice(((40, 0), (0, 40), (40, 1), (40, 100_000), (1, 40), (40, 3, 3), (2,) * 20, (10**6, 2))),
                    np.float32,
                )
        elif kind == "values" and array.size and array.dtype.kind in "fiu":
            changed = array.astype(np.float64).copy().reshape(-1)
            for place in rng.sample(range(changed.size), min(changed.size, 3)):
                changed[place] = rng.choice(
                    (np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, -1, 2, 0.5, 1 + 1e-12, 2**53, -0.0, 7)
                )
            arrays[key] = changed.reshape(array.shape)
        elif kind == "copy":
            arrays[
                rng.choice(
                    (
                        "probs",
                        "logits",
                        "labels",
                        "groups",
                        "ids",
                        "confidence",
                        "gate_logits",
                        "probs_b",
                        "half",
                        "classes",
                    )
                )
            ] = array
        elif kind == "scalar":
            arrays[key] = np.array(rng.choice((0, 1.5, "x", True, np.nan)))
        else:
            rows = rng.choice((1, 40, 10**5))
            first = array if array.ndim == 0 else array[:1]
            wanted = (rows, *array.shape[1:])
            arrays[key] = np.broadcast_to(first, wanted) if first.size else np.zeros(wanted, array.dtype)
        return kind

    def item(self, rng, array, kinds, *, packed):
        item = io.BytesIO()
        if rng.random() < 0.1:
            kinds.append("header")
            shape = rng.choice(
                (
                    (2**40,),
                    (2**20, 2**20),
                    (-1,),
                    (2**62, 4),
                    (10**9, 0),
                    (0, 10**9),
                    (),
                    array.shape,
                    (40,),
                    tuple([1] * 70),
                )
            )
            descr = rng.choice(
                ("<f4", "<f8", "|O", "<U1000000000", "|S0", "<U0", [("a", "<f4")], "|V8", "<M8[s]", "x", "|u1")
            )
            head = repr(
                {
                    "descr": descr,
                    "fortran_order": rng.choice((True, False, 3)),
                    "shape": shape,
                    **({"x": 1} if rng.random() < 0.1 else {}),
                }
            )
            head = rng.choice(
                (
                    head,
                    head[:-5],
                    "[" * 3000,
                    "{" * 90,
                    "9" * 9000,
                    "\0",
                    head + " " * 70_000,
                    "__import__('os').system('true')",
                )
            )
            version = rng.choice((1, 1, 1, 2, 3, 9))
            size = struct.pack("<H" if version == 1 else "<I", min(len(head), 65_535))
            return (
                b"\x93NUMPY"
                + bytes([version, 0])
                + size
                + head.encode("latin-1")
                + bytes(rng.choice((0, 8, 160, 2**20)))
            )
        np.lib.format.write_array(item, np.asarray(array), allow_pickle=True)
        if rng.random() < 0.002:
            kinds.append("bomb")
            np.lib.format.write_array(item := io.BytesIO(), np.zeros(2**25 if packed else 2**20), allow_pickle=False)
        return item.getvalue()

    def read(self, name):
        from stage1_pro.files import load_npz
        from stage1_pro.training.calibration import file_rows

        if name == "calibrate":
            file_rows(
                self.path,
                load_npz(self.path),
                random.Random(self.path.stat().st_size).choice(("softmax", "gate", "scrc")),
                None,
                None,
            )
        elif name == "reference":
            load_npz(self.path.read_bytes())
        else:
            measured(self.path)


# --------------------------------------------------------------------------------------------
# Images


def encode(image, kind, **options):
    buffer = io.BytesIO()
    if "append_images" in options:  # a picture keeps the options of the encoder before
        options["append_images"] = [one.copy() for one in options["append_images"]]
    image.copy().save(buffer, kind, **options)
    return buffer.getvalue()


LARGE = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "PNG deep")


class Images:
    """Every format that is read, with its parts mutated, and files that claim much."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "x.img"
        random_state = np.random.default_rng(0)
        rgb = Image.fromarray(random_state.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        frames = [Image.fromarray(random_state.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(3)]
        rgba, grey = rgb.convert("RGBA"), rgb.convert("L")
        deep = Image.fromarray(random_state.integers(0, 65536, (48, 64), dtype=np.uint16))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "x" * 2000
        several = {"save_all": True, "append_images": frames[1:]}
        made = [
            ("JPEG", rgb, {"exif": exif, "icc_profile": bytes(3000), "comment": b"x" * 500}), ("JPEG", rgb,
            {"progressive": True}), ("JPEG", rgb.convert("CMYK"), {}),
            ("JPEG", grey, {}), ("MPO", frames[0], several), ("PNG", rgb, {"exif": exif}), ("PNG", rgba, {}), ("PNG",
            deep, {}), ("PNG", rgb.convert("P"), {"transparency": 3}),
            ("PNG", grey.convert("1"), {}), ("PNG", frames[0], several), ("WEBP", rgb, {}), ("WEBP", rgba,
            {"lossless": True, "exif": exif}), ("WEBP", frames[0], several),
            ("GIF", rgb.convert("P"), {}), ("GIF", frames[0], several), ("BMP", rgb, {}), ("BMP", rgb.convert("P"),
            {}), ("DIB", rgb, {}), ("PPM", rgb, {}), ("PPM", deep, {}),
            ("TGA", rgba, {"compression": "tga_rle"}), ("JPEG2000", rgb, {}), ("JPEG2000", rgba, {"tile_size": (16,
            16)}), ("AVIF", rgb, {}), ("AVIF", frames[0], several),
            ("ICO", rgba, {"sizes": [(32, 32)]}), ("TIFF", frames[0], several), ("TIFF", deep, {}), ("TIFF",
            Image.fromarray(np.ones((20, 30), np.float32)), {}),
            *(("TIFF", rgb, {"compression": one}) for one in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits",
            "zstd")),
            ("TIFF", grey.convert("1"), {"compression": "group4"}), ("TIFF", rgb.convert("CMYK"), {}), ("TIFF",
            rgb.convert("LAB"), {}),
        ]  # fmt: skip
        self.seeds = [(kind, encode(image, kind, **options)) for kind, image, options in made]
        self.large = {}

    def largest(self, kind):
        """A file of nearly as many pixels as are read, made when it is first asked for."""
        if kind not in self.large:
            wide, alpha = (7990, 8000), (6190, 6200)
            image, options = {
                "PNG": (Image.new("RGBA", wide), {"compress_level": 1}),
                "JPEG": (Image.new("RGB", wide), {"progressive": True}),
                "WEBP": (Image.new("RGBA", alpha), {"lossless": True, "method": 0}),
                "GIF": (Image.new("P", wide), {}),
                "TIFF": (Image.new("RGBA", wide), {"compression": "tiff_lzw"}),
                "PNG deep": (Image.fromarray(np.zeros(wide[::-1], np.uint16)), {"compress_level": 1}),
            }[kind]
            self.large[kind] = encode(image, kind.split()[0], **options)
        return kind, self.large[kind]

    def make(self, rng):
        large = rng.random() < 0.03
        kind, data = self.largest(rng.choice(LARGE)) if large else rng.choice(self.seeds)
        kinds = [kind + (" large" if large else "")]
        change = {"PNG": self.png, "JPEG": self.jpeg, "MPO": self.jpeg, "TIFF": self.tiff, "GIF": self.gif}.get(kind)
        for _ in range(rng.choice((0, 1, 1, 2)) if not large else rng.choice((0, 1))):
            if change is not None and rng.random() < 0.6:
                kinds.append("parts")
                data = change(rng, data)
            elif rng.random() < 0.5:
                kinds.append("numbers")
                at = rng.randrange(min(len(data), 400))
                size = rng.choice((1, 2, 2, 4, 4))
                order = rng.choice(("<", ">"))
                number = rng.choice((0, 1, 2, 255, 256, 32767, 65535, 2**31 - 1, 2**32 - 1, 7000, 20_000))
                data = (
                    data[:at]
                    + struct.pack(f"{order}I", number)[-size if order == ">" else 0 :][:size]
                    + data[at + size :]
                )
            else:
                kinds.append("bytes")
                data = mutate_bytes(rng, data)
        if rng.random() < 0.03:
            kinds.append("two")
            data += rng.choice(self.seeds)[1]
        self.path.write_bytes(data)
        if rng.random() < 0.02:
            kinds.append("holes")
            with self.path.open("r+b") as file:
                file.truncate(rng.choice((2**20, 2**28, 2**31, 2**33)))
        # Whoever opens a file himself has read it by then.
        return rng.choice(("path", "bytes", "opened") if self.path.stat().st_size < 2**28 else ("path",)), kinds

    def png(self, rng, data):
        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        parts, place = [], 8
        while place + 8 <= len(data):
            size = struct.unpack(">I", data[place : place + 4])[0]
            parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
            place += 12 + size
        if not parts:
            return mutate_bytes(rng, data)
        kind = rng.randrange(6)
        at = rng.randrange(len(parts))
        if kind == 0 and len(parts[0][1]) >= 13:
            head = parts[0][1]
            sides = [rng.choice((0, 1, 64, 5000, 8000, 30_000, 2**31 - 1)) for _ in range(2)]
            parts[0] = (
                b"IHDR",
                struct.pack(">II", *sides) + bytes(rng.choice((byte, 0, 16, 255)) for byte in head[8:]),
            )
        elif kind == 1:
            bomb = zlib.compress(bytes(rng.choice((2**20, 2**27))))
            parts.insert(at, rng.choice((
                (b"zTXt", b"x\0\0" + bomb), (b"iTXt", b"x\0\1\0\0\0" + bomb), (b"iCCP", b"x\0\0" + bomb), (b"tEXt",
                b"x\0" + bytes(2**20)), (b"eXIf", bytes(2**20)),
                (b"acTL", struct.pack(">II", 2**31, 0)), (b"fcTL", bytes(26)), (b"tRNS", bytes(300)), (b"PLTE",
                bytes(3)), (b"pHYs", bytes(9)), (b"gAMA", bytes(4)),
                (b"eXIf", b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + struct.pack("<HHII", 0x0112, 7, 60_000,
                8) * 5000),
            )))  # fmt: skip
        elif kind == 2:
            parts[at:at] = [rng.choice(((b"abCd", b""), (b"tEXt", b"x\0y"), (b"IDAT", b""), parts[at]))] * rng.choice(
                (10, 30_000, 300_000)
            )
        elif kind == 3:
            del parts[at]
        elif kind == 4:
            rng.shuffle(parts)
        else:
            parts[at] = (parts[at][0], mutate_bytes(rng, parts[at][1]) if parts[at][1] else b"x")
        return data[:8] + b"".join(chunk(*part) for part in parts)

    def jpeg(self, rng, data):
        scan = data.rfind(b"\xff\xda")
        kind = rng.randrange(5)
        if kind == 0:
            frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
            sides = struct.pack(">HH", *(rng.choice((0, 1, 8000, 65_500)) for _ in range(2)))
            return data[: frame + 5] + sides + data[frame + 9 :] if frame > 0 else mutate_bytes(rng, data)
        if kind == 1:
            return data[:-2] + data[scan:-2] * rng.choice((3, 100, 2000)) + b"\xff\xd9"
        if kind == 2:
            many = rng.choice((10, 5000, 300_000))
            part = rng.choice(
                (
                    b"\xff\xe5\0\x02",
                    b"\xff\xe1\0\x08Exif\0\0",
                    b"\xff\xed\0\x12Photoshop 3.0\0\0\0",
                    b"\xff\xfe\0\x03x",
                    b"\xff\xe2\0\x10ICC_PROFILE\0\1\2",
                )
            )
            return data[:2] + part * many + data[2:]
        if kind == 3:
            tags = rng.choice((10, 4000))
            body = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", tags) + b"".join(
                struct.pack("<HHII", rng.choice((0x0112, i & 65535)), rng.choice((2, 3, 4, 5, 7, 12)), rng.choice((1,
                60_000, 2**31)), rng.choice((8, 2**31)))
                for i in range(tags)
            )  # fmt: skip
            body = body[:65_500]
            return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
        return data[: scan + 12] + mutate_bytes(rng, data[scan + 12 :] or b"x")

    def tiff(self, rng, data):
        if data[:2] != b"II" or len(data) < 8:
            return mutate_bytes(rng, data)
        place = struct.unpack("<I", data[4:8])[0]
        if place + 2 > len(data):
            return mutate_bytes(rng, data)
        count = struct.unpack("<H", data[place : place + 2])[0]
        at = place + 2 + 12 * rng.randrange(max(1, count))
        kind = rng.randrange(4)
        if kind == 0:
            number = struct.pack("<I", rng.choice((0, 1, 5, 8000, 65_535, 2**31 - 1, 2**32 - 1, place)))
            return data[: at + 8] + number + data[at + 12 :]
        if kind == 1:
            return (
                data[: at + 2]
                + struct.pack(
                    "<HI", rng.choice((1, 2, 3, 4, 5, 7, 11, 12, 16, 99)), rng.choice((0, 1, 3, 5000, 10**6, 2**31))
                )
                + data[at + 8 :]
            )
        if kind == 2:
            tags = b"".join(
                struct.pack("<HHII", 5000 + i, 7, min(len(data), 10**6), 8) for i in range(rng.choice((10, 50_000)))
            )
            old = data[place + 2 : place + 2 + 12 * count]
            rows = len(old + tags) // 12 & 65535
            return (
                data[:4]
                + struct.pack("<I", len(data))
                + data[8:]
                + struct.pack("<H", rows)
                + old
                + tags
                + struct.pack("<I", rng.choice((0, place, len(data))))
            )
        return mutate_bytes(rng, data)

    def gif(self, rng, data):
        flags = data[10] if len(data) > 13 else 0
        place = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0)
        kind = rng.randrange(4)
        if kind == 0:
            return data[:6] + struct.pack("<HH", *(rng.choice((0, 1, 8000, 65_535)) for _ in range(2))) + data[10:]
        if kind == 1:
            return (
                data[:place]
                + b"\x21\xfe"
                + (b"\xff" + bytes(255)) * rng.choice((3, 5000, 40_000))
                + b"\0"
                + data[place:]
            )
        if kind == 2:
            return (
                data[:place]
                + rng.choice(
                    (b"\x21\xfe\1a\0", b"\x21\xf9\4\0\0\0\0\0", b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0", b"\0", b"\x21")
                )
                * rng.choice((3, 200_000))
                + data[place:]
            )
        return mutate_bytes(rng, data)

    def read(self, how):
        from stage1_pro.data.images import PreprocessSpec, preprocess, read_image, read_opened

        if how == "opened":
            try:
                image = Image.open(self.path)
            except Exception:  # noqa: BLE001 - whoever opens it himself meets these himself
                return
            with image:
                found = read_opened(image)
        else:
            found = read_image(self.path if how == "path" else self.path.read_bytes())
        pixels = preprocess(found, PreprocessSpec(height=32, width=32))
        assert found.mode == "RGB" and pixels.shape == (3, 32, 32) and np.isfinite(pixels).all()
