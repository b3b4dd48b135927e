"""A pool of unlabelled images: what of it may be learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stage1_pro.data.duplicates import near_duplicates, read_pictures
from stage1_pro.data.images import Quarantined
from stage1_pro.data.labels import TABLE, read_list
from stage1_pro.data.photos import Photo, Photos, is_source, look, open_photos
from stage1_pro.data.splits import Row
from stage1_pro.data.tables import is_table
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes
from stage1_pro.progress import say


@dataclass(frozen=True)
class Pool:
    """Readable, different photos none of which shows a row that must stay unseen, in the order of their names."""

    photos: list[Photo]
    hashes: list[str]
    groups: list[str]  # that a table names; empty where it names none
    fingerprint: str
    quarantined: list[Quarantined]
    n_copies: int
    n_left_out: int
    n_not_compared: int


def read_pool(
    images: Path | str,
    unseen: Sequence[Row],
    shown_in: Photos,
    columns: Mapping[str, str] | None = None,
    *,
    said: str = "--images",
) -> Pool:
    """Read a folder, tar or address of images, or a CSV with ``file[,group]`` (``labels.csv`` of a folder is taken).

    Left out and counted: images of the same content as one before them, and what shows rows that must stay unseen:
    files of the same content, near-duplicates as ``stage1 split`` finds them (re-encoded, resized), and, where the CSV
    names groups, files of a group that has such a file or a row's group's name (a clip's other frames are near-copies
    of it; two sets that merely use the same names, such as "1", want the folder instead of the CSV).

    Unseen rows that cannot be read in ``shown_in`` are told by content and group alone; ``n_not_compared`` counts them.
    ``columns`` says what the CSV calls its columns, ``said`` what messages call the option.

    Raises:
        InputError: no such pool, or nothing in it that can be used.
    """
    place = Path(images)
    if place.is_dir() and (place / TABLE).is_file():
        place = place / TABLE
    if place.is_file() and is_table(place):
        listed = read_list(place, columns)
        photos, group_of = open_photos(place.parent), {row["file"]: row.get("group", "") for row in listed}
    elif columns:
        raise InputError(f"--columns must go with a CSV, got it with {images}, which is none; leave it out")
    elif is_source(images):
        photos = open_photos(images)
        held = look(photos)
        group_of = dict.fromkeys(held.keys, "")
        if held.passed:
            say(held.words())
    else:
        raise InputError(f"{said} must be a folder, a tar or a CSV with a column 'file', got {images}")
    files = sorted(group_of)
    pictures, quarantined = read_pictures(photos, files)
    shown, not_shown = read_pictures(shown_in, [row.file for row in unseen])
    if not_shown:
        say(f"{len(not_shown)} rows that must stay unseen cannot be read; near-duplicates of them are not left out")
    small = [picture.small for picture in (*pictures.values(), *shown.values())]
    side = np.repeat([0, 1], [len(pictures), len(shown)])
    usable = list(pictures)
    contents = {row.sha256 for row in unseen}
    found = {file for file, picture in pictures.items() if picture.sha256 in contents}
    if pictures and shown:
        found |= {usable[i] for i, _ in near_duplicates(np.stack(small), side)}
    groups = ({row.group for row in unseen} | {group_of[file] for file in found}) - {""}
    kept: dict[str, str] = {}
    left_out = copies = 0
    for file, picture in pictures.items():
        if file in found or group_of[file] in groups:
            left_out += 1
        elif picture.sha256 in kept:
            copies += 1
        else:
            kept[picture.sha256] = file
    for one in quarantined[:3]:
        say(f"left out {one.file}: {one.reason}")
    if len(kept) < 2:
        raise InputError(
            f"{said} must hold two usable images or more, got {len(kept)} of {len(files)} in {images} "
            f"({len(quarantined)} unreadable, {left_out} that show rows of the run, {copies} copies)"
        )
    fingerprint = sha256_bytes("\n".join(kept).encode())
    usable_photos, named = [Photo(photos, file) for file in kept.values()], [group_of[file] for file in kept.values()]
    return Pool(usable_photos, list(kept), named, fingerprint, quarantined, copies, left_out, len(not_shown))
