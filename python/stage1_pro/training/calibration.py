"""Calibration: choose the exit policy on ``val_calib``, or on anybody's logits."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.arguments import choice
from stage1_pro.classes import check_names, choose_positive, spelled
from stage1_pro.config import CalibrateConfig
from stage1_pro.data.given import read_arrays
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.data.tables import is_table
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.files import sha256_file
from stage1_pro.policies.claims import CLAIMS_FILE, Claims, Stake, close_claim, note_look, weigh_claim
from stage1_pro.policies.policy import Origin, Policy, policies, read_policy, replace_policy
from stage1_pro.policies.possible import check_possible, foresee, told
from stage1_pro.policies.ranking import GateChoice
from stage1_pro.policies.rows import Rows, cut_halves
from stage1_pro.policies.softmax import softmax
from stage1_pro.policies.target import POLICIES, Target, settle_target
from stage1_pro.progress import say
from stage1_pro.record import Record, parse_json
from stage1_pro.tables import Sheet, grid
from stage1_pro.training.run import RunConfig, exclusive
from stage1_pro.training.unlabelled import Unlabelled, read_unlabelled
from stage1_pro.words import HALVES

if TYPE_CHECKING:
    from stage1_pro.commands.calibrate import Calibration


def calibrate(asked: Calibration, target: Target | None = None, *, halve: bool = False) -> Policy:
    """Choose when Stage A may answer, and write the policy file, as ``commands.calibrate`` says.

    With ``logits``, a file of one column means the logit of the second of two classes, and ``half`` [N] (``fit`` or
    ``certify``) is cut at random by group where it is missing. Without gate or Stage B the logit of the largest
    probability stands in for scrc's gate, and the one stage answers deferred rows as well.

    Args:
        asked: options; for policy ``auto`` ``gate.json`` says whether softmax or gate ranked answers better on
            ``val_select``.
        target: what is asked for, instead of the options of a policy and of the configuration.
        halve: let the first half of a run's ``val_calib`` fix the order of thresholds, where its ``val_select`` is of
            other photos than are served now.

    Raises:
        InputError: an option or array is not what it must be, or the rows kept for the certificate have been used up.
        ArtifactError: ``val_calib.npz`` is missing, damaged, or of other splits.
        NotReachableError: the target cannot be met or certified; the policy that stands stays.
    """
    given = asked.asked_for()
    if target is not None and given:
        raise InputError(f"target must be given alone, got it with {', '.join(given)}; it says all of that")
    if asked.run is not None:
        if asked.out is not None or asked.positive is not None or asked.classes is not None:
            raise InputError("out, positive and classes must go with --logits, got them with --run; a run has its own")
        if asked.columns is not None and asked.unlabelled is None:
            raise InputError("columns must go with --logits, got it with --run; a run's rows are its own")
        if asked.rows_independent and asked.unlabelled is None:
            raise InputError("rows_independent must go with --logits, got it with --run; a run's splits have groups")
        work = _prepare(asked, given, target, halve=halve)
        # One lock from the stake to the policy: two calibrations at once would lose a claim.
        with exclusive(asked.run):
            return _choose(work)
    if asked.unlabelled is not None:
        raise InputError("unlabelled must go with --run, whose model looks at the photos, got it with --logits")
    wish = _target_of_logits(asked, given, target)
    place = _place(asked.out, wish)
    rows, hashes = _read_logits(asked, wish)
    check_possible(wish, rows)
    policy = checked(POLICIES.find(wish.policy).fit(wish, rows, origin=Origin(hashes)))
    if place is not None:
        if place == asked.out:
            policy.write(place)
        else:
            replace_policy(place.parent, policy)
        say(f"wrote {place}")
    return policy


def foresee_calibration(asked: Calibration, target: Target | None = None) -> Foreseen:
    """Say what a calibration could certify by the number of its rows alone; nothing is looked at, spent or written.

    Raises:
        InputError, ArtifactError: as ``calibrate``.
    """
    given = asked.asked_for()
    if asked.run is None:
        wish = _target_of_logits(asked, given, target)
        rows, _ = _read_logits(asked, wish)
        return Foreseen(target=wish.words(), claim="nobody counts claims on a file", told=told(foresee(wish, rows)))
    work = _prepare(asked, given, target)
    wish, claim = work.wish, "nothing is promised, so no claim is needed"
    if wish.guarantee == "ltt":
        stake, _ = work.weigh()
        wish = wish.model_copy(update={"delta": stake.delta, "claims": stake.claims})
        claim = f"this would be claim {stake.use} of {stake.claims} on these photos; your claim is unspent"
        if stake.made:
            claim = f"claim {stake.use} of {stake.claims} on these photos was made for this very target"
    return Foreseen(target=wish.words(), claim=claim, told=told(foresee(wish, work.rows)))


class Foreseen(Record):
    """What ``calibrate --dry-run`` found, by counts alone."""

    target: str
    claim: str
    told: list[str] = Field(description="a line for each promise: what is there, and what could be asked for")

    def render(self) -> str:
        """The same as text."""
        return "\n".join(map(_wrap, [f"target: {self.target}", *self.told, f"nothing was looked at; {self.claim}"]))


def render(policy: Policy) -> str:
    """Show a policy as text: the classic grid with the chosen threshold in its place, and what it means."""
    said = [*policy.found(), policy.rule(), f"guarantee: {policy.guarantee}. {policy.statement}"]
    claims, use = policy.claims_made
    if use is not None:
        end = "" if use < claims else "; it certifies nothing else"
        said.append(f"claim {use} of {claims} on these photos{end}")
    table = [_grid(policy)] if policy.sweep else []
    return "\n".join([_wrap(policy.headline()), *table, *map(_wrap, said)])


def _wrap(line: str) -> str:
    return textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)


def _of_one_class(policy: Policy) -> bool:
    """Whether some figures are of one class: the positive one, or the one that a limit is of."""
    return policy.positive is not None or any(one.label for one in policy.target.promises(None))


def _grid(policy: Policy) -> str:
    of_one = ("FNR on exits", "missed/positives") if _of_one_class(policy) else ()
    names = ("threshold", "coverage", *of_one, "exit accuracy", "")
    table, sheet, chosen = grid(names, left=("",)), Sheet(100), False
    for row in policy.sweep:
        is_chosen = not row.grid and not chosen and row.threshold == policy.exit_threshold
        if not (row.grid or is_chosen):
            continue
        chosen = chosen or is_chosen
        fnr = "-" if row.fnr_on_exited is None else f"{row.fnr_on_exited:.2%}"
        missed = (fnr, f"{row.n_false_negative}/{row.n_positive_exited}")
        digits = ".6g" if is_chosen else ".3g" if row.threshold > 0.99 else ".2f"
        table.add_row(
            f"{row.threshold:{digits}}",
            f"{row.coverage:.1%}",
            *(missed if of_one else ()),
            "-" if row.exit_accuracy is None else f"{row.exit_accuracy:.2%}",
            "<- chosen" if is_chosen else "",
        )
    sheet.add(table)
    return f"{sheet.text()}\n"


@dataclass(frozen=True)
class _Work:
    """What a calibration of a run works on: what is asked for, the rows, and where they come from."""

    run: Path
    wish: Target
    declared: tuple[float | None, int | None]  # delta and claims, where they were given
    rows: Rows
    splits: Splits
    origin: Origin
    others: Unlabelled | None = None  # photos without labels, which certify in place of val_calib

    @property
    def half(self) -> str:
        """Hash of the rows that certify, ``val_calib`` or its second half; empty where the splits have none."""
        if self.others is not None:
            return self.others.fingerprint
        return self.splits.hashes.get("val_calib.certify" if self.rows.halved else "val_calib", "")

    @property
    def kept(self) -> tuple[list[str], list[str]]:
        """Content hash and group of every photo that certifies."""
        if self.others is not None:
            return self.others.hashes, self.others.groups
        rows = self.splits.of("val_calib", "certify" if self.rows.halved else None)
        return [row.sha256 for row in rows], [row.group for row in rows]

    @property
    def order(self) -> str:
        """Which rows fixed the order of thresholds, as an assumption of the certificate."""
        if self.others is not None:
            return self.others.order
        if self.rows.halved:
            return "the order of thresholds comes from the other half of val_calib: no photo and no group is in both"
        n, of = len(self.splits.of("val_select")), len(self.splits.of("val_calib"))
        return (
            f"the order of thresholds comes from the {n} photos of val_select, which share no photo and no group with "
            f"the {of} of val_calib that certify"
        )

    def weigh(self) -> tuple[Stake, Claims]:
        """The claim that this would be, as ``weigh_claim`` says."""
        delta, claims = self.declared
        return weigh_claim(
            self.run, self.half, *self.kept, policy=self.wish.policy, wish=self.wish.key(),
            model_fingerprint=self.origin.model_fingerprint or "",
            preprocessing_fingerprint=self.origin.preprocessing_fingerprint or "", delta=delta, claims=claims,
            defaults=(self.wish.delta, self.wish.claims),
            order="" if self.rows.halved else sha256_file(self.run / "val_select.npz"),
        )  # fmt: skip


def _prepare(asked: Calibration, given: dict[str, Any], wish: Target | None, *, halve: bool = False) -> _Work:
    run = asked.run
    assert run is not None
    predictions = read_calibration(run)
    path = run / "config.json"
    splits = Splits.read(run / "splits.json")
    if wish is None:
        base = RunConfig.read(path).config.calibrate if path.is_file() else CalibrateConfig()
        if given.get("policy", base.policy) == "auto":
            given = {**given, "policy": better_policy(run, predictions, stated="policy" in given)}
        wish = settle_target(base, given)
    else:
        given = {"delta": wish.delta, "claims": wish.claims}
    _check_halves(predictions, splits)
    certifies = wish.guarantee == "ltt" and not halve
    order = read_order(run, predictions, splits) if certifies or asked.unlabelled is not None else None
    others = None
    if asked.unlabelled is not None:
        wished = [one.quantity for one in wish.promises(predictions.positive) if one.quantity != "coverage"]
        if wished != ["disagreement"]:
            raise InputError(
                f"--unlabelled must go with --disagreement alone, got {wish.words()}; other limits are about labels"
            )
        if wish.served_prior is not None:
            raise InputError("--prior must go without --unlabelled, got both; photos without labels have no known mix")
        others = read_unlabelled(
            run, asked.unlabelled, splits, order, columns=asked.columns, rows_independent=asked.rows_independent
        )
    for one in wish.promises(predictions.positive):  # refused before anything is looked at
        if one.label is not None:
            choice("class", one.label, predictions.classes)
    rows = run_rows(predictions, order) if others is None else others.rows
    origin = Origin(splits.hashes, predictions.model_fingerprint, predictions.preprocessing_fingerprint)
    work = _Work(run, wish, (given.get("delta"), given.get("claims")), rows, splits, origin, others)
    if wish.guarantee == "ltt":
        if not work.half:
            raise ArtifactError(
                f"{run / 'splits.json'} must have the hash of the rows that certify, got none; split again"
            )
        POLICIES.find(wish.policy).check_fit_half(rows)
    return work


def run_rows(predictions: Predictions, order: Predictions | None = None) -> Rows:
    """Rows of a run's predictions, with halves where all have one.

    With ``order``, those of ``val_select``, its rows are the fit half and all of the others certify.
    """
    parts = [predictions] if order is None else [order, predictions]
    halves = predictions.halves if (predictions.halves != "").all() else None
    if order is not None:
        halves = np.repeat(HALVES, [order.labels.size, predictions.labels.size])

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(one, name) for one in parts])

    rows = Rows.of(
        softmax(joined("logits_a")), joined("labels"), classes=predictions.classes, positive=predictions.positive,
        gate=joined("gate_logits"), probs_b=softmax(joined("logits_b")), groups=joined("groups"), halves=halves,
        told_apart=True,
    )  # fmt: skip
    return replace(rows, halved=order is None)


def read_order(run: Path, predictions: Predictions, splits: Splits) -> Predictions | None:
    """Read ``RUN/val_select.npz``, whose rows fix the order of thresholds and certify nothing; None without it.

    A run that has claimed the second half of ``val_calib`` keeps its halves, so that its claim can be repeated.

    Raises:
        ArtifactError: it is damaged, of other splits, or of another model than ``predictions``.
    """
    path, claimed = run / "val_select.npz", Claims.of(run).halves
    if splits.hashes.get("val_calib.certify") in claimed:
        return None
    if not path.is_file():
        if splits.hashes["val_calib"] in claimed:
            raise ArtifactError(f"{path} must be there, as it was when val_calib was claimed; restore it from a copy")
        return None
    try:
        found = Predictions.load(path)
    except InputError as error:
        raise ArtifactError(str(error)) from None
    same_rows = found.row_ids.tolist() == [row.id for row in splits.of("val_select")]
    same_rows &= (found.split, found.split_hash) == ("val_select", splits.hashes["val_select"])
    of = ("model_fingerprint", "preprocessing_fingerprint", "classes")
    if not same_rows or any(getattr(found, one) != getattr(predictions, one) for one in of):
        raise ArtifactError(f"{path} must be of the model and splits that gave val_calib.npz, got others; train again")
    splits.apart()
    return found


def _choose(work: _Work) -> Policy:
    """Certify or choose, and replace the policy of the run; whatever goes wrong, the one that stands stays."""
    run, wish, stake = work.run, work.wish, None
    counts = run / CLAIMS_FILE
    before = counts.read_bytes() if counts.is_file() else None
    if wish.guarantee == "ltt":
        stake, claims = work.weigh()
        # Delta and claims as they were first declared.
        wish = wish.model_copy(update={"delta": stake.delta, "claims": stake.claims})
        check_possible(wish, work.rows)
        # Written down before anybody looks.
        claims.write(counts)
    elif work.half:
        if work.others is not None:
            note_look(run, work.half, *work.kept)
        else:
            seen = work.splits.of("val_calib")
            note_look(run, work.splits.hashes["val_calib"], [row.sha256 for row in seen], [row.group for row in seen])
    try:
        policy = POLICIES.find(wish.policy).fit(
            wish, work.rows, use=None if stake is None else stake.use, origin=work.origin
        )
    except NotReachableError as error:
        if stake is not None:
            close_claim(run, work.half, stake, "infeasible")
        counted = counts.is_file() and counts.read_bytes() != before
        raise NotReachableError(f"{error}. {_advice(stake, read_policy(run), counted)}") from None
    if stake is not None:
        close_claim(run, work.half, stake, "certified")
        policy = policy.assuming(work.order, *stake.assumptions())
        if stake.looks:
            say(
                f"--guarantee none saw these photos {stake.looks} time(s) before; the certificate holds only if this "
                "target was not chosen by what it showed"
            )
    if work.others is not None:
        policy = policy.model_copy(update={"unlabelled": work.others.fingerprint})
    replace_policy(run, checked(policy))
    say(f"wrote {run / policy.file}")
    return policy


def _advice(stake: Stake | None, standing: Policy | None, counted: bool) -> str:
    """What can be done after a refusal, and what it changed: ``counted`` says whether ``claims.json`` did."""
    left = 0 if stake is None else stake.left
    stands = "no policy was changed" if standing is None else f"{standing.file} stands as it was"
    if not counted:
        stands = "nothing was changed"
    elif stake is None:
        stands += f"; the look at these photos is counted in {CLAIMS_FILE}"
    else:
        stands += f"; one claim is spent, {left or 'none'} {'is' if left < 2 else 'are'} left"
    if stake is None:
        return f"Ask for less; {stands}"
    ways = ["choose with --guarantee none, which promises nothing"]
    if left:
        which = "the claim that is" if left == 1 else f"one of the {left} claims that are"
        ways.insert(0, f"ask for less with {which} left")
    return f"You can {', or '.join(ways)}; {stands}"


def _check_halves(predictions: Predictions, splits: Splits) -> None:
    """Fit and certify rows are those of the splits, and share neither image nor group."""
    rows = splits.of("val_calib")
    if predictions.halves.tolist() != [row.half or "" for row in rows]:
        raise ArtifactError(
            "val_calib.npz must have the halves of splits.json, got others; train again on these splits"
        )
    for what in ("sha256", "group"):
        part = {half: {getattr(row, what) for row in rows if row.half == half} for half in HALVES}
        both = sorted(part["fit"] & part["certify"])
        if both:
            raise ArtifactError(
                f"the fit and certify halves of val_calib must not overlap, got the same {what} in both: "
                f"{both[0][:40]} ({len(both)} such); split again"
            )


def read_calibration(run: Path) -> Predictions:
    """Read ``RUN/val_calib.npz`` and check that it holds the ``val_calib`` rows of the run's splits.

    Raises:
        ArtifactError: a file is missing or damaged, or the rows are others.
    """
    path = run / "val_calib.npz"
    splits = Splits.read(run / "splits.json")
    if not path.is_file():
        raise ArtifactError(f"{path} must exist, but there is no such file; run `stage1 train --run {run}` first")
    try:
        predictions = Predictions.load(path)
    except InputError as error:
        raise ArtifactError(str(error)) from None
    if predictions.split != "val_calib":
        raise ArtifactError(
            f"{path} must hold the split val_calib, got {predictions.split}; thresholds come from val_calib alone"
        )
    same_rows = predictions.row_ids.tolist() == [row.id for row in splits.of("val_calib")]
    if predictions.split_hash != splits.hashes["val_calib"] or not same_rows:
        raise ArtifactError(
            f"{path} must be of the splits in {run / 'splits.json'}, got rows with hash {predictions.split_hash[:12]} "
            f"instead of {splits.hashes['val_calib'][:12]}; train again on these splits"
        )
    return predictions


def better_policy(run: Path, predictions: Predictions, *, stated: bool) -> str:
    """What ranked answers better on ``val_select``: softmax or gate; softmax where nobody asked and nothing says."""
    path = run / "gate.json"
    if not path.is_file():
        if stated:
            raise ArtifactError(
                f"policy auto must have {path}, but there is no such file; train again, or name a policy"
            )
        say(f"policy softmax: {path} is not there to say whether the gate ranks answers better")
        return "softmax"
    choice = GateChoice.read(path)
    if choice.model_fingerprint != predictions.model_fingerprint:
        raise ArtifactError(f"{path} must be of the model that gave val_calib.npz, got another's; train again")
    say(f"policy {choice.confidence}: {path.name} found it to rank answers better on val_select")
    return choice.confidence


def _target_of_logits(asked: Calibration, given: Mapping[str, Any], target: Target | None) -> Target:
    if asked.policy == "auto":
        raise InputError("policy auto must go with --run, got it with --logits; name softmax, gate or scrc")
    return target or settle_target(CalibrateConfig(), {"policy": "softmax", **given})


def _read_logits(asked: Calibration, wish: Target) -> tuple[Rows, dict[str, str]]:
    """The rows of a file of logits, and the hash that the policy remembers it by."""
    path, stated = asked.logits, asked.rows_independent
    assert path is not None
    arrays = read_arrays(path, positive=asked.positive, columns=asked.columns)
    if is_table(path) and asked.classes is not None and list(asked.classes) != arrays["classes"].tolist():
        raise InputError(
            f"--classes must be left out beside a CSV, which names its own ({', '.join(arrays['classes'])}), got "
            f"{', '.join(asked.classes)}"
        )
    of_one = any(one.label == "" for one in wish.promises(""))
    rows = file_rows(
        path, arrays, wish.policy, asked.classes, asked.positive, rows_independent=stated, any_positive=not of_one
    )
    if wish.guarantee == "ltt":
        rows.check_answers_differ()
    if wish.guarantee == "ltt" and ("groups" not in arrays) != stated:
        raise InputError(
            f"{path} must hold groups [N], the clip, track or place of every row, or --rows-independent must state "
            f"that each row is a photo of its own, got {'both' if stated else 'neither'}; rows of one clip are "
            "near-copies and certify nothing of each other"
        )
    return rows, {"logits": sha256_file(path)}


def _place(out: Path | None, wish: Target) -> Path | None:
    """The file that the policy is written to; None: to none."""
    place = None if out is None else (out if out.suffix == ".json" else out / POLICIES.find(wish.policy).file)
    if place is not None and place != out and (place.parent / "splits.json").is_file():
        raise InputError(
            f"--out must not be a run or a bundle, got {out}, whose policy is its own; name another folder"
        )
    if place is not None and place == out and out.is_file() and not _is_policy(out):
        raise InputError(f"--out must be a new file or a policy to replace, got {out}, which is neither; name another")
    return place


def _is_policy(path: Path) -> bool:
    try:
        content = parse_json(path.read_bytes(), str(path), InputError, values=10**6, depth=100)
    except (OSError, InputError):
        return False
    return isinstance(content, dict) and str(content.get("policy")) in policies()


def file_rows(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    policy: str,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    *,
    said: str = "--positive",
    rows_independent: bool = False,
    any_positive: bool = False,
) -> Rows:
    """The rows of a file of logits, with what a policy needs; ``said`` is where a positive class can be named.

    With ``any_positive`` nothing depends on it where none is named: of two classes the last one stands in, of more none
    is the positive one.

    Raises:
        InputError: an array is missing or not what it must be, or nothing tells the positive class.
    """
    probs = file_probs(path, arrays)
    if "labels" not in arrays:
        raise InputError(f"{path} must hold labels [N] as class indices, got {', '.join(sorted(arrays)) or 'nothing'}")
    if policy == "gate" and "gate_logits" not in arrays:
        raise InputError(f"{path} must hold gate_logits [N] for the gate policy, got {', '.join(sorted(arrays))}")
    own = np.atleast_1d(arrays.get("classes", np.arange(probs.shape[1])))
    if own.shape != probs.shape[1:]:
        raise InputError(f"classes must name the {probs.shape[1]} columns of {path}, got shape {list(own.shape)}")
    names = list(classes or (spelled(str(name)) for name in own))
    check_names(names, "--classes" if classes else "classes", stated=bool(classes))
    if positive is None and "positive" in arrays:
        positive, said = str(arrays["positive"]), f"positive in {path}"
    elif positive is None and any_positive and len(names) == 2:
        positive = names[-1]
    if positive is not None or len(names) == 2 or not any_positive:
        positive = choose_positive(names, positive, said=said)
    groups = arrays.get("groups")
    if groups is not None and groups.shape != probs.shape[:1]:
        raise InputError(f"groups must have shape [{len(probs)}] as there are rows, got {list(groups.shape)}")
    for name in ("gate_logits", "labels"):
        if name in arrays and arrays[name].dtype.kind not in "biuf":
            raise InputError(f"{name} must be numbers, got {arrays[name].dtype}")
    halves = arrays.get("half")
    return Rows.of(
        probs, arrays["labels"], classes=names, positive=positive,
        gate=arrays.get("gate_logits"),
        probs_b=file_probs(path, arrays, "_b") if {"logits_b", "probs_b"} & set(arrays) else None,
        halves=cut_halves(len(probs), groups) if halves is None else halves, groups=groups,
        rows_independent=rows_independent,
    )  # fmt: skip


def file_probs(path: Path, arrays: Mapping[str, NDArray[Any]], end: str = "") -> NDArray[np.float64]:
    """Probabilities [N, K] from ``logits`` or ``probs``; one column stands for the second of two classes."""
    given = [name for name in (f"logits{end}", f"probs{end}") if name in arrays]
    if len(given) != 1:
        found = " and ".join(given) or ", ".join(sorted(arrays)) or "nothing"
        raise InputError(f"{path} must hold exactly one of logits{end} and probs{end}, got {found}")
    values = arrays[given[0]]
    if values.dtype.kind not in "fiu":
        raise InputError(f"{given[0]} must be numbers, got {values.dtype}")
    values = values.astype(np.float64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.size == 0:
        raise InputError(f"{given[0]} must be [N, K] or [N] with at least one row and class, got {list(values.shape)}")
    if values.ndim == 1:
        other = 1 - values if given[0].startswith("probs") else np.zeros_like(values)
        values = np.stack([other, values], axis=1)
    if values.ndim != 2:
        raise InputError(f"{given[0]} must have shape [N, K] or [N], got {list(values.shape)}")
    return softmax(values) if given[0].startswith("logits") else cast("NDArray[np.float64]", values)


def checked(policy: Policy) -> Policy:
    """The same; raises ArtifactError where it does not fit its own JSON Schema."""
    problem = next(
        Draft202012Validator(type(policy).model_json_schema()).iter_errors(policy.model_dump(mode="json")), None
    )
    if problem is not None:
        raise ArtifactError(
            f"{policy.file} must fit its JSON Schema, but {problem.json_path}: {problem.message}; not written"
        )
    return policy
