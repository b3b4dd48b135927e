"""A pool of unlabelled images: what of it may be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stage1_pro.artifacts import Row, sha256_bytes, sha256_file
from stage1_pro.data.images import Quarantined, scan
from stage1_pro.data.listing import gather, read_list
from stage1_pro.errors import InputError
from stage1_pro.progress import say


@dataclass(frozen=True)
class Pool:
    """Readable, different images that are no row which has to stay unseen; ``paths`` in the order of their names."""

    paths: list[Path]
    fingerprint: str
    quarantined: list[Quarantined]
    n_copies: int
    n_left_out: int


def read_pool(images: Path | str, unseen: Sequence[Row]) -> Pool:
    """Read a folder of images, or a CSV with ``file[,group]`` (``labels.csv`` of a folder is taken).

    Left out and counted: images of the same content as one before them, and what shows rows that must stay unseen:
    files of the same content, and, where the CSV names groups, files of the same group (a clip's other frames are
    near-copies of it; two sets that merely use the same names, such as "1", want the folder instead of the CSV). A
    re-encoded copy under another group's name is not recognised.

    Raises:
        InputError: no such pool, or nothing in it that can be used.
    """
    images = Path(images)
    if images.is_dir() and (images / "labels.csv").is_file():
        images = images / "labels.csv"
    if images.is_dir():
        root, group_of = images, dict.fromkeys((str(path.relative_to(images)) for _, path in gather([images])), "")
    elif images.is_file() and images.suffix.lower() == ".csv":
        root, group_of = images.parent, {row["file"]: row.get("group", "") for row in read_list(images)}
    else:
        raise InputError(f"--images must be a folder or a CSV with a column 'file', got {images}")
    files = sorted(group_of)
    quarantined = scan(root, files)
    broken = {one.file for one in quarantined}
    contents, groups = {row.sha256 for row in unseen}, {row.group for row in unseen} - {""}
    kept: dict[str, str] = {}
    left_out = copies = 0
    for file in files:
        if file in broken:
            continue
        content = sha256_file(root / file)
        if content in contents or group_of[file] in groups:
            left_out += 1
        elif content in kept:
            copies += 1
        else:
            kept[content] = file
    for one in quarantined[:3]:
        say(f"left out {one.file}: {one.reason}")
    if len(kept) < 2:
        raise InputError(
            f"--images must hold two usable images or more, got {len(kept)} of {len(files)} in {images} "
            f"({len(broken)} unreadable, {left_out} of the run's val_select, val_calib or val_test, {copies} copies)"
        )
    fingerprint = sha256_bytes("\n".join(kept).encode())
    return Pool([root / file for file in kept.values()], fingerprint, quarantined, copies, left_out)
