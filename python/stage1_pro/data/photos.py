"""Where photos lie: a folder, a tar, or a source from outside; each gives a photo's bytes by its key.

A source from outside is a class of one argument, its address, in ``PHOTOS`` or behind an entry point of the group
``stage1_pro.photos``; its name there is the scheme of its addresses: ``s3`` opens ``s3://bucket/signs``.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from stage1_pro.errors import InputError, printable
from stage1_pro.files import sha256_bytes
from stage1_pro.registry import Registry

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://.+", re.DOTALL)
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})


class Photos(Protocol):
    """A source of photos; keys are names with ``/`` between their parts, such as ``roadwork/0001.jpg``."""

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
    """One photo of a source; its text is what messages call it."""

    photos: Photos
    key: str

    def __str__(self) -> str:
        return os.path.join(self.photos.root, self.key)  # noqa: PTH118 - a root may be no path

    def open(self) -> BinaryIO:
        """The file, to be read from its start and closed; raises OSError."""
        opening: Callable[[str], BinaryIO] | None = getattr(self.photos, "open", None)
        return io.BytesIO(self.read()) if opening is None else opening(self.key)

    def read(self) -> bytes:
        """The file's bytes; raises OSError."""
        try:
            return self.photos.read(self.key)
        except OSError:
            raise
        except Exception as error:  # a source from outside may raise anything
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(self)) from error


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
    """A folder with photos at any depth; links to folders are followed at its top alone."""

    root: str

    def keys(self) -> Iterator[str]:
        """Names of files relative to the folder."""
        root = Path(self.root)
        for top in sorted(root.iterdir()):
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                key = path.relative_to(root).as_posix()
                if not _hidden(key) and not path.is_dir():
                    yield key

    def open(self, key: str) -> BinaryIO:
        """A file of the folder; raises OSError."""
        return open_file(Path(self.root) / key)

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
        return (key for key in sorted(self._index()) if not _hidden(key))

    def open(self, key: str) -> BinaryIO:
        """A member, read where it lies in the tar; raises OSError."""
        place = self._index().get(key)
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


def _hidden(key: str) -> bool:
    *folders, name = key.split("/")
    return name in _SYSTEM_FILES or any(part.startswith(".") for part in (*folders, name))


def _fingerprint(sizes: Iterator[tuple[str, int]]) -> str:
    lines = sorted(f"{key}\0{size}\n" for key, size in sizes)
    return sha256_bytes("".join(lines).encode("utf-8", "surrogateescape"))
