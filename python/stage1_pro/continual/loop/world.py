"""A world to simulate the loop in: real photos, cut into a past that a model learns from and a stream that is served.

The unit is the photo: near-copies of one place lie on both sides, as for a camera that passes the same places every
day. Results hold for this stream and say nothing of new places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from stage1_pro.data.protocols import challenge
from stage1_pro.data.splits import Row, Splits, facts_of, make_splits
from stage1_pro.errors import InputError
from stage1_pro.files import uniform
from stage1_pro.words import HALVES, SPLITS, ProtocolName, SplitName

# Of the past. Certificates are what the loop lives on, and half of val_select is the promotion test's anchor.
_SHARES: dict[SplitName, float] = {"train": 0.4, "val_select": 0.35, "val_calib": 0.22, "val_test": 0.03}
# Photos for judging afterwards are changed by other draws than those of the stream.
_JUDGED = 1 << 31


class World:
    """Photos of a labelled folder: of the past, of a stream that changes on one day, and some to judge by afterwards.

    ``past_share`` of the photos belong to the past, ``judged`` ones are never served. Once the world has shifted photos
    are changed by ``protocol`` at ``level``. Options are those of ``stage1 continual simulate``.

    Raises:
        InputError: labels that cannot be used, or a class without photos on a side.
    """

    def __init__(
        self,
        data: Path | str,
        *,
        columns: Mapping[str, str] | None = None,
        positive: str | None = None,
        past_share: float = 0.3,
        judged: int = 300,
        protocol: ProtocolName = "letterbox224",
        level: int = 3,
        seed: int = 0,
    ) -> None:
        self.protocol, self.level, self.seed = protocol, level, seed
        found, _ = make_splits(data, columns=columns, positive=positive, max_component=1.0)
        contents: dict[str, Row] = {}
        for row in found.rows:
            contents.setdefault(row.sha256, row)
        rows = sorted(contents.values(), key=lambda row: row.id)
        old = [row for row in rows if uniform(seed, "past", row.id) < past_share]
        self.past = _split(found, old, seed)
        kept = {row.id for row in old}
        others = sorted((row for row in rows if row.id not in kept), key=lambda row: uniform(seed, "judged", row.id))
        self.judged, self.stream = others[:judged], sorted(others[judged:], key=lambda row: row.id)
        for what, part in (("the stream", self.stream), ("judging", self.judged)):
            for name in found.classes:
                if not any(row.label == name for row in part):
                    raise InputError(f"data must have photos of '{name}' left for {what}, got none; add some")
        self._orders: dict[str, list[Row]] = {}

    def photo(self, number: int, *, shifted: bool, judged: bool = False) -> tuple[bytes, str]:
        """Bytes and label of photo ``number``, from 0, of those that are served or of those that judge.

        A photo comes again only after all others have. A ``shifted`` one is changed; else these are its own bytes.
        """
        rows = self.judged if judged else self.stream
        turn, place = divmod(number, len(rows))
        salt = f"{'judged' if judged else 'stream'}/{turn}"
        if salt not in self._orders:
            self._orders[salt] = sorted(rows, key=lambda row: uniform(self.seed, salt, row.id))
        row = self._orders[salt][place]
        (photo,) = self.past.photos_of([row])
        if not shifted:
            return photo.read(), row.label
        with photo.open() as file, Image.open(file) as image:
            draw = number + (_JUDGED if judged else 0)
            return challenge(image, self.protocol, self.level, seed=self.seed, row=draw), row.label


def _split(found: Splits, old: list[Row], seed: int) -> Splits:
    """The past as splits whose unit is the photo."""
    rows = []
    for row in old:
        draw, split = uniform(seed, "split", row.id), SPLITS[-1]
        for name, share in _SHARES.items():
            split = name
            draw -= share
            if draw < 0:
                break
        half = HALVES[uniform(seed, "half", row.id) < 0.5] if split == "val_calib" else None
        rows.append(row.model_copy(update={"group": row.id, "split": split, "half": half}))
    there = {(row.label, row.split) for row in rows}
    for part, label in itertools.product(SPLITS, found.classes):
        if (label, part) not in there:
            absent = f"'{label}' in {part}"
            raise InputError(
                f"data must have photos of every class for every split of the past, got no {absent}; add some"
            )
    facts = facts_of(rows, found.classes)
    return found.model_copy(update={**facts, "rows": rows, "seed": seed, "fractions": _SHARES, "given": None}).apart()
