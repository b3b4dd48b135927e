"""Labelled images to four splits that cannot leak.

The unit is the group (clip, track, place). Groups that share near-duplicate images are joined first, so that no
picture is on both sides of a border. The result depends on the files, their labels and the seed, never on row order.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy.fft import dctn

from stage1_pro.classes import choose_positive
from stage1_pro.data.images import ImageError, Quarantined, read_image
from stage1_pro.errors import ArtifactError, InputError, nearest
from stage1_pro.files import sha256_bytes, sha256_file
from stage1_pro.progress import track
from stage1_pro.record import Record
from stage1_pro.words import HALVES, SPLITS, Half, SplitName


class Row(Record):
    """One labelled image of a run."""

    id: str
    file: str
    label: str
    group: str
    source: str = ""
    split: SplitName
    half: Half | None = None
    sha256: str


class Merging(Record):
    """What near-duplicate detection joined across groups."""

    pairs: int
    components: int
    largest_rows: int
    largest_share: float
    largest_groups: list[str]


class Splits(Record):
    """``splits.json``: every row of a run, its split and the hash of every split.

    ``hashes`` has an entry per split and for ``val_calib.fit`` and ``val_calib.certify``.
    """

    format_version: Literal[1] = 1
    root: str
    classes: list[str]
    positive: str
    seed: int
    fractions: dict[SplitName, float]
    folds: int | None = None
    fold: int | None = None
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    quarantined: int = 0
    merging: Merging
    rows: list[Row]

    def of(self, split: SplitName, half: Half | None = None) -> list[Row]:
        """Rows of one split (or one half of ``val_calib``), in file order."""
        return [r for r in self.rows if r.split == split and (half is None or r.half == half)]

    def verify(self) -> Self:
        """Check that the rows are those the hashes were taken of, and that no two splits share any.

        Raises:
            ArtifactError: rows were moved, added, removed or relabelled since the split.
        """
        if hash_splits(self.rows) != self.hashes:
            raise ArtifactError(
                "splits.json must be as `stage1 split` wrote it, but its rows do not give its hashes; split again"
            )
        where: dict[str, str] = {}
        for row in self.rows:
            for key in (f"group {row.group}", f"content {row.sha256}"):
                if where.setdefault(key, row.split) != row.split:
                    raise ArtifactError(f"splits must not share images, got {key} in {where[key]} and {row.split}")
        return self

    def path(self, row: Row) -> Path:
        """Where the row's image is."""
        return Path(self.root) / row.file

    def indices(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """Class index of every row [N], its place among ``classes``."""
        place = {name: index for index, name in enumerate(self.classes)}
        return np.asarray([place[row.label] for row in rows], dtype=np.int64)

    def summary(self) -> SplitsSummary:
        """The part that may leave the house: hashes and counts, no file names."""
        return SplitsSummary(
            classes=self.classes,
            positive=self.positive,
            seed=self.seed,
            fractions=self.fractions,
            counts=self.counts,
            groups=self.groups,
            hashes=self.hashes,
            group_shares=self._group_shares(),
        )

    def _group_shares(self) -> dict[str, float]:
        rows = self.of("val_calib")
        sizes: dict[str, int] = {}
        for row in rows:
            sizes[row.group] = sizes.get(row.group, 0) + 1
        shares = dict.fromkeys(self.classes, 0.0)
        for row in rows:
            shares[row.label] += 1 / (sizes[row.group] * len(sizes))
        return shares


def hash_splits(rows: Sequence[Row]) -> dict[str, str]:
    """The hash of every split and half: contents, labels and groups, in any order and under any file names."""
    parts: dict[str, list[Row]] = {split: [row for row in rows if row.split == split] for split in SPLITS}
    for half in HALVES:
        parts[f"val_calib.{half}"] = [row for row in rows if row.half == half]
    return {
        name: sha256_bytes("\n".join(sorted(f"{r.sha256} {r.label} {r.group}" for r in part)).encode())
        for name, part in parts.items()
    }


class SplitsSummary(Record):
    """``splits.json`` of a bundle: hashes and counts only."""

    format_version: Literal[1] = 1
    classes: list[str]
    positive: str
    seed: int
    fractions: dict[SplitName, float]
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    group_shares: dict[str, float] = Field(
        default={}, description="share of every label in val_calib where groups count alike, as certificates count them"
    )


FRACTIONS: dict[SplitName, float] = {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}
# Two pictures are one when few of 64 hash bits differ and their pixels correlate: as a whole (grey, 8 x 8), in detail
# (grey, 32 x 32) and in colour (8 x 8). Measured on 19.8 million pairs of different signs of roadwork_signs, of which
# 41 thousand are within 12 bits: the most alike reach .9949 as a whole ("70" and "120" on dark plates). Copies (JPEG
# 50-95, x0.5-2, brightness 10%) stay above .996 on all street scenes and on 9 in 10 signs, tiny ones among them; as a
# whole tells copies from look-alikes better than detail does, since re-encoding a small picture costs its detail.
HASH_BITS = 14
WHOLE = 0.996
DETAIL = 0.96
COLOUR = 0.93
MEAN_DIFFERENCE = 32.0
_SIDE = 32
_GREY = np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
_ROWS, _COLUMNS = 64, 2048

Key = TypeVar("Key", bound=Hashable)


class QuarantineError(InputError):
    """Too many files cannot be used; ``quarantined`` lists them."""

    def __init__(self, message: str, quarantined: list[Quarantined]) -> None:
        super().__init__(message)
        self.quarantined = quarantined


@dataclass(frozen=True)
class _Entry:
    """One labelled file as the user gave it; ``where`` says where, for messages."""

    file: str
    label: str
    name: str
    group: str
    source: str
    where: str


@dataclass(frozen=True)
class Picture:
    """What near-duplicates are found by: hex sha256 of the file and a small copy [32, 32, 3] uint8."""

    sha256: str
    small: NDArray[np.uint8]


def make_splits(
    labels: Path | str,
    *,
    images: Path | str | None = None,
    positive: str | None = None,
    classes: Sequence[str] | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
    max_component: float = 0.05,
    max_quarantine: float = 0.02,
) -> tuple[Splits, list[Quarantined]]:
    """Cut labelled images into train, val_select, val_calib (fit and certify halves) and val_test.

    A row's ``group`` in the result is the unit of splits, certificates and intervals: the group given (the file
    itself when none is), or, where near-duplicates join several, the first of their names.

    Args:
        labels: CSV with ``file, label`` and optional ``label_name, group, source``, or a folder with one
            sub-folder of images per class.
        images: folder that ``file`` is relative to; the CSV's own by default.
        positive: name (or label) of the positive class; needed unless there are two classes and one of them has
            a name that means "none".
        classes: class names in the order of the logits; found in the data by default, ordered by label.
        fractions: share of every split; they sum to 1.
        seed: another seed, other splits.
        folds: cut into this many folds instead; ``val_test`` is fold number ``fold``, the other splits share
            the rest in proportion.
        fold: 0 .. folds - 1; the same seed gives folds that hold every group exactly once.
        max_component: largest share of the rows that near-duplicates may tie together across groups.
        max_quarantine: largest share of the files that may be unreadable.

    Returns:
        The splits, and the files left out with their reasons.

    Raises:
        QuarantineError: too many files cannot be read as images.
        InputError: anything wrong with the labels, or splits that cannot hold every class.
    """
    for name, limit in (("max_component", max_component), ("max_quarantine", max_quarantine)):
        if not 0 <= limit <= 1:  # written so that NaN fails too
            raise InputError(f"--{name.replace('_', '-')} must be a share from 0 to 1, got {limit}")
    shares = _shares(fractions, folds, fold)
    root, entries = _read_labels(Path(labels), Path(images) if images is not None else None)
    names = _classes(entries, classes)
    target = _positive(positive, names, entries)

    pictures, quarantined = read_pictures(root, [entry.file for entry in entries])
    if len(quarantined) > max_quarantine * len(entries):
        first = "; ".join(f"{q.file}: {q.reason}" for q in quarantined[:3])
        raise QuarantineError(
            f"images under {root} must be readable for all but {max_quarantine:.1%} of the rows, got "
            f"{len(quarantined)} of {len(entries)} that are not ({first}); repair or remove them, "
            "name the right folder with --images, or raise --max-quarantine",
            quarantined,
        )
    entries = [entry for entry in entries if entry.file in pictures]
    _refuse_contradictions(entries, pictures)
    _refuse_missing(Counter(entry.name for entry in entries), names)

    units, merging = _join_groups(entries, pictures, max_component)
    split_of = _assign_splits(entries, units, names, shares, seed, folds, fold)
    inside = [i for i, unit in enumerate(units) if split_of[unit] == "val_calib"]
    half_of = assign(
        _unit_counts([entries[i] for i in inside], [units[i] for i in inside], names),
        dict.fromkeys(HALVES, 0.5),
        f"{seed}:halves",
    )
    rows = [
        Row(
            id=sha256_bytes(entry.file.encode("utf-8", "surrogateescape"))[:16],
            file=entry.file,
            label=entry.name,
            group=unit,
            source=entry.source,
            split=split_of[unit],
            half=half_of.get(unit),
            sha256=pictures[entry.file].sha256,
        )
        for entry, unit in zip(entries, units, strict=True)
    ]
    counts = _split_counts(rows, names)
    _refuse_lacking(counts, rows, names)
    splits = Splits(
        root=str(root),
        classes=names,
        positive=target,
        seed=seed,
        fractions=shares,
        folds=folds,
        fold=fold,
        counts=counts,
        groups=_split_groups(rows),
        hashes=hash_splits(rows),
        quarantined=len(quarantined),
        merging=merging,
        rows=rows,
    )
    return splits.verify(), quarantined


def resplit(splits: Splits, seed: int) -> Splits:
    """Cut everything but ``val_test`` anew, by the same groups and shares; the splits' own seed gives other rows too.

    ``val_test`` keeps its rows, so that a choice on the ``val_select`` of many seeds has seen none of them. No image is
    read: near-duplicates were joined into groups when the data was split first.

    Args:
        splits: of ``make_splits``.
        seed: another seed, other splits.

    Raises:
        InputError: a class that cannot be in every split.
    """
    rest = [row for row in splits.rows if row.split != "val_test"]
    shares = {name: share for name, share in splits.fractions.items() if name != "val_test"}
    total = sum(shares.values())
    text = f"{splits.seed}:but val_test:{seed}"
    units = _row_counts(rest, splits.classes)
    split_of = assign(units, {name: share / total for name, share in shares.items()}, f"{text}:splits")
    inside = [row for row in rest if split_of[row.group] == "val_calib"]
    half_of = assign(_row_counts(inside, splits.classes), dict.fromkeys(HALVES, 0.5), f"{text}:halves")
    rows = [
        row
        if row.split == "val_test"
        else row.model_copy(update={"split": split_of[row.group], "half": half_of.get(row.group)})
        for row in splits.rows
    ]
    counts = _split_counts(rows, splits.classes)
    _refuse_lacking(counts, rows, splits.classes)
    changed = {"counts": counts, "groups": _split_groups(rows), "hashes": hash_splits(rows), "rows": rows}
    return splits.model_copy(update={**changed, "seed": seed}).verify()


def _row_counts(rows: Sequence[Row], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    counts = {unit: np.zeros(len(names), dtype=np.int64) for unit in sorted({row.group for row in rows})}
    for row in rows:
        counts[row.group][names.index(row.label)] += 1
    return counts


def _split_counts(rows: Sequence[Row], names: Sequence[str]) -> dict[SplitName, dict[str, int]]:
    return {s: {name: sum(r.split == s and r.label == name for r in rows) for name in names} for s in SPLITS}


def _split_groups(rows: Sequence[Row]) -> dict[SplitName, int]:
    return {s: len({r.group for r in rows if r.split == s}) for s in SPLITS}


# --------------------------------------------------------------------------------------------
# Labels

_ONE_CLASS = "labels must have two classes or more, got one class only: '{}'; add images of another"


def _read_labels(labels: Path, images: Path | None) -> tuple[Path, list[_Entry]]:
    if labels.is_dir() and (labels / "labels.csv").is_file():
        labels = labels / "labels.csv"
    if labels.is_dir():
        root, entries = labels.resolve(), _read_folder(labels.resolve())
    elif labels.is_file():
        root = (images if images is not None else labels.parent).resolve()
        if not root.is_dir():
            raise InputError(f"--images must be a folder, got {images}")
        entries = _read_csv(labels, root)
    else:
        raise InputError(
            f"--labels must be a CSV or a folder with one sub-folder per class, got {labels}, which does not exist"
        )
    seen: dict[str, _Entry] = {}
    for entry in entries:
        if entry.file in seen:
            raise InputError(
                f"every file must be listed once, got {entry.file} in {seen[entry.file].where} and {entry.where}; "
                "remove one of them"
            )
        seen[entry.file] = entry
    return root, sorted(entries, key=lambda entry: entry.file)


def _read_folder(root: Path) -> list[_Entry]:
    entries = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(root)
            if path.is_dir() or any(part.startswith(".") for part in file.parts) or path.name in _SYSTEM_FILES:
                continue
            name = file.as_posix()
            entries.append(_Entry(name, folder.name, folder.name, name, "", f"folder {folder.name}"))
    if not entries:
        raise InputError(f"--labels must hold one sub-folder of images per class, got {root} without any")
    return entries


_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})


