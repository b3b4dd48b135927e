"""Where photos lie: a folder, a tar, or a source from outside; each gives a photo's bytes by its key.

A source from outside is a class of one argument, its address, in ``PHOTOS`` or behind an entry point of the group
``stage1_pro.photos``; its name there is the scheme of its addresses: ``s3`` opens ``s3://bucket/signs``.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import posixpath
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from stage1_pro.errors import InputError, printable
from stage1_pro.files import sha256_bytes
from stage1_pro.registry import Registry

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://.+", re.DOTALL)
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})

_OTHER, _LARGEST = "its content is not the one that was split", 2**30
MOVED = "say where they lie now by --images of evaluate, infer, export or train"

# fmt: off
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".mpo", ".heic", ".heif",
})
# fmt: on
# How a picture begins, whatever it is called.
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{12}|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(avi|hei|hev|mif|msf)"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-6]\s",
    re.DOTALL,
)
# Folders in which systems keep small or deleted copies of photos, in lower case.
_SYSTEM_FOLDERS = frozenset({"@eadir", "__macosx", "$recycle.bin", "#recycle", "lost+found", "@__thumb", "thumbnails"})
_UNREADABLE, _NOWHERE = "a folder that cannot be read", "a link that leads nowhere"


@dataclass(frozen=True)
class Passed:
    """Something that lies in a source and is no photo to it: its name there, and why."""

    key: str
    why: str

    @property
    def may_be_photos(self) -> bool:
        """Whether photos may have been lost with it."""
        return self.why.startswith((_UNREADABLE, _NOWHERE))


@dataclass(frozen=True)
class Found:
    """All that lies in a source: the keys of photos, by their names or how they begin, and what was passed over."""

    keys: list[str]
    passed: list[Passed]

    def but(self, *, keys: list[str], why: str) -> Found:
        """The same with fewer keys; the others are passed over for a reason."""
        kept = set(keys)
        return Found(keys, [*self.passed, *(Passed(key, why) for key in self.keys if key not in kept)])

    def counts(self) -> dict[str, int]:
        """How many were passed over for each reason that is told by its count."""
        found = Counter(one.why for one in self.passed if not self._is_named(one))
        return dict(sorted(found.items()))

    def named(self) -> list[Passed]:
        """What was passed over and is told by its name."""
        return [one for one in self.passed if self._is_named(one)]

    def _is_named(self, one: Passed) -> bool:
        return one.may_be_photos or one.why.startswith(("a link", "no plain file"))

    def words(self) -> str:
        """What was passed over, in one line; empty where that is nothing."""
        if not self.passed:
            return ""
        named = [f"{printable(one.key)} ({one.why})" for one in self.named()]
        more = [f"and {len(named) - 5} more"] if len(named) > 5 else []
        counted = [f"{count} {why}" for why, count in self.counts().items()]
        return f"passed over {len(self.passed)}: " + ", ".join([*counted, *named[:5], *more])

    def record(self) -> dict[str, Any]:
        """The same for ``--json``."""
        return {"counts": self.counts(), "named": [{"file": one.key, "why": one.why} for one in self.named()]}


class Photos(Protocol):
    """A source of photos; keys are names with ``/`` between their parts, such as ``roadwork/0001.jpg``.

    A source may have ``entries()`` as well, as ``Folder`` has; without it nobody knows what it holds beside ``keys``.
    """

    @property
    def root(self) -> str:
        """What ``splits.json`` calls it, and ``open_photos`` opens it by."""

    def keys(self) -> Iterator[str]:
        """Every file that may be a photo, hidden ones left out."""

    def read(self, key: str) -> bytes:
        """The file's bytes; raises OSError when it cannot be read."""

    def fingerprint(self) -> str:
        """Hex sha256 of all keys with their sizes; the same wherever the files lie."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo of a source; its text is what messages call it. With ``sha256`` another content is none of its."""

    photos: Photos
    key: str
    sha256: str = ""

    def __str__(self) -> str:
        return os.path.join(self.photos.root, self.key)  # noqa: PTH118 - a root may be no path

    def open(self) -> BinaryIO:
        """The file, to be read from its start and closed; raises OSError."""
        opening: Callable[[str], BinaryIO] | None = getattr(self.photos, "open", None)
        if opening is None:
            return io.BytesIO(self.read())
        file = opening(self.key)
        if self.sha256 and digest(file) != self.sha256:
            file.close()
            raise OSError(errno.EIO, _OTHER, str(self))
        return file

    def read(self) -> bytes:
        """The file's bytes; raises OSError."""
        try:
            content = self.photos.read(self.key)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a source from outside may raise anything
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(self)) from error
        if self.sha256 and sha256_bytes(content) != self.sha256:
            raise OSError(errno.EIO, _OTHER, str(self))
        return content


def digest(file: BinaryIO) -> str:
    """Hex sha256 of an open file from its start, read in pieces and left there; raises OSError beyond a GiB."""
    if file.seek(0, os.SEEK_END) > _LARGEST:
        raise OSError(errno.EFBIG, "larger than any photo")
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # BytesIO has a stub of its own
    file.seek(0)
    return found


