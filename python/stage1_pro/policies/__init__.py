"""Exit policies: which answers of Stage A stand, and what is promised of them. NumPy only, no torch.

For arrays: ``certify_threshold`` certifies a threshold on anybody's scores, ``SCRC`` and ``conformal_sets`` sets of
classes, ``fit_policy`` any registered policy; ``plan_calibration`` says how many rows a promise takes. Names are
imported on first use.

``policy`` has the common form of policies and their registry, ``target`` what they are asked for and what they
guarantee, ``rows`` what they are fitted on. Exactly one policy is active in a folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage1_pro.policies.bets import labelling_chances as labelling_chances
    from stage1_pro.policies.bets import shuffle_units as shuffle_units
    from stage1_pro.policies.bounds import betting_p_value as betting_p_value
    from stage1_pro.policies.bounds import betting_upper as betting_upper
    from stage1_pro.policies.bounds import coverage_p_value as coverage_p_value
    from stage1_pro.policies.bounds import errors_allowed as errors_allowed
    from stage1_pro.policies.bounds import risk_p_value as risk_p_value
    from stage1_pro.policies.bounds import trials_needed as trials_needed
    from stage1_pro.policies.candidates import Mix as Mix
    from stage1_pro.policies.candidates import Risk as Risk
    from stage1_pro.policies.certify import Certificate as Certificate
    from stage1_pro.policies.certify import certify as certify_risks  # noqa: F401
    from stage1_pro.policies.certify import certify_threshold as certify_threshold
    from stage1_pro.policies.conformal import AdaptiveSets as AdaptiveSets
    from stage1_pro.policies.conformal import ConformalSets as ConformalSets
    from stage1_pro.policies.conformal import conformal_sets as conformal_sets
    from stage1_pro.policies.fitting import fit_policy as fit_policy
    from stage1_pro.policies.ordering import certify_halves as certify_halves
    from stage1_pro.policies.ordering import order_candidates as order_candidates
    from stage1_pro.policies.planning import plan_calibration as plan_calibration
    from stage1_pro.policies.policy import Policy as Policy
    from stage1_pro.policies.policy import read_policy as read_policy
    from stage1_pro.policies.rows import cut_halves as cut_halves
    from stage1_pro.policies.scrc import SCRC as SCRC
    from stage1_pro.policies.scrc import FittedSCRC as FittedSCRC
    from stage1_pro.policies.sequential import SequentialCertificate as SequentialCertificate
    from stage1_pro.policies.sequential import SequentialState as SequentialState

# ``certify_risks`` is ``certify`` of the module of that name, which hides it here.
_HOMES = {
    "SCRC": "scrc",
    "AdaptiveSets": "conformal",
    "Certificate": "certify",
    "ConformalSets": "conformal",
    "FittedSCRC": "scrc",
    "Policy": "policy",
    "Mix": "candidates",
    "Risk": "candidates",
    "SequentialCertificate": "sequential",
    "SequentialState": "sequential",
    "betting_p_value": "bounds",
    "betting_upper": "bounds",
    "certify_halves": "ordering",
    "certify_risks": "certify",
    "certify_threshold": "certify",
    "conformal_sets": "conformal",
    "coverage_p_value": "bounds",
    "cut_halves": "rows",
    "errors_allowed": "bounds",
    "fit_policy": "fitting",
    "labelling_chances": "bets",
    "order_candidates": "ordering",
    "plan_calibration": "planning",
    "read_policy": "policy",
    "risk_p_value": "bounds",
    "shuffle_units": "bets",
    "trials_needed": "bounds",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stage1_pro.policies' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"stage1_pro.policies.{_HOMES[name]}")
    return getattr(home, "certify" if name == "certify_risks" else name)


def __dir__() -> list[str]:
    return __all__