def _read_csv(path: Path, root: Path) -> list[_Entry]:
    text = _decode(path)
    header = text.split("\n", 1)[0]
    delimiter = next((d for d in ",;\t" if {"file", "label"} <= {_clean(c).strip('"') for c in header.split(d)}), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="\0")
    entries: list[_Entry] = []
    try:
        columns = [_clean(name) for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for column in ("file", "label"):
            if column not in columns:
                raise InputError(
                    f"{path} must have a column '{column}', got {', '.join(columns) or 'an empty file'}"
                    f"{nearest(column, columns)}"
                )
        entries.extend(_entry(cells, f"{path.name} line {reader.line_num}", root) for cells in reader)
    except csv.Error as error:
        raise InputError(f"{path} must be a CSV, got in line {reader.line_num}: {error}") from None
    if not entries:
        raise InputError(f"{path} must have at least one row under its header, got none")
    names = {bool(entry.name) for entry in entries}
    if names == {False}:
        return [_Entry(e.file, e.label, e.label, e.group, e.source, e.where) for e in entries]
    for entry in entries:
        if not entry.name:
            raise InputError(f"label_name must be given in every row or in none, got an empty one in {entry.where}")
    _refuse_double_names(entries)
    return entries


def _entry(cells: Mapping[str, str | None], where: str, root: Path) -> _Entry:
    if "\0" in cells:
        raise InputError(f"{where} must have as many cells as the header, got more; quote cells that hold commas")
    get = {key: _clean(value) for key, value in cells.items()}
    for column in ("file", "label"):
        if not get[column]:
            raise InputError(f"{column} must not be empty, got an empty {column} in {where}")
    file = _relative(get["file"], where, root)
    return _Entry(file, get["label"], get.get("label_name", ""), get.get("group") or file, get.get("source", ""), where)


def _clean(value: str | None) -> str:
    return (value or "").strip()


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--labels must be readable, got {path}: {error.strerror}") from None
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path} must be UTF-8 text, got other bytes in line {line}; save it as CSV UTF-8") from None


