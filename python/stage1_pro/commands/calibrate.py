"""``stage1 calibrate``: its options are those of the policies' targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from stage1_pro.command import Columns, Command, Count, Flag, Result, Share, Words, keywords, option
from stage1_pro.policies.target import POLICIES, Target, kind_of_target
from stage1_pro.progress import say

if TYPE_CHECKING:
    from stage1_pro.policies.policy import Policy

_SOURCE = Flag(one_of="source")
_OWN = Flag(group="with --logits")


class Calibration(Command, topic="certificates"):
    """Choose the exit policy on val_calib.

    What is left out is taken from the run's configuration. An option that the chosen policy does not have is refused.
    """

    run: Annotated[Path | None, _SOURCE] = option(None, "trained run folder")
    logits: Annotated[Path | None, _SOURCE] = option(
        None,
        ".npz with logits [N, K] (or probs) and labels [N], optional gate_logits, logits_b, groups, half, "
        "classes, positive; or a CSV as `stage1 metrics` reads it, also with gate_logits and half",
    )
    policy: str | None = option(
        None,
        "what decides an exit: softmax, gate, scrc, or auto (by default with --run): the better of softmax and gate by "
        "gate.json",
    )
    guarantee: Literal["ltt", "none"] | None = option(
        None, "ltt (by default) = certified or refused; none = empirical choice, promises nothing"
    )
    delta: Share | None = option(
        None, "ltt: largest chance of a false certificate, all claims together; .05 by default"
    )
    allow_useless: bool | None = option(
        None, "certify also what is no better than always answering the commonest class; put on record"
    )
    claims: Count | None = option(None, "ltt: claims that delta is divided for, fixed by the first; 1 by default")
    out: Annotated[Path | None, _OWN] = option(None, "where to write the policy, a folder or a .json file")
    columns: Annotated[Columns | None, Flag(group="with --logits", metavar="NAME=COLUMN,…")] = option(
        None, "what a CSV calls its columns, such as label=truth,prob=score"
    )
    positive: Annotated[str | None, _OWN] = option(None, "name of the positive class")
    classes: Annotated[Words | None, _OWN] = option(
        None, "comma-separated names of the classes; the file's own, else 0, 1, … by default"
    )

    unlabelled: Annotated[Path | None, Flag(metavar="FOLDER")] = option(
        None,
        "with --run and --disagreement: photos without labels that certify, a folder, tar or CSV with file[,group]; "
        "without groups add --rows-independent",
    )
    rows_independent: Annotated[bool, _OWN] = option(
        False, "state that every row is a photo of its own, independent of the others, where the file has no groups"
    )
    dry_run: bool = option(
        False, "say what could be certified by the number of photos alone; nothing is looked at, spent or written"
    )

    def asked_for(self) -> dict[str, Any]:
        """Options of targets that were given."""
        own = {"run", "logits", "out", "columns", "positive", "classes", "rows_independent", "dry_run", "unlabelled"}
        return {name: value for name, value in self if name not in own and value is not None}

    def execute(self) -> Result:
        """Print the grid with the chosen threshold in its place, and what it means."""
        from stage1_pro.training.calibration import calibrate, foresee_calibration, render

        if self.policy in ("softmax", "gate") and "alpha" in self.asked_for():
            say("--alpha of softmax and gate is called --exit-error now; the older name goes with the next version")
        if self.dry_run:
            found = foresee_calibration(self)
            return Result(found.render(), found.model_dump(mode="json"))
        policy = calibrate(self)
        return Result(render(policy), policy.model_dump(mode="json"))


def _options() -> dict[str, Any]:
    """Every field of the targets, left out by default, in a group of the policies that have it."""
    kinds = {policy: kind_of_target(policy) for policy in POLICIES}
    owners: dict[str, dict[str, FieldInfo]] = {}
    for policy, kind in kinds.items():
        named = {older: new for older, new in kind.aliases.items() if older in _OLDER or new in _OLDER}
        known = {**kind.model_fields, **{name: kind.model_fields[new] for name, new in named.items()}}
        for name, field in known.items():
            if name not in Target.model_fields:
                owners.setdefault(name, {})[policy] = field
    made: dict[str, Any] = {}
    for name, fields in owners.items():
        # A policy that calls it otherwise says what it is there.
        texts = {
            policy: _text(kind.model_fields[kind.aliases.get(name, name)])
            for policy, kind in kinds.items()
            if policy in fields or (name in kind.aliases and name not in (*_OLDER, "alpha"))
        }
        field = next(iter(fields.values()))
        flag = next((one for one in field.metadata if isinstance(one, Flag)), Flag())
        checks = [one for one in field.metadata if one is not flag]
        checked = Annotated[(field.annotation, *checks)] if checks else field.annotation
        said: dict[str, list[str]] = {}
        for policy, one in texts.items():
            said.setdefault(one, []).append(policy)
        text = next(iter(said)) if len(said) == 1 else "; ".join(f"{', '.join(of)}: {one}" for one, of in said.items())
        group = f"polic{'y' if len(texts) == 1 else 'ies'} {', '.join(texts)}"
        made[name] = (
            Annotated[Optional[checked], replace(flag, group=group, older=_OLDER.get(name, ""))],  # noqa: UP045
            Field(None, description=text),
        )
    return made


# Names of the first version, and today's.
_OLDER = {"target_fnr": "--fnr", "max_exit_error": "--exit-error", "min_coverage": "--least-coverage"}


def _text(field: FieldInfo) -> str:
    return f"{field.description}{'' if field.default in (None, False) else f' (default: {field.default})'}"


Calibrate: type[Calibration] = create_model(
    "Calibrate", __base__=Calibration, __doc__=Calibration.__doc__, __module__=__name__, **_options()
)


@keywords(Calibrate, without=("dry_run",))
def calibrate(run: Path | str | None = None, *, target: Target | None = None, **options: Any) -> Policy:
    """Choose when Stage A may answer, and write the policy file.

    With ``run`` it reads ``RUN/val_calib.npz`` and ``RUN/val_select.npz``, and writes ``thresholds.json``,
    ``gateparams.json`` or ``scrcparams.json``, the run's only policy file from then on. With ``logits`` it writes
    to ``out`` when that is given. What is left out is taken from the run's configuration, or the defaults of
    ``config.CalibrateConfig``; ``target`` says all of it at once.

    Raises:
        InputError: an option or array is not what it must be, or the rows kept for the certificate have been
            used up.
        ArtifactError: ``val_calib.npz`` is missing, damaged, or of other splits.
        NotReachableError: the target cannot be met or certified.
    """
    from stage1_pro.training.calibration import calibrate as work

    return work(Calibrate.of(run=run, **options), target)
