"""Ask a StreetVision miner N hostile questions and print what came of it: ``hostile_requests.py BUNDLE N SEED``.

A process of its own, so that its memory is nobody else's.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import io
import json
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from stage1_pro.integrations.streetvision import StreetVision

warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rng: np.random.Generator, *shape: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims to be large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def kinds(rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    """Makers of requests by name, the ordinary one among them."""
    photo = noise(rng, 120, 200, 3)
    jpeg = encode(photo, "JPEG", quality=75)
    large = encode(Image.new("RGB", (9000, 8000)), "PNG")  # 72 MP that decode, if one lets them
    palette = photo.convert("P")

    def cut(data: bytes) -> bytes:
        return data[: int(rng.integers(1, len(data)))]

    def flipped() -> bytes:
        data = bytearray(jpeg)
        for place in rng.integers(0, len(data), 20):
            data[place] = int(rng.integers(256))
        return bytes(data)

    def animated() -> bytes:
        frames = [noise(rng, 40, 60, 3) for _ in range(3)]
        return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])

    def opened(data: bytes) -> Any:
        try:
            return Image.open(io.BytesIO(data))
        except (OSError, Image.DecompressionBombError):  # the miner's own code meets these
            return data

    return {
        "ordinary": lambda: jpeg,
        "base64": lambda: base64.b64encode(jpeg).decode(),
        "wrong base64": lambda: base64.b64encode(jpeg).decode()[:-3] + "*é",
        "base64 of nothing": lambda: "",
        "truncated": lambda: cut(jpeg),
        "flipped bytes": flipped,
        "decompression bomb": lambda: bomb(int(rng.integers(20000, 60000)), int(rng.integers(20000, 60000))),
        "opened bomb": lambda: opened(bomb(12000, 12000)),
        "large": lambda: large,
        "opened large": lambda: opened(large),
        "short of its claim": lambda: bomb(1000, 1000),
        "1x1": lambda: encode(noise(rng, 1, 1, 3), "PNG"),
        "strip": lambda: encode(noise(rng, 1, 5000, 3), "PNG"),
        "cmyk": lambda: encode(noise(rng, 60, 80, 4).convert("CMYK"), "JPEG"),
        "animated": animated,
        "palette with transparency": lambda: encode(palette, "PNG", transparency=3),
        "16 bits": lambda: encode(Image.fromarray(rng.integers(0, 65536, (50, 70), dtype=np.uint16)), "PNG"),
        "floats": lambda: encode(Image.fromarray(rng.random((50, 70)).astype(np.float32)), "TIFF"),
        "one bit": lambda: encode(noise(rng, 50, 70).convert("1"), "PNG"),
        "random bytes": lambda: rng.bytes(int(rng.integers(0, 5000))),
        "nothing": lambda: b"",
        "postscript": lambda: opened(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        "opened and truncated": lambda: opened(jpeg[: len(jpeg) // 2]),
        "not even an image": lambda: [None, 3.5, ["a"], {"image": jpeg}][int(rng.integers(4))],
    }


def requests(count: int, seed: int) -> Iterator[tuple[str, Any]]:
    rng = np.random.default_rng(seed)
    makers = kinds(rng)
    names = list(makers)
    for number in range(count):
        name = names[number % len(names)]
        yield name, makers[name]()


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    bundle, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    miner = StreetVision(bundle, threads=1)
    answers: dict[str, list[float]] = {}
    memory = []
    for number, (name, image) in enumerate(requests(count, seed)):
        answers.setdefault(name, []).append(miner.answer(image))
        if (number + 1) % max(1, count // 10) == 0:
            memory.append(resident())
    heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
    print(json.dumps({"answers": answers, "memory": memory, "heavy": heavy}))


if __name__ == "__main__":
    main()