ImageFile = Path | str | Photo


def is_address(root: Path | str) -> bool:
    """Whether it names a source from outside, as ``scheme://...`` does."""
    return _ADDRESS.fullmatch(str(root)) is not None


def is_source(root: Path | str) -> bool:
    """Whether ``open_photos`` has something to open: an address, a tar that is there, or a folder that is there."""
    path = Path(root)
    return is_address(root) or path.is_dir() or (path.suffix.lower() == ".tar" and path.is_file())


def open_photos(root: Path | str) -> Photos:
    """The source that lies at ``root``: an address (``scheme://...``), a file that ends in ``.tar``, or a folder.

    Raises:
        InputError: an address of no known scheme, or a tar that cannot be read by key.
    """
    address = _ADDRESS.fullmatch(str(root))
    if address is not None:
        return _from_outside(address[1], str(root))
    path = Path(root)
    return Folder(str(path)) if path.is_dir() or not is_source(path) else Tar(str(path))


def _on_disk(address: str) -> Photos:
    return open_photos(address.removeprefix("file://"))


# What opens an address, by its scheme.
PHOTOS: Registry[Callable[[str], Photos]] = Registry("the scheme of photos", "stage1_pro.photos", {"file": _on_disk})


@functools.lru_cache(maxsize=8)
def _from_outside(scheme: str, address: str) -> Photos:
    return PHOTOS.find(scheme)(address)


def look(photos: Photos) -> Found:
    """Which files of a source are photos, by their suffix or else by how they begin, and what else lies there."""
    entries: Callable[[], Iterator[tuple[str, str]]] | None = getattr(photos, "entries", None)
    keys, passed = [], []
    for key, why in ((key, "") for key in photos.keys()) if entries is None else entries():  # noqa: SIM118
        suffix = posixpath.splitext(key)[1].lower()
        if why:
            passed.append(Passed(key, why))
        elif suffix in SUFFIXES or _begins_as_a_picture(Photo(photos, key)):
            keys.append(key)
        else:
            passed.append(Passed(key, f"no picture ({printable(suffix) or 'no suffix'})"))
    return Found(keys, passed)


def _begins_as_a_picture(photo: Photo) -> bool:
    try:
        with photo.open() as file:
            return _PICTURE.match(file.read(16)) is not None
    except OSError:
        return True  # whoever reads it says why it cannot be read


def open_file(path: Path | str) -> BinaryIO:
    """A file on disk, or a member of a tar named as if that were a folder; raises OSError."""
    path = Path(path)
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for its writer.
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    try:
        return path.open("rb")
    except NotADirectoryError:
        tar = in_tar(path)
        if tar is None:
            raise
    return Tar(str(tar)).open(path.relative_to(tar).as_posix())


def in_tar(path: Path) -> Path | None:
    """The tar that a path leads into as if it were a folder, or None."""
    return next((folder for folder in path.parents if folder.suffix.lower() == ".tar" and folder.is_file()), None)


def read_file(image: ImageFile) -> bytes:
    """A photo's or a file's bytes, the file also inside a tar; raises OSError."""
    if isinstance(image, Photo):
        return image.read()
    with open_file(image) as file:
        return file.read()


@dataclass(frozen=True)
class Folder:
    """A folder with photos at any depth; a folder that several links lead to is entered once."""

    root: str

    def keys(self) -> Iterator[str]:
        """Names of files relative to the folder."""
        return (key for key, why in self.entries() if not why)

    def entries(self) -> Iterator[tuple[str, str]]:
        """Every entry that is no folder, and folders that cannot be entered, with why it is no file to be read."""
        return iter(sorted(_walk(self.root), key=lambda entry: entry[0].split("/")))

    def open(self, key: str) -> BinaryIO:
        """A file of the folder, also where its name is composed otherwise (NFC, NFD) there; raises OSError."""
        try:
            return open_file(Path(self.root) / key)
        except FileNotFoundError:
            return open_file(_respelled(Path(self.root), key))

    def read(self, key: str) -> bytes:
        """A file's bytes; raises OSError."""
        with self.open(key) as file:
            return file.read()

    def fingerprint(self) -> str:
        """Hex sha256 of all keys with their sizes."""
        return _fingerprint((key, (Path(self.root) / key).lstat().st_size) for key in self.keys())


