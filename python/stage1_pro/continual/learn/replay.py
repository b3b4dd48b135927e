"""What is remembered of earlier rows: a stratified reservoir of cached features. NumPy alone, stored without pickle.

Every row has a key drawn from its id and the seed, and each stratum keeps its rows of smallest key: a uniform sample of
all it has seen, whatever the order they came in, in how many batches, or how often. So an ingest that was killed and
repeated ends in the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import load_npz, save_npz

_COLUMN = "column:"


class Reservoir:
    """At most ``capacity`` rows, shared by the strata (domain and class, say) as evenly as what they have seen allows.

    A stratum that has seen fewer rows than its share leaves the rest to the others. ``columns`` are arrays of N rows
    each, the same ones in every ``add``; rows stand by stratum and key.

    Args:
        capacity: most rows, >= 1.
        seed: of the keys.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise InputError(f"capacity must be 1 or more, got {capacity}; it is a number of rows")
        self.capacity, self.seed = capacity, seed
        # Most rows of a stratum. It never grows, so a row that was dropped would not be kept later either.
        self._share = capacity
        self.ids: NDArray[np.str_] = np.empty(0, dtype=np.str_)
        self.strata: NDArray[np.str_] = np.empty(0, dtype=np.str_)
        self.columns: dict[str, NDArray[Any]] = {}
        self._keys: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return self.ids.size

    def add(self, ids: Sequence[str], strata: Sequence[str], columns: Mapping[str, ArrayLike]) -> None:
        """Take in rows: ids [N], strata [N], and arrays of N rows. An id that is kept already is not taken twice.

        Raises:
            InputError: arrays of other lengths, names or shapes than before.
        """
        names = np.asarray([str(one) for one in ids], dtype=np.str_)
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        lengths = {"strata": len(strata), **{name: len(values) for name, values in arrays.items()}}
        for name, length in lengths.items():
            if length != names.size:
                raise InputError(f"{name} must hold a row for each of {names.size} ids, got {length}; same rows")
        if self.columns:
            given = {name: (values.shape[1:], values.dtype) for name, values in arrays.items()}
            known = {name: (values.shape[1:], values.dtype) for name, values in self.columns.items()}
            if given != known:
                raise InputError(f"columns must be as before, {known}, got {given}; a new encoder needs another")
        _, first = np.unique(names, return_index=True)
        fresh = np.sort(first[~np.isin(names[first], self.ids)])
        joined_ids = np.concatenate([self.ids, names[fresh]])
        joined_strata = np.concatenate([self.strata, np.asarray([str(s) for s in strata], dtype=np.str_)[fresh]])
        keys = np.concatenate([self._keys, np.array([self._key(one) for one in names[fresh]], dtype=np.uint64)])
        kept = self._kept(joined_ids, joined_strata, keys)
        self.ids, self.strata, self._keys = joined_ids[kept], joined_strata[kept], keys[kept]
        old = self.columns or {name: values[:0] for name, values in arrays.items()}
        self.columns = {name: np.concatenate([old[name], values[fresh]])[kept] for name, values in arrays.items()}

    def save(self, path: Path | str) -> None:
        """Write as ``.npz``, atomically; equal content gives equal bytes."""
        facts = {"capacity": np.asarray(self.capacity), "seed": np.asarray(self.seed), "share": np.asarray(self._share)}
        rows = {"ids": self.ids, "strata": self.strata}
        save_npz(path, {**facts, **rows, **{f"{_COLUMN}{k}": v for k, v in sorted(self.columns.items())}})

    @classmethod
    def load(cls, path: Path | str) -> Reservoir:
        """Read what ``save`` wrote; nothing in it can run code.

        Raises:
            ArtifactError: no reservoir's file.
        """
        arrays = load_npz(path)
        missing = [name for name in ("capacity", "seed", "share", "ids", "strata") if name not in arrays]
        if missing:
            raise ArtifactError(f"{path} must be a reservoir's file, missing: {', '.join(missing)}")
        found = cls(int(arrays["capacity"]), int(arrays["seed"]))
        found._share = int(arrays["share"])
        columns = {k.removeprefix(_COLUMN): v for k, v in arrays.items() if k.startswith(_COLUMN)}
        found.add(arrays["ids"].tolist(), arrays["strata"].tolist(), columns)
        return found

    def _key(self, one: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}\n{one}".encode()).digest()[:8], "big")

    def _kept(self, ids: NDArray[np.str_], strata: NDArray[np.str_], keys: NDArray[np.uint64]) -> NDArray[np.intp]:
        """The rows to keep, by stratum and key; ids part equal keys."""
        order = np.lexsort((ids, keys, strata))
        _, starts, sizes = np.unique(strata[order], return_index=True, return_counts=True)
        if sizes.size > self.capacity:
            raise InputError(f"strata must be at most capacity = {self.capacity}, got {sizes.size}; take coarser ones")
        self._share = _even_share(sizes, self.capacity, self._share)
        place = np.arange(order.size) - np.repeat(starts, sizes)
        return order[place < self._share]


def _even_share(sizes: NDArray[np.int64], capacity: int, most: int) -> int:
    """The largest equal share of the strata, up to ``most``, with which all fit; what is left over goes to nobody."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= capacity else (low, middle - 1)
    return low
