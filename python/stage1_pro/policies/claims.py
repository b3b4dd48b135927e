"""Uses of a certify half, counted: one claim is a promise, the best of several is a selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes
from stage1_pro.record import Record

CLAIMS_FILE = "claims.json"


class Claim(Record):
    """One use of a certify half: which promise was sought on it."""

    key: str = Field(description="hash of model, preprocessing, policy and wish: the same key is the same claim")
    policy: str
    wish: str
    model_fingerprint: str
    outcome: Literal["open", "certified", "infeasible"] = "open"


class HalfClaims(Record):
    """What one certify half has been used for; delta and the number of claims are fixed by the first."""

    delta: float = Field(gt=0, lt=1, description="for all claims together")
    claims: int = Field(ge=1)
    uses: list[Claim]


class Claims(Record):
    """``claims.json``: every use of every certify half of a run, by the half's hash.

    It outlives policies and trainings: a certify half that was looked at stays looked at.
    """

    format_version: Literal[1] = 1
    halves: dict[str, HalfClaims] = Field({})
    looks: dict[str, int] = Field({}, description="empirical choices that saw a certify half, which promise nothing")


@dataclass(frozen=True)
class Stake:
    """A claim that may be made: ``delta`` declared for all ``claims``, of which this is number ``use``."""

    delta: float
    claims: int
    use: int
    key: str
    looks: int = 0  # empirical choices that had seen the half before


def stake_claim(
    run: Path,
    half: str,
    *,
    policy: str,
    wish: str,
    model_fingerprint: str,
    preprocessing_fingerprint: str,
    delta: float | None,
    claims: int | None,
    defaults: tuple[float, int],
) -> Stake:
    """Write down in ``RUN/claims.json`` that a certify half is about to be used, before anybody looks at it.

    The very same claim (model, preprocessing, policy and wish) is no new use. The first claim fixes delta and the
    number of claims it is divided by; another certify half starts anew.

    Args:
        run: run folder.
        half: hash of the certify half.
        policy: what will be certified.
        wish: its constraints in words.
        model_fingerprint: of the weights.
        preprocessing_fingerprint: of the pixels.
        delta: largest chance of a false certificate, all claims together; as declared before when None.
        claims: how many claims to divide it for; as declared before when None.
        defaults: delta and claims of a first claim that names neither.

    Raises:
        InputError: all declared claims have been made, or delta or their number differ from what was declared.
        ArtifactError: ``claims.json`` is damaged.
    """
    path = run / CLAIMS_FILE
    known = Claims.read(path) if path.is_file() else Claims()
    counted = known.halves.get(half) or HalfClaims(delta=delta or defaults[0], claims=claims or defaults[1], uses=[])
    key = sha256_bytes(f"{model_fingerprint}\n{preprocessing_fingerprint}\n{policy}\n{wish}".encode())
    for name, given, declared in (
        ("claims", claims or counted.claims, counted.claims),
        ("delta", delta or counted.delta, counted.delta),
    ):
        if given != declared:
            raise InputError(
                f"--{name} must be {declared:g}, as declared at the first claim on this run's certify half, got "
                f"{given:g}; dividing delta after looking would promise nothing"
            )
    place = next((i for i, use in enumerate(counted.uses) if use.key == key), None)
    if place is None:
        if len(counted.uses) >= counted.claims:
            raise _refused(run, counted, policy, wish)
        place = len(counted.uses)
        claim = Claim(key=key, policy=policy, wish=wish, model_fingerprint=model_fingerprint)
        _put(path, known, half, counted.model_copy(update={"uses": [*counted.uses, claim]}))
    return Stake(counted.delta, counted.claims, place + 1, key, known.looks.get(half, 0))


def note_look(run: Path, half: str) -> None:
    """Count that an empirical choice, which promises nothing, saw a certify half; a later certificate says so."""
    path = run / CLAIMS_FILE
    known = Claims.read(path) if path.is_file() else Claims()
    known.model_copy(update={"looks": {**known.looks, half: known.looks.get(half, 0) + 1}}).write(path)


def close_claim(run: Path, half: str, stake: Stake, outcome: Literal["certified", "infeasible"]) -> None:
    """Note how a claim ended, for the message that refuses the next one."""
    known = Claims.read(run / CLAIMS_FILE)
    counted = known.halves[half]
    uses = [use.model_copy(update={"outcome": outcome}) if use.key == stake.key else use for use in counted.uses]
    _put(run / CLAIMS_FILE, known, half, counted.model_copy(update={"uses": uses}))


def _put(path: Path, known: Claims, half: str, counted: HalfClaims) -> None:
    known.model_copy(update={"halves": {**known.halves, half: counted}}).write(path)


def _refused(run: Path, counted: HalfClaims, policy: str, wish: str) -> InputError:
    made = "; ".join(
        f"{i}. {use.policy}: {use.wish}, model {use.model_fingerprint[:8]}: {use.outcome}"
        for i, use in enumerate(counted.uses, 1)
    )
    one = counted.claims == 1
    return InputError(
        f"the certify half of {run} must serve {'one claim' if one else f'the {counted.claims} claims declared'}, "
        f"which {'was' if one else 'were'} made ({made}), got another ({policy}: {wish}). Rows that were looked at "
        "certify nothing more: the best of 5 tries is certified falsely in 19% of cases at delta 5%. Keep what stands; "
        "or choose with --guarantee none, which promises nothing; or cut new splits (stage1 split --seed N "
        "--overwrite, train again), and where several wishes are foreseen divide delta before the first: --claims K"
    )
