"""``stage1 plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stage1_pro.command import (
    Columns,
    Command,
    Part,
    Rate,
    Result,
    Seed,
    Share,
    keywords,
    option,
    table_columns,
    within,
)
from stage1_pro.words import PolicyName

if TYPE_CHECKING:
    from stage1_pro.studies.planning import CalibrationPlan

# The most units that are simulated.
MOST_UNITS = 100_000
Growth = Annotated[float, within(lambda x: 0 <= x <= 20, "from 0 to 20")]

# A few hundred simulated calibrations tell no power nearer to 0 or 1.
Power = Annotated[float, within(lambda x: 0.05 <= x <= 0.99, "from 0.05 to 0.99")]
Units = Annotated[int, within(lambda x: 1 <= x <= MOST_UNITS, f"from 1 to {MOST_UNITS:,}", "more are not simulated")]


class Plan(Command, topic="plan"):
    """Say how many calibration rows a promise takes, and what rows you have can promise.

    Whole calibrations are simulated with the policy itself; units are rows, or groups where rows share clips, tracks
    or places. What new photos are like is stated (--expected-error), or taken from rows that a model has answered.
    """

    policy: PolicyName = option("gate", "what makes the promise")
    alpha: Share | None = option(None, "largest risk; .05 by default, of scrc .01")
    delta: float | tuple[float, ...] = option(
        0.05,
        "largest chance of a false certificate; scrc: of selection and risk (one number is split 1 : 4)",
        metavar="D",
    )
    min_coverage: Share = option(0.70, "least share accepted; softmax: share expected to exit")
    expected_error: Part | None = option(None, "true risk that you hope for; half of alpha by default")
    expected_coverage: Rate | None = option(
        None, "share of the surest answers at which you hope for it; --min-coverage by default"
    )
    growth: Growth = option(
        3.5, "the risk grows as that share to this power: 2 where errors come early in the ranking, 5 where late"
    )
    run: Path | None = option(None, "trained run folder: new photos are like its val_select, instead of an expectation")
    logits: Path | None = option(None, "the same from a file as `stage1 calibrate --logits` takes")
    columns: Columns | None = table_columns("what a CSV of --logits calls its columns, such as label=truth,prob=score")
    positives: Share = option(0.5, "softmax: share of rows (or groups) that are positive")
    power: Power = option(0.9, "chance to succeed that you want")
    cells: float | tuple[float, ...] = option(
        1,
        "scrc: number of cells (classes or stages) with a limit each, or the share of each among the accepted",
        metavar="K",
    )
    n: Units | None = option(None, "rows (or groups) kept for the certificate that you have")
    seed: Seed = option(0, "of the simulated calibrations")
    out: Path | None = option(None, "folder for plan.json and plan.png")

    def execute(self) -> Result:
        """Print the answer, the table, and what it rests on."""
        from stage1_pro.studies.planning import plan, render

        found = plan(self)
        wrote = "" if self.out is None else f"\nwrote {self.out}/plan.json and plan.png"
        return Result(render(found) + wrote, found.model_dump(mode="json"))


@keywords(Plan)
def plan(policy: PolicyName = "gate", **options: Any) -> CalibrationPlan:
    """Say how many calibration units certify a target with the wanted chance, by simulating calibrations.

    Raises:
        InputError: an option out of its range, or no number of units would do.
    """
    from stage1_pro.studies.planning import plan as work

    return work(Plan.of(policy=policy, **options))
