"""Answers that are written as they come, beside the CSV they are to be, and that ended work goes on after."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import claim, csv_line, sha256_bytes, sync_directory, unshield
from stage1_pro.progress import say
from stage1_pro.record import Record

Row = dict[str, Any]
COLUMNS = ("file", "label", "set", "probability", "confidence", "decision", "stage", "error")
_OF_CLASS = "prob_"
_NUMBERS = ("probability", "confidence", _OF_CLASS)


def columns_of(classes: Sequence[str]) -> list[str]:
    """Columns of answers: ``COLUMNS``, then ``prob_<class>`` of every class, as ``stage1 metrics`` reads them.

    No column begins with what a spreadsheet takes for a formula, and different classes have different ones.
    """
    return [*COLUMNS, *(f"{_OF_CLASS}{name}" for name in classes)]


class Begun(Record):
    """``<out>.partial.json``: the work whose answers so far are in ``<out>.partial``."""

    format_version: Literal[1] = 1
    answering: str = Field(description="sha256 of the bundle's manifest, or fingerprint of the run's policy")
    photos: str = Field(description="sha256 of names and places of all photos, in their order")
    n_photos: int
    options: dict[str, str] = Field(description="what else a row, or where it is logged, depends on")
    columns: list[str] = Field([], description="of the file; not there in records of older versions")
    writer: str = Field(description="this work's name in the ids of the events it logs")

    @classmethod
    def of(cls, answering: str, names: Sequence[str], *, columns: Sequence[str], **options: object) -> Begun:
        """Work that begins now, on photos by name and place, one after the other."""
        photos = sha256_bytes("\0".join(names).encode("utf-8", "surrogateescape"))
        kept = {name: str(value) for name, value in options.items()}
        return cls(
            answering=answering, photos=photos, n_photos=len(names) // 2, options=kept, columns=list(columns),
            writer=uuid.uuid4().hex,
        )  # fmt: skip

    def differences(self, other: Begun) -> list[str]:
        """What of other work is not as in this one, in words."""
        found = []
        if self.answering != other.answering:
            found.append(f"another bundle or policy ({other.answering[:12]} instead of {self.answering[:12]})")
        if (self.photos, self.n_photos) != (other.photos, other.n_photos):
            found.append(f"other photos ({other.n_photos} instead of {self.n_photos} or other names)")
        if self.columns != other.columns:
            found.append("other columns, of another version of stage1")
        for name in sorted(self.options | other.options):
            mine, yours = self.options.get(name), other.options.get(name)
            if mine != yours:
                found.append(f"{name} {yours} instead of {mine}")
        return found


class Filed(Sequence[Row]):
    """Rows of a CSV of answers, read anew by each that goes through them: any number of them in little memory."""

    def __init__(self, path: Path, n_rows: int) -> None:
        self.path, self._n_rows = path, n_rows

    def __len__(self) -> int:
        return self._n_rows

    def __iter__(self) -> Iterator[Row]:
        with self.path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for cells in csv.DictReader(file):
                yield {name: _value(name, cell) for name, cell in cells.items()}

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def _value(name: str, cell: str) -> Any:
    if not cell:
        return None
    return float(cell) if name.startswith(_NUMBERS) else unshield(cell)


class Answers:
    """The rows of a CSV on their way.

    ``n_rows`` are written; ``n_decided`` of them were read and decided on; ``begun`` says of what work they are.
    """

    def __init__(self, file: int, path: Path, begun: Begun) -> None:
        self._file, self._path, self.begun = file, path, begun
        self.n_rows = self.n_decided = 0

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Write the rows of one batch; raises OSError that names the file."""
        self._write("".join(csv_line([row[name] for name in self.begun.columns]) for row in rows))
        self.n_rows += len(rows)
        self.n_decided += sum(row["decision"] is not None for row in rows)

    def begin(self) -> None:
        """Forget every row."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._write(csv_line(self.begun.columns))

    def go_on(self, names: Sequence[str], batch_size: int) -> None:
        """Take the rows of whole batches as written, and drop those after them: batches must be as they were.

        Raises:
            ArtifactError: a row is not of the photo in its place.
        """
        columns = self.begun.columns
        head, end, rows, decided = csv_line(columns).encode(), 0, 0, 0
        for number, record in enumerate(_records(self._path)):
            if number == 0 and record == head:
                end = len(record)
                kept = (end, 0, 0)
                continue
            cells = next(csv.reader(io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")))
            fits = number and rows < len(names) and len(cells) == len(columns)
            if not (fits and unshield(cells[0]) == names[rows]):
                raise ArtifactError(
                    f"{self._path} must hold a row for each photo in order, got another in row {number}; it was "
                    "changed: begin anew with --overwrite"
                )
            end, rows, decided = end + len(record), rows + 1, decided + bool(cells[COLUMNS.index("decision")])
            if rows % batch_size == 0 or rows == len(names):
                kept = (end, rows, decided)
        if not end:
            self.begin()
            return
        os.ftruncate(self._file, kept[0])
        os.lseek(self._file, 0, os.SEEK_END)
        _, self.n_rows, self.n_decided = kept

    def _write(self, text: str) -> None:
        view = memoryview(text.encode("utf-8", "surrogateescape"))
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            error.filename = str(self._path)
            raise


def _records(path: Path) -> Iterator[bytes]:
    """Whole records of a CSV: lines, joined where a quoted cell goes on in the next one; a torn last one is none."""
    record = b""
    with path.open("rb") as file:
        for line in file:
            record += line
            if line.endswith(b"\n") and record.count(b'"') % 2 == 0:
                yield record
                record = b""


@contextlib.contextmanager
def coming(
    out: Path, work: Begun, names: Sequence[str], *, batch_size: int, resume: bool, overwrite: bool
) -> Iterator[Answers]:
    """Yield what rows are appended to, ``<out>.partial``, which takes the name ``out`` at the end.

    Ended at any moment it stays, with ``<out>.partial.json``, and the next work with ``resume`` goes on after it.

    Raises:
        InputError: such a file lies there and neither ``resume`` nor ``overwrite`` is set, it is of other work, or
            another process writes it.
        ArtifactError: it was changed.
    """
    path, about = (out.with_name(f"{out.name}.{end}") for end in ("partial", "partial.json"))
    if resume and overwrite:
        raise InputError("--resume and --overwrite must not be given together, got both; choose one")
    begun = Begun.read(about) if resume and about.is_file() else None
    # The file is renamed before the record of it goes.
    if begun is not None and out.is_file() and not path.exists() and not begun.differences(work):
        answers = Answers(-1, out, begun)
        answers.n_rows = len(names)
        yield answers
        about.unlink()
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        answers = _opened(file, path, about, work, begun, resume=resume, overwrite=overwrite)
        if answers.begun is begun:
            answers.go_on(names, batch_size)
            say(f"going on after {answers.n_rows} of {len(names)} answers in {path}")
        else:
            about.unlink(missing_ok=True)
            if resume:
                say(f"there is no {path} to go on after; answering from the first photo on")
            answers.begin()
            work.write(about)
        try:
            yield answers
            os.fsync(file)
            path.replace(out)
            sync_directory(out.parent)
            about.unlink()
        except BaseException:
            _leave(answers, path, about)
            raise
    finally:
        os.close(file)


def _opened(
    file: int, path: Path, about: Path, work: Begun, begun: Begun | None, *, resume: bool, overwrite: bool
) -> Answers:
    """What the opened file holds: answers to go on after, or nothing yet."""
    # Whoever held the lock may have given the file its last name in between.
    if claim(file) is False or not path.exists() or os.fstat(file).st_ino != path.stat().st_ino:
        raise InputError(f"{path} must be free, but another process writes answers into it; wait for it")
    something = about.is_file()  # its rows are begun before it, and end after it
    if not something or overwrite:
        if something:
            say(f"removed the {max(0, sum(1 for _ in _records(path)) - 1)} answers in {path}")
        return Answers(file, path, work)
    if not resume or begun is None:
        raise InputError(
            f"{path} holds answers of work that was ended; go on after them with --resume or begin anew with "
            "--overwrite"
        )
    if found := begun.differences(work):
        raise InputError(
            f"--resume must go on with the work that was begun, got {'; '.join(found)}; put that back, or begin anew "
            "with --overwrite"
        )
    return Answers(file, path, begun)


def _leave(answers: Answers, path: Path, about: Path) -> None:
    """Say what ended work leaves; where that is nothing, leave nothing."""
    if answers.n_rows:
        place = path if path.exists() else "their place"
        say(f"{answers.n_rows} of {answers.begun.n_photos} answers are in {place}; --resume goes on after them")
        return
    for one in (about, path):
        with contextlib.suppress(OSError):
            one.unlink()
