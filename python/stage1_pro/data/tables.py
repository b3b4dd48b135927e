"""The one reader of tables that people hand in: the same file means the same to every command."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from stage1_pro.data.photos import ImageFile, read_file
from stage1_pro.errors import InputError, nearest, printable
from stage1_pro.files import unshield

DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Sheet:
    """A table's cells as text, stripped; iterating gives each row by column, with its place for messages."""

    file: ImageFile
    columns: tuple[str, ...]
    cells: list[list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        for line, cells in zip(self.lines, self.cells, strict=True):
            yield f"{printable(Path(str(self.file)).name)} line {line}", dict(zip(self.columns, cells, strict=True))

    def column(self, name: str) -> list[str]:
        """All cells of one column, from the top."""
        place = self.columns.index(name)
        return [cells[place] for cells in self.cells]


def read_table(file: ImageFile, names: Collection[str], *, required: Collection[str] = ()) -> Sheet:
    """Read a CSV with commas, semicolons or tabs, in UTF-8 or, with its byte order mark, UTF-16.

    The delimiter is the one by which the header has most of the names. Blank lines do not count, and a row that ends
    early has empty cells, as spreadsheets write them; the last one, in a file that does not end its line, was cut off.
    There may be other columns than ``names``.

    Raises:
        InputError: the file cannot be read, is no such text, lacks a column or has one twice, a row has more cells than
            the header, or the file was cut off.
    """
    text = _text(file)
    delimiter = _delimiter(text, names)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    cells: list[list[str]] = []
    lines: list[int] = []
    short = False
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(file, columns, required)
        for row in reader:
            if not row:
                continue
            if len(row) > len(columns):
                raise InputError(
                    f"{file} must have {len(columns)} cells in every row, as its header has, got {len(row)} in line "
                    f"{reader.line_num}; quote cells that hold a '{delimiter}'"
                )
            short = len(row) < len(columns)
            cells.append([unshield(cell.strip()) for cell in row] + [""] * (len(columns) - len(row)))
            lines.append(reader.line_num)
        if short and not text.endswith(("\n", "\r")):
            raise InputError(f"{file} must be whole, but its last line {reader.line_num} ends early; copy it again")
    except csv.Error as error:
        raise InputError(f"{file} must be a CSV, got in line {reader.line_num}: {error}") from None
    return Sheet(file, tuple(columns), cells, lines)


def slashes(file: str) -> str:
    """A file name of a table with ``/`` between folders, also where it was written on Windows."""
    return file.replace("\\", "/") if "/" not in file else file


def _text(file: ImageFile) -> str:
    try:
        data = read_file(file)
    except FileNotFoundError:
        raise InputError(f"{file} must exist, but there is no such file") from None
    except OSError as error:
        raise InputError(f"{file} must be a readable CSV, got: {error.strerror}") from None
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{file} must be UTF-8 text, got other bytes in line {line}; save it as CSV UTF-8") from None


def _delimiter(text: str, names: Collection[str]) -> str:
    line = io.StringIO(text[: csv.field_size_limit()], newline="").readline()

    def found(delimiter: str) -> tuple[int, int]:
        columns = {name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])}
        return len(columns & set(names)), len(columns)

    return max(DELIMITERS, key=found)


def _check_columns(file: ImageFile, columns: list[str], required: Collection[str]) -> None:
    shown = printable(", ".join(columns)) or "an empty file"
    for name in required:
        if name not in columns:
            raise InputError(f"{file} must have a column '{name}', got {shown}{nearest(name, columns)}")
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{file} must name every column once, got '{printable(twice)}' more than once; rename one of them"
        )
