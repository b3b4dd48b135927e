"""Which images an argument names: files, folders, tars, addresses, and CSV files that list them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stage1_pro.data.images import SUFFIXES
from stage1_pro.data.labels import COLUMNS
from stage1_pro.data.photos import ImageFile, Photo, in_tar, is_source, open_photos
from stage1_pro.data.tables import read_table, slashes
from stage1_pro.errors import InputError


def gather(inputs: Sequence[Path | str]) -> list[tuple[str, ImageFile]]:
    """Name to show and place of every image of the inputs, in order.

    Raises:
        InputError: an input does not exist or holds no image, or there are none.
    """
    files: list[tuple[str, ImageFile]] = []
    for given in inputs:
        path = Path(given)
        found: Sequence[ImageFile]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif is_source(given):
            photos = open_photos(given)
            found = [Photo(photos, key) for key in photos.keys() if Path(key).suffix.lower() in SUFFIXES]  # noqa: SIM118
        elif path.suffix.lower() == ".csv" and path.exists():
            files += [(row["file"], path.parent / row["file"]) for row in read_list(path)]
            continue
        elif path.exists() or in_tar(path):
            found = [path]
        else:
            raise InputError(f"inputs must exist, got {path}, and there is no such file or folder")
        if not found:
            raise InputError(f"inputs must hold images, got {given} with none ({' '.join(sorted(SUFFIXES))})")
        files += [(str(one), one) for one in found]
    if not files:
        raise InputError("inputs must name at least one image, folder, tar or CSV file, got none")
    return files


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
