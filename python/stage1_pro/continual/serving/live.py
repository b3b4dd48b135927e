"""Serving what the loop points at: a new champion is picked up without a restart. No database, no torch.

``champion.json`` is the whole interface between the loop and those who serve: replaced atomically by ``Registry``, read
here before every batch. A bundle is loaded and verified before it is used, so a bad one leaves the old one serving.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from stage1_pro.continual.serving.events import EventLog, Novelty, ReviewPlan
from stage1_pro.continual.serving.served import Served, identify
from stage1_pro.deploy.bundle import MANIFEST, Bundle, load_bundle
from stage1_pro.deploy.cascade import Answering, Cascade, Decisions, Prepared, concatenate
from stage1_pro.errors import ArtifactError, InputError, Stage1Error
from stage1_pro.files import sha256_bytes, uniform
from stage1_pro.policies.policy import Policy
from stage1_pro.progress import say
from stage1_pro.record import Record

if TYPE_CHECKING:
    from stage1_pro.deploy.trained import Trained

POINTER = "champion.json"
BUNDLES = "bundles"
PAIRS = "pairs"
PLAN = "plan.json"
NOVELTY = "novelty"


class Pointer(Record):
    """``champion.json``: what serves, by the sha256 of its ``bundle.json``, and what is being tried beside it."""

    format_version: Literal[1] = 1
    serial: int = Field(ge=1, description="grows with every change")
    champion: str
    version: int = Field(ge=1, description="of the alias champion")
    previous: str | None = Field(description="what a rollback would bring back")
    threshold: float | None = Field(description="that the champion exits at while it is above its policy's own")
    audit_rate: float | None = Field(
        None, ge=0, le=1, description="every event's chance of review is at least this; null: as the plan has it"
    )
    shadow: str | None = Field(description="decides, too; its answers do not leave")
    canary: str | None = Field(description="answers a share of the images")
    canary_share: float = Field(ge=0, le=1)


class Pair(Record):
    """What champion and candidate said of one image; one of them was served, and its event is in the log."""

    time: float
    image_sha256: str
    champion: str
    candidate: str
    served: Literal["champion", "candidate"]
    champion_label: str = Field(description="empty: no answer")
    candidate_label: str
    champion_exited: bool
    candidate_exited: bool


def novelty_path(root: Path | str, bundle: str) -> Path:
    """Where a registry's folder says what is known to a bundle, once the loop has learned that."""
    return Path(root) / NOVELTY / f"{bundle}.json"


def read_pairs(log: Path | str, candidate: str) -> Iterator[Pair]:
    """Pairs of a candidate in the order of writing; the torn line of a killed writer is passed over."""
    path = Path(log) / PAIRS / f"{candidate}.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield Pair.model_validate_json(line)
            except ValidationError:
                continue


def tightened(policy: Policy, threshold: float | None) -> Policy:
    """The policy at a stricter exit threshold, without the promises that do not survive it; see ``Policy.at``."""
    return policy if threshold is None else policy.at(threshold)


def takes_canary(image_sha256: str, share: float, candidate: str) -> bool:
    """Whether an image is the canary's: always the same ones, and more of them as the share grows."""
    return uniform(0, f"canary/{candidate}", image_sha256) < share


@dataclass(frozen=True)
class _Loaded:
    """A loaded bundle under its hash, at a threshold and an audit rate, and what logs its decisions."""

    sha256: str
    at: tuple[float | None, float | None]
    cascade: Cascade
    served: Served | None

    def answer(self, photos: Sequence[Prepared], now: float) -> Decisions:
        return (self.served or self.cascade).answer(photos, now=now)


@dataclass(frozen=True)
class _Serving:
    """What one state of ``champion.json`` names, loaded."""

    raw: bytes
    pointer: Pointer
    champion: _Loaded
    candidate: _Loaded | None


