"""``Policy``: what decides which answers of Stage A stand; the base of every policy file, and their registry.

A policy of another package is one module: a record that derives from ``Policy``, given to ``register`` or named by an
entry point of the group ``stage1_pro.policies``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import at_or_above, floats
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.policies.certificate import PromiseCheck, SetCheck, SweepRow
from stage1_pro.policies.rows import Rows, counting_unit, one_each
from stage1_pro.policies.target import POLICIES, Promise, Target
from stage1_pro.record import Record

if TYPE_CHECKING:
    from stage1_pro.policies.candidates import Risk
    from stage1_pro.policies.planning import Planned, PlanTerms


Said = Literal["promised", "covered by a promise", "promised of groups", "asked for", "watched"]


@dataclass(frozen=True)
class Origin:
    """Where calibration rows come from: hashes of their splits, the model that answered, how its pixels were made."""

    split_hashes: Mapping[str, str] = field(default_factory=dict)
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    def fields(self) -> dict[str, Any]:
        """The same as fields of a policy."""
        return {**asdict(self), "split_hashes": dict(self.split_hashes)}


@dataclass(frozen=True)
class Checked:
    """A policy's constraints held against rows that calibrated nothing; ``sets`` of a policy that gives sets."""

    promises: list[PromiseCheck] = field(default_factory=list)
    sets: SetCheck | None = None


def risk_of(asked: Promise, rows: Rows) -> Risk:
    """What is counted for a limit on exits.

    Raises:
        InputError: no such quantity of exits.
    """
    from stage1_pro.policies.candidates import Risk

    if asked.quantity == "exit error":
        return Risk(asked.quantity, asked.limit, rows.wrong)
    if asked.quantity == "disagreement":
        return Risk(asked.quantity, asked.limit, rows.probs.argmax(axis=1) != rows.answers_b)
    if asked.quantity == "cascade error":
        return Risk(asked.quantity, asked.limit, rows.wrong, otherwise=rows.answers_b != rows.labels)
    if asked.quantity == "FNR on exits" and asked.label is not None:
        return Risk(asked.quantity, asked.limit, rows.missed(asked.label), rows.is_class(asked.label))
    raise InputError(
        "a promise of exits must be of coverage, exit error, FNR on exits, cascade error or disagreement, got "
        f"{asked.quantity}"
    )


