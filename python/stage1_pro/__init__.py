"""Selective image classification that keeps its promises.

Commands: ``split, explora, train, compare, calibrate, evaluate, export, build, merge``; a deployed bundle:
``Cascade.load(bundle).predict(images)``.
Everything is imported on first use, so that serving needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage1_pro.commands.merge import merge
    from stage1_pro.commands.plan import plan
    from stage1_pro.commands.split import split
    from stage1_pro.deploy.building import build
    from stage1_pro.deploy.cascade import Cascade
    from stage1_pro.deploy.exporting import export
    from stage1_pro.studies.comparing import compare
    from stage1_pro.training.calibration import calibrate
    from stage1_pro.training.evaluation import evaluate
    from stage1_pro.training.exploration import explora
    from stage1_pro.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Cascade", "__version__", "build", "calibrate", "compare", "evaluate", "explora", "export", "merge", "plan",
    "split", "train",
]  # fmt: skip

_HOMES = {
    "Cascade": "stage1_pro.deploy.cascade",
    "build": "stage1_pro.deploy.building",
    "calibrate": "stage1_pro.training.calibration",
    "compare": "stage1_pro.studies.comparing",
    "evaluate": "stage1_pro.training.evaluation",
    "explora": "stage1_pro.training.exploration",
    "export": "stage1_pro.deploy.exporting",
    "merge": "stage1_pro.commands.merge",
    "plan": "stage1_pro.commands.plan",
    "split": "stage1_pro.commands.split",
    "train": "stage1_pro.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stage1_pro' has no attribute {name!r}")
