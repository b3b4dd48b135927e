"""Which labelled images judge candidates, which certify them, and which teach: dealt by the draw that selected them.

Draws below the audit floor are a plain random sample of all that was served, whatever the cascade thought of it: by a
hash of the image they judge candidates (the guard), certify them (a fresh ``val_calib``) or teach. All other labels,
mostly of hard images, teach. An image has one role for good.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from pydantic import Field

from stage1_pro.continual.ledger.history import History
from stage1_pro.continual.loop.config import Role, RoundsConfig
from stage1_pro.continual.serving.events import uniform
from stage1_pro.continual.serving.live import PLAN
from stage1_pro.errors import NotReachableError
from stage1_pro.record import Record


class LabelledImage(NamedTuple):
    """An image by its sha256, the class it was labelled, and the source of that label."""

    image: str
    label: str
    source: str


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


def deal(
    history: History, config: RoundsConfig, *, since: Mapping[Role, float], after: float, exclude: Collection[str]
) -> Dealt:
    """Labelled images by role, in the order of their hashes.

    Args:
        history: what was served and labelled.
        config: floor, seed and shares.
        since: first serving time of what may judge and what may certify; what teaches is of any time.
        after: serving time that both must be later than: of the last harm that was found.
        exclude: sha256 of images that were learned from.

    Raises:
        NotReachableError: an event that may judge or certify was drawn by another review plan.
    """
    plan = config.plan
    found: dict[Role, dict[str, LabelledImage]] = {"guard": {}, "certify": {}, "learn": {}}
    roles: dict[str, Role] = {}
    for one in history.served:
        fresh = [part for part, time in since.items() if one.time >= time and one.time > after]
        if fresh and (one.propensity < plan.floor or one.selected != plan.selects(one.id, one.propensity)):
            raise NotReachableError(
                f"events must be drawn by the loop's own review plan, got {one.id} of another: draws below the "
                f"floor are no plain random sample then; serve with {PLAN} of the loop's folder"
            )
        draw = uniform(plan.seed, "review", one.id)
        # An image that ever judges or certifies is never learned from, whatever it is drawn for later.
        part = role(one.image_sha256, draw, config) if one.selected else "learn"
        if roles.get(one.image_sha256, "learn") == "learn":
            roles[one.image_sha256] = part
        if one.id in history.held and one.selected and part in ("learn", *fresh):
            answer = history.held[one.id]
            row = LabelledImage(one.image_sha256, answer.label, answer.source)
            found[part].setdefault(one.image_sha256, row)
    return {
        part: [row for name, row in sorted(rows.items()) if roles[name] == part and name not in exclude]
        for part, rows in found.items()
    }


def available(dealt: Dealt, is_there: Callable[[str], bool]) -> Dealt:
    """The rows whose image is there."""
    return {part: [row for row in rows if is_there(row.image)] for part, rows in dealt.items()}


def shortfall(dealt: Dealt, config: RoundsConfig) -> str:
    """Which roles have too few rows for a round; empty: none."""
    few = [(part, len(rows), config.least(part)) for part, rows in dealt.items()]
    return ", ".join(f"{n} of {least} to {part}" for part, n, least in few if n < least)
