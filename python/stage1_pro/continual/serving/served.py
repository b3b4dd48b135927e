"""Serving that remembers: a cascade whose every decision is an event in a log. No torch, no database."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.classes import index_of
from stage1_pro.continual.serving.events import BundleFacts, Event, EventLog, Novelty, ReviewPlan, entropy, sketch
from stage1_pro.data.images import ImageError
from stage1_pro.data.photos import Photo, read_file
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.cascade import Answering, Cascade, Decisions, ImageLike, Prepared, Trace, open_image
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes

# Images whose time is over are looked for this often, in seconds.
PURGE_SECONDS = 3600.0


class Served(Answering):
    """A cascade that logs what it decides, before it gives the decision away.

    Args:
        cascade: of a bundle; one of a run has no manifest to name in events.
        log: where events go.
        plan: how events are drawn for review.
        novelty: what is known; without it nothing is novel.
        on_failure: is told of what could not be logged, and the answer is given all the same; by default that is
            raised, and no answer leaves without its event.
        writer: name of this process in event ids: give one to get the same ids from a replay. Random otherwise.

    Raises:
        InputError: the cascade is a run's.
    """

    def __init__(
        self,
        cascade: Cascade,
        log: EventLog,
        *,
        plan: ReviewPlan | None = None,
        novelty: Novelty | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        writer: str | None = None,
    ) -> None:
        if not isinstance(cascade.bundle, Bundle):
            raise InputError("cascade must be one of a bundle to be logged, got a run's; run `stage1 export` first")
        self.cascade, self.log, self.novelty = cascade, log, novelty
        self.bundle = cascade.bundle
        self.plan = plan or ReviewPlan()
        self._on_failure, self._writer = on_failure, writer or uuid.uuid4().hex
        self._count = self._logged = 0
        self._purged = self._last = -math.inf
        self._bundle = sha256_bytes(cascade.bundle.raw)
        classes, positive = cascade.bundle.classes, cascade.bundle.positive
        log.describe(BundleFacts(bundle=self._bundle, classes=tuple(classes), positive=positive))

    def read(self, image: ImageLike) -> Prepared:
        """A photo that holds a file's bytes, so that what is logged is what was decided on.

        Raises:
            ImageError: it cannot be read as an image.
            InputError: it is no kind of image.
        """
        if not isinstance(image, str | Path | Photo):
            return super().read(image)
        try:
            data = _encode(image)
        except OSError:
            return super().read(image)  # It says what is wrong with the file.
        try:
            return super().read(data)
        except ImageError as error:
            raise ImageError(str(image), error.reason, error.detail) from None

    def go_on(self, count: int) -> None:
        """Go on after this writer's first ``count`` events; those beyond them that are in the log are not repeated."""
        self._count = self._logged = count
        for event in self.log:
            if event.id == self._name(self._logged, event.time, event.image_sha256):
                self._logged += 1

    def answer(self, photos: Sequence[Prepared], *, now: float | None = None) -> Decisions:
        """Decide for photos as one batch, and log it.

        Raises:
            InputError: ``now`` is no number of seconds.
            OSError: the log cannot be written, and nobody is told of it instead.
        """
        now = time.time() if now is None else now
        if not math.isfinite(now):
            raise InputError(f"now must be seconds since the epoch, got {now}")
        traces: list[Trace] = []
        decisions = self.cascade.decide(self.cascade.stack(photos), watch=traces.append)
        if traces:
            try:
                known = max(0, self._logged - self._count)
                events = self._events(decisions, traces[0], [identify(photo.image) for photo in photos], now)
                self._purge(now)
                for event, photo in list(zip(events, photos, strict=True))[known:]:
                    if event.selected:
                        self.log.images.put(event.image_sha256, _encode(photo.image), now)
                self.log.append(events[known:])
            except Exception as error:
                if self._on_failure is None:
                    raise
                self._on_failure(error)
        return decisions

    def _purge(self, now: float) -> None:
        """Remove old images now and then, and see a clock that leaps before its time is an event's."""
        leapt, self._last = now - self._last > self.log.info.image_ttl, now
        if leapt or time.monotonic() - self._purged >= PURGE_SECONDS:
            self._purged = time.monotonic()
            with contextlib.suppress(OSError):  # it is no reason to answer nobody; every look of the loop says it
                self.log.purge(now)

    def _name(self, count: int, now: float, image: str) -> str:
        """The id of this writer's event number ``count``."""
        return hashlib.sha256(f"{self._writer}/{count}/{now!r}/{self._bundle}/{image}".encode()).hexdigest()[:32]

    def _events(self, decisions: Decisions, trace: Trace, images: Sequence[str], now: float) -> list[Event]:
        policy, classes = self.cascade.bundle.policy, self.cascade.bundle.classes
        positive = index_of(classes, self.cascade.bundle.positive)

        def of_positive(probs: NDArray[np.float64]) -> float | None:
            return None if positive is None else _number(probs[positive])

        scores = policy.scores(trace.probs_a, trace.gate_logit)
        sketches = sketch(trace.hidden)
        asked_b = ~trace.exited
        disagree = asked_b & (trace.probs_a.argmax(axis=1) != trace.probs.argmax(axis=1))
        novel = 0.0 if self.novelty is None else self.novelty.signal(sketches)
        chances = self.plan.propensity(asked_b, ~decisions.accepted, disagree, entropy(trace.probs), novel)
        gate = np.full(len(images), np.nan) if trace.gate_logit is None else trace.gate_logit
        events = []
        for row, image in enumerate(images):
            accepted, exited = bool(decisions.accepted[row]), bool(trace.exited[row])
            event_id, chance = self._name(self._count, now, image), float(chances[row])
            self._count += 1
            events.append(
                Event(
                    id=event_id,
                    time=now,
                    bundle=self._bundle,
                    image_sha256=image,
                    action=("exit" if exited else "defer") if accepted else "abstain",
                    stage=str(decisions.stage[row]),
                    label=str(decisions.label[row]),
                    prob_a=of_positive(trace.probs_a[row]),
                    prob_b=None if exited else of_positive(trace.probs[row]),
                    probs_a=_numbers(trace.probs_a[row]),
                    probs_b=None if exited else _numbers(trace.probs[row]),
                    confidence=_number(decisions.confidence[row]),
                    gate_logit=_number(gate[row]),
                    exit_score=_number(scores[row]),
                    threshold=policy.exit_threshold,
                    propensity=chance,
                    selected=self.plan.selects(event_id, chance),
                    sketch=sketches[row],
                )
            )
        return events


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...] | None:
    return tuple(values.tolist()) if np.isfinite(values).all() else None


def identify(image: ImageLike) -> str:
    """Sha256 of a file's bytes; of size and RGB pixels where there was no file."""
    if isinstance(image, str | Path | Photo | bytes | bytearray | memoryview):
        return sha256_bytes(_encode(image))
    picture = open_image(image)
    return sha256_bytes(f"RGB {picture.width} {picture.height} ".encode() + picture.tobytes())


def _encode(image: ImageLike) -> bytes:
    if isinstance(image, str | Path | Photo):
        return read_file(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    buffer = io.BytesIO()
    picture: Image.Image = open_image(image)
    picture.save(buffer, "PNG")
    return buffer.getvalue()
