"""Metrics of selective classifiers and of probabilities: NumPy in, numbers out, no torch."""

from __future__ import annotations

from stage1_pro.metrics.binomial import clopper_pearson, clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.intervals import (
    Intervals,
    bootstrap,
    bootstrap_answers,
    bootstrap_augrc,
    bootstrap_errors,
    compare,
)
from stage1_pro.metrics.probabilistic import accuracy, auroc, balanced_accuracy, brier, ece, mcc, nll
from stage1_pro.metrics.selective import (
    OperatingPoint,
    RiskCoverage,
    augrc,
    aurc,
    cascade_risks,
    coverage_at_risk,
    fnr_on_exited,
    relative_cost,
    risk_at_coverage,
    risk_coverage,
)
from stage1_pro.metrics.sweeps import DualThreshold, Sweep, dual_threshold, sweep

__all__ = [
    "DualThreshold",
    "Interval",
    "Intervals",
    "OperatingPoint",
    "RiskCoverage",
    "Sweep",
    "accuracy",
    "augrc",
    "aurc",
    "auroc",
    "balanced_accuracy",
    "bootstrap",
    "bootstrap_answers",
    "bootstrap_augrc",
    "bootstrap_errors",
    "brier",
    "cascade_risks",
    "clopper_pearson",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "compare",
    "coverage_at_risk",
    "dual_threshold",
    "ece",
    "fnr_on_exited",
    "mcc",
    "nll",
    "relative_cost",
    "risk_at_coverage",
    "risk_coverage",
    "sweep",
]
