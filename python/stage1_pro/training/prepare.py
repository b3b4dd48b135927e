"""Checks and ``config.json`` of a training; no torch, so that mistakes are told at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from stage1_pro.artifacts import Record, Splits
from stage1_pro.config import Config
from stage1_pro.errors import InputError


class RunConfig(Record):
    """``config.json``: the resolved configuration, the splits it was trained on, library versions."""

    config: Config
    split_hashes: dict[str, str]
    versions: dict[str, str]


def prepare_run(run: Path, config: Config | None, *, resume: bool, overwrite: bool) -> tuple[Splits, Config]:
    """Check a run folder and write its ``config.json``, before anything slow is loaded."""
    if not (run / "splits.json").is_file():
        raise InputError(f"--run must be a folder with splits.json, got {run}; run `stage1 split --out {run}` first")
    splits = Splits.read(run / "splits.json")
    stored = RunConfig.read(run / "config.json").config if (run / "config.json").is_file() else None
    main_process = int(os.environ.get("RANK", "0")) == 0
    if resume:
        if config is not None and stored is not None:
            _refuse_changes(config, stored)
        config = stored or config
        if config is None:
            raise InputError(f"--resume needs {run}/config.json, which is not there; start without --resume")
    elif (run / "last.pth").exists() and not overwrite:
        raise InputError(f"{run} has been trained already; go on with --resume or start anew with --overwrite")
    config = config or Config()
    if not resume and main_process:
        for name in ("last.pth", "model_best.pth", "model_best_acc.pth", "metrics.csv", "val_calib.npz",
                     "val_calib_logits.pt", "val_calib_labels.pt", "val_calib_gate_logits.pt",
                     "thresholds.json", "gateparams.json", "scrcparams.json", "features.npz", "train.log"):  # fmt: skip
            (run / name).unlink(missing_ok=True)
    if main_process and stored != config:
        write_config(run, config, splits)
    return splits, config


def write_config(run: Path, config: Config, splits: Splits) -> None:
    """Write ``config.json`` with the versions of what computes."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "numpy", "pillow")}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    RunConfig(config=config, split_hashes=splits.hashes, versions=versions).write(run / "config.json")


def _refuse_changes(config: Config, stored: Config) -> None:
    """A resumed run keeps its configuration; only what cannot change the result may differ."""
    free = {"workers", "save_every_steps", "tensorboard"}
    given, kept = config.model_dump(), stored.model_dump()
    for section in ("augment", "train", "model"):
        for key, value in given[section].items():
            default = getattr(getattr(Config(), section), key)
            if key not in free and value not in (kept[section][key], default):
                raise InputError(
                    f"--resume must keep the run's configuration, got {section}.{key} = {value} instead of "
                    f"{kept[section][key]}; start anew with --overwrite"
                )


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, and sweep up what killed writers left behind.

    The lock goes with the process, also when it is killed.

    Raises:
        InputError: another process is training in this folder.
    """
    with (run / ".lock").open("w") as file:
        try:
            # A record lock: forked decoders do not inherit it, so it cannot outlive a killed training.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{run} must not be in use, but another process is training in it; wait for it") from None
        for leftover in run.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
