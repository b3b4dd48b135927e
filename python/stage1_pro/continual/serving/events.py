"""What was served: an event per decision in an append-only log, with its chance of review. No database, no torch."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import locked, uniform, write_bytes, write_text
from stage1_pro.record import Record

SKETCH_SIZE = 64
_HAS_FLOCK = find_spec("fcntl") is not None
# Least share of exits that is audited at random: without these audits nobody sees what Stage A gets wrong.
LEAST_FLOOR = 0.02
_SHA256 = r"^[0-9a-f]{64}$"
# Bytes of a log's end in which its last events are: one is about 1 KB, and 110 KB of the most classes.
_TAIL = 256 * 2**10
_SEGMENT = re.compile(r"events-(\d{8})\.jsonl")

Action = Literal["exit", "defer", "abstain"]


def _to_floats(value: Any) -> tuple[float, ...]:
    """64 float32 values from base64 of their little-endian bytes, or from any sequence."""
    if isinstance(value, str):
        data = base64.b64decode(value, validate=True)
        if len(data) != 4 * SKETCH_SIZE:
            raise ValueError(f"must be {SKETCH_SIZE} float32 values, got {len(data)} bytes")
        return unpack_floats(data)
    values = np.asarray(value, dtype=np.float32)
    if values.shape != (SKETCH_SIZE,):
        raise ValueError(f"must be {SKETCH_SIZE} values, got shape {list(values.shape)}")
    return tuple(values.tolist())


def pack_floats(values: Sequence[float]) -> bytes:
    """Little-endian float32 bytes of a sketch."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpack_floats(data: bytes) -> tuple[float, ...]:
    """The sketch of which these are the bytes."""
    return tuple(np.frombuffer(data, dtype="<f4").tolist())


def _to_base64(values: tuple[float, ...]) -> str:
    return base64.b64encode(pack_floats(values)).decode()


Sketch = Annotated[
    tuple[float, ...], BeforeValidator(_to_floats), PlainSerializer(_to_base64, return_type=str, when_used="json")
]


def _to_probs(value: Any) -> Any:
    """Probabilities from base64 of little-endian float32 values; anything else as it is."""
    if not isinstance(value, str):
        return value
    data = base64.b64decode(value, validate=True)
    if len(data) % 4:
        raise ValueError(f"must be float32 values, got {len(data)} bytes")
    return unpack_floats(data)


Probs = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    BeforeValidator(_to_probs),
    PlainSerializer(_to_base64, return_type=str, when_used="json"),
]


class Event(Record):
    """One served decision. None stands where there was no number, or Stage B was not asked."""

    id: str = Field(min_length=1, max_length=64)
    time: float = Field(description="seconds since the epoch, UTC")
    bundle: str = Field(pattern=_SHA256, description="sha256 of bundle.json")
    image_sha256: str = Field(pattern=_SHA256, description="of the encoded file; of the pixels where there was no file")
    action: Action
    stage: Literal["A", "B", ""] = Field(description="who looked last; empty where it gave no number")
    label: str = Field(description="the answer; empty where nobody answers")
    prob_a: float | None = Field(ge=0, le=1, description="P(positive) of Stage A; null where no class is that")
    prob_b: float | None = Field(ge=0, le=1, description="P(positive) of Stage B; null where no class is that")
    confidence: float | None = Field(ge=0, le=1, description="largest probability of the stage that looked last")
    gate_logit: float | None
    exit_score: float | None = Field(ge=0, le=1, description="what was compared with the threshold")
    threshold: float = Field(ge=0, description="an exit needs a score at or above it")
    propensity: float = Field(gt=0, le=1, description="chance with which this event is selected for review")
    selected: bool
    sketch: Sketch = Field(description="seeded random projection of Stage A's features, 64 float32 values")
    probs_a: Probs | None = Field(None, description="of every class, by Stage A, float32; null in older logs")
    probs_b: Probs | None = Field(None, description="the same by Stage B")


# What a ledger keeps of an event; its probabilities of every class stay in the log.
STORED = tuple(name for name in Event.model_fields if name not in ("probs_a", "probs_b"))


# --------------------------------------------------------------------------------------------
# Selection