def _relative(text: str, where: str, root: Path) -> str:
    if "\\" in text and "/" not in text:
        text = text.replace("\\", "/")
    # Lexical, so that links inside the folder may point anywhere, but no row climbs out of it.
    inside = os.path.relpath(os.path.normpath(root / text), root)
    if "\0" in text or inside == "." or Path(inside).parts[0] == "..":
        raise InputError(
            f"file must be inside {root}, got {text!r} in {where}; name the folder that holds all images with --images"
        )
    return Path(inside).as_posix()


def _refuse_double_names(entries: Sequence[_Entry]) -> None:
    by_label: dict[str, _Entry] = {}
    by_name: dict[str, _Entry] = {}
    for entry in entries:
        for known, key in ((by_label, entry.label), (by_name, entry.name)):
            other = known.setdefault(key, entry)
            if (other.label, other.name) != (entry.label, entry.name):
                raise InputError(
                    f"label and label_name must be one to one, got {other.label} = '{other.name}' in {other.where} "
                    f"and {entry.label} = '{entry.name}' in {entry.where}"
                )


def _classes(entries: Sequence[_Entry], given: Sequence[str] | None) -> list[str]:
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


def _positive(given: str | None, names: Sequence[str], entries: Sequence[_Entry]) -> str:
    """The positive class by its name, or by the label it has in the CSV."""
    if given is not None and given not in names:
        given = next((entry.name for entry in entries if entry.label == given), given)
    return choose_positive(names, given)


