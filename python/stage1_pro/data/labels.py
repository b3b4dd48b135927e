"""What a user names: labels (a CSV, or a folder or tar with a sub-folder of images per class), or images to look at."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stage1_pro.classes import choose_positive
from stage1_pro.data.photos import (
    Folder,
    Found,
    ImageFile,
    Passed,
    Photo,
    Photos,
    in_tar,
    is_address,
    is_source,
    look,
    open_photos,
)  # fmt: skip
from stage1_pro.data.tables import read_table, slashes
from stage1_pro.errors import InputError, nearest

COLUMNS = ("file", "label", "label_name", "group", "source")
TABLE = "labels.csv"
_ONE_CLASS = "labels must have two classes or more, got one class only: '{}'; add images of another"


@dataclass(frozen=True)
class Labelled:
    """One labelled file as the user gave it; ``where`` is its place in the labels, for messages."""

    file: str
    label: str
    name: str
    group: str
    source: str
    where: str


def read_labels(labels: Path | str, images: Path | str | None = None) -> tuple[Photos, list[Labelled]]:
    """Where the photos lie, and every labelled file, ordered by name.

    Args:
        labels: CSV with ``file, label`` and optional ``label_name, group, source``, or a folder, tar or address with
            one sub-folder of images per class; its ``labels.csv`` is taken where there is one.
        images: folder, tar or address that ``file`` is relative to; what holds the CSV by default.

    Raises:
        InputError: no such labels, or anything wrong in them.
    """
    place = Path(labels)
    table: ImageFile | None = None
    if is_source(labels):
        photos = _opened(labels)
        if (place / TABLE).is_file() if isinstance(photos, Folder) else TABLE in photos.keys():  # noqa: SIM118
            table = Photo(photos, TABLE)
    elif place.is_file():
        photos, table = _opened(place.parent), place
    else:
        raise InputError(
            f"--labels must be a CSV, or a folder or tar with one sub-folder per class, got {labels}, which does not "
            "exist"
        )
    if table is None:
        entries = _read_folders(photos)
    else:
        if images is not None:
            if not is_source(images):
                raise InputError(f"--images must be a folder or a tar, got {images}")
            photos = _opened(images)
        entries = _read_csv(table, photos.root)
    seen: dict[str, Labelled] = {}
    for entry in entries:
        if entry.file in seen:
            raise InputError(
                f"every file must be listed once, got {entry.file} in {seen[entry.file].where} and {entry.where}; "
                "remove one of them"
            )
        seen[entry.file] = entry
    return photos, sorted(entries, key=lambda entry: entry.file)


def _opened(root: Path | str) -> Photos:
    return open_photos(root if is_address(root) else Path(root).resolve())


def left_out(labels: Path | str, images: Path | str | None, files: Collection[str]) -> Found:
    """What lies in the folder, tar or address that was given for labels or images, and is none of the files.

    Nothing is looked for beside a CSV whose photos' folder was not named.
    """
    named = images if images is not None else labels
    if not is_source(named):
        return Found([], [])
    found = look(_opened(named))
    own = {TABLE} if images is None else set()
    rest = [one for one in found.passed if one.key not in own]
    tabled = images is not None or len(rest) < len(found.passed)
    why = "not in the table" if tabled else "in no folder of a class"
    return Found(found.keys, rest).but(keys=[key for key in found.keys if key in files], why=why)


def _read_folders(photos: Photos) -> list[Labelled]:
    entries = []
    for key in look(photos).keys:
        folder, slash, _ = key.partition("/")
        if slash:
            entries.append(Labelled(key, folder, folder, key, "", f"folder {folder}"))
    if not entries:
        raise InputError(f"--labels must hold one sub-folder of images per class, got {photos.root} without any")
    return entries


def _read_csv(table: ImageFile, root: str) -> list[Labelled]:
    sheet = read_table(table, COLUMNS, required=("file", "label"))
    if not sheet.cells:
        raise InputError(f"{table} must have at least one row under its header, got none")
    entries = [_labelled(cells, where, root) for where, cells in sheet]
    if not any(entry.name for entry in entries):
        return [replace(entry, name=entry.label) for entry in entries]
    for entry in entries:
        if not entry.name:
            raise InputError(f"label_name must be given in every row or in none, got an empty one in {entry.where}")
    by_label: dict[str, Labelled] = {}
    by_name: dict[str, Labelled] = {}
    for entry in entries:
        for known, key in ((by_label, entry.label), (by_name, entry.name)):
            other = known.setdefault(key, entry)
            if (other.label, other.name) != (entry.label, entry.name):
                raise InputError(
                    f"label and label_name must be one to one, got {other.label} = '{other.name}' in {other.where} "
                    f"and {entry.label} = '{entry.name}' in {entry.where}"
                )
    return entries


def _labelled(cells: Mapping[str, str], where: str, root: str) -> Labelled:
    for column in ("file", "label"):
        if not cells[column]:
            raise InputError(f"{column} must not be empty, got an empty {column} in {where}")
    file = _relative(cells["file"], where, root)
    group = cells.get("group") or file
    return Labelled(file, cells["label"], cells.get("label_name", ""), group, cells.get("source", ""), where)


def _relative(text: str, where: str, root: str) -> str:
    text = slashes(text)
    # Lexical, so that links inside the folder may point anywhere, but no row climbs out of it.
    inside = os.path.relpath(os.path.normpath(Path(root) / text), root)
    if "\0" in text or inside == "." or Path(inside).parts[0] == "..":
        raise InputError(
            f"file must be inside {root}, got {text!r} in {where}; name the folder that holds all images with --images"
        )
    return Path(inside).as_posix()


def classes_of(entries: Sequence[Labelled], given: Sequence[str] | None) -> list[str]:
    """Class names in the order of the logits: those given, or those found, ordered by label (numbers by value).

    Raises:
        InputError: fewer than two classes, a name given twice, or a label that is none of those given.
    """
    label_of = {entry.name: entry.label for entry in entries}
    if given is None:
        numeric = all(re.fullmatch(r"[+-]?\d+", label) for label in label_of.values())
        names = sorted(label_of, key=lambda name: (int(label_of[name]), name) if numeric else (0, label_of[name]))
    else:
        names = [str(name).strip() for name in given]
        if len(set(names)) != len(names) or not all(names):
            raise InputError(f"--classes must be different names, got {', '.join(names)}")
        for entry in entries:
            if entry.name not in names:
                raise InputError(
                    f"unknown label '{entry.name}' in {entry.where}{nearest(entry.name, names)}; "
                    f"classes: {', '.join(names)}"
                )
    if len(names) < 2:
        raise InputError(_ONE_CLASS.format(names[0]))
    return names


def positive_of(given: str | None, names: Sequence[str], entries: Sequence[Labelled]) -> str:
    """The positive class by its name, or by the label it has in the CSV; raises InputError."""
    if given is not None and given not in names:
        given = next((entry.name for entry in entries if entry.label == given), given)
    return choose_positive(names, given)


def check_contents(entries: Sequence[Labelled], contents: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse one content (sha256 of each file) under two labels, and classes without a readable image: InputError."""
    seen: dict[str, Labelled] = {}
    for entry in entries:
        other = seen.setdefault(contents[entry.file], entry)
        if other.name != entry.name:
            raise InputError(
                f"one image must have one label, got the same content in {other.file} ('{other.name}') and "
                f"{entry.file} ('{entry.name}'); correct or remove one of them"
            )
    present = {entry.name for entry in entries}
    if len(present) == 1:
        raise InputError(_ONE_CLASS.format(*present))
    for name in names:
        if name not in present:
            raise InputError(f"every class must have readable images, got none of '{name}'; add some or leave it out")