@dataclass(frozen=True)
class Tar:
    """An uncompressed tar with photos, read by key: its index is made once, and a read seeks to its member.

    Raises:
        InputError: it is compressed, damaged or cut off, or has members that are neither folders nor plain files with
            a name of their own inside it.
    """

    root: str

    def __post_init__(self) -> None:
        # Now, so that a damaged tar is told at once and forked decoders find the index made.
        self._index()

    def _index(self) -> dict[str, tuple[int, int]]:
        now = Path(self.root).stat()
        return _members(self.root, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))

    def keys(self) -> Iterator[str]:
        """Names of plain files in the tar."""
        return (key for key, why in self.entries() if not why)

    def entries(self) -> Iterator[tuple[str, str]]:
        """Names of plain files in the tar, with why one is not to be read."""
        return ((key, next(filter(None, map(hidden, key.split("/"))), "")) for key in sorted(self._index()))

    def open(self, key: str) -> BinaryIO:
        """A member, read where it lies in the tar, also one whose name is composed otherwise there; raises OSError."""
        index = self._index()
        place = index.get(key)
        if place is None:
            wanted = unicodedata.normalize("NFC", key)
            alike = [there for name, there in index.items() if unicodedata.normalize("NFC", name) == wanted]
            place = alike[0] if len(alike) == 1 else None
        if place is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.root}/{key}")
        return cast("BinaryIO", io.BufferedReader(_Part(open_file(self.root), *place)))

    def read(self, key: str) -> bytes:
        """A member's bytes; raises OSError."""
        with self.open(key) as file:
            return file.read()

    def fingerprint(self) -> str:
        """Hex sha256 of all keys with their sizes."""
        index = self._index()
        return _fingerprint((key, index[key][1]) for key in self.keys())


class _Part(io.RawIOBase):
    """``size`` bytes of an open file from ``start`` on, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.lru_cache(maxsize=8)
def _members(root: str, identity: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Where each plain file of a tar begins, and its size; ``identity`` tells whether the tar is still the same."""
    del identity
    found: dict[str, tuple[int, int]] = {}
    try:
        with open_file(root) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    _add_member(found, member, root)
            file.seek(archive.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - tarfile lets a dozen kinds out of a damaged header
        raise InputError(
            f"{root} must be an uncompressed tar, which can be read at any place, got: {printable(str(error))}; "
            "make one with: tar cf"
        ) from None
    if not whole:
        raise InputError(f"{root} must be a whole tar, but it is damaged or cut off; copy it again")
    return found


def _add_member(found: dict[str, tuple[int, int]], member: tarfile.TarInfo, root: str) -> None:
    name, shown = posixpath.normpath(member.name), printable(member.name)
    if not member.isreg() or member.issparse():
        raise InputError(
            f"{root} must hold folders and plain files, got {shown}, which is a link, a device or has holes; make it "
            "with: tar c --dereference --hard-dereference"
        )
    if name.startswith(("/", "../")) or name in (".", "..") or "\0" in name:
        raise InputError(f"{root} must name its files inside it, got {shown}; make it with: tar c -C FOLDER .")
    if name in found:
        raise InputError(f"{root} must hold every file once, got {shown} twice; make it anew")
    found[name] = (member.offset_data, member.size)


def hidden(name: str) -> str:
    """Why a file or folder of this name is none of the user's photos; empty where it may be."""
    if name.startswith("."):
        return "hidden"
    return "of the system" if name in _SYSTEM_FILES or name.lower() in _SYSTEM_FOLDERS else ""


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """What ``Folder.entries`` gives, in any order. Folders that lie here are entered before those links lead to."""
    seen: dict[tuple[int, int], str] = {}
    folders, links = [(root, "", "")], list[tuple[str, str, str]]()
    while folders or links:
        path, key, why = folders.pop() if folders else links.pop(0)
        try:
            info = os.stat(path)  # noqa: PTH116
            known = seen.setdefault((info.st_dev, info.st_ino), key or ".")
            if known != (key or "."):
                yield key, f"a link into a folder that is here already, {printable(known)}"
                continue
            with os.scandir(path) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            yield key or ".", f"{_UNREADABLE}: {error.strerror}"
            continue
        for entry in entries:
            name, here = f"{key}/{entry.name}".lstrip("/"), why or hidden(entry.name)
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, name, here))
                elif entry.is_dir() and Path(root).resolve().is_relative_to(Path(entry.path).resolve()):
                    yield name, "a link to a folder around this one"
                elif entry.is_dir():
                    links.append((entry.path, name, here))
                elif entry.is_file():
                    yield name, here
                else:
                    yield name, _NOWHERE if entry.is_symlink() else "no plain file"
            except OSError as error:  # a link to itself, or one behind a folder that is closed
                yield name, f"{_NOWHERE}: {error.strerror}"


def _respelled(root: Path, key: str) -> Path:
    """Where a file lies whose name has other code points for the same letters; the path as it is where nothing does."""
    found = root
    for part in key.split("/"):
        names: list[str] = []
        if not os.path.lexists(found / part) and found.is_dir():
            wanted = unicodedata.normalize("NFC", part)
            names = [one.name for one in found.iterdir() if unicodedata.normalize("NFC", one.name) == wanted]
        found /= names[0] if len(names) == 1 else part
    return found


def _fingerprint(sizes: Iterator[tuple[str, int]]) -> str:
    lines = sorted(f"{key}\0{size}\n" for key, size in sizes)
    return sha256_bytes("".join(lines).encode("utf-8", "surrogateescape"))
