"""Files on disk: atomic writes, hashes, CSV and NumPy archives."""

from __future__ import annotations

import contextlib
import csv
import errno
import getpass
import glob
import hashlib
import io
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from stage1_pro.errors import InputError, printable
from stage1_pro.progress import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def uniform(seed: int, salt: str, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{salt}/{name}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def user_name() -> str:
    """The user's name, or ``uid:12345`` where the system knows none: containers run under any number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid:{os.getuid()}"


def home_folder(variable: str) -> Path:
    """The user's home; raises InputError, which names the variable to set, where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        raise InputError(f"{variable} must name a folder, for this user has no home; set it") from None


def permit(path: Path, mode: int = 0o666) -> None:
    """Give a new file or folder the mode that the process's umask leaves of ``mode``."""
    # It can only be read by setting it; a file that another thread makes in between is its owner's alone.
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(mode & ~umask)


@contextlib.contextmanager
def atomic_path(path: Path | str, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over it, ``mode`` less the umask.

    A process killed at any moment leaves either the old file or the new one. Leftovers of
    killed writers are named ``.<name>.*.tmp``, are never read, and go when the file is written next.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary, mark = _marked(lambda: Path(_closed(tempfile.mkstemp(".tmp", f".{path.name}.", path.parent))))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        permit(temporary, mode)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write to a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
        os.close(mark)


@contextlib.contextmanager
def atomic_directory(path: Path | str, *, keep: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place on success.

    An existing folder at ``path`` is moved aside first and removed after the new one stands; with ``keep`` it stays, as
    ``<path>.before``, in place of what lay there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    sweep(path.parent, path.name)
    before = path.with_name(f"{path.name}.before")
    keep = keep and path.is_dir() and any(path.iterdir())
    if keep and before.exists() and {*os.listdir(before)}.isdisjoint(os.listdir(path)):  # noqa: PTH208
        raise InputError(f"{before} must be free for what lies in {path}, got something else there; move it away")
    staging, mark = _marked(lambda: Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent)))
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        permit(staging, 0o777)
        if path.exists():
            aside, kept = _marked(lambda: Path(tempfile.mkdtemp(".old", f".{path.name}.", path.parent)))
            path.replace(aside / path.name)
            staging.replace(path)
            if keep:
                say(f"what lay in {path} goes to {before}{', in place of what lay there' * before.exists()}")
                shutil.rmtree(before, ignore_errors=True)
                (aside / path.name).replace(before)
            shutil.rmtree(aside)
            os.close(kept)
        else:
            staging.replace(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(mark)


def _closed(made: tuple[int, str]) -> str:
    os.close(made[0])
    return made[1]


def _marked(make: Callable[[], Path]) -> tuple[Path, int]:
    """Make a temporary file or folder that says by a lock, which ends with this process, that it is being written."""
    while True:
        path = make()
        try:
            mark = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # a sweep came in between
        if claim(mark) is not False and os.fstat(mark).st_nlink:
            return path, mark
        os.close(mark)


def claim(descriptor: int) -> bool | None:
    """Lock what is open, at once; False where another holds it, None where the system or its disk has no such locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers of ``name``, or of anything, left in a folder; what a living one writes stays."""
    for leftover in (*_left(folder, name, ".tmp"), *_left(folder, name, ".old")):
        target = folder / leftover.name[1:].rsplit(".", 2)[0]
        if leftover.suffix == ".old" and not target.exists():
            continue  # the only copy: `recover_directory` puts it back
        with contextlib.suppress(OSError):
            mark = os.open(leftover, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if claim(mark):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(mark)


def _left(folder: Path, name: str | None, suffix: str) -> list[Path]:
    return [*folder.glob(f".{'*' if name is None else glob.escape(name)}.*{suffix}")]


@contextlib.contextmanager
def locked(path: Path | str, *, wait: float | None = None, busy: str | None = None) -> Iterator[int]:
    """Hold a lock file for this thread of this process, and yield its descriptor.

    The kernel frees the lock when its holder ends, also by ``kill -9``; the file stays and blocks nobody. Forked
    children do not hold it; a child that is started with the descriptor in ``pass_fds`` does, until it ends.

    Args:
        path: of the lock file, made if it is not there; its folder must exist.
        wait: seconds to wait for another holder; None waits for as long as it takes.
        busy: message of the error when another holder does not let go.

    Raises:
        InputError: the lock is still held elsewhere after ``wait`` seconds.
        RuntimeError: this thread holds the lock already, and would wait for itself.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    descriptors: list[int] = []
    lock = FileLock(
        path, -1 if wait is None else wait, mode=0o600, poll_interval=0.01, on_acquired=descriptors.append,
        fallback_to_soft=False,  # a marker file would outlive a killed holder
    )  # fmt: skip
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy or f"{path} must be free, but another process holds it; wait for it") from None
    try:
        yield descriptors[-1]
    finally:
        lock.release()


def recover_directory(path: Path) -> None:
    """Put back a folder that a writer killed between its two renames had moved aside."""
    if path.exists():
        return
    for aside in _left(path.parent, path.name, ".old"):
        if (aside / path.name).is_dir():
            (aside / path.name).replace(path)
            aside.rmdir()
            return


def sync_directory(path: Path) -> None:
    """Let what was renamed in a folder outlast the machine's end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, data: bytes, *, mode: int = 0o666) -> None:
    """Write bytes atomically."""
    with atomic_path(path, mode=mode) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str, *, mode: int = 0o666) -> None:
    """Write UTF-8 text atomically."""
    # File names on Linux are bytes: those that are not UTF-8 go out as they came in.
    write_bytes(path, text.encode(errors="surrogateescape"), mode=mode)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write rows under the given columns atomically; ``None`` and NaN become empty cells, formulas text."""
    lines = [csv_line(columns), *(csv_line([row.get(key) for key in columns]) for row in rows)]
    write_text(path, "".join(lines))


def csv_line(cells: Sequence[object]) -> str:
    """One row of a CSV as ``write_csv`` writes it, with the end of its line."""
    buffer = io.StringIO(newline="")
    # Characters of the line's end are quoted, and a lone carriage return would end a row for its readers.
    csv.writer(buffer, lineterminator="\r\n").writerow([_cell(cell) for cell in cells])
    return buffer.getvalue()[:-2] + "\n"


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return repr(float(value))
    return shield(value) if isinstance(value, str) else value


# What a spreadsheet runs as a formula, behind any number of the apostrophes that keep it from doing so.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def shield(text: str) -> str:
    """A cell that a spreadsheet shows and never runs: an apostrophe before what looks like a formula, not a number."""
    if _FORMULA.match(text) is None:
        return text
    try:
        float(text)
    except ValueError:
        return "'" + text
    return text


def unshield(cell: str) -> str:
    """The text that ``shield`` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_npz(path: Path | str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as an uncompressed ``.npz``, atomically; equal arrays give equal bytes."""
    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            item = io.BytesIO()
            np.lib.format.write_array(item, array, allow_pickle=False)
            # A fixed date: np.savez stamps the clock, and the same run must give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), item.getvalue())
    write_bytes(path, buffer.getvalue())


_ARRAYS = 256
_HEAD = 2**16
# What a packed file may unpack to: real predictions pack to a half or a third.
_PACKED, _PACKED_TIMES = 2**26, 32
_NUMBERS, _TEXTS = "biuf", "USMm"


class _Sparing:
    """A file of which nobody reads more than a MiB at once: a zip's directory is read before anything is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        most = 2**20
        data = self._file.read(min(size, most + 1) if size >= 0 else most + 1)
        if len(data) > most:
            raise ValueError(f"a part of more than {most} bytes")
        return data


def npz_arrays(file: IO[bytes], *, plain: bool = False) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Kind and shape of every array of an ``.npz``, by its headers alone; what it claims is what it holds.

    Args:
        file: read from anywhere, left open.
        plain: refuse packed arrays, and text.

    Raises:
        Exception: of many kinds, where it is damaged, holds objects, or would take far more memory than it is large.
    """
    import numpy as np

    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    with zipfile.ZipFile(cast("IO[bytes]", _Sparing(file))) as archive:
        members = archive.infolist()
        if len(members) > _ARRAYS:
            raise ValueError(f"more than {_ARRAYS} arrays")
        whole = file.seek(0, os.SEEK_END)
        if sum(member.file_size for member in members) > max(_PACKED, _PACKED_TIMES * whole):
            raise ValueError(f"arrays that unpack to more than {_PACKED_TIMES} times the file's size")
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} packed in another way than deflate")
            if member.flag_bits & 1 or (plain and member.compress_type != zipfile.ZIP_STORED):
                raise ValueError(f"{member.filename} packed or encrypted")
            with archive.open(member) as opened:
                head = io.BytesIO(opened.read(_HEAD))
            version = np.lib.format.read_magic(head)
            shape, _, dtype = headers[version](head)
            if dtype.kind not in (_NUMBERS if plain else _NUMBERS + _TEXTS) or min(shape, default=0) < 0:
                raise ValueError(f"{member.filename} of something else than numbers{'' if plain else ' or text'}")
            if math.prod(shape) * dtype.itemsize != member.file_size - head.tell():
                raise ValueError(f"{member.filename} of another size than its shape says")
            # An axis of no length beside a long one: rows without end in no bytes.
            if math.prod(max(1, size) for size in shape) * max(1, dtype.itemsize) > max(_PACKED, member.file_size):
                raise ValueError(f"{member.filename} of a shape that no array has")
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"two arrays of the name {name}")
            found[name] = dtype, shape
    return found


def load_npz(source: Path | str | bytes, *, most: int | None = None) -> dict[str, NDArray[Any]]:
    """Read every array of an ``.npz``, by its path or from its bytes, without pickle.

    Args:
        source: the file, or what is in it.
        most: bytes of all arrays together that nothing is read beyond.

    Raises:
        InputError: it is none, or its arrays are larger, or packed to less than a thirtieth of their size.
    """
    import numpy as np

    path = "bytes" if isinstance(source, bytes) else Path(source)
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            raise ValueError("no plain file")
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path} must be a NumPy .npz file with named arrays, got a single array")
            names = npz_arrays(file)
            total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in names.values())
            if most is not None and total > most:
                raise ValueError(f"arrays of {total:,} bytes, and {most:,} are the most that is read of this file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as data:
                return {name: data[name] for name in names}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} must exist, but there is no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and NumPy each raise kinds of their own on damage
        raise InputError(
            f"{path} must be a NumPy .npz file without pickled objects, got: {printable(str(error))}"
        ) from None
