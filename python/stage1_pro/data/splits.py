"""Labelled images to four splits that cannot leak.

The unit is the group (clip, track, place). Groups that share near-duplicate images are joined first, so that no
picture is on both sides of a border. The result depends on the files, their labels and the seed, never on row order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from stage1_pro.arguments import check_share
from stage1_pro.data.duplicates import Merging, join_groups, read_pictures
from stage1_pro.data.images import Quarantined
from stage1_pro.data.labels import Labelled, check_contents, classes_of, positive_of, read_labels
from stage1_pro.data.photos import MOVED, Photo, Photos, digest, is_address, is_source, look, open_photos
from stage1_pro.errors import ArtifactError, InputError, nearest, printable
from stage1_pro.files import sha256_bytes
from stage1_pro.progress import track
from stage1_pro.record import Record
from stage1_pro.words import GIVEN_SPLITS, HALVES, SPLITS, Half, SplitName


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


class Given(Record):
    """Splits that the user gave, by name: what each became, and rows in quarantine so that none leaks into another."""

    became: dict[str, list[SplitName]]
    shared_groups: int = Field(ge=0, description="rows of a group that a better protected split has, too")
    near_copies: int = Field(ge=0, description="rows that near-copies tie to a better protected split")


class Splits(Record):
    """``splits.json``: every row of a run, its split and the hash of every split.

    ``hashes`` has an entry per split and for ``val_calib.fit`` and ``val_calib.certify``.
    """

    format_version: Literal[1] = 1
    root: str
    beside: str | None = Field(None, description="the same as seen from this file, which both may move with")
    classes: list[str]
    positive: str | None
    seed: int
    fractions: dict[SplitName, float]
    folds: int | None = None
    fold: int | None = None
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    quarantined: int = 0
    merging: Merging
    given: Given | None = None
    rows: list[Row]

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if values.get("given", ...) is None:
            del values["given"]
        return values

    def write(self, path: Path | str, *, mode: int = 0o666) -> None:
        """Write as indented JSON, atomically, with the way from there to the photos."""
        beside = None if is_address(self.root) else os.path.relpath(self.root, Path(path).resolve().parent)
        Record.write(self.model_copy(update={"beside": beside}), path, mode=mode)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read and validate; photos that moved together with the file are found where they lie now."""
        found = super().read(path)
        root = os.path.normpath(Path(path).resolve().parent / (found.beside or ""))
        moved = found.beside is not None and not is_source(found.root) and is_source(root)
        return found.model_copy(update={"root": root if moved else found.root, "beside": None})

    def moved_to(self, images: Path | str) -> Self:
        """The same splits with their photos at another place, each found by its content, under any name.

        Raises:
            InputError: no such place, or a photo that is not there.
        """
        if not is_source(images):
            raise InputError(f"--images must be a folder or a tar, got {images}")
        photos = open_photos(images if is_address(images) else Path(images).resolve())
        files: dict[str, list[str]] = defaultdict(list)
        named, missing = {row.file for row in self.rows}, {row.sha256 for row in self.rows}
        keys = sorted(look(photos).keys, key=lambda key: key not in named)
        for key in track(keys, "looking for the run's photos"):
            if not missing and key not in named:
                break
            with contextlib.suppress(OSError), Photo(photos, key).open() as file:
                found = digest(file)
                files[found].append(key)
                missing.discard(found)
        lost = [row.file for row in self.rows if row.sha256 not in files]
        if lost:
            raise InputError(
                f"--images must hold the {len(self.rows)} photos that were split, unchanged, got {images} without "
                f"{len(lost)} of them, such as {lost[0]}; nothing was changed"
            )
        rows = []
        for row in self.rows:
            held = files[row.sha256]
            rows.append(row if row.file in held else row.model_copy(update={"file": held[0]}))
        return self.model_copy(update={"root": photos.root, "rows": rows})

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
        return self.apart()

    def apart(self) -> Self:
        """Check that no two splits share a group or a content; raises ArtifactError."""
        where: dict[str, str] = {}
        for row in self.rows:
            for key in (f"group {row.group}", f"content {row.sha256}"):
                if where.setdefault(key, row.split) != row.split:
                    raise ArtifactError(f"splits must not share images, got {key} in {where[key]} and {row.split}")
        return self

    def photos(self) -> Photos:
        """Where the rows' photos lie; raises InputError when they are not there or cannot be read."""
        if not is_source(self.root):
            raise InputError(f"the run's photos must lie in {self.root}, which is not there; {MOVED}")
        return open_photos(self.root)

    def photos_of(self, rows: Sequence[Row]) -> list[Photo]:
        """The photo of each row, which any reader of images takes; another content than was split is unreadable."""
        photos = self.photos()
        return [Photo(photos, row.file, row.sha256) for row in rows]

    def path(self, row: Row) -> Path:
        """Where the row's photo is on disk, also inside a tar.

        Raises:
            InputError: the photos lie at an address.
        """
        if is_address(self.root):
            raise InputError(f"photos must lie in a folder or a tar for this, got {self.root}; copy them there first")
        return Path(self.root) / row.file

    def indices(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """Class index of every row [N], its place among ``classes``."""
        place = {name: index for index, name in enumerate(self.classes)}
        return np.asarray([place[row.label] for row in rows], dtype=np.int64)

    def summary(self) -> SplitsSummary:
        """The part that may leave the house: hashes and counts, no file names."""
        same = self.model_dump(include={*SplitsSummary.model_fields} - {"group_shares"})
        return SplitsSummary(**same, group_shares=self._group_shares())

    def _group_shares(self) -> dict[str, float]:
        rows = self.of("val_calib")
        sizes = Counter(row.group for row in rows)
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
    positive: str | None
    seed: int
    fractions: dict[SplitName, float]
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    group_shares: dict[str, float] = Field(
        default={}, description="share of every label in val_calib where groups count alike, as certificates count them"
    )


FRACTIONS: dict[SplitName, float] = {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}

Key = TypeVar("Key", bound=Hashable)


class QuarantineError(InputError):
    """Too many files cannot be used; ``quarantined`` lists them."""

    def __init__(self, message: str, quarantined: list[Quarantined]) -> None:
        super().__init__(message)
        self.quarantined = quarantined


def make_splits(
    labels: Path | str,
    *,
    images: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
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
    itself when none is), or, where near-duplicates join several, the first of their names. Splits that are given stay
    what they are: ``train`` is train, ``test`` is val_test, ``val`` is cut into val_select and val_calib, and what is
    missing is cut from ``train``. Options are those of ``stage1 split``.

    Returns:
        The splits, and the files left out with their reasons.

    Raises:
        QuarantineError: too many files cannot be read as images.
        InputError: anything wrong with the labels, or splits that cannot hold every class.
    """
    for name, limit in (("max_component", max_component), ("max_quarantine", max_quarantine)):
        check_share(name, limit, least=True, most=True)
    shares = _shares(fractions, folds, fold)
    photos, entries = read_labels(labels, images, columns=columns, classes=classes)
    names = classes_of(entries, classes)
    target = positive_of(positive, names, entries)

    pictures, quarantined = read_pictures(photos, [entry.file for entry in entries])
    if len(quarantined) > max_quarantine * len(entries):
        first = "; ".join(f"{q.file}: {q.reason}" for q in quarantined[:3])
        raise QuarantineError(
            f"images under {photos.root} must be readable for all but {max_quarantine:.1%} of the rows, got "
            f"{len(quarantined)} of {len(entries)} that are not ({first}); repair or remove them, "
            "name the right folder with --images, or raise --max-quarantine",
            quarantined,
        )
    entries = [entry for entry in entries if entry.file in pictures]
    check_contents(entries, {file: picture.sha256 for file, picture in pictures.items()}, names)

    files = [entry.file for entry in entries]
    units, merging = join_groups(files, [entry.group for entry in entries], pictures, max_component)
    given = None
    if any(entry.split for entry in entries):
        if folds is not None:
            raise InputError("--folds must go with photos whose splits are not given, got given ones; leave it out")
        entries, units, leaks, given = _without_leaks(entries, units)
        quarantined = sorted(quarantined + leaks, key=lambda one: one.file)
    classes_in = _unit_counts(units, [entry.name for entry in entries], names)
    if given is None:
        split_of = _assign_splits(classes_in, names, shares, seed, folds, fold)
    else:
        pool_of = {unit: _pool(entry.split) for entry, unit in zip(entries, units, strict=True)}
        split_of = _assign_given(classes_in, pool_of, given.became, names, shares, seed)
    inside = {unit: count for unit, count in classes_in.items() if split_of[unit] == "val_calib"}
    half_of = assign(inside, dict.fromkeys(HALVES, 0.5), f"{seed}:halves")
    rows = [
        Row(
            id=sha256_bytes(entry.file.encode("utf-8", "surrogateescape"))[:16], file=entry.file, label=entry.name,
            group=unit, source=entry.source, split=split_of[unit], half=half_of.get(unit),
            sha256=pictures[entry.file].sha256,
        )
        for entry, unit in zip(entries, units, strict=True)
    ]  # fmt: skip
    splits = Splits(
        root=photos.root, classes=names, positive=target, seed=seed, fractions=shares, folds=folds, fold=fold,
        **facts_of(rows, names), quarantined=len(quarantined), merging=merging, given=given, rows=rows,
    )  # fmt: skip
    return splits.apart(), quarantined


class _Facts(TypedDict):
    """What the rows alone say of their splits."""

    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]


def facts_of(rows: Sequence[Row], names: Sequence[str]) -> _Facts:
    """Counts, groups and hashes of every split; raises InputError where a split lacks a class."""
    counts = {split: dict.fromkeys(names, 0) for split in SPLITS}
    for row in rows:
        counts[row.split][row.label] += 1
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
    groups = {split: len({row.group for row in rows if row.split == split}) for split in SPLITS}
    return {"counts": counts, "groups": groups, "hashes": hash_splits(rows)}


def resplit(splits: Splits, seed: int) -> Splits:
    """Cut everything but ``val_test`` anew, by the same groups and shares; the splits' own seed gives other rows too.

    ``val_test`` keeps its rows, so that a choice on the ``val_select`` of many seeds has seen none of them. No image is
    read: near-duplicates were joined into groups when the data was split first. Of given splits, each is cut anew into
    what it became.

    Raises:
        InputError: a class that cannot be in every split.
    """
    rest = [row for row in splits.rows if row.split != "val_test"]
    text = f"{splits.seed}:but val_test:{seed}"
    classes_in = _unit_counts([row.group for row in rest], [row.label for row in rest], splits.classes)
    pools = {"": list(SPLITS)} if splits.given is None else splits.given.became
    split_of: dict[str, SplitName] = {}
    for pool, parts in pools.items():
        units = {row.group for row in rest if row.split in parts}
        shares = {name: share for name, share in splits.fractions.items() if name in parts and name != "val_test"}
        total = sum(shares.values())
        part = {unit: count for unit, count in classes_in.items() if unit in units}
        key = f"{text}:splits{pool and ':'}{pool}"
        split_of |= assign(part, {name: share / total for name, share in shares.items()}, key)
    inside = {unit: count for unit, count in classes_in.items() if split_of[unit] == "val_calib"}
    half_of = assign(inside, dict.fromkeys(HALVES, 0.5), f"{text}:halves")
    rows = [
        row
        if row.split == "val_test"
        else row.model_copy(update={"split": split_of[row.group], "half": half_of.get(row.group)})
        for row in splits.rows
    ]
    return splits.model_copy(update={**facts_of(rows, splits.classes), "rows": rows, "seed": seed}).apart()


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


def _unit_counts(units: Sequence[str], labels: Sequence[str], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Rows of each class [K] of every unit, from the unit and the class of each row."""
    counts = {unit: np.zeros(len(names), dtype=np.int64) for unit in sorted(set(units))}
    place = {name: k for k, name in enumerate(names)}
    for unit, label in zip(units, labels, strict=True):
        counts[unit][place[label]] += 1
    return counts


def _assign_splits(
    counts: Mapping[str, NDArray[np.int64]],
    names: Sequence[str],
    shares: Mapping[SplitName, float],
    seed: int,
    folds: int | None,
    fold: int | None,
) -> dict[str, SplitName]:
    where = "every split" if folds is None else f"each of {folds} folds and every split"
    _check_holding(counts, names, len(SPLITS) if folds is None else max(folds, len(SPLITS)), where)
    if folds is None:
        return assign(counts, shares, f"{seed}:splits")
    fold_of = assign(counts, dict.fromkeys(range(folds), 1 / folds), f"{seed}:folds:{folds}")
    result: dict[str, SplitName] = {unit: "val_test" for unit, number in fold_of.items() if number == fold}
    rest = {unit: count for unit, count in counts.items() if unit not in result}
    others = {name: share for name, share in shares.items() if name != "val_test"}
    total = sum(others.values())
    return result | assign(rest, {name: share / total for name, share in others.items()}, f"{seed}:fold:{folds}:{fold}")


def _check_holding(counts: Mapping[str, NDArray[np.int64]], names: Sequence[str], parts: int, where: str) -> None:
    for k, name in enumerate(names):
        holding = sum(bool(count[k]) for count in counts.values())
        if holding < parts:
            raise InputError(
                f"class '{name}' must be in at least {parts} groups, so that {where} can have it, got {holding} "
                f"({sum(int(count[k]) for count in counts.values())} rows); add groups of it, or cut its groups into "
                "finer ones if they are independent"
            )


def _pool(given: str) -> str:
    """The first of the names that mean the same given split."""
    return next(name for name, parts in GIVEN_SPLITS.items() if parts == GIVEN_SPLITS[given])


def _given_parts(given: set[str]) -> dict[str, list[SplitName]]:
    """What each given split becomes; no split comes from two of them. Raises InputError where train is not given."""
    own = {_pool(name): GIVEN_SPLITS[_pool(name)] for name in sorted(given)}
    if "train" not in own:
        raise InputError(f"given splits must have train, got {', '.join(sorted(given))}; add it")
    single = {parts[0] for parts in own.values() if len(parts) == 1}
    if "val" in own and single >= set(own["val"]):
        raise InputError("given splits must be val, or val_select and val_calib, got all three; rename val")
    became = {name: [one for one in parts if len(parts) == 1 or one not in single] for name, parts in own.items()}
    missing = [name for name in SPLITS if not any(name in parts for parts in became.values())]
    became["train"] += missing
    return became


def _without_leaks(
    entries: Sequence[Labelled], units: Sequence[str]
) -> tuple[list[Labelled], list[str], list[Quarantined], Given]:
    """The rows whose unit is in one given split alone, or in none that is better protected, and those left out."""
    became = _given_parts({entry.split for entry in entries})
    level = {name: 0 if name == "train" else max(map(SPLITS.index, parts)) for name, parts in became.items()}
    best: dict[str, str] = {}
    holders: dict[tuple[str, str], str] = {}
    for entry, unit in zip(entries, units, strict=True):
        pool = _pool(entry.split)
        best[unit] = max(best.get(unit, pool), pool, key=lambda name: level[name])
        holders.setdefault((entry.group, pool), entry.file)
    leaks: list[Quarantined] = []
    shared = 0
    for entry, unit in zip(entries, units, strict=True):
        above = best[unit]
        if _pool(entry.split) == above:
            continue
        same = holders.get((entry.group, above))
        shared += same is not None
        tie = f"near-copies tie it to photos of {above}"
        if same is not None:
            tie = f"its group {printable(entry.group, 80)} is in {above}, too ({printable(same, 80)})"
        leaks.append(Quarantined(entry.file, f"leak: given as {entry.split}, but {tie}"))
    gone = {one.file for one in leaks}
    kept = [(entry, unit) for entry, unit in zip(entries, units, strict=True) if entry.file not in gone]
    given = Given(became=became, shared_groups=shared, near_copies=len(leaks) - shared)
    return [entry for entry, _ in kept], [unit for _, unit in kept], leaks, given


def _assign_given(
    counts: Mapping[str, NDArray[np.int64]],
    pool_of: Mapping[str, str],
    became: Mapping[str, Sequence[SplitName]],
    names: Sequence[str],
    shares: Mapping[SplitName, float],
    seed: int,
) -> dict[str, SplitName]:
    result: dict[str, SplitName] = {}
    for pool, parts in became.items():
        inside = {unit: count for unit, count in counts.items() if pool_of[unit] == pool}
        _check_holding(inside, names, len(parts), f"{' and '.join(parts)} of the given {pool}")
        total = sum(shares[part] for part in parts)
        result |= assign(inside, {part: shares[part] / total for part in parts}, f"{seed}:given:{pool}")
    return result


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
