"""``stage1 plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage1_pro.command import Command, Count, Rate, Result, Share, keywords, option
from stage1_pro.words import PolicyName

if TYPE_CHECKING:
    from stage1_pro.studies.planning import CalibrationPlan


class Plan(Command, topic="plan"):
    """Say how many calibration rows a promise takes, and what rows you have can promise.

    Exact binomials of the policies; units are rows, or groups where rows share clips, tracks or places.
    """

    policy: PolicyName = option("gate", "what makes the promise")
    alpha: Share | None = option(None, "largest risk; .01 by default, of softmax .02")
    delta: float | tuple[float, ...] = option(
        0.05,
        "largest chance of a false certificate; scrc: of selection and risk (one number is split 1 : 4)",
        metavar="D",
    )
    min_coverage: Share = option(0.70, "least share accepted; softmax: share expected to exit")
    expected_error: float | None = option(None, "true risk that you hope for; half of alpha by default")
    expected_coverage: float | None = option(
        None, "true share accepted that you hope for, above --min-coverage; gate: its test is then counted too"
    )
    positives: Rate = option(0.5, "softmax: share of rows (or groups) that are positive")
    power: Share = option(0.9, "chance to succeed that you want")
    cells: float | tuple[float, ...] = option(
        1,
        "scrc: number of cells (classes or stages) with a limit each, or the share of each among the accepted",
        metavar="K",
    )
    n: Count | None = option(None, "rows (or groups) kept for the certificate that you have")
    out: Path | None = option(None, "folder for plan.json and plan.png")

    def execute(self) -> Result:
        """Print the answer, the table, and what it rests on."""
        from stage1_pro.studies.planning import plan, render

        found = plan(self)
        wrote = "" if self.out is None else f"\nwrote {self.out}/plan.json and plan.png"
        return Result(render(found) + wrote, found.model_dump(mode="json"))


@keywords(Plan)
def plan(policy: PolicyName = "gate", **options: Any) -> CalibrationPlan:
    """Say how many calibration units certify a target with the wanted chance.

    Raises:
        InputError: an option out of its range, or no number of units would do.
    """
    from stage1_pro.studies.planning import plan as work

    return work(Plan.of(policy=policy, **options))
