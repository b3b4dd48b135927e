"""What a user names: labels (a CSV, or a folder or tar with a sub-folder of images per class), or images to look at."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stage1_pro.classes import check_names, choose_positive, known_as, spelled
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
from stage1_pro.data.tables import is_table, read_table, slashes
from stage1_pro.errors import InputError, nearest, printable
from stage1_pro.progress import say
from stage1_pro.words import GIVEN_SPLITS

COLUMNS = ("file", "label", "label_name", "group", "source", "split")
TABLE = "labels.csv"
_ONE_CLASS = "labels must have two classes or more, got one class only: '{}'; add images of another"


@dataclass(frozen=True)
class Labelled:
    """One labelled file as the user gave it; ``where`` is its place in the labels, for messages.

    ``split`` is a key of ``GIVEN_SPLITS``; empty where no splits are given.
    """

    file: str
    label: str
    name: str
    group: str
    source: str
    where: str
    split: str = ""


def read_labels(
    labels: Path | str,
    images: Path | str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Photos, list[Labelled]]:
    """Where the photos lie, and every labelled file, ordered by name.

    Args:
        labels: CSV with ``file, label`` and optional ``label_name, group, source, split``, or a folder, tar or address
            with one sub-folder of images per class, or with folders ``train``, ``val``, ``test`` of such ones; its
            ``labels.csv`` is taken where there is one.
        images: folder, tar or address that ``file`` is relative to; what holds the CSV by default.
        columns: what the CSV calls its columns.
        classes: the classes that the user has named: a folder ``train`` is one where it is among them.

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
        if columns:
            raise InputError(f"--columns must go with a CSV, got it with {labels}, which holds none")
        entries = _read_folders(photos, classes or ())
    else:
        if images is not None:
            if not is_source(images):
                raise InputError(f"--images must be a folder or a tar, got {images}")
            photos = _opened(images)
        entries = _read_csv(table, photos.root, columns)
        _check_once(entries)
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
    known = {unicodedata.normalize("NFC", file) for file in files}
    kept = [key for key in found.keys if unicodedata.normalize("NFC", key) in known]
    return Found(found.keys, rest).but(keys=kept, why=why)


def _check_once(entries: Sequence[Labelled]) -> None:
    seen: dict[str, Labelled] = {}
    for entry in entries:
        # A name in two compositions (NFC, NFD) is one file: either way it is found.
        other = seen.setdefault(unicodedata.normalize("NFC", entry.file), entry)
        if other is not entry:
            raise InputError(
                f"every file must be listed once, got {printable(entry.file)} in {other.where} and {entry.where}; "
                "remove one of them"
            )


def _read_folders(photos: Photos, classes: Collection[str]) -> list[Labelled]:
    keys = [key for key in look(photos).keys if "/" in key]
    if not keys:
        raise InputError(f"--labels must hold one sub-folder of images per class, got {photos.root} without any")
    given = _given_folders(photos.root, keys, classes)
    entries = []
    for key in keys:
        folder, _, rest = key.partition("/")
        split, folder = (folder, rest.partition("/")[0]) if given else ("", folder)
        name = unicodedata.normalize("NFC", folder)
        entries.append(Labelled(key, name, name, key, "", f"folder {folder}", split.lower()))
    return entries


def _given_folders(root: str, keys: Sequence[str], classes: Collection[str]) -> bool:
    """Whether the top folders are splits with folders of classes, and not classes; says so where that is a question.

    Raises:
        InputError: ``train`` holds folders of classes, but what lies beside it is no split or is not sorted by class.
    """
    direct: dict[str, bool] = defaultdict(bool)
    for key in keys:
        direct[key.partition("/")[0]] |= key.count("/") == 1
    called = {top: GIVEN_SPLITS[top.lower()] for top in direct if top.lower() in GIVEN_SPLITS}
    train = [top for top, parts in called.items() if parts == ("train",)]
    if not train or set(direct) & set(classes):
        return False
    shown = printable(", ".join(sorted(called)))
    if any(direct[top] for top in train):
        if len(called) > 1:
            say(f"read {shown} as classes: photos lie in {train[0]} itself, not in folders of classes")
        return False
    wrong = next((top for top in sorted(direct) if top not in called or direct[top]), None)
    if wrong is None:
        say(f"read {shown} as given splits, and the folders in them as classes")
        return True
    if len(called) == 1:
        return False
    what = "photos that are in no folder of a class" if wrong in called else "no name of a split (train, val, test)"
    raise InputError(
        f"--labels must hold splits of folders of classes throughout, got {root} with {shown}, and in "
        f"{printable(wrong)} {what}; move it out, or list the classes with --classes if these folders are classes"
    )


