"""The pictures of an evaluation, with what to see in each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stage1_pro.data.predictions import Predictions
from stage1_pro.metrics.answers import Answered
from stage1_pro.metrics.figures import (
    confidence_png,
    cost_risk_png,
    distribution_png,
    exit_rate_png,
    reliability_png,
    risk_band,
    risk_coverage_png,
)
from stage1_pro.metrics.selective import relative_cost
from stage1_pro.policies.policy import Policy
from stage1_pro.report import Picture
from stage1_pro.training.measures import LEVEL, Measured

if TYPE_CHECKING:
    from stage1_pro.training.evaluation import Evaluation


def draw(
    predictions: Predictions, answers: Answered, policy: Policy | None, evaluation: Evaluation, found: Measured
) -> list[Picture]:
    """Draw Stage A, which is what the policy selects from; ``found`` is of all rows, with ``BAND_METRICS``."""
    stage_a = answers["stage_a"]
    point = threshold = None
    if policy is not None:
        exited = answers["cascade"].exited
        # The gate's threshold is not on this axis.
        threshold = None if policy.needs_gate else policy.exit_threshold
        if exited.any():
            point = (float(exited.mean()), float(stage_a.error[exited].mean()))
    pictures = [
        Picture.of(
            "risk_coverage_curve",
            "If Stage A answers only its surest photos (left), how many of those answers are wrong? "
            f"Good confidence keeps the line low on the left. Shaded: {LEVEL:.0%} interval at each coverage.",
            risk_coverage_png(
                stage_a.confidence, stage_a.error, point=point, band=risk_band(found.stage_a), level=LEVEL
            ),
        ),
        Picture.of(
            "augrc",
            "AUGRC of Stage A on each resample of whole groups. A wide heap: few groups or few errors.",
            distribution_png(found.stage_a["augrc"], "AUGRC of Stage A (lower is better)"),
        ),
        Picture.of(
            "reliability",
            "Points below the dashed line: Stage A is surer than it should be. ECE is the mean length of the bars, "
            "weighted by photos, over 15 bins of equal width. Small dots are few photos.",
            reliability_png(stage_a.confidence, ~stage_a.error, error=evaluation.value("ece", "stage_a")),
        ),
        Picture.of(
            "confidence",
            "Wrong answers right of the threshold are the costly ones: they exit.",
            confidence_png(stage_a.confidence, ~stage_a.error, threshold=threshold),
        ),
    ]
    exits = found.exits
    if policy is not None and exits is not None:
        fnr = evaluation.measure("fnr_on_exited", "stage_a")
        if fnr.value is not None:
            # Its bound stands for the interval.
            one = replace(exits["fnr_on_exited"], value=fnr.value, low=math.nan, high=math.nan)
            png = distribution_png(one, "FNR on exits", percent=True, target=policy.fnr_target, bound=fnr.high)
            caption = (
                "Missed positives among exits, on each resample of whole groups. The target is kept by its bound when "
                "the dotted line is left of the dashed one."
            )
            pictures.append(Picture.of("fnr_on_exited", caption, png))
        png = distribution_png(
            exits["coverage"], "coverage: share answered by Stage A", percent=True,
            target=policy.usual_exit_rate,
            target_label="on calibration rows",
        )  # fmt: skip
        caption = "Coverage on each resample of whole groups, beside what the calibration photos gave."
        pictures.append(Picture.of("coverage", caption, png))
        scores = np.nan_to_num(policy.scores(stage_a.probs, predictions.gate_logits), nan=0.0)
        png = exit_rate_png(scores, answers["cascade"].exited, ~stage_a.error, label=policy.score_title)
        caption = (
            f"Photos in bins of about equal size by {policy.score_title} (its range is below each bar, with the number "
            "of photos). Bars should be high where the points are."
        )
        pictures.append(Picture("exit_rate", "Who exits", caption, png))
    return pictures


def draw_cost(
    answers: Answered,
    evaluation: Evaluation,
    curve: tuple[NDArray[np.float64], ...],
    others: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Picture:
    """What every threshold would cost and risk, here and with the taps of other runs, and where the policy stands."""
    tap, n_blocks = evaluation.tap, evaluation.n_blocks
    assert tap is not None
    assert n_blocks is not None
    exited, deployed = answers["cascade"].exited, answers["cascade"].error
    png = cost_risk_png(
        {f"tap {tap} of {n_blocks}, all thresholds": (curve[2], curve[3]), **others},
        point=(float(relative_cost(exited.mean(), tap, n_blocks)), float(deployed.mean())),
        stage_b=(1.0, float(answers["stage_b"].error.mean())),
    )
    caption = (
        f"Left: everybody exits after {tap} of {n_blocks} blocks. Right: everybody runs them all. Lower and further "
        "left is better. Cost counts blocks alone; `stage1 bench cascade` measures time. `stage1 evaluate --beside` "
        "adds the curves of runs with other taps."
    )
    return Picture("cost_risk", "What a threshold costs and risks", caption, png)