class Policy(Record):
    """An exit policy: an image exits at Stage A iff its score is at or above ``exit_threshold``."""

    file: ClassVar[str]  # its name in a run or bundle
    asks: ClassVar[type[Target]]  # what it is asked for
    needs_gate: ClassVar[bool] = True  # scores come from the gate's logits
    score_title: ClassVar[str] = "the gate's P(Stage A is correct)"
    abstains: ClassVar[bool] = False  # there are images that nobody answers, and sets of several classes
    steerable: ClassVar[bool] = True  # a loop may tighten the threshold by what audits of exits say

    format_version: Literal[1] = 1
    policy: str
    classes: list[str] = Field(min_length=2)
    positive: str | None = Field(description="null: no class is the positive one")

    if TYPE_CHECKING:
        # Fields of every policy too, each where its file has it.
        guarantee: str
        statement: str
        split_hashes: dict[str, str]
        model_fingerprint: str | None
        preprocessing_fingerprint: str | None

        @property
        def exit_threshold(self) -> float:
            """An image exits iff its score is at or above it."""

    # ------------------------------------------------------------------------ what it decides

    @classmethod
    @abstractmethod
    def fit(cls, target: Any, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        """Choose the policy for a target on calibration rows.

        Args:
            target: of the kind ``asks``; its delta is divided by its claims.
            rows: with halves where something is certified.
            use: which of the claims this is, for the record; None when nobody counts.
            origin: of the rows, for the record.

        Raises:
            InputError: an argument is not what it must be.
            NotReachableError: the target cannot be met or certified; nothing is chosen in its place.
        """

    @classmethod
    def check_fit_half(cls, rows: Rows) -> None:
        """Raise NotReachableError where the fit half alone shows that no target can be met: no claim is spent on it."""
        del rows

    @classmethod
    def planned(cls, terms: PlanTerms) -> Planned:
        """How it would certify a target, for ``stage1 plan``, which draws calibrations and counts how many certify.

        Raises:
            InputError: the policy cannot be planned.
        """
        del terms
        name = cls.asks.model_fields["policy"].default
        raise InputError(f"policy must be one that can be planned, got {name}; its class has no method `planned`")

    @abstractmethod
    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        """Give what is compared with the threshold, [N] in [0, 1]; higher is surer, NaN has no answer.

        Args:
            probs: [N, K] probabilities of Stage A.
            gate_logits: [N], where ``needs_gate``.

        Raises:
            InputError: another number of classes than the policy's, or gate logits that are missing.
        """

    def exits(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.bool_]:
        """Say which rows [N] Stage A answers: those whose score is at or above the threshold; NaN never is.

        The one rule of calibration, evaluation, cascade and reports. Arguments and errors as of ``scores``.
        """
        return self.accepts(self.scores(probs, gate_logits))

    def accepts(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Say which scores, of what ``scores`` gives, exit: compared as float64, whatever their dtype; NaN never does.

        Raises:
            InputError: scores that are no numbers.
        """
        return at_or_above("scores", scores, self.exit_threshold)

    def answer(
        self, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Give the classes in each image's set, bool [N, K], and which images are answered, bool [N].

        The set is the most probable class alone, and answered is what has an answer at all, unless a policy abstains.

        Args:
            probs: [N, K] of the stage that answered.
            exited: [N] whether that was Stage A.
            gate_logits: [N], where a policy abstains.

        Raises:
            InputError: another number of classes than the policy's, or gate logits that are missing.
        """
        del exited, gate_logits
        values = self.check_probs(probs)
        answered = np.asarray(np.isfinite(values).all(axis=1))
        sets = np.zeros(values.shape, dtype=bool)
        sets[np.arange(len(values)), values.argmax(axis=1)] = True
        return sets & answered[:, None], answered

    def near(self, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.bool_]:
        """Say which rows [N] lie so near a limit other than ``exit_threshold`` that rounding could decide.

        Arguments as of ``answer``.
        """
        del exited, gate_logits
        return np.zeros(np.shape(probs)[0], dtype=bool)

    def check_probs(self, probs: ArrayLike) -> NDArray[np.float64]:
        """Probabilities [N, K] of the policy's classes, in float64.

        Raises:
            InputError: another shape.
        """
        values = floats("probs", probs)
        if values.ndim != 2 or values.shape[1] != len(self.classes):
            raise InputError(
                f"probs must have shape [N, {len(self.classes)}] as the policy's classes, got {list(values.shape)}; "
                "use the policy of this model"
            )
        return values

    def compiled(self) -> tuple[float, float] | None:
        """Scale and offset of the gate's logit, whose sigmoid is the score; None: the largest probability is.

        Raises:
            InputError: the compiled router does not know scores like these.
        """
        raise InputError(f"policy must be one that the compiled router knows, got {self.policy}; serve with Cascade")

    # ------------------------------------------------------------------------ what it promises

    @property
    @abstractmethod
    def target(self) -> Target:
        """What it was asked for; delta is that of its own claim."""

    @property
    def promises(self) -> tuple[Promise, ...]:
        """All that it may be said to promise, wherever it is shown; nothing without a guarantee."""
        return () if self.guarantee == "none" else self.target.promises(self.positive)

    @property
    def outside(self) -> str:
        """Fingerprint of the photos from outside the splits that certified it; empty: rows of the splits did."""
        return ""

    @property
    def groups_are_photos(self) -> bool:
        """Whether each photo that certified it was a group of its own, so that what it promises is of photos, too."""
        return False

    def says_of_exits(self, limit: float) -> tuple[Said, float]:
        """What a limit on the share of photos that exit and are wrong is to it, and the policy's own limit.

        A promise covers each limit that is no stricter. One of groups promises nothing of photos where groups have
        several: its own limit is then another one, of another rate.
        """

        def own(found: Sequence[Promise]) -> float | None:
            limits = [one.limit for one in found if one.quantity == "exit error" and one.bound == "at most"]
            return min((one for one in limits if one <= limit), default=None)

        sure = [one for one in self.promises if one.strength == "certified" and one.prior is None]
        of_photos = own([one for one in sure if one.unit == "photo" or self.groups_are_photos])
        if of_photos is not None:
            return "promised" if of_photos == limit else "covered by a promise", of_photos
        of_groups, asked = own(sure), own(self.target.promises(self.positive))
        if of_groups is not None:
            return "promised of groups", of_groups
        return ("watched", limit) if asked is None else ("asked for", asked)

    @property
    def fnr_target(self) -> float | None:
        """The largest FNR on exits that was asked for of the positive class; None: it was not, or there is none."""
        asked = self.target.promises(self.positive)
        of = ("FNR on exits", self.positive)
        return next((one.limit for one in asked if (one.quantity, one.label) == of), None)

    @property
    def mix(self) -> Mapping[str, float] | None:
        """Share of each class that it promises for; None: as classes come."""
        return None

    @property
    def claims_made(self) -> tuple[int, int | None]:
        """How many claims delta was divided for, and which of them this is; None when nobody counted."""
        return 1, None

    @property
    def n_certified(self) -> int:
        """Units that certified it; 0 without a certificate."""
        return 0

    def check(self, rows: Rows) -> Checked:
        """Hold what was promised against rows that calibrated nothing: PASS, FAIL or INCONCLUSIVE.

        FAIL: the 99% lower bound, shared by all promises, is beyond the limit; PASS: the 95% upper bound is within it.
        A rate below the limit is no PASS, one above it no FAIL. One seeded row speaks for its group, as in a
        certificate, with the counts of all photos beside it; where photos are promised they are what is held. What was
        only asked for has no outcome, nor has an average over calibrations, which one of them does not show.
        """
        from stage1_pro.policies.bounds import exact
        from stage1_pro.policies.candidates import Mix
        from stage1_pro.policies.checks import check_claim, check_mix, check_photos, unjudged

        exited, everyone = self.exits(rows.probs, rows.gate), np.ones(rows.labels.size, dtype=bool)
        _, names = counting_unit(rows.groups, rows.labels.size, "auto", False)
        n, found = one_each(names, everyone, 0).size, []
        asked = self.target.promises(self.positive)
        for one in asked:
            name, limit, errors, trials, among = "share deferred", one.limit, ~exited, everyone, everyone
            if one.quantity == "coverage":
                limit = float(1 - exact(one.limit))
            else:
                risk = risk_of(one, rows)
                name, among = risk.name, everyone if risk.trials is None else risk.trials
                errors, trials = risk.outcomes(exited)
            if one.prior is not None and self.mix is not None:
                drawn = one_each(names, everyone, 0)
                shares = np.array([self.mix.get(called, 0.0) for called in rows.classes])
                mix = Mix(shares, rows.labels[drawn])
                found.append(check_mix(name, errors[drawn], trials[drawn], mix, limit, len(asked)))
                continue
            if self.target.largest is not None and names is not None:
                found.append(check_photos(name, errors, trials, names, limit, self.target.largest, len(asked)))
                continue
            drawn = one_each(names, among, 0)
            drawn = drawn[trials[drawn]]
            check = check_claim(name, int(errors[drawn].sum()), drawn.size, limit, n, len(asked))
            photos = {"photo_errors": int((errors & trials).sum()), "photo_trials": int(trials.sum())}
            found.append(check if names is None else check.model_copy(update=photos))
        judged = [bool(self.promises) and one.strength == "certified" for one in asked]
        return Checked([one if sure else unjudged([one])[0] for one, sure in zip(found, judged, strict=True)])

    def at(self, threshold: float) -> Self:
        """The policy with a stricter exit threshold; itself at its own threshold or below, where nothing is certified.

        Exits only become fewer, but no share of them was certified there: whatever was promised is given up.
        """
        if threshold <= self.exit_threshold:
            return self
        return self._stricter(
            threshold, f"nothing is promised: the threshold was tightened from {self.exit_threshold:.6g} to "
            f"{threshold:.6g}, where nothing was certified"
        )  # fmt: skip

    @abstractmethod
    def _stricter(self, threshold: float, statement: str) -> Self:
        """A copy with that threshold and statement, and without a guarantee."""

    def assuming(self, *assumptions: str) -> Self:
        """The policy with what else its certificate takes for granted; itself where it has no certificate."""
        del assumptions
        return self

    def void(self) -> str:
        """What follows for a promise where something that it stands on has changed; empty when there is none."""
        return "" if self.guarantee == "none" else ", so its certificate is void"

    # ------------------------------------------------------------------------ what is said of it

    @abstractmethod
    def rule(self) -> str:
        """The rule in words."""

    @property
    def usual_exit_rate(self) -> float | None:
        """Share of calibration rows that exit; None: not counted."""
        return None

    @property
    def sweep(self) -> list[SweepRow]:
        """Thresholds that were looked at, the chosen one among them."""
        return []

    def headline(self) -> str:
        """The policy and what was asked for, in a line."""
        return f"{self.policy} policy, {self._of_positive()}{self.target.words()}"

    def _of_positive(self) -> str:
        return "" if self.positive is None else f"positive class '{self.positive}', "

    def found(self) -> list[str]:
        """Lines on what calibration found, beside the sweep."""
        return []

    def story(self) -> list[str]:
        """Sentences for anybody on what it does and promises, for the report; none: its statement says it."""
        return []

    def facts(self) -> dict[str, Any]:
        """Its own fields, for ``inspect``."""
        return self.model_dump(mode="json", exclude={"policy", "format_version"})

    def measured(self) -> str:
        """Figures on the calibration rows with their bounds, in a line."""
        return "" if self.usual_exit_rate is None else f"coverage {self.usual_exit_rate:.1%}"


# -------------------------------------------------------------------------------- those that are known


def register(kind: type[Policy]) -> None:
    """Make a policy known by the name of its target, for this process; an entry point does so for all.

    Raises:
        InputError: another policy has this name or file.
    """
    name = kind.asks.model_fields["policy"].default
    for known, other in policies().items():
        if (known == name or other.file == kind.file) and other is not kind:
            raise InputError(f"policy must have a name and a file of its own, got {name} ({kind.file}), already taken")
    POLICIES.register(name, kind)


def policies() -> Mapping[str, type[Policy]]:
    """Every known policy by name."""
    return {name: POLICIES.find(name) for name in POLICIES}


def policy_files() -> list[str]:
    """Names of all policy files; a folder holds one of them at most."""
    return [kind.file for kind in policies().values()]


def coming_files() -> list[str]:
    """Names of policies that are on their way to take the place of another; see ``replace_policy``."""
    return [_COMING + name for name in policy_files()]


def read_policy(folder: Path | str) -> Policy | None:
    """Read the active policy of a run or bundle; None when there is none.

    Raises:
        ArtifactError: more than one policy file, or a damaged one.
    """
    coming = _coming(Path(folder))
    if coming is not None:
        return coming[0].read(coming[1])
    found = [kind for kind in policies().values() if (Path(folder) / kind.file).is_file()]
    if len(found) > 1:
        names = ", ".join(kind.file for kind in found)
        raise ArtifactError(f"{folder} must hold exactly one policy file, got {names}; calibrate again")
    return found[0].read(Path(folder) / found[0].file) if found else None


def replace_policy(folder: Path, policy: Policy) -> None:
    """Make a policy the active one of a folder, all or nothing: one rename decides, wherever it is killed."""
    policy.write(folder / f"{_COMING}{policy.file}")
    for name in policy_files():
        if name != policy.file:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{_COMING}{name}").unlink(missing_ok=True)
    (folder / f"{_COMING}{policy.file}").replace(folder / policy.file)


# Stands before the name of a policy that takes the place of another, which may still be there.
_COMING = "new-"


def _coming(folder: Path) -> tuple[type[Policy], Path] | None:
    """The kind and file of a policy whose writer was killed before it took the others away."""
    paths = ((kind, folder / f"{_COMING}{kind.file}") for kind in policies().values())
    return next(((kind, path) for kind, path in paths if path.is_file()), None)