def _read_csv(table: ImageFile, root: str, columns: Mapping[str, str] | None) -> list[Labelled]:
    sheet = read_table(table, COLUMNS, required=("file", "label"), columns=columns)
    if not sheet.cells:
        raise InputError(f"{table} must have at least one row under its header, got none")
    entries = [_labelled(cells, where, root) for where, cells in sheet]
    if "split" in sheet.columns:
        say(f"read the column split as given splits: {', '.join(sorted({entry.split for entry in entries}))}")
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
                ours, theirs = (printable(f"{one.label} = '{one.name}'") for one in (other, entry))
                raise InputError(
                    f"label and label_name must be one to one, got {ours} in {other.where} and {theirs} in "
                    f"{entry.where}"
                )
    return entries


def _labelled(cells: Mapping[str, str], where: str, root: str) -> Labelled:
    for column in ("file", "label"):
        if not cells[column]:
            raise InputError(f"{column} must not be empty, got an empty {column} in {where}")
    file = _relative(cells["file"], where, root)
    group = cells.get("group") or file
    split = cells.get("split", "").lower()
    if "split" in cells and split not in GIVEN_SPLITS:
        raise InputError(
            f"split must be one of {', '.join(GIVEN_SPLITS)}, got '{printable(cells['split'])}' in {where}"
            f"{nearest(split, GIVEN_SPLITS)}; pass the column over with --columns split="
        )
    return Labelled(file, cells["label"], cells.get("label_name", ""), group, cells.get("source", ""), where, split)


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
        numeric = all(re.fullmatch(r"[+-]?\d{1,100}", label) for label in label_of.values())
        check_names([*label_of], "labels")
        names = sorted(label_of, key=lambda name: (int(label_of[name]), name) if numeric else (0, label_of[name]))
    else:
        plain = [unicodedata.normalize("NFC", str(name)).strip() for name in given]
        names = [name if name in label_of else spelled(name) for name in plain]
        check_names(names, "--classes", stated=True)
        for entry in entries:
            if entry.name not in names:
                raise InputError(
                    f"unknown label '{printable(entry.name)}' in {entry.where}{nearest(entry.name, names)}; "
                    f"classes: {', '.join(names)}"
                )
    if len(names) < 2:
        raise InputError(_ONE_CLASS.format(names[0]))
    return names


def positive_of(given: str | None, names: Sequence[str], entries: Sequence[Labelled]) -> str | None:
    """The positive class by its name, or by the label it has in the CSV; raises InputError.

    None where none is named of more than two classes: only of two does one name tell what the other one is.
    """
    if given is None and len(names) > 2:
        return None
    if given is not None and known_as(given, names) is None:
        given = next((entry.name for entry in entries if entry.label == spelled(given)), given)
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


def gather(inputs: Sequence[Path | str], columns: Mapping[str, str] | None = None) -> Gathered:
    """Find every image of files, folders, tars, addresses and CSV files with a column ``file``.

    ``columns`` says what the CSV files call it.

    Raises:
        InputError: an input does not exist or holds no image, or there are none.
    """
    if columns and not any(is_table(given) and not is_source(given) for given in inputs):
        raise InputError("--columns must go with a CSV, got none among the inputs; leave it out")
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
        elif is_table(path) and path.exists():
            beside = Folder(str(path.parent))
            files += [(row["file"], Photo(beside, row["file"])) for row in read_list(path, columns)]
        elif path.exists() or in_tar(path):
            files.append((str(path), path))
        else:
            raise InputError(f"inputs must exist, got {path}, and there is no such file or folder")
    if not files:
        raise InputError("inputs must name at least one image, folder, tar or CSV file, got none")
    return Gathered(files, passed)


def read_list(path: Path, columns: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Rows of a CSV with a column ``file``, relative to the CSV's folder, as text by column.

    ``columns`` says what the CSV calls them.

    Raises:
        InputError: the CSV cannot be read, lists no image, or has a row that names none.
    """
    rows = []
    for where, cells in read_table(path, COLUMNS, required=("file",), columns=columns):
        if not cells["file"]:
            raise InputError(f"file must not be empty, got an empty file in {where}")
        rows.append({**cells, "file": slashes(cells["file"])})
    if not rows:
        raise InputError(f"{path} must list at least one image, got none")
    return rows
