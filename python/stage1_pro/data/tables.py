"""The one reader of tables that people hand in: the same file means the same to every command."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stage1_pro.classes import spelled
from stage1_pro.data.photos import ImageFile, Photo, open_file
from stage1_pro.errors import InputError, closest, nearest, printable
from stage1_pro.files import unshield

DELIMITERS = ",;\t|"
SUFFIXES = frozenset({".csv", ".tsv", ".tab"})
LARGEST = 2**28
# What is looked up as it is written; all else is composed (NFC), so that one name is one name.
_AS_WRITTEN = frozenset({"file", "event_id"})
_BREAK = re.compile(rb"\r\n|\r|\n")


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

    def by_column(self) -> dict[str, list[str]]:
        """All cells of every column that has a name."""
        turned = zip(*self.cells, strict=True) if self.cells else iter([()] * len(self.columns))
        return {name: list(cells) for name, cells in zip(self.columns, turned, strict=True) if name}


def is_table(path: Path | str) -> bool:
    """Whether a file is a table by its name."""
    return Path(path).suffix.lower() in SUFFIXES


def read_table(
    file: ImageFile, names: Collection[str], *, required: Collection[str] = (), columns: Mapping[str, str] | None = None
) -> Sheet:
    """Read a CSV with commas, semicolons, tabs or bars, in UTF-8 or UTF-16.

    The delimiter is the one by which the header has most of the names, in any case of letters. Blank lines do not
    count, and a row that ends early has empty cells, as spreadsheets write them; the last one, in a file that does not
    end its line, was cut off. There may be other columns than ``names``. Labels are as ``classes.spelled`` says; other
    cells but those of ``file`` and ``event_id`` are composed (NFC).

    Args:
        file: at most 256 MiB of text.
        names: columns that are looked for; one that ends in ``*`` stands for all that begin so.
        required: those of them that must be there.
        columns: what some of them are called in this file, as ``--columns`` says; empty for one to be passed over.

    Raises:
        InputError: the file cannot be read, is no such text, lacks a column or has one twice, a row has more cells than
            the header, or the file was cut off.
    """
    text = _text(file)
    first = re.match(r'"?sep=(.)"?(\r\n|\r|\n)', text, re.IGNORECASE)  # how Excel is told
    skipped, text = (0, text) if first is None else (1, text[first.end() :])
    delimiter = _delimiter(text, {*names, *(columns or {}).values()}) if first is None else first[1]
    # A fourth of what StringIO takes.
    opened = io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogatepass")), "utf-8", "surrogatepass", newline="")
    reader = csv.reader(opened, delimiter=delimiter, strict=True, skipinitialspace=True)
    cells: list[list[str]] = []
    lines: list[int] = []
    short = False
    try:
        header = next((row for row in reader if any(map(str.strip, row))), [])
        heads = _heads(file, header, names, columns or {})
        _check_heads(file, heads, names, required)
        clean = [_cleaner(name) for name in heads]
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            line = reader.line_num + skipped
            if len(row) > len(heads):
                raise InputError(
                    f"{file} must have {len(heads)} cells in every row, as its header has, got {len(row)} in line "
                    f"{line}; quote cells that hold a '{printable(delimiter)}'"
                )
            short = len(row) < len(heads)
            whole = [*row, *[""] * (len(heads) - len(row))]
            cells.append([tidy(unshield(cell.strip())) for tidy, cell in zip(clean, whole, strict=True)])
            lines.append(line)
        if short and not text.endswith(("\n", "\r")):
            raise InputError(f"{file} must be whole, but its last line {lines[-1]} ends early; copy it again")
    except csv.Error as error:
        raise InputError(
            f"{file} must be a CSV, got in line {reader.line_num + skipped}: {printable(str(error))}"
        ) from None
    return Sheet(file, tuple(heads), cells, lines)


def slashes(file: str) -> str:
    """A file name of a table with ``/`` between folders, also where it was written on Windows."""
    return file.replace("\\", "/") if "/" not in file else file


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _cleaner(column: str) -> Callable[[str], str]:
    return str if column in _AS_WRITTEN else spelled if column == "label" else _composed


def _text(file: ImageFile) -> str:
    try:
        with file.open() if isinstance(file, Photo) else open_file(file) as opened:
            data = opened.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"{file} must exist, but there is no such file") from None
    except OSError as error:
        raise InputError(f"{file} must be a readable CSV, got: {error.strerror}") from None
    if len(data) > LARGEST:
        raise InputError(f"{file} must be a table of at most {LARGEST >> 20} MiB, got more; cut it into several")
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif len(data) > 1 and not (data[0] and data[1]):
        encoding = "utf-16-be" if data[1] else "utf-16-le"  # no text in UTF-8 has a NUL
    try:
        text = data.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(_other_bytes(file, data, error)) from None
    if "\0" in text:
        line = len(_BREAK.findall(text[: text.index("\0")].encode("utf-8", "surrogatepass"))) + 1
        raise InputError(f"{file} must be text, got a NUL in line {line}; save it as CSV UTF-8")
    return text


def _other_bytes(file: ImageFile, data: bytes, error: UnicodeDecodeError) -> str:
    if error.encoding.startswith("utf-16"):
        return f"{file} must be whole UTF-16 text, got other bytes at {error.start}; save it as CSV UTF-8"
    before = _BREAK.split(data[: error.start])
    text = printable((before[-1] + _BREAK.split(data[error.start :], maxsplit=1)[0]).decode("cp1252", "replace"), 60)
    # Which of a dozen code pages it is nobody can tell by its bytes; a name that was read wrongly would be learned.
    return (
        f"{file} must be UTF-8 text, got other bytes in line {len(before)}; save it as CSV UTF-8, or, where that line "
        f"should read '{text}', convert it with: iconv -f WINDOWS-1252 -t UTF-8"
    )


def _delimiter(text: str, names: Collection[str]) -> str:
    line = io.StringIO(text.lstrip()[: csv.field_size_limit()], newline="").readline()
    whole = {name.casefold() for name in names}
    begun = tuple(name[:-1].casefold() for name in names if name.endswith("*"))

    def found(delimiter: str) -> tuple[int, int]:
        row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        cells = {_composed(name.strip()).casefold() for name in row}
        return sum(name in whole or (name.startswith(begun) if begun else False) for name in cells), len(cells)

    return max(DELIMITERS, key=found)


def _heads(file: ImageFile, header: list[str], names: Collection[str], columns: Mapping[str, str]) -> list[str]:
    """What each column is to the reader: the name that it is looked for by, else its own."""
    plain = [_composed(name.strip()) for name in header]
    ours: dict[int, str] = {}
    for name, theirs in columns.items():
        if not _is_one_of(name, names):
            raise InputError(f"--columns must be of {', '.join(names)}, got '{printable(name)}'{nearest(name, names)}")
        wanted = _composed(theirs.strip())
        places = [i for i, one in enumerate(plain) if one == wanted]
        places = places or [i for i, one in enumerate(plain) if one.casefold() == wanted.casefold()]
        if wanted and len(places) != 1:
            raise InputError(
                f"--columns must name one column of {file}, got '{printable(theirs)}' for {name}, which names "
                f"{len(places)} of {_shown(plain)}{nearest(wanted, plain)}"
            )
        if wanted and ours.setdefault(places[0], name) != name:
            raise InputError(
                f"--columns must name every column once, got '{printable(theirs)}' for {ours[places[0]]} and {name}"
            )
    found = []
    for place, name in enumerate(plain):
        own = _our_name(name, names)
        # A column whose name was given to another one is not looked at.
        found.append(ours.get(place, "" if own in columns else own))
    return found


def _is_one_of(name: str, names: Collection[str]) -> bool:
    return (name in names and not name.endswith("*")) or any(
        one.endswith("*") and name.startswith(one[:-1]) and name != one for one in names
    )


def _our_name(name: str, names: Collection[str]) -> str:
    folded = name.casefold()
    for one in names:
        if one.endswith("*") and folded.startswith(one[:-1]):
            return one[:-1] + name[len(one) - 1 :]
        if one == folded:
            return one
    return name


def _check_heads(file: ImageFile, heads: list[str], names: Collection[str], required: Collection[str]) -> None:
    for name in required:
        if name not in heads:
            free = [head for head in heads if head and not _is_one_of(head, names)]
            advice = f"; name it with --columns {name}={printable(closest(name, free) or 'COLUMN')}" if heads else ""
            raise InputError(f"{file} must have a column '{name}', got {_shown(heads)}{nearest(name, free)}{advice}")
    twice = next((name for name, count in Counter(heads).items() if name and count > 1), None)
    if twice is not None:
        raise InputError(
            f"{file} must name every column once, got '{printable(twice)}' more than once; rename one of them"
        )


def _shown(heads: list[str]) -> str:
    return printable(", ".join(heads)) or "an empty file"
