"""Label until it is proven, on a run: what was begun, the log of labels, and the policy that follows from both.

``RUN/certify`` holds ``plan.json`` (all options, the order of thresholds, hashes), ``photos.npz`` (what the model says
of every photo), ``labels.jsonl`` (a chain of answers, the only thing that grows) and ``head.json`` (its end). All else,
the policy too, is replayed from them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from stage1_pro.chain import GENESIS, AuditRow, canonical, parsed_rows, verify_rows
from stage1_pro.classes import spelled
from stage1_pro.data.photos import Photo, is_address, open_photos
from stage1_pro.data.splits import Splits
from stage1_pro.data.tables import read_table, slashes
from stage1_pro.errors import ArtifactError, InputError, NotReachableError, nearest
from stage1_pro.files import atomic_directory, load_npz, save_npz, sha256_file, write_text
from stage1_pro.policies.bounds import trials_needed
from stage1_pro.policies.certificate import LABELS_RIGHT, CertificateRecord, RiskCounts
from stage1_pro.policies.claims import CLAIMS_FILE, Claims, Stake, close_claim, weigh_claim
from stage1_pro.policies.exiting import ByLimits
from stage1_pro.policies.planning import plan_calibration
from stage1_pro.policies.policy import Policy, coming_files, read_policy, replace_policy
from stage1_pro.policies.sequential import SequentialCertificate
from stage1_pro.policies.target import POLICIES, OfExits, kind_of_target
from stage1_pro.policies.useful import OVERRIDE, weigh_exits
from stage1_pro.progress import say
from stage1_pro.record import Record, parse_json
from stage1_pro.training.calibration import better_policy, checked, read_calibration, read_order
from stage1_pro.training.labelling import Labelling, PoolAnswers, Won
from stage1_pro.training.run import exclusive
from stage1_pro.training.unlabelled import order_told, score_photos

if TYPE_CHECKING:
    from stage1_pro.commands.certify import Certify

FOLDER, _PLAN, _PHOTOS, _LOG, _HEAD = "certify", "plan.json", "photos.npz", "labels.jsonl", "head.json"
# An error this near to its limit takes labels without end.
_NEAR = 0.9
# Chances are computed by another machine's library in the last digits.
_SAME = 1e-9
# The smallest chance of an exit to be labelled, where photos are many.
_FLOOR = 0.1
# So many times the labels of one test should be there to be drawn.
_ENOUGH = 3.0
# Labels of a table that are written down at once.
_AT_ONCE = 200


class CertifyPlan(Record):
    """``plan.json``: what was begun; nothing of it may change."""

    format_version: int = Field(1, ge=1, le=1)
    images: str = Field(description="as it was named")
    root: str = Field(description="that photos' names are relative to")
    rows_independent: bool
    columns: dict[str, str] | None
    policy: str
    exit_error: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1, description="for all claims on these photos together")
    claims: int = Field(ge=1)
    floor: float = Field(gt=0, le=1, description="no exit has a smaller chance of being labelled")
    seed: int = Field(ge=0)
    batch: int = Field(ge=1, description="labels after which the progress is shown anew; the last may be undone before")
    allow_useless: bool
    useless: str = Field(description="why the promise says nothing, where it was wanted all the same")
    thresholds: tuple[float, ...] = Field(min_length=1, description="in the order of testing, strict to lax")
    order: str = Field(description="hash of val_select.npz, which fixed them")
    budget: int | None = Field(description="labels of one test planned beforehand; null: none would do, it seems")
    n_photos: int
    n_units: int = Field(description="groups, one photo of each; photos, where each is its own")
    n_left_out: int = Field(description="photos that show one of the run's")
    n_copies: int
    n_unreadable: int
    pool: str = Field(description="hash of all photos' hashes")
    photos: str = Field(description="hash of photos.npz")
    split_hashes: dict[str, str]
    model_fingerprint: str
    preprocessing_fingerprint: str
    attempt: int = Field(ge=1, description="number of this beginning among the run's claims")
    use: int = Field(ge=1, description="which claim on these photos it is")
    assumptions: tuple[str, ...]

    @property
    def target(self) -> OfExits:
        """What is asked for."""
        kind = kind_of_target(self.policy)
        found = kind.of(
            policy=self.policy, exit_error=self.exit_error, delta=self.delta, claims=self.claims,
            allow_useless=self.allow_useless,
        )  # fmt: skip
        assert isinstance(found, OfExits)
        return found

    def weigh(self, run: Path, photos: PoolAnswers) -> tuple[Stake, Claims]:
        """The claim that this is, as ``weigh_claim`` says."""
        return weigh_claim(
            run, self.pool, photos.sha256, photos.groups, policy=self.policy, wish=self.target.key(),
            model_fingerprint=self.model_fingerprint, preprocessing_fingerprint=self.preprocessing_fingerprint,
            delta=self.delta, claims=self.claims, defaults=(self.delta, self.claims),
            order=f"certify {self.attempt}: {self.photos}",
        )  # fmt: skip


class LogEnd(Record):
    """``head.json``: how far the log went at least; a log without this row was cut."""

    rows: int
    hash: str


class Certified(Record):
    """Where a certificate by labels stands."""

    proven: bool
    threshold: float | None = Field(description="the laxest proven")
    coverage: float | None = Field(description="share of the photos looked through that exit there")
    labels: int = Field(description="answers, those that nobody could tell among them")
    wrong: int = Field(description="of them, wrong answers of Stage A")
    cannot_tell: int = Field(description="of those, photos of which nobody could tell; they count as wrong")
    photos: int = Field(description="photos looked through")
    n_photos: int = Field(description="photos that there are to look through")
    progress: float = Field(description="towards the next threshold, in [0, 1]")
    more: int | None = Field(description="about how many more labels prove it; null: no number would, or none is known")
    advice: str
    head: str = Field(description="hash of the log's last row")
    policy: str = Field(description="what was written; empty: nothing")
    ignored: int = Field(0, description="rows of the table of labels that were not drawn")
    can_go_on: bool = Field(description="whether a photo is left to label")


class Certification(Labelling):
    """A certificate that labels make, where it stands: replayed from its folder, and continued.

    Args:
        folder: ``RUN/certify``.
        mend: drop a row that a killed writer left unfinished, as who continues does.

    Raises:
        ArtifactError: a file is missing, damaged or of other files, or the log was changed or cut.
    """

    def __init__(self, folder: Path, *, mend: bool = True) -> None:
        self.folder, self.run = folder, folder.parent
        plan = self.plan = CertifyPlan.read(folder / _PLAN)
        splits = Splits.read(self.run / "splits.json")
        order = read_order(self.run, read_calibration(self.run), splits)
        found = (splits.hashes, order and order.model_fingerprint, order and sha256_file(self.run / "val_select.npz"))
        if order is None or found != (plan.split_hashes, plan.model_fingerprint, plan.order):
            raise ArtifactError(
                f"{folder / _PLAN} must be of the model and splits in {self.run}, got others; begin anew with "
                "--overwrite"
            )
        if not (folder / _PHOTOS).is_file() or sha256_file(folder / _PHOTOS) != plan.photos:
            raise ArtifactError(f"{folder / _PHOTOS} must be as it was begun, got it missing or changed; restore it")
        self.kind = _kind(plan.policy)
        self._waiting: list[AuditRow] = []
        self._head, self._head_won = LogEnd(rows=0, hash=GENESIS), ""
        proof = SequentialCertificate(
            plan.thresholds, alpha=plan.exit_error, delta=plan.delta / plan.claims, floor=plan.floor,
            budget=plan.budget, seed=plan.seed,
        )  # fmt: skip
        photos = PoolAnswers.of(self.kind, order, load_npz(folder / _PHOTOS))
        super().__init__(proof, photos, order.classes, seed=plan.seed, batch=plan.batch)
        self._replay(mend=mend)
        # Whoever comes back knows more than at the answer.
        self.before = None

    # ---------------------------------------------------------------------------- where it stands

    @property
    def coverage(self) -> float | None:
        """Share of the photos that exit at the next threshold; None: all are proven."""
        return None if self.todo is None else float((self.unit_scores >= self.thresholds[self.todo]).mean())

    def read(self, photo: str) -> bytes | None:
        """The photo that is to be labelled, with the very content that the model saw; None: another, or gone."""
        if photo != self.photo:
            return None
        at = self.at
        try:
            return Photo(open_photos(self.plan.root), str(self.photos.arrays["files"][at]), photo).read()
        except OSError:
            return None

    def stands(self, ignored: int = 0) -> Certified:
        """Where it stands now."""
        won, todo, policy = self.won, self.todo, self.policy()
        return Certified(
            proven=won is not None,
            threshold=None if won is None else won.threshold,
            coverage=None if won is None else self._exits(won) / won.photos,
            labels=self.labels, wrong=self.wrong, cannot_tell=sum(one.label is None for one in self.history),
            photos=self.place, n_photos=len(self.units),
            progress=1.0 if todo is None else float(self.proof.progress[todo]),
            more=self.proof.more if self.labels else None, advice=self.proof.advice, head=self._head.hash,
            policy="" if policy is None else policy.file, ignored=ignored, can_go_on=self.asked is not None,
        )  # fmt: skip

    # ---------------------------------------------------------------------------- labels

    def answer(self, photo: str, label: str | None, by: str, *, at_once: bool = True) -> bool:
        """Take the class of the photo asked for, None where nobody can tell; give whether that proved a threshold.

        Args:
            photo: content hash.
            label: a class of the run.
            by: who says so.
            at_once: let it outlast this process before this returns; otherwise ``keep`` does.

        Raises:
            InputError: another photo is asked for, or the label is no class.
        """
        if self.asked is None or photo != self.photo:
            raise InputError(f"photo must be the one that is asked for, got {photo[:12]}; take the next one")
        if label is not None and label not in self.classes:
            raise InputError(
                f"label must be one of {', '.join(self.classes)}, got '{label}'{nearest(label, self.classes)}"
            )
        body = {"photo": photo, "place": self.asked.place, "chance": float(self.asked.chances[0]), "by": by}
        return self._add("cannot tell" if label is None else "answer", {**body, "label": label}, at_once=at_once)

    def undo(self, by: str) -> bool:
        """Take the last answer back, if it may be, and write that down; give whether it was."""
        if self.can_undo:
            self._add("undo", {"by": by})
            return True
        return False

    def take(self, given: Mapping[str, str], by: str) -> int:
        """Answer from labels by name or content hash, as long as the photo asked for is among them.

        An empty label says that nobody could tell. Give how many of them were not drawn.
        """
        used = 0
        while self.asked is not None:
            file = str(self.photos.arrays["files"][self.at])
            label = given.get(self.asked.name, given.get(file))
            if label is None:
                break
            used += 1
            self.answer(self.asked.name, label or None, by, at_once=used % _AT_ONCE == 0)
        self.keep()
        foreign = len(given.keys() - {*self.photos.sha256, *map(str, self.photos.arrays["files"])})
        if foreign:
            say(f"{foreign} labels name photos that are not among the {self.plan.n_photos} looked at")
        return len(given) - used

    def keep(self) -> None:
        """Let every answer outlast this process, and write the policy where one is proven."""
        self._store()
        policy = self.policy()
        if policy is None:
            return
        # One that was killed on its way there counts already, and is not done.
        on_its_way = any((self.run / name).exists() for name in coming_files())
        if on_its_way or read_policy(self.run) != policy:
            replace_policy(self.run, checked(policy))
            say(f"wrote {self.run / policy.file}")
        close_claim(self.run, self.plan.pool, self.plan.weigh(self.run, self.photos)[0], "certified")

    def _add(self, kind: str, body: dict[str, Any], *, at_once: bool = True) -> bool:
        row, before = AuditRow.after(self._head.rows + 1, self._head.hash, kind, body, time.time()), self.won
        self._waiting.append(row)
        if at_once:
            self._store()
        self._head = LogEnd(rows=row.seq, hash=row.hash)
        self._apply(row)
        if self.won == before:
            return False
        self.keep()
        return True

    def _store(self) -> None:
        """Write rows down, all or none."""
        if not self._waiting:
            return
        path, last = self.folder / _LOG, self._waiting[-1]
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write("".join(f"{canonical(row.model_dump())}\n" for row in self._waiting).encode())
                file.flush()
                os.fsync(file.fileno())
            LogEnd(rows=last.seq, hash=last.hash).write(self.folder / _HEAD)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
        finally:
            self._waiting = []

    # ---------------------------------------------------------------------------- replay

    def _replay(self, *, mend: bool) -> None:
        """Read the log and do again what it says."""
        path, end = self.folder / _LOG, LogEnd.read(self.folder / _HEAD)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} must be the log of labels, got: {error.strerror}; restore it") from None
        whole = data[: data.rfind(b"\n") + 1]
        rows = list(parsed_rows(whole))
        found = verify_rows(rows, end.hash)
        if not found.ok:
            raise ArtifactError(
                f"{path} must be as it was written, got in row {found.broken_at}: {found.reason}; restore it "
                "from a copy, or begin anew with --overwrite and other photos"
            )
        first = rows[0]
        assert isinstance(first, AuditRow)
        if self._body(first) != {"plan": self.plan.fingerprint()}:
            raise ArtifactError(f"{self.folder / _PLAN} must be what {path} began with, got another; restore it")
        self._head = LogEnd(rows=1, hash=first.hash)
        for row in rows[1:]:
            assert isinstance(row, AuditRow)
            self._head = LogEnd(rows=row.seq, hash=row.hash)
            try:
                self._apply(row)
            except (KeyError, TypeError, ValueError, InputError) as error:
                raise ArtifactError(
                    f"{path} must have the answers that this plan asks for, got in row {row.seq}: {error}"
                ) from None
        if mend and len(whole) < len(data):
            # Its writer was killed, and told nobody.
            os.truncate(path, len(whole))
        if mend and self._head != end:
            self._head.write(self.folder / _HEAD)

    def _body(self, row: AuditRow) -> dict[str, Any]:
        found = parse_json(
            row.body.encode(), f"row {row.seq} of {self.folder / _LOG}", ArtifactError, values=99, depth=9
        )
        if not isinstance(found, dict):
            raise ArtifactError(f"row {row.seq} of {self.folder / _LOG} must hold keys and values, got something else")
        return found

    def _apply(self, row: AuditRow) -> None:
        """Do what a row says; raises ValueError where it answers what is not asked."""
        body = self._body(row)
        if row.kind == "undo":
            if not self.take_back():
                raise ValueError("an answer is taken back that stands")
            return
        unit, label = self.asked, body["label"]
        if unit is None or row.kind != ("cannot tell" if label is None else "answer"):
            raise ValueError(f"nothing is asked that '{row.kind}' answers")
        same = (body["photo"], body["place"]) == (unit.name, unit.place)
        if not same or not math.isclose(body["chance"], float(unit.chances[0]), rel_tol=_SAME):
            raise ValueError(f"photo {str(body['photo'])[:12]} instead of {unit.name[:12]}")
        if self.count(label):
            self._head_won = row.hash

    # ---------------------------------------------------------------------------- what follows

    def _exits(self, won: Won) -> int:
        return int((self.unit_scores[: won.photos] >= won.threshold).sum())

    def policy(self) -> Policy | None:
        """The policy that the labels prove, of the last threshold that they did; None: none is proven."""
        plan, won = self.plan, self.won
        if won is None:
            return None
        at, rows = plan.thresholds.index(won.threshold), self.photos.rows
        exits = [one for one in self.history[: won.answers] if self.photos.of_pool[one.at] >= won.threshold]
        positive = [one for one in exits if one.label == rows.positive]
        weights = np.array([1 / one.chance for one in exits])
        # Every label stands for as many exits as its chance says.
        error = float(weights @ np.array([one.wrong for one in exits])) / float(weights.sum())
        n, n_exits, n_wrong = won.photos, self._exits(won), sum(one.wrong for one in exits)
        single = len(set(self.photos.groups)) == len(self.photos.groups)
        level, kind = plan.delta / plan.claims, "a new photo" if single else "one photo drawn from a new group"
        guarantee = (
            f"With probability at least {100 * (1 - level):g}% over the photos that were drawn: exit error at most "
            f"{100 * plan.exit_error:g}% of {kind} like those looked through (bets on labels, looked at after each; "
            "thresholds in a frozen order)."
        )
        cannot = sum(one.label is None for one in self.history[: won.answers])
        assumptions = [
            self._order_told,
            "photos were drawn independently from where it will serve"
            + (", as the caller states" if plan.rows_independent else ", one for each group"),
            LABELS_RIGHT,
            *plan.assumptions,
        ]
        statement = (
            f"{guarantee} Labelled until it was proven: {n} of {len(self.units)} photos were looked through in an "
            f"order drawn beforehand, {n_exits} of them exit; {won.labels} were drawn for labelling, none of what may "
            f"exit with a chance below {plan.floor:g}. Of {len(exits)} labelled exits {n_wrong} were wrong"
            f"{f' ({cannot} photos that nobody could tell are counted as wrong)' if cannot else ''}; likely errors "
            f"were drawn more often, so that the share of all exits looks like {error:.2%}. Provided that "
            f"{'; '.join(assumptions)}."
        )
        p_value = min(1.0, 1 / float(self.proof.capital[at]))
        certificate = CertificateRecord(
            method="sequential", delta=level, claims=plan.claims, use=plan.use, min_coverage=None,
            risks=[
                RiskCounts(
                    name="exit error", alpha=plan.exit_error, trials=len(exits), errors=n_wrong, bound=plan.exit_error,
                    p_value=p_value,
                )
            ],
            unit="rows" if single else "groups", n=n, accepted=n_exits, coverage=n_exits / n, threshold=won.threshold,
            first_candidate=plan.thresholds[0], n_tested=at + 1, p_value=p_value, seed=plan.seed, guarantee=guarantee,
            assumptions=assumptions, labelled=won.labels, log=self._head_won,
        )  # fmt: skip
        fields = {
            "classes": rows.classes, "positive": rows.positive, "coverage": n_exits / n, "fnr_on_exited": None,
            "guarantee": "ltt", "certificate": certificate, "n_rows": n, "n_exited": n_exits,
            "n_positive_exited": len(positive), "n_false_negative": sum(one.wrong for one in positive),
            "grouped": not single, "sweep_results": [], "split_hashes": plan.split_hashes,
            "model_fingerprint": plan.model_fingerprint, "preprocessing_fingerprint": plan.preprocessing_fingerprint,
            "useless": plan.useless, "statement": statement, "exit_error": error,
            "exit_error_upper_bound": plan.exit_error, "fnr_upper_bound": None, "bound_level": 1 - level,
            "bound_method": "bets on labels drawn with known chances, looked at after each; only the limit is shown",
            "n_errors": n_wrong, "n_exited_groups": n_exits, "n_positive_groups": len(positive),
            "unlabelled": plan.pool,
        }  # fmt: skip
        return self.kind.made(plan.target, rows, won.threshold, fields, 1 - error)

    @cached_property
    def _order_told(self) -> str:
        n = int(self.photos.rows.fit_half().sum())
        return order_told(n, self.plan.n_photos)


def read_given(table: Path, classes: Sequence[str]) -> dict[str, str]:
    """Labels of a table by ``sha256`` or ``file``; empty where nobody could tell.

    Raises:
        InputError: the table is not what it must be, has two labels for a photo, or one that is no class.
    """
    given: dict[str, tuple[str, str]] = {}
    for where, cells in read_table(table, ("file", "sha256", "label"), required=("label",)):
        name = cells.get("sha256") or slashes(cells.get("file", ""))
        if not name:
            raise InputError(f"{where} must name a photo by sha256 or file, got neither")
        label = spelled(cells["label"])
        if given.setdefault(name, (label, where))[0] != label:
            raise InputError(f"{where} must have the label of {given[name][1]}, got two for one photo: {name}")
        if label and label not in classes:
            raise InputError(
                f"label in {where} must be one of {', '.join(classes)} or empty (nobody can tell), got "
                f"'{label}'{nearest(label, classes)}"
            )
    return {name: label for name, (label, _) in given.items()}


@contextlib.contextmanager
def opened(asked: Certify) -> Iterator[tuple[Certification, dict[str, str]]]:
    """Begin, or go on with what was begun, while no other process is at work in the run; with a table's labels.

    Raises:
        InputError: an option is not what it must be, or another than was begun with; or the photos certify no more.
        ArtifactError: a file is missing, damaged or changed.
        NotReachableError: the promise would say nothing.
    """
    folder = asked.run / FOLDER
    if not (asked.run / "splits.json").is_file():
        raise InputError(f"--run must be a trained run, got {asked.run}, which has no splits.json")
    given = {} if asked.labels is None else read_given(asked.labels, Splits.read(asked.run / "splits.json").classes)
    with exclusive(asked.run):
        if not (folder / _PLAN).is_file() or asked.overwrite:
            _begin(asked, folder)
        else:
            _same(asked, CertifyPlan.read(folder / _PLAN))
        work = Certification(folder)
        stake, claims = work.plan.weigh(asked.run, work.photos)
        if not stake.made:
            # Killed between the plan and the claim, before anybody saw a photo.
            claims.write(asked.run / CLAIMS_FILE)
        work.keep()
        yield work, given


def check_log(run: Path) -> tuple[Certified, str]:
    """Replay the log of a run and say, too, whether the policy that lies there is the one that it proves.

    Raises:
        ArtifactError: the log or what it began with was changed or cut, or does not prove the policy.
    """
    folder = run / FOLDER
    if not (folder / _PLAN).is_file():
        raise InputError(f"--check must have something to check, got {run} without {FOLDER}/{_PLAN}; begin it first")
    work = Certification(folder, mend=False)
    proven, lies = work.policy(), read_policy(run)
    if proven == lies:
        return work.stands(), "the log is whole, and the policy is what it proves" if lies else "the log is whole"
    if proven is not None and (lies is None or not lies.outside):
        return work.stands(), "the log is whole, but the policy that lies there is another command's"
    raise ArtifactError(
        f"{run} must have the policy that {folder / _LOG} proves, got "
        f"{'none proven' if proven is None else 'another'}; restore both from one copy"
    )


def _kind(policy: str) -> type[ByLimits]:
    kind = POLICIES.find(policy)
    if not issubclass(kind, ByLimits):
        raise InputError(f"--policy must be softmax or gate to be certified label by label, got {policy}")
    return kind


def _same(asked: Certify, plan: CertifyPlan) -> None:
    """Refuse other options than those of what was begun; what is left out is as it was begun."""
    for name, value in asked.begun_with().items():
        before = getattr(plan, name)
        if value is not None and value != before:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} must be {before}, as it was begun, got {value}; leave it out to go on, or begin anew with "
                "--overwrite, which is another claim"
            )


def _begin(asked: Certify, folder: Path) -> None:
    run = asked.run
    if asked.images is None or asked.exit_error is None:
        raise InputError("--images and --exit-error must be given to begin with, got one or both left out")
    predictions, splits = read_calibration(run), Splits.read(run / "splits.json").verify()
    order = read_order(run, predictions, splits)
    policy = asked.policy or "auto"
    policy = better_policy(run, predictions, stated=False) if policy == "auto" else policy
    kind = _kind(policy)
    found = score_photos(
        run, Path(asked.images), splits, order, columns=asked.columns,
        rows_independent=bool(asked.rows_independent), said="--images",
    )  # fmt: skip
    assert order is not None
    arrays = {
        "files": np.array([one.key for one in found.pool.photos]), "sha256": np.array(found.pool.hashes),
        "groups": np.array(found.groups), **found.logits,
    }  # fmt: skip
    photos, n_units = PoolAnswers.of(kind, order, arrays), len(set(found.groups))
    alpha = asked.exit_error
    thresholds = photos.thresholds(alpha, n_units)
    fit = photos.rows.fit_half()
    weighed = weigh_exits(photos.rows.where(fit), photos.scores[fit] >= thresholds[0], "groups", None)
    if weighed.useless and not asked.allow_useless:
        raise NotReachableError(
            f"exit error <= {alpha:g} must be a promise that says something, but on val_select {weighed.useless}. "
            f"Train a better Stage A, or {OVERRIDE}. Nothing was begun"
        )
    exits = photos.of_pool >= thresholds[0]
    guess = float(photos.p_hat[exits].mean()) if exits.any() else 1.0
    source = found.pool.photos[0].photos.root
    given = {name: one for name, one in asked.begun_with().items() if one is not None}
    with atomic_directory(folder, keep=True) as staging:
        save_npz(staging / _PHOTOS, arrays)
        draft = CertifyPlan(
            **{
                "rows_independent": False, "columns": None, "delta": 0.05, "claims": 1, "floor": 1.0, "seed": 0,
                "batch": 10, "allow_useless": False, **given, "policy": policy,
            },
            root=source if is_address(source) else str(Path(source).absolute()), useless=weighed.useless,
            thresholds=thresholds, order=sha256_file(run / "val_select.npz"), budget=None, n_photos=len(found.groups),
            n_units=n_units, n_left_out=found.pool.n_left_out, n_copies=found.pool.n_copies,
            n_unreadable=len(found.pool.quarantined), pool=found.pool.fingerprint,
            photos=sha256_file(staging / _PHOTOS), split_hashes=splits.hashes,
            model_fingerprint=order.model_fingerprint, preprocessing_fingerprint=order.preprocessing_fingerprint,
            attempt=1 + sum(len(half.uses) for half in Claims.of(run).halves.values()), use=1, assumptions=(),
        )  # fmt: skip
        stake, _ = draft.weigh(run, photos)
        level = stake.delta / stake.claims
        budget = plan_calibration(alpha, level, None, guess) if guess < _NEAR * alpha else None
        wanted = _ENOUGH * (budget or trials_needed(2, alpha, level)) / max(n_units * float(exits.mean()), 1.0)
        plan = draft.model_copy(
            update={
                "delta": stake.delta, "claims": stake.claims, "use": stake.use, "assumptions": stake.assumptions(),
                "budget": budget, "floor": given.get("floor", round(min(max(wanted, _FLOOR), 1.0), 3)),
            }
        )  # fmt: skip
        plan.write(staging / _PLAN)
        row = AuditRow.after(1, GENESIS, "begun", {"plan": plan.fingerprint()}, time.time())
        write_text(staging / _LOG, f"{canonical(row.model_dump())}\n")
        LogEnd(rows=1, hash=row.hash).write(staging / _HEAD)
    say(
        f"one of {n_units} groups each will be looked through, a photo drawn from each"
        if n_units < plan.n_photos
        else f"{n_units} photos will be looked through, each a group of its own"
    )
    if plan.budget is None:
        say(f"by val_select {guess:.1%} of exits are wrong, too near to {alpha:g} or above: labels may prove nothing")
    else:
        say(f"a test planned beforehand would take {plan.budget:,} labels; looked at after each it mostly takes fewer")
    say(f"an exit is drawn for labelling with a chance of {plan.floor:g} at least")


def render(found: Certified) -> str:
    """Where it stands, for people."""
    seen = (
        f"{found.labels:,} labels ({found.wrong:,} wrong answers, {found.cannot_tell:,} of them photos that nobody "
        f"could tell), {found.photos:,} of {found.n_photos:,} photos looked through"
    )
    if found.ignored:
        seen += f"; {found.ignored:,} labels of the table were not drawn and are ignored"
    if found.proven:
        head = f"PROVEN at threshold {found.threshold:.6g}: {found.coverage:.1%} of the photos exit there"
        more = f"; {found.advice[0].lower()}{found.advice[1:]}" if found.can_go_on else ""
        return f"{head}{more}\n{seen}\npolicy: {found.policy}"
    if not found.can_go_on:
        return f"NOT PROVEN, and no photo is left: bring more photos of this kind\n{seen}"
    return f"not proven yet ({found.progress:.0%} of the way). {found.advice}\n{seen}\nthe same command goes on"
