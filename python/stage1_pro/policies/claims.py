"""Uses of the rows kept for certificates, counted: one claim is a promise, the best of several is a selection.

Claims follow photos and their groups. A certify half that shares a photo or a group (clip, track, place) with an
earlier one of the same run, whatever the seed of the split, a row that was dropped, a label that was mended, other
frames of a clip or photos encoded anew, is another cut of the same photos: all cuts share delta.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes
from stage1_pro.record import Record

CLAIMS_FILE = "claims.json"
# Digits of a content hash that tell photos apart: a million of them collide with chance 3e-8.
_DIGITS = 16
# Shares of delta add up to it but for rounding.
_ROUNDING = 1 + 1e-9


class Claim(Record):
    """One use of a certify half: which promise was sought on it."""

    key: str = Field(description="hash of model, preprocessing, policy and wish: the same key is the same claim")
    policy: str
    wish: str
    model_fingerprint: str
    outcome: Literal["open", "certified", "infeasible"] = "open"
    number: int | None = Field(None, description="among the claims on all cuts of its photos; null: its place")
    level: float | None = Field(None, description="what it may spend of delta; null: its half's delta / claims")


class HalfClaims(Record):
    """What one certify half has been used for; delta and the number of claims are fixed by the first."""

    delta: float = Field(gt=0, lt=1, description="for all claims together")
    claims: int = Field(ge=1)
    uses: list[Claim]

    @property
    def spent(self) -> float:
        """Of delta, by the uses so far."""
        return sum(self.delta / self.claims if use.level is None else use.level for use in self.uses)


class Claims(Record):
    """``claims.json``: every use of every certify half of a run, by the half's hash.

    It outlives policies, trainings and splits: photos that were looked at stay looked at.
    """

    format_version: Literal[1] = 1
    halves: dict[str, HalfClaims] = Field({})
    looks: dict[str, int] = Field({}, description="empirical choices that saw rows that certify, which promise nothing")
    rows: dict[str, list[str]] = Field(
        {},
        description="photos of each half that was used, in the order of first use, by the first digits of their "
        "content hash; a half that is not here is of an older version and taken to share photos with all others",
    )
    groups: dict[str, list[str]] = Field(
        {},
        description="groups of those photos, by the first digits of their names' hash; a half of rows that is not here "
        "is of an older version and taken to share groups with all others",
    )

    @classmethod
    def of(cls, run: Path) -> Claims:
        """Those of a run, none where it has no file; raises ArtifactError where the file is damaged."""
        return cls.read(run / CLAIMS_FILE) if (run / CLAIMS_FILE).is_file() else cls()

    def seen(self, half: str, rows: Iterable[str], groups: Iterable[str] = ()) -> Claims:
        """The same with a half's photos, by their content hashes, and the names of their groups."""
        found = sorted({one[:_DIGITS] for one in rows})
        of = sorted({sha256_bytes(one.encode("utf-8", "surrogateescape"))[:_DIGITS] for one in groups})
        return self.model_copy(update={"rows": {**self.rows, half: found}, "groups": {**self.groups, half: of}})

    def cuts(self, half: str) -> list[str]:
        """This half and all that share photos or groups with it, also by way of others, in the order of first use."""
        known = list(dict.fromkeys([*(one for one in (*self.halves, *self.looks) if one not in self.rows), *self.rows]))
        shared = {
            one: {*(("photo", name) for name in self.rows[one]), *(("group", name) for name in self.groups[one])}
            if one in self.rows and one in self.groups else None
            for one in known
        }  # fmt: skip
        found, waiting = {half}, [half]
        while waiting:
            mine = shared.get(waiting.pop())
            near = [
                one for one in known
                if one not in found and (mine is None or (yours := shared[one]) is None or not mine.isdisjoint(yours))
            ]  # fmt: skip
            found.update(near)
            waiting += near
        return [one for one in known if one in found]


@dataclass(frozen=True)
class Stake:
    """A claim that may be made: ``delta`` declared for all ``claims``, of which this is number ``use``."""

    delta: float
    claims: int
    use: int
    key: str
    looks: int = 0  # empirical choices that had seen photos of the half before
    cut: int = 1  # which cut of these photos the half is, from 1
    left: int = 0  # claims that may be made after this one
    made: bool = False  # it was made before

    def assumptions(self) -> tuple[str, ...]:
        """What a certificate takes for granted of the photos that made it, which the run's files cannot show."""
        of = "the one claim" if self.claims == 1 else f"all {self.claims} claims"
        cut = f"this is cut {self.cut} of these photos, and delta is for {of} on every cut of them"
        more = [f"{cut}; they certified nothing in another run folder, whose claims nobody counts here"]
        if self.looks:
            more.append(
                f"the wish does not come from the {self.looks} empirical choice(s) that saw these rows before it"
            )
        return tuple(more)