class ReviewPlan(Record):
    """How events are drawn for review: independently (Poisson sampling), each with a chance that is logged.

    Every rate is the chance that its reason alone selects an event; together they select it with chance
    1 - (1 - floor) * prod(1 - rate * signal). ``least`` lifts every chance to itself, as long as the loop asks for more
    audits. It is apart from ``floor``: draws below the floor stay a plain random sample of all that was served.
    """

    floor: float = Field(default=LEAST_FLOOR, ge=LEAST_FLOOR, le=1, description="chance of every event, exits too")
    deferral: float = Field(default=0.10, ge=0, le=1, description="Stage B was asked")
    abstention: float = Field(default=0.25, ge=0, le=1, description="nobody answered")
    disagreement: float = Field(default=0.50, ge=0, le=1, description="Stage B answers otherwise than Stage A")
    entropy: float = Field(default=0.10, ge=0, le=1, description="times the answer's entropy over its largest value")
    novelty: float = Field(default=0.25, ge=0, le=1, description="times how far the features are from known ones")
    least: float = Field(default=0.0, ge=0, le=1, description="no chance is below it; the floor stays what it is")
    seed: int = 0

    def raised(self, rate: float | None) -> Self:
        """The plan in which every event has at least this chance; the same object if that changes nothing."""
        return self if rate is None or rate <= self.least else self.model_copy(update={"least": rate})

    def propensity(
        self,
        deferred: ArrayLike,
        abstained: ArrayLike,
        disagree: ArrayLike,
        entropy: ArrayLike,
        novelty: ArrayLike | float = 0.0,
    ) -> NDArray[np.float64]:
        """Chance of review [N] in [floor, 1] from signals [N], each a bool or in [0, 1]; NaN counts as 1.

        Args:
            deferred: Stage B was asked.
            abstained: nobody answered.
            disagree: Stage B answers otherwise than Stage A.
            entropy: of the answer, over its largest value.
            novelty: distance of the features from known ones.
        """
        passed = np.asarray(1.0)
        rates = (self.deferral, self.abstention, self.disagreement, self.entropy, self.novelty)
        for rate, signal in zip(rates, (deferred, abstained, disagree, entropy, novelty), strict=True):
            value = np.clip(np.nan_to_num(np.asarray(signal, dtype=np.float64), nan=1.0), 0, 1)
            passed = passed * (1 - rate * value)
        # In this order the floor itself comes out exactly, and no rounding falls below it.
        chance: NDArray[np.float64] = self.floor + (1 - self.floor) * (1 - passed)
        return np.clip(chance, self.least, 1.0)

    def selects(self, event_id: str, propensity: float) -> bool:
        """Whether this event is reviewed: a function of seed, id and chance, so that a replay selects the same."""
        return uniform(self.seed, "review", event_id) < propensity


def entropy(probs: ArrayLike) -> NDArray[np.float64]:
    """Entropy [N] of probabilities [N, K] over its largest value, in [0, 1]; NaN where a row has no numbers."""
    values = np.asarray(probs, dtype=np.float64)
    logs = np.log(np.where(values > 0, values, 1.0))
    found: NDArray[np.float64] = -(values * logs).sum(axis=1) / math.log(values.shape[1])
    return np.clip(found, 0, 1)


def sketch(hidden: ArrayLike) -> NDArray[np.float32]:
    """Project what Stage A hands on to [N, 64]; distances are kept to about an eighth (Johnson–Lindenstrauss).

    Of tokens [N, T, D] the first (CLS), of pooled features [N, D] all. The signs (Achlioptas 2003) are the bits of
    SHAKE-256. Rows that are not finite give zeros.

    Raises:
        InputError: another shape.
    """
    values = np.asarray(hidden, dtype=np.float64)
    if values.ndim == 3:
        values = values[:, 0]
    if values.ndim != 2 or values.shape[1] == 0:
        raise InputError(f"hidden must have shape [N, T, D] or [N, D], got {list(np.shape(hidden))}")
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, 0.0)
    return (values @ _signs(values.shape[1]) / math.sqrt(SKETCH_SIZE)).astype(np.float32)


