"""Selective image classification that keeps its promises.

Commands: ``split, explora, train, compare, calibrate, evaluate, measure, plan, export, build, merge``; a deployed
bundle: ``Cascade.load(bundle).predict(images)``.
Everything is imported on first use, so that serving needs no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Libraries that tell their makers of their use: read when they are imported, hence here. What is set already holds.
for _name, _value in {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from stage1_pro.commands.calibrate import calibrate as calibrate
    from stage1_pro.commands.compare import compare as compare
    from stage1_pro.commands.merge import merge as merge
    from stage1_pro.commands.metrics import measure as measure
    from stage1_pro.commands.plan import plan as plan
    from stage1_pro.commands.split import split as split
    from stage1_pro.deploy.cascade import Cascade as Cascade
    from stage1_pro.deploy.exporting import build as build
    from stage1_pro.deploy.exporting import export as export
    from stage1_pro.policies.sequential import SequentialCertificate as SequentialCertificate
    from stage1_pro.training.evaluation import evaluate as evaluate
    from stage1_pro.training.exploration import explora as explora
    from stage1_pro.training.loop import train as train

__version__ = "0.1.0"
_HOMES = {
    "Cascade": "deploy.cascade",
    "SequentialCertificate": "policies.sequential",
    "build": "deploy.exporting",
    "calibrate": "commands.calibrate",
    "compare": "commands.compare",
    "evaluate": "training.evaluation",
    "explora": "training.exploration",
    "export": "deploy.exporting",
    "measure": "commands.metrics",
    "merge": "commands.merge",
    "plan": "commands.plan",
    "split": "commands.split",
    "train": "training.loop",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stage1_pro' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"stage1_pro.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