@dataclass(frozen=True)
class Gathered:
    """Name to show and place of every image of the inputs, in order, and what their folders hold besides."""

    files: list[tuple[str, ImageFile]]
    passed: list[Passed]


def gather(inputs: Sequence[Path | str]) -> Gathered:
    """Find every image of files, folders, tars, addresses and CSV files with a column ``file``.

    Raises:
        InputError: an input does not exist or holds no image, or there are none.
    """
    files: list[tuple[str, ImageFile]] = []
    passed: list[Passed] = []
    for given in inputs:
        path = Path(given)
        if is_source(given):
            photos = open_photos(given)
            found = look(photos)
            if not found.keys:
                words = found.words() or "nothing is in it"
                raise InputError(f"inputs must hold images, got {given} with none; {words}")
            taken = [Photo(photos, key) for key in found.keys]
            files += [(str(one), one) for one in taken]
            passed += [replace(one, key=str(Photo(photos, one.key))) for one in found.passed]
        elif path.suffix.lower() == ".csv" and path.exists():
            beside = Folder(str(path.parent))
            files += [(row["file"], Photo(beside, row["file"])) for row in read_list(path)]
        elif path.exists() or in_tar(path):
            files.append((str(path), path))
        else:
            raise InputError(f"inputs must exist, got {path}, and there is no such file or folder")
    if not files:
        raise InputError("inputs must name at least one image, folder, tar or CSV file, got none")
    return Gathered(files, passed)


def read_list(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with a column ``file``, relative to the CSV's folder, as text by column.

    Raises:
        InputError: the CSV cannot be read, lists no image, or has a row that names none.
    """
    rows = []
    for where, cells in read_table(path, COLUMNS, required=("file",)):
        if not cells["file"]:
            raise InputError(f"file must not be empty, got an empty file in {where}")
        rows.append({**cells, "file": slashes(cells["file"])})
    if not rows:
        raise InputError(f"{path} must list at least one image, got none")
    return rows