def weigh_claim(
    run: Path,
    half: str,
    rows: Iterable[str],
    groups: Iterable[str] = (),
    *,
    policy: str,
    wish: str,
    model_fingerprint: str,
    preprocessing_fingerprint: str,
    delta: float | None,
    claims: int | None,
    defaults: tuple[float, int],
    order: str = "",
) -> tuple[Stake, Claims]:
    """Say which claim this would be, and what ``RUN/claims.json`` would then hold; nothing is written.

    The very same claim (model, preprocessing, policy, wish and order on the same rows) is no new use. The first
    claim on any cut of these photos fixes delta and the number of claims it is divided by; of cuts that were
    declared apart and share photos the least delta and the most claims hold.

    Args:
        run: run folder.
        half: hash of the rows that certify.
        rows: content hash of each of its photos.
        groups: name of the group of each.
        policy: what will be certified.
        wish: its constraints in words.
        model_fingerprint: of the weights.
        preprocessing_fingerprint: of the pixels.
        delta: largest chance of a false certificate, all claims together; as declared before when None.
        claims: how many claims to divide it for; as declared before when None.
        defaults: delta and claims of a first claim that names neither.
        order: hash of the rows of another split that fix the order of thresholds; another order is another claim.

    Raises:
        InputError: all declared claims have been made, or delta or their number differ from what was declared.
        ArtifactError: ``claims.json`` is damaged.
    """
    known = Claims.of(run).seen(half, rows, groups)
    cuts = known.cuts(half)
    kin = [known.halves[one] for one in cuts if one in known.halves]
    # Where cuts that were declared apart turn out to share photos, the stricter declaration holds for all.
    strictest = HalfClaims(
        delta=min((one.delta for one in kin), default=delta or defaults[0]),
        claims=max((one.claims for one in kin), default=claims or defaults[1]),
        uses=[],
    )
    own = known.halves.get(half, strictest)
    for name, given, before in (("claims", claims, strictest.claims), ("delta", delta, strictest.delta)):
        if given is not None and given != before:
            raise InputError(
                f"--{name} must be {before:g}, as declared at the first claim on these photos, got {given:g}; dividing "
                "delta after looking would promise nothing"
            )
    key = sha256_bytes(
        "\n".join(filter(None, (model_fingerprint, preprocessing_fingerprint, policy, wish, order))).encode()
    )
    level, n_made = strictest.delta / strictest.claims, sum(len(one.uses) for one in kin)
    left = (strictest.delta * _ROUNDING - sum(one.spent for one in kin)) // level
    place = next((i for i, use in enumerate(own.uses) if use.key == key), None)
    if place is None:
        if left < 1:
            raise _refused(run, strictest, kin, policy, wish, len(cuts))
        use, left = n_made + 1, left - 1
        claim = Claim(key=key, policy=policy, wish=wish, model_fingerprint=model_fingerprint, number=use, level=level)
        own = own.model_copy(update={"uses": [*own.uses, claim]})
        known = known.model_copy(update={"halves": {**known.halves, half: own}})
    else:
        use = own.uses[place].number or place + 1
    looks, cut = sum(known.looks.get(one, 0) for one in cuts), cuts.index(half) + 1
    stake = Stake(strictest.delta, strictest.claims, use, key, looks, cut, max(int(left), 0), made=place is not None)
    return stake, known


def note_look(run: Path, half: str, rows: Iterable[str], groups: Iterable[str] = ()) -> None:
    """Count that an empirical choice, which promises nothing, saw rows that certify; a later certificate says so."""
    known = Claims.of(run).seen(half, rows, groups)
    looks = {**known.looks, half: known.looks.get(half, 0) + 1}
    known.model_copy(update={"looks": looks}).write(run / CLAIMS_FILE)


def close_claim(run: Path, half: str, stake: Stake, outcome: Literal["certified", "infeasible"]) -> None:
    """Note how a claim ended, for the message that refuses the next one."""
    known = Claims.of(run)
    counted = known.halves[half]
    uses = [use.model_copy(update={"outcome": outcome}) if use.key == stake.key else use for use in counted.uses]
    counted = counted.model_copy(update={"uses": uses})
    known.model_copy(update={"halves": {**known.halves, half: counted}}).write(run / CLAIMS_FILE)


def _refused(run: Path, declared: HalfClaims, kin: list[HalfClaims], policy: str, wish: str, n_cuts: int) -> InputError:
    uses = [use for one in kin for use in one.uses]
    made = "; ".join(
        f"{i}. {use.policy}: {use.wish}, model {use.model_fingerprint[:8]}: {use.outcome}"
        for i, use in enumerate(uses, 1)
    )
    must = "one claim" if declared.claims == 1 else f"the {declared.claims} claims declared"
    cuts = f", in {n_cuts} cuts that share photos or groups" if n_cuts > 1 else ""
    return InputError(
        f"the photos of {run} kept for the certificate{cuts} must serve {must}, which "
        f"{'was' if len(uses) == 1 else 'were'} made ({made}), got another ({policy}: {wish}). Photos that were looked "
        "at certify nothing more, however they are cut: the best of 5 tries is certified falsely in 19% of cases at "
        "delta 5%. Keep what stands; or choose with --guarantee none, which promises nothing; or label photos that "
        "were never used here and split them into another folder, and where several targets are "
        "foreseen divide delta before the first: --claims K"
    )