@cache
def _signs(width: int) -> NDArray[np.float64]:
    data = hashlib.shake_256(f"stage1 sketch {width}".encode()).digest(width * SKETCH_SIZE // 8)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(width, SKETCH_SIZE)
    return bits.astype(np.float64) * 2 - 1


class Novelty(Record):
    """How far sketches lie from known ones: Mahalanobis distance, and where the known ones' 95% quantile is."""

    n: int = Field(ge=2)
    mean: Sketch
    factor: tuple[Sketch, ...] = Field(description="lower Cholesky factor of the covariance, a row each")
    quantile: float = Field(gt=0)

    @model_validator(mode="after")
    def _square(self) -> Self:
        if len(self.factor) != SKETCH_SIZE:
            raise ValueError(f"factor must have {SKETCH_SIZE} rows, got {len(self.factor)}")
        if not all(row[place] > 0 and not any(row[place + 1 :]) for place, row in enumerate(self.factor)):
            raise ValueError("factor must be lower triangular with a positive diagonal")
        return self

    @classmethod
    def fit(cls, sketches: ArrayLike) -> Self:
        """Learn what is known from sketches [N, 64], such as those of the first days.

        The covariance is shrunk towards a multiple of the identity by 64 / (64 + N), so that few rows are enough.

        Raises:
            InputError: fewer than two sketches, another shape, or values that are not finite.
        """
        values = np.asarray(sketches, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != SKETCH_SIZE or len(values) < 2 or not np.isfinite(values).all():
            raise InputError(f"sketches must be finite, [N, {SKETCH_SIZE}] with N >= 2, got {list(values.shape)}")
        mean = values.mean(axis=0).astype(np.float32)
        centred = values - mean
        covariance = centred.T @ centred / len(values)
        weight = SKETCH_SIZE / (SKETCH_SIZE + len(values))
        scale = max(float(np.trace(covariance)) / SKETCH_SIZE, 1e-12)
        covariance = (1 - weight) * covariance + (weight + 1e-6) * scale * np.eye(SKETCH_SIZE)
        factor = np.linalg.cholesky(covariance).astype(np.float32)
        distance = _distance(values, mean, factor)
        quantile = max(float(np.quantile(distance, 0.95)), 1e-12)
        return cls(n=len(values), mean=mean, factor=tuple(factor), quantile=quantile)

    def signal(self, sketches: ArrayLike) -> NDArray[np.float64]:
        """Novelty [N] in [0, 1]: 0 within the known ones' 95% quantile, 1 from twice its distance on."""
        distance = _distance(np.asarray(sketches, dtype=np.float64), np.asarray(self.mean), np.asarray(self.factor))
        return np.clip(distance / self.quantile - 1, 0, 1)


def _distance(values: NDArray[Any], mean: NDArray[Any], factor: NDArray[Any]) -> NDArray[np.float64]:
    scaled = np.linalg.solve(factor.astype(np.float64), (values - mean).T)
    found: NDArray[np.float64] = np.sqrt((scaled**2).sum(axis=0))
    return found


# --------------------------------------------------------------------------------------------
# The log


class BundleFacts(Record):
    """Classes of a bundle that served, for readers of its log."""

    bundle: str = Field(pattern=_SHA256)
    classes: tuple[str, ...] = Field(min_length=2)
    positive: str | None


class LogInfo(Record):
    """``log.json``: which log this is, wherever its folder is moved."""

    format_version: Literal[1] = 1
    id: str = Field(min_length=1)
    image_ttl: float = Field(gt=0, description="seconds that an image selected for review is kept")


@dataclass(frozen=True)
class Position:
    """A place in a log, between two lines."""

    segment: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Tail:
    """Events after a position: them, the position behind them, ``segment:offset: reason`` of lines that are none.

    ``pending`` bytes at the very end are a line without its end: what a writer that was killed left. It is not passed
    over, because the next writer ends it; from then on it is among ``torn``.
    """

    events: tuple[Event, ...]
    position: Position
    torn: tuple[str, ...]
    pending: int


class Purged(Record):
    """How many images were removed, and how many were not, as the clock is in doubt."""

    removed: int
    in_doubt: int = 0
    reason: str = ""

    def __str__(self) -> str:
        said = f"purged {self.removed} images whose time was over"
        if not self.in_doubt:
            return said
        return f"{said}; {self.in_doubt} more are kept, for {self.reason}: `stage1 review --purge --yes` removes them"


class EventLog:
    """An append-only log in a folder, for any number of writing and reading processes.

    ``events-<n>.jsonl`` (a JSON object a line), ``images/`` (of selected events, for a time), ``bundles/`` (facts on
    what served). A killed process loses nothing it had appended, and leaves at most one torn line, which the next
    writer ends and readers report. Lines are synced to disk at most ``sync_seconds`` after an earlier sync, by the next
    append, and on ``close``; a machine that loses power loses what came after.

    Args:
        folder: made where there is none.
        image_ttl: seconds that images are kept; of a new log 30 days, of an old one what it was made with.
        sync_seconds: 0 syncs every append.
        segment_bytes: size from which another file is begun.
        read_only: nothing is made or locked; the log must be there.

    Raises:
        InputError: an argument out of range, or another ``image_ttl`` than the log's.
        ArtifactError: ``log.json`` is damaged.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        image_ttl: float | None = None,
        sync_seconds: float = 1.0,
        segment_bytes: int = 64 * 2**20,
        read_only: bool = False,
    ) -> None:
        if not sync_seconds >= 0:
            raise InputError(f"sync_seconds must be 0 or more, got {sync_seconds}")
        if segment_bytes < 1:
            raise InputError(f"segment_bytes must be 1 or more, got {segment_bytes}")
        if image_ttl is not None and not (image_ttl > 0 and math.isfinite(image_ttl)):
            raise InputError(f"image_ttl must be a positive number of seconds, got {image_ttl}")
        self.folder, self.read_only = Path(folder), read_only
        path = self.folder / "log.json"
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / ".lock"):
                if not path.is_file():
                    LogInfo(id=uuid.uuid4().hex, image_ttl=30 * 86400.0 if image_ttl is None else image_ttl).write(path)
        self.info = LogInfo.read(path)
        own = self.info.image_ttl
        if image_ttl is not None and image_ttl != own:
            raise InputError(f"image_ttl must be the log's own, {own:g} s, got {image_ttl:g}; leave it out")
        self.images = ImageStore(self.folder / "images", own)
        self._sync_seconds, self._segment_bytes = sync_seconds, segment_bytes
        self._synced = time.monotonic()
        self._dirty = False

    def _segments(self) -> dict[int, Path]:
        named = ((_SEGMENT.fullmatch(path.name), path) for path in self.folder.iterdir())
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def append(self, events: Sequence[Event]) -> None:
        """Write events, all or none of them.

        Raises:
            OSError: the disk is full or gone; nothing of these events stays.
        """
        if not events:
            return
        data = b"".join(event.model_dump_json().encode() + b"\n" for event in events)
        with _locked(self.folder / ".lock"):
            segments = self._segments()
            number = max(segments, default=0)
            if segments and segments[number].stat().st_size >= self._segment_bytes:
                _fsync(segments[number])
                number += 1
            path = self.folder / f"events-{number:08d}.jsonl"
            with open(path, "a+b", buffering=0, opener=_private) as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":
                        data = b"\n" + data
                _write_all(file.fileno(), data, end)
                self._dirty = True
                if time.monotonic() - self._synced >= self._sync_seconds:
                    os.fsync(file.fileno())
                    self._synced, self._dirty = time.monotonic(), False

    def read(self, start: Position | None = None, limit: int = 20_000) -> Tail:
        """Up to about ``limit`` events after a position; the same position again when there are no more.

        Raises:
            ArtifactError: the log has lost bytes that lay before the position.
        """
        position = start or Position()
        with _locked(self.folder / ".lock"):
            # No writer is at work now, so whatever lies before these sizes is never changed again.
            sizes = {number: (path, path.stat().st_size) for number, path in self._segments().items()}
        events: list[Event] = []
        torn: list[str] = []
        pending = 0
        for number, (path, size) in sizes.items():
            if number < position.segment or len(events) + len(torn) >= limit:
                continue
            offset = position.offset if number == position.segment else 0
            if offset > size:
                raise ArtifactError(f"{path.name} must have {offset} bytes or more as read before, got {size}")
            with path.open("rb") as file:
                file.seek(offset)
                while offset < size and len(events) + len(torn) < limit:
                    line = file.readline(size - offset)
                    if not line.endswith(b"\n") and number == max(sizes):
                        pending = len(line)
                        break
                    try:
                        events.append(Event.model_validate_json(line))
                    except ValidationError as error:
                        if line.strip():
                            torn.append(f"{number}:{offset}: {error.errors()[0]['msg']}")
                    offset += len(line)
            position = Position(number, offset)
        return Tail(tuple(events), position, tuple(torn), pending)

    def __iter__(self) -> Iterator[Event]:
        """Every event that is whole, in the order of writing."""
        tail = self.read()
        while tail.events or tail.torn:
            yield from tail.events
            tail = self.read(tail.position)

    def behind(self, position: Position) -> list[Path]:
        """Whole files before a position, none of which holds the last event that was written."""
        whole = [number for number in self._segments() if number < position.segment]
        # The file that a writer has just begun may hold no event yet, and a purge asks the log for its newest.
        return [self._segments()[number] for number in (whole if position.offset else whole[:-1])]

    def discard(self, position: Position) -> int:
        """Remove the files ``behind`` a position, up to which all events are kept elsewhere; give their bytes."""
        gone = 0
        with _locked(self.folder / ".lock"):
            for path in self.behind(position):
                gone += path.stat().st_size
                path.unlink()
        return gone

    def newest(self) -> float | None:
        """Latest time among the events that were written last; None where there is none."""
        for path in reversed(self._segments().values()):
            times = []
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL))
                for line in file:
                    with contextlib.suppress(ValidationError):
                        times.append(Event.model_validate_json(line).time)
            if times:
                return max(times)
        return None

    def leapt(self, now: float) -> float | None:
        """Time of the last event before the clock leapt further than images are kept; None where it did not."""
        leap = self.folder / "leap"
        known = float(leap.read_text()) if leap.exists() else self.newest()
        return known if known is not None and now - known > self.info.image_ttl else None

    def purge(self, now: float, *, asked: bool = False) -> Purged:
        """Remove images whose time is over, unless the clock is in doubt: more than their time past the newest event.

        Args:
            now: seconds since the epoch.
            asked: a person said that the clock is right.
        """
        leap = self.folder / "leap"
        if asked:
            leap.unlink(missing_ok=True)
        known = None if asked else self.leapt(now)
        if known is None:
            leap.unlink(missing_ok=True)
        elif not leap.exists():
            # The events to come have the clock's time; what was served before them is in doubt until a person says.
            write_text(leap, repr(known))
        since = -math.inf if known is None else known
        in_doubt = sum(image for _, image in self.images.over(now, until=since)) if known is not None else 0
        reason = f"the clock leapt {(now - since) / 86400:.0f} days past an event" if in_doubt else ""
        return Purged(removed=self.images.purge(now, since=since), in_doubt=in_doubt, reason=reason)

    def describe(self, facts: BundleFacts) -> None:
        """Keep what readers must know about a bundle, once."""
        path = self.folder / "bundles" / f"{facts.bundle}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            facts.write(path)

    def bundles(self) -> Mapping[str, BundleFacts]:
        """Facts on every bundle that served, by its sha256."""
        return {path.stem: BundleFacts.read(path) for path in sorted((self.folder / "bundles").glob("*.json"))}

    def close(self) -> None:
        """Sync what this process appended."""
        if self._dirty:
            for path in list(self._segments().values())[-2:]:
                _fsync(path)
            self._dirty = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a log's lock: by ``flock`` (5 µs, first come, first served), or else ``files.locked`` (200 µs, polls)."""
    if not _HAS_FLOCK:
        with locked(path):
            yield
        return
    import fcntl

    with open(path, "ab", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(file: int, data: bytes, end: int) -> None:
    """Write everything, or leave the file ``end`` bytes long as it was."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(file, view) :]
    except BaseException:
        os.ftruncate(file, end)
        raise


def _fsync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


class ImageStore:
    """Images of events selected for review, under their sha256, for ``ttl`` seconds; for their owner alone."""

    def __init__(self, folder: Path | str, ttl: float) -> None:
        self.folder, self.ttl = Path(folder), ttl

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch(_SHA256, sha256):
            raise InputError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
        return self.folder / sha256[:2] / sha256

    def put(self, sha256: str, data: bytes, now: float) -> None:
        """Keep an encoded image until ``now + ttl``; one that is there is kept anew."""
        path = self._path(sha256)
        if not path.is_file():
            for folder in (self.folder, path.parent):
                folder.mkdir(parents=True, exist_ok=True)
                if folder.stat().st_mode & 0o077:  # new, or of an older version; its parents are as the umask says
                    folder.chmod(0o700)
            write_bytes(path, data, mode=0o600)
        os.utime(path, (now, now))

    def get(self, sha256: str) -> bytes | None:
        """The encoded image, or None where it was purged or never kept."""
        try:
            return self._path(sha256).read_bytes()
        except FileNotFoundError:
            return None

    def __contains__(self, sha256: str) -> bool:
        return self._path(sha256).is_file()

    def names(self) -> set[str]:
        """The sha256 of every image that is there."""
        return {file.name for file in self._files()}

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Whatever lies where images do; every look asks for it."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as folders:
            for folder in folders:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as files:
                    yield from files

    def over(self, now: float, *, since: float = -math.inf, until: float = math.inf) -> Iterator[tuple[Path, bool]]:
        """Images whose time is over, kept in (since, until]; and what killed writers left (False)."""
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):
                image, kept = re.fullmatch(_SHA256, file.name) is not None, file.stat().st_mtime
                if since < kept <= min(until, now - (self.ttl if image else 3600)):
                    yield Path(file.path), image

    def purge(self, now: float, *, since: float = -math.inf) -> int:
        """Remove images whose time is over, and what killed writers left; give how many.

        Args:
            now: seconds since the epoch.
            since: what was kept up to then stays.
        """
        removed = 0
        for path, image in self.over(now, since=since):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                removed += image
        return removed