class LiveCascade(Answering):
    """A cascade that follows ``champion.json`` of a registry's folder, for any number of threads.

    Before every batch the file is read. When it names something else, one thread loads and verifies it while the others
    go on with what they have. What was loaded for the pointer before is kept, so a rollback costs no loading.

    Args:
        root: the registry's folder.
        runtime: as ``Cascade.load`` takes it.
        threads: as ``Cascade.load`` takes it.
        log: where decisions go, and pairs of champion and candidate; without it nothing is logged and shadows rest.
        plan: how events are drawn for review; the loop's own (``plan.json``) by default. While the file asks for more
            audits, every event's chance is raised to that.
        on_failure: as ``Served`` takes it.
        retry_seconds: how long a bundle that could not be loaded is left alone.
        writer: as ``Served`` takes it.

    Raises:
        ArtifactError: no champion yet, or its bundle is damaged.
    """

    def __init__(
        self,
        root: Path | str,
        runtime: str = "onnxruntime",
        *,
        threads: int = 0,
        log: EventLog | None = None,
        plan: ReviewPlan | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        retry_seconds: float = 30.0,
        writer: str | None = None,
    ) -> None:
        self.root, self.log = Path(root), log
        self.failure: str | None = None
        """Why what the file names does not serve; None where it does."""
        self.candidate_failures = 0
        if plan is None and (self.root / PLAN).is_file():
            plan = ReviewPlan.read(self.root / PLAN)
        self._plan, self._retry_seconds, self._writer = plan or ReviewPlan(), retry_seconds, writer
        self._on_failure = on_failure
        self._open: Callable[[Bundle], Cascade] = lambda bundle: Cascade.load(bundle, runtime, threads=threads)
        self._loading = threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._known: dict[str, Novelty | None] = {}
        self._failed: tuple[bytes, float] = (b"", 0.0)
        self._serving = self._follow(self._raw())

    @property
    def pointer(self) -> Pointer:
        """What serves now."""
        return self._serving.pointer

    def refresh(self) -> Pointer:
        """Look at the file, load what it names if that is new, and say what serves now; an error keeps the old."""
        try:
            raw = self._raw()
        except ArtifactError as error:
            self._fail(b"", error)
            return self.pointer
        if raw == self._serving.raw:
            self.failure = None
            for loaded in (self._serving.champion, self._serving.candidate):
                if loaded is not None and loaded.served is not None and loaded.served.novelty is None:
                    loaded.served.novelty = self._novelty(loaded.sha256)
            return self.pointer
        given_up = self._failed[0] == raw and time.monotonic() - self._failed[1] < self._retry_seconds
        if not given_up and self._loading.acquire(blocking=False):
            try:
                self._serving = self._follow(raw)
                self.failure = None
                policy = self._serving.champion.cascade.bundle.policy
                note = f"; {policy.statement}" if policy.exit_threshold == self.pointer.threshold else ""
                say(f"serving {self.pointer.champion[:12]} (serial {self.pointer.serial}){note}")
            except (Stage1Error, OSError) as error:
                self._fail(raw, error)
            finally:
                self._loading.release()
        return self.pointer

    @property
    def bundle(self) -> Bundle | Trained:  # type: ignore[override]
        """The champion's bundle."""
        return self._serving.champion.cascade.bundle

    def answer(self, photos: Sequence[Prepared], *, now: float | None = None) -> Decisions:
        """Look at the file, then decide for photos as one batch of what it points at.

        Raises:
            OSError: the log cannot be written.
        """
        self.refresh()
        now = time.time() if now is None else now
        # Another thread may change it meanwhile; a batch is of one champion.
        serving = self._serving
        champion, candidate, pointer = serving.champion, serving.candidate, serving.pointer
        if candidate is None or not photos:
            return champion.answer(photos, now)
        names = [identify(photo.image) for photo in photos]
        share = pointer.canary_share if pointer.canary is not None else 0.0
        by_canary = np.array([takes_canary(name, share, candidate.sha256) for name in names])
        parts: list[tuple[NDArray[np.intp], Decisions]] = []

        def answer(by: _Loaded, rows: NDArray[np.intp], *, by_candidate: bool) -> None:
            asked, mine = [photos[row] for row in rows], [names[row] for row in rows]
            found = by.answer(asked, now)
            self._pair(champion, candidate, found, asked, mine, now, by_candidate=by_candidate)
            parts.append((rows, found))  # last: what failed on the way has answered nothing

        if by_canary.any():
            try:
                answer(candidate, np.flatnonzero(by_canary), by_candidate=True)
            except Exception as error:  # noqa: BLE001  a candidate that fails must not take an answer with it
                self._note(candidate, error)
                by_canary[:] = False
        if not by_canary.all():
            answer(champion, np.flatnonzero(~by_canary), by_candidate=False)
        joined = concatenate([found for _, found in parts])
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return Decisions(**{f.name: getattr(joined, f.name)[order] for f in dataclasses.fields(Decisions)})

    def _pair(
        self, champion: _Loaded, candidate: _Loaded, found: Decisions, photos: Sequence[Prepared], names: list[str],
        now: float, *, by_candidate: bool,
    ) -> None:  # fmt: skip
        """Ask the other side as well and write both answers down; whatever goes wrong there stays there."""
        if self.log is None:
            return
        other = champion if by_candidate else candidate
        try:
            second = other.cascade.answer(photos)
            first, tried = (second, found) if by_candidate else (found, second)
            pairs = [
                Pair(
                    time=now, image_sha256=name, champion=champion.sha256, candidate=candidate.sha256,
                    served="candidate" if by_candidate else "champion",
                    champion_label=str(first.label[row]), candidate_label=str(tried.label[row]),
                    champion_exited=bool(first.exited[row]), candidate_exited=bool(tried.exited[row]),
                )
                for row, name in enumerate(names)
            ]  # fmt: skip
            _append_pairs(self.log.folder, pairs)
        except Exception as error:  # noqa: BLE001  the same
            self._note(other, error)

    def _note(self, candidate: _Loaded, error: Exception) -> None:
        self.candidate_failures += 1
        if self.candidate_failures == 1:
            say(f"{candidate.sha256[:12]} failed beside the champion: {error}")

    def _raw(self) -> bytes:
        try:
            return (self.root / POINTER).read_bytes()
        except OSError as error:
            said = f"{self.root} must hold {POINTER}, got: {error.strerror}; `stage1 continual init` makes it"
            raise ArtifactError(said) from None

    def _follow(self, raw: bytes) -> _Serving:
        pointer = Pointer.parse(raw.decode("utf-8", "replace"), POINTER)
        trying = pointer.canary or pointer.shadow
        champion = self._take(pointer.champion, pointer.threshold, pointer.audit_rate)
        candidate = None
        if trying is not None and (pointer.canary is not None or self.log is not None):
            candidate = self._take(trying, None, pointer.audit_rate)
        named = {pointer.champion, pointer.previous, trying}
        self._loaded = {name: loaded for name, loaded in self._loaded.items() if name in named}
        return _Serving(raw, pointer, champion, candidate)

    def _take(self, sha256: str, threshold: float | None, audit_rate: float | None) -> _Loaded:
        known = self._loaded.get(sha256)
        if known is not None and known.at == (threshold, audit_rate):
            return known
        bundle = load_content(self.root, sha256, verify=known is None)
        runtime = (self._open(bundle) if known is None else known.cascade).runtime
        cascade = Cascade(dataclasses.replace(bundle, policy=tightened(bundle.policy, threshold)), runtime)
        # Each counts its own events.
        writer = None if self._writer is None else f"{self._writer}/{threshold}" + f"/{audit_rate}" * bool(audit_rate)
        served = None
        if self.log is not None:
            served = Served(
                cascade, self.log, plan=self._plan.raised(audit_rate), novelty=self._novelty(sha256),
                on_failure=self._on_failure, writer=writer,
            )  # fmt: skip
        # One threshold of each bundle: a threshold that follows labels moves thousands of times.
        self._loaded[sha256] = loaded = _Loaded(sha256, (threshold, audit_rate), cascade, served)
        return loaded

    def _novelty(self, sha256: str) -> Novelty | None:
        """What is known to a bundle; read once, when the loop has written it."""
        path = novelty_path(self.root, sha256)
        if self._plan.novelty > 0 and sha256 not in self._known and path.is_file():
            try:
                self._known[sha256] = Novelty.read(path)
            except ArtifactError as error:
                self._known[sha256] = None
                say(f"nothing is novel to {sha256[:12]}: {error}; remove it, let the loop learn anew, and start again")
        return self._known.get(sha256)

    def _fail(self, raw: bytes, error: Exception) -> None:
        if self._failed[0] != raw or self.failure is None:
            say(f"{POINTER} is not followed, {self.pointer.champion[:12]} goes on serving: {error}")
        self.failure, self._failed = str(error), (raw, time.monotonic())


def load_content(root: Path | str, sha256: str, *, verify: bool = True) -> Bundle:
    """The bundle of this hash in a registry's folder, verified.

    Raises:
        InputError: no such bundle.
        ArtifactError: it is damaged, or another one.
    """
    path = Path(root) / BUNDLES / sha256
    if not (path / MANIFEST).is_file():
        raise InputError(f"bundle must be one of the registry, got {sha256[:12]}, which {Path(root) / BUNDLES} lacks")
    found = load_bundle(path, verify=verify)
    if sha256_bytes(found.raw) != sha256:
        raise ArtifactError(f"{path} must hold the bundle of that hash, got another; it was changed")
    return found


def _append_pairs(log: Path, pairs: list[Pair]) -> None:
    """One write; each line begins with a line's end, so that what a killed writer left spoils no other."""
    folder = log / PAIRS
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(pair.model_dump(), sort_keys=True) for pair in pairs]
    file = os.open(folder / f"{pairs[0].candidate}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, "".join(f"\n{line}" for line in lines).encode() + b"\n")
    finally:
        os.close(file)
