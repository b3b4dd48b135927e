"""Which labelled images judge candidates, which certify them, and which teach: dealt by the draw that selected them.

Draws below the audit floor are a plain random sample of all that was served, whatever the cascade thought of it: by a
hash of the image they judge candidates (the guard), certify them (a fresh ``val_calib``) or teach. All other labels,
mostly of hard images, teach. An image has one role for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from stage1_pro.continual.loop.config import Role, RoundsConfig
from stage1_pro.continual.serving.live import PLAN
from stage1_pro.errors import NotReachableError
from stage1_pro.files import uniform
from stage1_pro.record import Record

if TYPE_CHECKING:
    from stage1_pro.continual.loop.history import Answered, History


class LabelledImage(NamedTuple):
    """An image by its sha256, the class it was labelled, and the source of that label."""

    image: str
    label: str
    source: str


# Answers of a role that are read before it is asked which photos are there.
_SOME = 1000
Dealt = Mapping[Role, list[LabelledImage]]


class Snapshot(Record):
    """What was collected: image and label of every row that may be learned from or certified on, none of the guard's.

    ``guard`` names the guard epoch alone.
    """

    until: float
    learn: tuple[LabelledImage, ...] = Field(description="image, label, source")
    certify: tuple[LabelledImage, ...]
    recent: tuple[str, ...] = Field(description="images of those to learn from, the ones served last")
    guard: str
    n_guard: int
    threshold: float | None = Field(
        None, description="that the champion was held to then; it is judged as it served. Null: its policy's"
    )


def role(image_sha256: str, draw: float, config: RoundsConfig) -> Role:
    """What a labelled image is for, by its event's draw in [0, 1).

    Some random audits teach: all else that is labelled was deferred, doubted or new, and those audits alone hold images
    that Stage A is sure of and wrong about.
    """
    if draw >= config.plan.floor:
        return "learn"
    place = uniform(config.plan.seed, "guard", image_sha256)
    if place < config.guard_share:
        return "guard"
    return "certify" if place < config.guard_share + config.certified_share else "learn"


def deal(history: History, *, since: Mapping[Role, float], after: float, exclude: Collection[str]) -> Dealt:
    """Labelled images by role, in the order of their hashes.

    Args:
        history: what was served and labelled.
        since: first serving time of what may judge and what may certify; what teaches is of any time.
        after: serving time that both must be later than: of the last harm that was found.
        exclude: sha256 of images that were learned from.

    Raises:
        NotReachableError: an event that may judge or certify was drawn by another review plan.
    """
    found = {}
    for part in _roles(history, since, after):
        rows: dict[str, LabelledImage] = {}
        for one in sorted(_answers(history, part, since, after), key=lambda one: (one.time, one.id)):
            rows.setdefault(one.image_sha256, LabelledImage(one.image_sha256, one.truth, one.source))
        found[part] = [row for name, row in sorted(rows.items()) if name not in exclude]
    return found


def count(
    history: History, config: RoundsConfig, there: Collection[str], *, since: Mapping[Role, float], after: float,
    exclude: Collection[str],
) -> dict[Role, int]:  # fmt: skip
    """How many images ``deal`` would give that are ``there``, of each role; at most the fewest that a round needs."""
    found = {}
    there = set(there).difference(exclude)
    for part in _roles(history, since, after):
        images, least = set[str](), config.least(part)
        for n, one in enumerate(_answers(history, part, since, after)):
            if n > _SOME + len(there):
                # Most photos are gone: those that are there are fewer than what was answered.
                images = {one.image_sha256 for one in _answers(history, part, since, after, there)}
                break
            if one.image_sha256 in there:
                images.add(one.image_sha256)
                if len(images) == least:
                    break
        found[part] = min(len(images), least)
    return found


def _roles(history: History, since: Mapping[Role, float], after: float) -> tuple[Role, ...]:
    """The roles, unless an event that may judge or certify was drawn by another plan than theirs."""
    name = history.foreign(min(since.values()), after)
    if name is not None:
        raise NotReachableError(
            f"events must be drawn by the loop's own review plan, got {name} of another: draws below the "
            f"floor are no plain random sample then; serve with {PLAN} of the loop's folder"
        )
    return "guard", "certify", "learn"


def _answers(
    history: History, part: Role, since: Mapping[Role, float], after: float, among: Collection[str] | None = None
) -> Iterator[Answered]:
    fresh = (since[part], after) if part in since else (-math.inf, -math.inf)
    return history.answers_of(part, *fresh, among=among)


def available(dealt: Dealt, is_there: Callable[[str], bool]) -> Dealt:
    """The rows whose image is there."""
    return {part: [row for row in rows if is_there(row.image)] for part, rows in dealt.items()}


def shortfall(counts: Mapping[Role, int], config: RoundsConfig) -> str:
    """Which roles have too few rows for a round; empty: none."""
    few = [(part, n, config.least(part)) for part, n in counts.items()]
    return ", ".join(f"{n} of {least} to {part}" for part, n, least in few if n < least)
