"""Metrics of selective classifiers and of probabilities: NumPy in, numbers out, no torch."""

from __future__ import annotations

from stage1_pro.metrics.bands import RiskBand, risk_band
from stage1_pro.metrics.binomial import clopper_pearson, clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.metrics.by_class import ByClass, ClassFigures, by_class, top_k_accuracy
from stage1_pro.metrics.costs import CostPoint, cheapest_threshold, cost_of_exits
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.histogram import ConfidenceHistogram
from stage1_pro.metrics.hypotheses import Tested, calibration_test, delong, mcnemar, permutation_test
from stage1_pro.metrics.intervals import (
    Intervals,
    bootstrap,
    bootstrap_answers,
    bootstrap_augrc,
    bootstrap_errors,
    compare,
)
from stage1_pro.metrics.probabilistic import accuracy, auroc, balanced_accuracy, brier, ece, mcc, nll
from stage1_pro.metrics.ranking import auarc, average_precision, excess_augrc, excess_aurc, fpr_at_tpr
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
    "ByClass",
    "ClassFigures",
    "ConfidenceHistogram",
    "CostPoint",
    "DualThreshold",
    "Interval",
    "Intervals",
    "OperatingPoint",
    "RiskBand",
    "RiskCoverage",
    "Sweep",
    "Tested",
    "accuracy",
    "auarc",
    "augrc",
    "aurc",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "bootstrap",
    "bootstrap_answers",
    "bootstrap_augrc",
    "bootstrap_errors",
    "brier",
    "by_class",
    "calibration_test",
    "cascade_risks",
    "cheapest_threshold",
    "clopper_pearson",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "compare",
    "cost_of_exits",
    "coverage_at_risk",
    "delong",
    "dual_threshold",
    "ece",
    "excess_augrc",
    "excess_aurc",
    "fnr_on_exited",
    "fpr_at_tpr",
    "mcc",
    "mcnemar",
    "nll",
    "permutation_test",
    "relative_cost",
    "risk_at_coverage",
    "risk_band",
    "risk_coverage",
    "sweep",
    "top_k_accuracy",
]
