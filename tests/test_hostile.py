"""What people and strangers hand in: bounded before it is read, by one door a format, and fuzzed by its grammar."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from kit import fuzz
from kit.fuzz_bundles import mutate_bytes
from PIL import Image

import stage1_pro
from stage1_pro.data.images import ImageError, read_image
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.errors import ArtifactError, InputError, Stage1Error
from stage1_pro.files import load_npz, save_npz
from stage1_pro.record import FileEntry, Record, parse_json, parts_of
from stage1_pro.training.calibration import _is_policy

LARGE = (7990, 8000)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


class TestImages:
    def hostile(self, kind: str, photo: Image.Image) -> bytes:
        head = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
        data = (b"IDAT", zlib.compress(bytes(72)))
        jpeg, gif = encode(photo, "JPEG"), encode(photo.convert("P"), "GIF")
        place = 13 + 3 * 256
        if kind == "chunks before":
            return png(head, *[(b"abCd", b"")] * 20_000, data, (b"IEND", b""))
        if kind == "chunks behind":
            return png(head, data, *[(b"abCd", b"")] * 400_000, (b"IEND", b""))
        if kind == "markers":
            return jpeg[:2] + b"\xff\xe5\0\2" * 20_000 + jpeg[2:]
        if kind == "comment":
            return gif[:place] + b"\x21\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0" + gif[place:]
        if kind == "comments":
            return gif[:place] + b"\x21\xfe\1a\0" * 20_000 + gif[place:]
        scans = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
        assert kind == "scans"
        return scans[:-2] + scans[scans.rfind(b"\xff\xda") : -2] * 300 + b"\xff\xd9"

    @pytest.mark.parametrize("kind", ["chunks before", "chunks behind", "markers", "comment", "comments", "scans"])
    def test_many_parts_are_refused_soon(self, kind: str, photo: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(self.hostile(kind, photo))
        for source in (path, path.read_bytes()):
            began = time.process_time()
            with pytest.raises(ImageError) as caught:
                read_image(source)
            assert caught.value.reason == "oversized" and time.process_time() - began < 5

    @pytest.mark.parametrize("kind", ["WEBP", "TIFF", "AVIF", "PNG", "JPEG2000"])
    def test_a_file_of_holes_is_not_read(self, kind: str, photo: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(encode(photo, kind))
        with path.open("r+b") as file:
            file.truncate(2**33)
        began = time.process_time()
        with pytest.raises(ImageError, match="bytes, more than"):
            read_image(path)
        assert time.process_time() - began < 1

    def test_limits_leave_ordinary_files_alone(self, photo: Image.Image) -> None:
        """A PNG in pieces of 8 KiB, a JPEG of ten scans and a profile in many segments."""
        large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1500, 2000, 3), dtype=np.uint8))
        whole = encode(large, "PNG", compress_level=0)
        body = b"".join(whole[i + 8 : i + 8 + n] for i, n in chunks_of(whole) if whole[i + 4 : i + 8] == b"IDAT")
        pieces = [(b"IDAT", body[i : i + 8192]) for i in range(0, len(body), 8192)]
        assert read_image(png((b"IHDR", whole[16:29]), *pieces, (b"IEND", b""))).tobytes() == large.tobytes()
        assert read_image(encode(large, "JPEG", progressive=True, icc_profile=bytes(3_000_000))).size == large.size
        # A frame in a container of scans that are all needed.
        assert read_image(encode(photo, "MPO", save_all=True, append_images=[photo.copy()] * 40)).size == photo.size

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
    def test_by_bands_as_whole(self, mode: str) -> None:
        """Pictures higher than a band, with and without an end that is no full one."""
        rng = np.random.default_rng(2)
        for height in (256, 700):
            if mode == "I;16":
                image = Image.fromarray(rng.integers(0, 65536, (height, 9), dtype=np.uint16))
                expected = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
                options: dict[str, object] = {}
            else:
                image = Image.fromarray(rng.integers(0, 256, (height, 9, 4), dtype=np.uint8)).convert(
                    "RGB" if mode == "P" else mode
                )
                image = image.quantize(64) if mode == "P" else image
                options = {"transparency": 3} if mode == "P" else {}
                saved = Image.open(io.BytesIO(encode(image, "PNG", **options))).convert("RGBA")
                white = Image.new("RGBA", saved.size, "white")
                expected = np.asarray(Image.alpha_composite(white, saved).convert("RGB"))
            assert np.array_equal(np.asarray(read_image(encode(image, "PNG", **options))), expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["RGBA", "I;16", "progressive", "WEBP", "turned", "GIF"])
    def test_memory_of_the_largest(self, kind: str, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = {
            "RGBA": lambda: encode(Image.new("RGBA", LARGE), "PNG", compress_level=1),
            "I;16": lambda: encode(Image.fromarray(np.zeros(LARGE, np.uint16)), "PNG", compress_level=1),
            "progressive": lambda: encode(Image.new("RGB", LARGE), "JPEG", progressive=True),
            "WEBP": lambda: encode(Image.new("RGBA", (6190, 6200)), "WEBP", lossless=True, method=0),
            "turned": lambda: encode(Image.new("RGB", LARGE), "JPEG", exif=exif),
            "GIF": lambda: encode(Image.new("P", LARGE), "GIF"),
        }[kind]()
        (tmp_path / "x").write_bytes(data)
        code = (
            "import re\nfrom pathlib import Path\n"
            "from stage1_pro.data.images import PreprocessSpec, preprocess, read_image\n"
            f"preprocess(read_image({str(tmp_path / 'x')!r}), PreprocessSpec(height=32, width=32))\n"
            # Of this program: ru_maxrss begins with that of the process which started it.
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 900

    def test_libraries_say_nothing_on_the_terminal(self, tmp_path: Path) -> None:
        """libtiff writes past Python, and Pillow logs; what is wrong stands in the error alone."""
        import random

        rng = np.random.default_rng(3)
        grey = Image.fromarray(rng.integers(0, 256, (90, 90), dtype=np.uint8))
        for number, compression in enumerate(("group4", "tiff_lzw", "tiff_adobe_deflate", "jpeg")):
            image = grey.convert("1") if compression == "group4" else grey
            for seed in range(12):
                data = encode(image, "TIFF", compression=compression)
                (tmp_path / f"{number}-{seed}").write_bytes(data[:200] + mutate_bytes(random.Random(seed), data[200:]))
        samples = bytearray(encode(grey, "TIFF"))
        place = samples.find(struct.pack("<HHI", 277, 3, 1))  # samples per pixel
        samples[place + 8 : place + 10] = b"\xff\xff"
        (tmp_path / "samples").write_bytes(samples)
        code = (
            "import sys\nfrom pathlib import Path\nfrom stage1_pro.data.images import ImageError, read_image\n"
            "bad = 0\nfor path in sorted(Path(sys.argv[1]).iterdir()):\n    try:\n        read_image(path)\n"
            "    except ImageError:\n        bad += 1\nprint(bad)"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
        assert int(done.stdout) > 10 and done.stderr == ""


def chunks_of(data: bytes) -> list[tuple[int, int]]:
    found, place = [], 8
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        found.append((place, size))
        place += 12 + size
    return found


class TestArrays:
    def header(self, descr: object, shape: tuple[int, ...], body: bytes = b"") -> bytes:
        buffer = io.BytesIO()
        head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
        buffer.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + body)
        return buffer.getvalue()

    @pytest.mark.parametrize(
        ("descr", "shape", "body"),
        [
            ("<f4", (2**40,), b""),
            ("<f4", (10**9, 0), b""),
            ("<U0", (10**9,), b""),
            ("<U1000000000", (1,), b""),
            ("<f4", (-1,), b""),
            ("|O", (1,), bytes(8)),
            ([("a", "<f4")], (1,), bytes(4)),
            ("<f4", (3,), bytes(8)),
        ],
    )
    def test_arrays_that_are_not_what_they_claim(self, tmp_path, descr, shape, body):  # type: ignore[no-untyped-def]
        path = tmp_path / "x.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("probs.npy", self.header(descr, shape, body))
        with pytest.raises(InputError, match="must be a NumPy"):
            load_npz(path)

    def test_packed_arrays_up_to_a_limit(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).random((1000, 3))
        np.savez_compressed(tmp_path / "x.npz", probs=values)
        assert np.array_equal(load_npz(tmp_path / "x.npz")["probs"], values)
        np.savez_compressed(tmp_path / "bomb.npz", probs=np.zeros(2**24))
        began = time.process_time()
        with pytest.raises(InputError, match="unpack to more than 32 times"):
            load_npz(tmp_path / "bomb.npz")
        assert time.process_time() - began < 1

    def test_a_directory_of_millions(self, tmp_path: Path) -> None:
        """Its entries alone would take gigabytes, before anybody could count them."""
        entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
        many = entry * 1_000_000
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(many), 0, 0)
        (tmp_path / "x.npz").write_bytes(many + end)
        began = time.process_time()
        with pytest.raises(InputError, match="a part of more than"):
            load_npz(tmp_path / "x.npz")
        assert time.process_time() - began < 2

    def test_from_bytes(self, tmp_path: Path) -> None:
        save_npz(tmp_path / "x.npz", {"a": np.arange(3), "b": np.array(["x", "yz"])})
        found = load_npz((tmp_path / "x.npz").read_bytes())
        assert found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == ["x", "yz"]

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.npz")
        with pytest.raises(InputError, match="no plain file"):
            load_npz(tmp_path / "x.npz")
        with pytest.raises(ArtifactError, match="plain file"):
            Record.read(tmp_path / "x.npz")


class TestTexts:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"[" * 100_000, "at most 1000 values"),
            (b"[" * 900 + b"]" * 900, "at most 20 deep"),
            (b"[" * 21 + b"]" * 21, "at most 20 deep"),
            (b'{"a":' * 999 + b"1" + b"}" * 999, "at most 20 deep|recursion"),
            (b"[" + b"1," * 2000 + b"1]", "at most 1000 values"),
            (b'{"a":1,"a":2}', "the same key twice"),
            (b"[NaN]", "no JSON"),
            (b"9" * 5000, "4300 digits"),
            (b"\xff", "readable UTF-8"),
            (b"", "must be JSON"),
        ],
    )
    def test_json_that_is_refused(self, data: bytes, words: str) -> None:
        with pytest.raises(InputError, match=words):
            parse_json(data, "x", InputError, values=1000, depth=20)

    def test_json_that_is_read(self) -> None:
        values = {"a": [1, {"b": None}], "c": "x"}
        assert parse_json(json.dumps(values).encode(), "x", InputError, values=10, depth=6) == values
        assert max(level for _, level in parts_of(values)) == 4
        assert {part for part, _ in parts_of(values) if isinstance(part, str)} == {"a", "b", "c", "x"}

    @pytest.mark.parametrize("data", [b"[" * 5000, b"{}", b'"x"', b"\xff", b'{"policy": [[[]]]}'])
    def test_a_file_that_would_be_overwritten_may_hold_anything(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_bytes(data)
        assert _is_policy(tmp_path / "x.json") is False

    @pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred", "\u202egnp", "\u2028", "\x9b1m", "\ud800", "x" * 10_000])
    def test_an_error_is_one_line_of_plain_text(self, text: str) -> None:
        for error in (Stage1Error(text), ImageError(text, "damaged", text)):
            assert str(error).isprintable() and len(str(error)) < 3000

    def test_one_door_a_format(self) -> None:
        """Who parses by himself has no limits: what is read here and not through a door is this package's own."""
        doors = {"record.py", "files.py"}
        own = {
            "continual/loop/executors.py", "continual/loop/rounds.py", "continual/loop/folder.py",  # rows and jobs
            "continual/loop/history.py",  # rows of the audit
            "studies/simulation.py", "studies/comparing.py", "deploy/timing.py", "deploy/onnxruntime.py",  # its output
            "deploy/engine.py", "models/model.py",  # a builder's words; a configuration in memory
        }  # fmt: skip
        package = Path(stage1_pro.__file__).parent
        found = set()
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                if (owner, node.func.attr) in {
                    ("json", "load"), ("json", "loads"), ("yaml", "load"), ("yaml", "safe_load"), ("np", "load"),
                    ("np", "loadtxt"), ("pickle", "load"), ("pickle", "loads"),
                }:  # fmt: skip
                    found.add(path.relative_to(package).as_posix())
        assert found <= doors | own and doors <= found

    def test_names_of_files_stand_for_themselves(self, tmp_path: Path) -> None:
        """``Bundle.read`` reads what is listed, and no further."""
        (tmp_path / "x").write_bytes(b"abc")
        manifest = type("Manifest", (), {"files": {"x": FileEntry(sha256="0" * 64, size=2)}})()
        with pytest.raises(ArtifactError, match="sha256"):
            Bundle.read(type("B", (), {"path": tmp_path, "manifest": manifest})(), "x")  # type: ignore[arg-type]


