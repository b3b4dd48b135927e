"""Policies fitted on plain arrays, by keywords; what tests of many rooms need."""

from __future__ import annotations

from typing import Any

from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import Origin
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.policies.target import Gate, Scrc, Softmax

_ORIGIN = ("split_hashes", "model_fingerprint", "preprocessing_fingerprint")
_ROWS = ("halves", "groups", "classes", "positive")


def _parts(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the rows, and keywords of ``fit``; what is left is of the target."""
    rows = {name: options.pop(name) for name in _ROWS if name in options}
    certifies = options.get("guarantee", "ltt") == "ltt" and options.get("variant") != "naive"
    rows["rows_independent"] = certifies and rows.get("groups") is None
    origin = Origin(**{name: options.pop(name) for name in _ORIGIN if name in options})
    return rows, {"use": options.pop("use", None), "origin": origin}


def fit_softmax_policy(probs: Any, labels: Any, **options: Any) -> Thresholds:
    options = {"guarantee": "none", **options}
    rows, keywords = _parts(options)
    if not options.keys() & {"exit_error", "fnr", "target_fnr", "cascade_error", "disagreement"}:
        options["fnr"] = 0.02
    target = Softmax.of(**options)
    return Thresholds.fit(target, Rows.of(probs, labels, **rows), **keywords)


def fit_gate_policy(probs: Any, gate_logits: Any, labels: Any, **options: Any) -> GateParams:
    rows, keywords = _parts(options)
    if not options.keys() & {"least_coverage", "min_coverage"}:
        options["least_coverage"] = 0.7
    return GateParams.fit(Gate.of(**options), Rows.of(probs, labels, gate=gate_logits, **rows), **keywords)


def fit_scrc_policy(probs_a: Any, gate_logits: Any, probs_b: Any, labels: Any, **options: Any) -> ScrcParams:
    rows, keywords = _parts(options)
    if "xi" in options:
        options["min_coverage"] = options.pop("xi")
    options["guarantee"] = "none" if options.get("variant") == "naive" else "ltt"
    target = Scrc.of(**options)
    return ScrcParams.fit(target, Rows.of(probs_a, labels, gate=gate_logits, probs_b=probs_b, **rows), **keywords)
