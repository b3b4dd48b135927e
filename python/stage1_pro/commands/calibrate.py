"""``stage1 calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stage1_pro.command import Command, Count, Flag, Result, Share, Words, keywords

if TYPE_CHECKING:
    from stage1_pro.policies.policy import Policy

Source = Flag(one_of="source")
BOTH = Flag(group="policies gate and scrc")
SCRC = Flag(group="policy scrc")
OWN = Flag(group="with --logits")


class Calibrate(Command):
    """Choose the exit policy on val_calib."""

    topic: ClassVar[str] = "certificates"

    run: Annotated[Path | None, Source] = Field(None, description="trained run folder")
    logits: Annotated[Path | None, Source] = Field(
        None,
        description=".npz with logits [N, K] (or probs) and labels [N], optional gate_logits, logits_b, groups, half, "
        "classes, positive",
    )

    policy: Literal["softmax", "gate", "scrc", "auto"] | None = Field(
        None,
        description="what decides an exit: softmax (by default), the gate head, or the better of both by gate.json "
        "(auto); scrc: the gate decides exits, then a set of classes is given for what is accepted, and nobody "
        "answers the rest",
    )
    guarantee: Literal["ltt", "none"] | None = Field(
        None, description="ltt (by default) = certified or refused; none = empirical choice, promises nothing"
    )
    delta: Share | None = Field(
        None, description="ltt: largest chance of a false certificate, all claims together; .05 by default"
    )
    claims: Count | None = Field(
        None, description="ltt: claims that delta is divided for, fixed by the first; 1 by default"
    )
    target_fnr: Annotated[Share | None, Flag(group="policies softmax and gate")] = Field(
        None,
        description="largest false negative rate among exits; softmax: .02 by default; gate: a third limit, off by "
        "default",
    )
    min_coverage: Annotated[Share | None, BOTH] = Field(
        None, description="least share of images that exit (gate) or are accepted (scrc); .70 by default"
    )
    alpha: Annotated[Share | None, BOTH] = Field(
        None,
        description="largest share of wrong answers among exits (gate), or largest risk among the accepted (scrc); .01 "
        "by default",
    )
    max_exit_error: Annotated[Share | None, BOTH] = Field(
        None,
        description="gate: another name of --alpha; scrc: limit of its exit rule on half of val_calib, where it "
        "promises nothing of its own; .01 by default",
    )
    variant: Annotated[Literal["pac", "I", "T", "naive"] | None, SCRC] = Field(
        None,
        description="pac (by default) = holds for the thresholds found with probability 1 - delta; I, T = on average "
        "over calibrations; naive = --guarantee none",
    )
    loss: Annotated[Literal["miscoverage", "fnr"] | None, SCRC] = Field(
        None, description="sets that miss the label (by default), or of positives alone"
    )
    score: Annotated[Literal["lac", "aps", "raps"] | None, SCRC] = Field(
        None, description="nonconformity of a class; lac by default"
    )
    cells: Annotated[Literal["stage", "class"] | None, SCRC] = Field(
        None, description="promise the risk for each stage that answers, or each class; one for all by default"
    )
    allow_empty: Annotated[bool | None, SCRC] = Field(None, description="let sets be empty")
    out: Annotated[Path | None, OWN] = Field(None, description="where to write the policy, a folder or a .json file")
    positive: Annotated[str | None, OWN] = Field(None, description="name of the positive class")
    classes: Annotated[Words | None, OWN] = Field(
        None, description="comma-separated names of the classes; the file's own, else 0, 1, … by default"
    )

    def execute(self) -> Result:
        """Print the grid with the chosen threshold in its place, and what it means."""
        from stage1_pro.training.calibration import calibrate, render

        policy = calibrate(**dict(self))
        return Result(render(policy), policy.model_dump(mode="json"))


@keywords(Calibrate)
def calibrate(run: Path | str | None = None, **options: Any) -> Policy:
    """Choose when Stage A may answer, and write the policy file.

    With ``run`` it reads ``RUN/val_calib.npz`` alone and writes ``thresholds.json``, ``gateparams.json`` or
    ``scrcparams.json``, the run's only policy file from then on. With ``logits`` it writes to ``out`` when that is
    given. What is left out is taken from the run's configuration, or the defaults of ``config.CalibrateConfig``.

    Raises:
        InputError: an option or array is not what it must be, or the half of val_calib kept for the certificate has
            been used up.
        ArtifactError: ``val_calib.npz`` is missing, damaged, or of other splits.
        NotReachableError: the target cannot be met or certified.
    """
    from stage1_pro.training.calibration import calibrate as work

    return work(**dict(Calibrate.of(run=run, **options)))