QUICK = {"yaml": 60, "csv": 60, "npz": 60, "labels": 150, "images": 40}


class TestFuzzers:
    def run(self, repository: Path, kind: str, cases: int, out: Path) -> dict[str, object]:
        command = [sys.executable, "-m", "tests.kit.fuzz", kind, "--cases", str(cases), "--seed", "7", "--workers", "1"]
        done = subprocess.run([*command, "--out", out], capture_output=True, text=True, cwd=repository)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, object] = json.loads(out.read_text())
        return found

    @pytest.mark.parametrize("kind", QUICK)
    def test_each_kind_is_read_or_refused(self, repository: Path, kind: str, tmp_path: Path) -> None:
        """The same at any length: ``python -m tests.kit.fuzz all --cases 10000``."""
        found = self.run(repository, kind, QUICK[kind], tmp_path / "x.json")
        counts = {row["outcome"]: row["count"] for row in found["outcomes"]}  # type: ignore[attr-defined]
        # Both: else all of it would be damaged, or none.
        assert min(counts["loaded"], counts["refused"]) > QUICK[kind] / 40

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", QUICK)
    def test_more_of_each(self, repository: Path, kind: str, tmp_path: Path) -> None:
        self.run(repository, kind, 8 * QUICK[kind], tmp_path / "x.json")

    def test_it_sees_what_must_not_happen(self, tmp_path: Path) -> None:
        """Each evil is done once, by hand; a watch that cries at none of them would be worthless."""
        code = f"""
import sys, time
sys.path.insert(0, {str(Path(fuzz.__file__).parents[1])!r})
from kit import fuzz, fuzz_bundles
from stage1_pro.errors import Stage1Error
class Unescaped(Stage1Error):
    def __str__(self): return "\\x1b[31m"
def refuse(error): raise error
class Door:
    def __init__(self, folder): self.path, self.evils = folder / "x", iter(EVILS)
    def make(self, rng): self.path.touch(); return next(self.evils), ["kind"]
    def read(self, evil): evil()
def spin():
    began = time.process_time()
    while time.process_time() - began < .5: pass
EVILS = [lambda: None, lambda: refuse(Stage1Error("no")), lambda: 1 / 0, lambda: refuse(Unescaped()), spin,
         lambda: bytearray(b"x" * (1200 << 20)), lambda: sys.exit(0)]
fuzz.KINDS["yaml"], fuzz_bundles.SECONDS = Door, .3
fuzz.work("yaml", 0, 0, len(EVILS), 1, {str(tmp_path)!r})
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        outcomes = [json.loads(line[2:])[1] for line in done.stdout.splitlines() if line.startswith("= ")]
        assert outcomes[:5] == ["loaded", "refused", "other exception", "bad message", "slow"], done.stderr
        assert outcomes[5] in ("memory", "slow") and outcomes[6] == "other exception"

    def test_a_worker_that_cannot_begin_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options = type("Options", (), {"n": 4, "workers": 1, "seed": 0, "kind": "yaml"})
        begin = lambda *_: subprocess.Popen([sys.executable, "-c", "1 / 0"], stdout=subprocess.PIPE, text=True)  # noqa: E731
        with pytest.raises(RuntimeError, match="it ended before"):
            fuzz.fuzz_bundles.run(options, begin)