def _refuse_contradictions(entries: Sequence[_Entry], pictures: Mapping[str, Picture]) -> None:
    seen: dict[str, _Entry] = {}
    for entry in entries:
        other = seen.setdefault(pictures[entry.file].sha256, entry)
        if other.name != entry.name:
            raise InputError(
                f"one image must have one label, got the same content in {other.file} ('{other.name}') and "
                f"{entry.file} ('{entry.name}'); correct or remove one of them"
            )


def _refuse_missing(counts: Mapping[str, int], names: Sequence[str]) -> None:
    present = [name for name in names if counts.get(name)]
    if len(present) == 1:
        raise InputError(_ONE_CLASS.format(present[0]))
    for name in names:
        if name not in present:
            raise InputError(f"every class must have readable images, got none of '{name}'; add some or leave it out")


# --------------------------------------------------------------------------------------------
# Near-duplicates


def read_pictures(root: Path, files: Sequence[str]) -> tuple[dict[str, Picture], list[Quarantined]]:
    """Read images under ``root``: by file what shows near-duplicates, and in order those that cannot be used."""
    pictures: dict[str, Picture] = {}
    quarantined = []
    # Threads: Pillow decodes outside the interpreter lock, and nothing has to be sent back through a pipe.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: _read_picture(root, file), files)
        for file, picture in zip(files, track(found, "reading images", total=len(files)), strict=True):
            if isinstance(picture, Quarantined):
                quarantined.append(picture)
            else:
                pictures[file] = picture
    return pictures, quarantined


