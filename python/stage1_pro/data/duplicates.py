"""Images that show the same picture, and the groups that they join.

Every pair is looked at, so the time grows with the square of the number of images: 8,000 take a third of a second of
one core, 200,000 some minutes. More than that wants an index of hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.data.images import ImageError, Quarantined, read_image
from stage1_pro.data.photos import Photo, Photos
from stage1_pro.errors import InputError
from stage1_pro.progress import track
from stage1_pro.record import Record

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


class Merging(Record):
    """What near-duplicate detection joined across groups."""

    pairs: int
    components: int
    largest_rows: int
    largest_share: float
    largest_groups: list[str]


@dataclass(frozen=True)
class Picture:
    """What near-duplicates are found by: hex sha256 of the file and a small copy [32, 32, 3] uint8."""

    sha256: str
    small: NDArray[np.uint8]


def read_pictures(photos: Photos, files: Sequence[str]) -> tuple[dict[str, Picture], list[Quarantined]]:
    """Read images of a source: by file what shows near-duplicates, and in order those that cannot be used."""
    pictures: dict[str, Picture] = {}
    quarantined = []
    # Threads: Pillow decodes outside the interpreter lock, and nothing has to be sent back through a pipe.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: _read_picture(Photo(photos, file)), files)
        for file, picture in zip(files, track(found, "reading images", total=len(files)), strict=True):
            if isinstance(picture, Quarantined):
                quarantined.append(picture)
            else:
                pictures[file] = picture
    return pictures, quarantined


def _read_picture(photo: Photo) -> Picture | Quarantined:
    try:
        photo.key.encode()
    except UnicodeEncodeError:
        return Quarantined(photo.key, "unreadable: the file name is not UTF-8; rename it")
    try:
        small = read_image(photo).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        with photo.open() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # BytesIO has a stub of its own
        return Picture(digest, np.asarray(small))
    except ImageError as error:
        return Quarantined(photo.key, f"{error.reason}: {error.detail}")
    except OSError as error:
        return Quarantined(photo.key, f"unreadable: {error.strerror}")


def perceptual_hashes(small: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64 bits per picture [N, 32, 32, 3] → [N]: signs of its lowest 8 x 8 DCT coefficients around their median."""
    from scipy.fft import dctn

    grey = small.astype(np.float32) @ _GREY
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(small), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def near_duplicates(small: NDArray[np.uint8], groups: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs (i < j) of different groups that show the same picture.

    A perceptual hash of the pictures [N, 32, 32, 3] gives the candidates and pixels decide: signs of one kind are
    alike to any such hash. Pairs within one of the numbered groups [N] are not looked for.
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


def cluster_copies(photos: Photos, files: Sequence[str]) -> list[str]:
    """The first file of those that show the same picture, for each of some files, in their order.

    Copies are what ``near_duplicates`` finds, and copies of copies; a file that is no image is one of its own.
    """
    pictures, _ = read_pictures(photos, files)
    shown = [i for i, file in enumerate(files) if file in pictures]
    if not shown:
        return list(files)
    pairs = near_duplicates(np.stack([pictures[files[i]].small for i in shown]), np.arange(len(shown)))
    roots = _components(len(files), ((shown[i], shown[j]) for i, j in pairs))
    return [files[i] for i in roots]


def _components(n: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest of those that pairs tie to each of 0 .. n - 1."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = np.asarray(list(pairs), dtype=np.int64).reshape(-1, 2).T
    _, component = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)
    first = np.unique(component, return_index=True)[1]
    return cast("list[int]", first[component].tolist())


def join_groups(
    files: Sequence[str], groups: Sequence[str], pictures: Mapping[str, Picture], max_component: float
) -> tuple[list[str], Merging]:
    """The unit each file belongs to: its group, or the first name of the groups that near-duplicates join.

    Raises:
        InputError: more than ``max_component`` of the files are tied together across groups.
    """
    names = sorted(set(groups))
    number = {name: i for i, name in enumerate(names)}
    numbers = np.asarray([number[name] for name in groups], dtype=np.int64)
    found = set(near_duplicates(np.stack([pictures[file].small for file in files]), numbers))
    by_content: dict[str, int] = {}
    for i, file in enumerate(files):
        first = by_content.setdefault(pictures[file].sha256, i)
        if numbers[first] != numbers[i]:
            found.add((first, i))

    # The smallest number, so that a component is called by its first name.
    roots = _components(len(names), ((int(numbers[i]), int(numbers[j])) for i, j in found))
    members: dict[int, list[str]] = defaultdict(list)
    for i, name in enumerate(names):
        members[roots[i]].append(name)
    units = [names[roots[i]] for i in numbers]
    sizes = Counter(units)
    joined = {names[i]: group for i, group in members.items() if len(group) > 1}
    largest = max(joined, key=lambda name: (sizes[name], name), default=None)
    rows = sizes[largest] if largest is not None else 0
    if largest is not None and rows > max(2, max_component * len(files)):
        shown = ", ".join(joined[largest][:3]) + (", ..." if len(joined[largest]) > 3 else "")
        i, j = next((i, j) for i, j in sorted(found) if units[i] == largest)
        raise InputError(
            f"near-duplicates across groups must tie at most {max_component:.1%} of the rows together, got {rows} of "
            f"{len(files)} rows in {len(joined[largest])} groups ({shown}; for example {files[i]} and "
            f"{files[j]}); remove the copies, give frames of one clip or place one `group`, or accept it with "
            f"--max-component {rows / len(files) + 0.005:.2f}"
        )
    return units, Merging(
        pairs=len(found),
        components=len(joined),
        largest_rows=rows,
        largest_share=rows / len(files),
        largest_groups=joined[largest] if largest is not None else [],
    )
