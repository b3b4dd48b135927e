"""Trackers: figures of every epoch sent to TensorBoard, Weights & Biases or MLflow through accelerate's own classes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from stage1_pro.errors import DependencyError
from stage1_pro.registry import Registry

_PROJECT = "stage1_pro"


def _tensorboard(folder: Path) -> GeneralTracker:
    return TensorBoardTracker("tensorboard", folder)


def _wandb(folder: Path) -> GeneralTracker:
    return WandBTracker(_PROJECT, dir=str(folder), name=folder.resolve().name)


def _mlflow(folder: Path) -> GeneralTracker:
    import mlflow

    place = folder.resolve()
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
    return MLflowTracker(_PROJECT, logging_dir=(place / "mlruns").as_uri(), run_name=place.name)


# What `train.trackers` can name: a function of the folder. Each of those here needs the library of its name.
_LIBRARIES: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
TRACKERS: Registry[Callable[[Path], GeneralTracker]] = Registry("train.trackers", "stage1_pro.trackers", _LIBRARIES)


class Trackers:
    """The trackers of a training: checked before anything slow happens, opened when it begins.

    They keep what they write inside the folder, unless their own environment variables name a server.

    Raises:
        InputError: a name that is not known.
        DependencyError: a library that is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if TRACKERS.find(name) is _LIBRARIES.get(name) and find_spec(name) is None:
                raise DependencyError(
                    f"train.trackers must name installed trackers, got {name}, which is not; install it with: "
                    f"pip install {name}"
                )
        self._names, self._folder, self._open = names, folder, list[GeneralTracker]()

    def open(self) -> None:
        """Open them, in the process that writes."""
        for name in self._names:
            tracker = TRACKERS.find(name)(self._folder)
            # Before 1.12 accelerate's trackers started when they were made.
            if hasattr(tracker, "start"):
                tracker.start()
            self._open.append(tracker)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Send the figures that are finite floats."""
        values = {k: value for k, value in figures.items() if isinstance(value, float) and math.isfinite(value)}
        for tracker in self._open:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Write what is left and let go."""
        for tracker in self._open:
            tracker.finish()
        self._open = []