def _read_picture(root: Path, file: str) -> Picture | Quarantined:
    try:
        file.encode()
    except UnicodeEncodeError:
        return Quarantined(file, "unreadable: the file name is not UTF-8; rename it")
    try:
        image = read_image(root / file)
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        return Picture(sha256_file(root / file), np.asarray(small))
    except ImageError as error:
        return Quarantined(file, f"{error.reason}: {error.detail}")
    except OSError as error:
        return Quarantined(file, f"unreadable: {error.strerror}")


def perceptual_hashes(small: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64 bits per picture [N, 32, 32, 3] → [N]: signs of its lowest 8 x 8 DCT coefficients around their median."""
    grey = small.astype(np.float32) @ _GREY
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(small), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def near_duplicates(small: NDArray[np.uint8], groups: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs (i < j) of different groups that show the same picture.

    A perceptual hash gives the candidates and pixels decide: signs of one kind are alike to any such hash.

    Args:
        small: pictures at 32 x 32 [N, 32, 32, 3].
        groups: group number of each [N]; pairs within a group are not looked for.
    """
    hashes = perceptual_hashes(small)
    coarse = small.reshape(-1, 8, _SIDE // 8, 8, _SIDE // 8, 3).mean((2, 4), dtype=np.float32)
    whole = _centred((coarse @ _GREY).reshape(-1, 64))
    colour = _centred(coarse.reshape(-1, 192))
    pairs: list[tuple[int, int]] = []
    # All pairs, in blocks that stay in the cache: exact, and without the worst cases of buckets.
    for top in range(0, len(hashes), _ROWS):
        for start in range(top, len(hashes), _COLUMNS):
            distance = np.bitwise_count(hashes[top : top + _ROWS, None] ^ hashes[None, start : start + _COLUMNS])
            near = np.flatnonzero((distance <= HASH_BITS).ravel())
            i, j = near // distance.shape[1] + top, near % distance.shape[1] + start
            keep = (i < j) & (groups[i] != groups[j])
            i, j = i[keep], j[keep]
            for rows, least in ((whole, WHOLE), (colour, COLOUR)):
                keep = _correlation(rows[i], rows[j]) >= least
                i, j = i[keep], j[keep]
            for k in range(0, len(i), 4096):
                same = _same(small[i[k : k + 4096]], small[j[k : k + 4096]])
                pairs += zip(i[k : k + 4096][same].tolist(), j[k : k + 4096][same].tolist(), strict=True)
    return pairs


def _centred(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", rows - rows.mean(axis=1, keepdims=True))


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Correlation of centred rows; 1 where both are flat, 0 where one is."""
    dot, aa, bb = (np.einsum("ij,ij->i", x, y).astype(np.float64) for x, y in ((a, b), (a, a), (b, b)))
    size = a.shape[1] or 1
    flat_a, flat_b = aa < size, bb < size  # less than one level of deviation
    value = dot / np.sqrt(np.where(flat_a | flat_b, 1, aa * bb))
    return np.where(flat_a & flat_b, 1.0, np.where(flat_a | flat_b, 0.0, value))


def _same(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
    x, y = (side.astype(np.float32) for side in (a, b))
    difference = np.abs(x - y).mean(axis=(1, 2, 3))
    x, y = (_centred((side @ _GREY).reshape(-1, _SIDE * _SIDE)) for side in (x, y))
    flat = np.minimum(x.std(axis=1), y.std(axis=1)) < 1
    # Empty pictures correlate with each other whatever their colour.
    close = difference <= np.where(flat, 1.0, MEAN_DIFFERENCE)
    return cast("NDArray[np.bool_]", close & (_correlation(x, y) >= DETAIL))


def cluster_copies(root: Path, files: Sequence[str]) -> list[str]:
    """The first file of those that show the same picture, for each of some files under ``root``, in their order.

    Copies are what ``near_duplicates`` finds, and copies of copies; a file that is no image is one of its own.
    """
    pictures, _ = read_pictures(root, files)
    shown = [i for i, file in enumerate(files) if file in pictures]
    if not shown:
        return list(files)
    pairs = near_duplicates(np.stack([pictures[files[i]].small for i in shown]), np.arange(len(shown)))
    roots = _components(len(files), ((shown[i], shown[j]) for i, j in pairs))
    return [files[i] for i in roots]


def _components(n: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest of those that pairs tie to each of 0 .. n - 1."""
    parent = list(range(n))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        a, b = sorted((root_of(i), root_of(j)))
        parent[b] = a
    return [root_of(i) for i in range(n)]


def _join_groups(
    entries: Sequence[_Entry], pictures: Mapping[str, Picture], max_component: float
) -> tuple[list[str], Merging]:
    """The unit each row belongs to: its group, or the first name of the groups joined by near-duplicates."""
    names = sorted({entry.group for entry in entries})
    number = {name: i for i, name in enumerate(names)}
    groups = np.asarray([number[entry.group] for entry in entries], dtype=np.int64)
    pairs = near_duplicates(np.stack([pictures[entry.file].small for entry in entries]), groups)
    found = set(pairs)
    by_content: dict[str, int] = {}
    for i, entry in enumerate(entries):
        first = by_content.setdefault(pictures[entry.file].sha256, i)
        if groups[first] != groups[i]:
            found.add((first, i))

    # The smallest number, so that a component is called by its first name.
    roots = _components(len(names), ((int(groups[i]), int(groups[j])) for i, j in found))
    members: dict[int, list[str]] = defaultdict(list)
    for i, name in enumerate(names):
        members[roots[i]].append(name)
    units = [names[roots[group]] for group in groups]
    sizes = Counter(units)
    joined = {names[i]: group for i, group in members.items() if len(group) > 1}
    largest = max(joined, key=lambda name: (sizes[name], name), default=None)
    rows = sizes[largest] if largest is not None else 0
    if largest is not None and rows > max(2, max_component * len(entries)):
        shown = ", ".join(joined[largest][:3]) + (", ..." if len(joined[largest]) > 3 else "")
        i, j = next((i, j) for i, j in sorted(found) if units[i] == largest)
        raise InputError(
            f"near-duplicates across groups must tie at most {max_component:.1%} of the rows together, got {rows} of "
            f"{len(entries)} rows in {len(joined[largest])} groups ({shown}; for example {entries[i].file} and "
            f"{entries[j].file}); remove the copies, give frames of one clip or place one `group`, or accept it with "
            f"--max-component {rows / len(entries) + 0.005:.2f}"
        )
    return units, Merging(
        pairs=len(found),
        components=len(joined),
        largest_rows=rows,
        largest_share=rows / len(entries),
        largest_groups=joined[largest] if largest is not None else [],
    )


# --------------------------------------------------------------------------------------------
# Assignment


def _shares(fractions: Mapping[str, float] | None, folds: int | None, fold: int | None) -> dict[SplitName, float]:
    given = dict(FRACTIONS if fractions is None else fractions)
    for name in given:
        if name not in SPLITS:
            raise InputError(f"fractions must be of {', '.join(SPLITS)}, got '{name}'{nearest(name, SPLITS)}")
    shares: dict[SplitName, float] = {name: float(given.get(name, 0)) for name in SPLITS}
    if not all(0 < share < 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        shown = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise InputError(f"fractions must be above 0 for every split and sum to 1, got {shown}; no split may be empty")
    if folds is None:
        if fold is not None:
            raise InputError(f"--fold must come with --folds, got --fold {fold} alone")
        return shares
    if folds < 2:
        raise InputError(f"--folds must be 2 or more, got {folds}")
    if fold is None or not 0 <= fold < folds:
        raise InputError(f"--fold must be 0 to {folds - 1}, got {fold}")
    rest = 1 - shares["val_test"]
    return {name: 1 / folds if name == "val_test" else shares[name] / rest * (1 - 1 / folds) for name in SPLITS}


def _unit_counts(entries: Sequence[_Entry], units: Sequence[str], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    counts = {unit: np.zeros(len(names), dtype=np.int64) for unit in sorted(set(units))}
    for entry, unit in zip(entries, units, strict=True):
        counts[unit][names.index(entry.name)] += 1
    return counts


def _assign_splits(
    entries: Sequence[_Entry],
    units: Sequence[str],
    names: Sequence[str],
    shares: Mapping[SplitName, float],
    seed: int,
    folds: int | None,
    fold: int | None,
) -> dict[str, SplitName]:
    counts = _unit_counts(entries, units, names)
    parts = len(SPLITS) if folds is None else max(folds, len(SPLITS))
    for k, name in enumerate(names):
        holding = sum(bool(count[k]) for count in counts.values())
        if holding < parts:
            where = "every split" if folds is None else f"each of {folds} folds and every split"
            raise InputError(
                f"class '{name}' must be in at least {parts} groups, so that {where} can have it, got {holding} "
                f"({sum(int(count[k]) for count in counts.values())} rows); add groups of it, or cut its groups into "
                "finer ones if they are independent"
            )
    if folds is None:
        return assign(counts, shares, f"{seed}:splits")
    fold_of = assign(counts, dict.fromkeys(range(folds), 1 / folds), f"{seed}:folds:{folds}")
    result: dict[str, SplitName] = {unit: "val_test" for unit, number in fold_of.items() if number == fold}
    rest = {unit: count for unit, count in counts.items() if unit not in result}
    others = {name: share for name, share in shares.items() if name != "val_test"}
    total = sum(others.values())
    return result | assign(rest, {name: share / total for name, share in others.items()}, f"{seed}:fold:{folds}:{fold}")


def assign(counts: Mapping[str, NDArray[np.int64]], shares: Mapping[Key, float], seed: str) -> dict[str, Key]:
    """Give every unit a part, so that rows and units of each class come near the parts' shares.

    Units are taken in a seeded order (large ones first, since they cannot be made up for) and each goes where the
    squared deviation from the shares grows least; the best of several orders is kept, complete ones first. A class
    that a part still lacks is moved there from where more than one unit has it.

    Args:
        counts: rows of each class [K] of every unit.
        shares: share of every part, summing to 1.
        seed: text that the order is derived from; platform and library versions do not matter.
    """
    names = sorted(counts)
    parts = list(shares)
    if not names:
        return {}
    rows = np.stack([counts[name] for name in names]).astype(np.float64)
    features = np.concatenate([rows, rows > 0], axis=1)
    features /= np.maximum(features.sum(axis=0), 1)
    fraction = np.asarray([shares[part] for part in parts])
    large = features.max(axis=1) > 0.1 * fraction.min()
    best: tuple[int, float] | None = None
    chosen = np.zeros(len(names), dtype=np.int64)
    for start in range(max(1, min(32, 20_000 // len(names)))):
        keys = [hashlib.sha256(f"{seed}:{start}:{name}".encode("utf-8", "surrogateescape")).digest() for name in names]
        order = sorted(range(len(names)), key=lambda i: (not large[i], keys[i]))
        placed = _greedy(features, fraction, order)
        _repair(features, rows > 0, fraction, placed)
        missing = sum(int((~(rows[placed == part] > 0).any(axis=0)).sum()) for part in range(len(parts)))
        quality = (missing, _deviation(features, fraction, placed))
        if best is None or quality < best:
            best, chosen = quality, placed
    return {name: parts[int(part)] for name, part in zip(names, chosen, strict=True)}


def _greedy(features: NDArray[np.float64], fraction: NDArray[np.float64], order: Sequence[int]) -> NDArray[np.int64]:
    placed = np.zeros(len(features), dtype=np.int64)
    filled = np.zeros((len(fraction), features.shape[1]))
    for i in order:
        unit = features[i]
        growth = (2 * (filled @ unit) + unit @ unit) / fraction
        part = int(np.argmin(growth))
        placed[i] = part
        filled[part] += unit
    return placed


def _deviation(features: NDArray[np.float64], fraction: NDArray[np.float64], placed: NDArray[np.int64]) -> float:
    filled = np.stack([features[placed == p].sum(axis=0) for p in range(len(fraction))])
    return float((filled**2 / fraction[:, None]).sum())


def _repair(
    features: NDArray[np.float64], holds: NDArray[np.bool_], fraction: NDArray[np.float64], placed: NDArray[np.int64]
) -> None:
    """Move units, in place, until every part has every class or no move is left that empties none."""
    for _ in range(len(fraction) * holds.shape[1]):
        have = np.stack([holds[placed == p].sum(axis=0) for p in range(len(fraction))])
        lacking = np.argwhere(have == 0)
        moves = []
        for part, k in lacking:
            # A unit may go when its part keeps another of each of its classes.
            for i in np.flatnonzero(holds[:, k]):
                if (have[placed[i]] - holds[i] < (have[placed[i]] > 0)).any():
                    continue
                moved = placed.copy()
                moved[i] = part
                moves.append((_deviation(features, fraction, moved), int(i), int(part)))
        if not moves:
            return
        _, unit, to = min(moves)
        placed[unit] = to


def _refuse_lacking(counts: Mapping[SplitName, Mapping[str, int]], rows: Sequence[Row], names: Sequence[str]) -> None:
    for split in SPLITS:
        if not any(counts[split].values()):
            raise InputError(f"{split} must not be empty, got no rows; add groups of images or raise its fraction")
        for name in names:
            if not counts[split][name]:
                holding = len({row.group for row in rows if row.label == name})
                raise InputError(
                    f"{split} must have every class, got none of '{name}', which is in {holding} groups; "
                    "try another --seed, add groups of it, or cut its groups into finer ones if they are independent"
                )
