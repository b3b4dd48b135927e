"""Checks and ``config.json`` of a training; no torch, so that mistakes are told at once."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from stage1_pro.artifacts import POLICY_FILES, Record, Splits, recover_directory
from stage1_pro.config import Config
from stage1_pro.errors import ArtifactError, InputError


class RunConfig(Record):
    """``config.json``: the resolved configuration, the splits it was trained on, library versions."""

    config: Config
    split_hashes: dict[str, str]
    versions: dict[str, str]


# What one training writes; a new one in the same folder starts without them. A bundle is its own thing and stays.
OWN_FILES = ("last.pth", "model_best.pth", "model_best_acc.pth", "metrics.csv", "train.log", "config.json",
             "val_calib.npz", "val_calib_logits.pt", "val_calib_labels.pt", "val_calib_gate_logits.pt",
             "gate.json", "tap.json", "start.json", "val_select.npz",
             *POLICY_FILES.values(), "report.html")  # fmt: skip
OWN_FOLDERS = ("adapter", "evaluation", "metrics")
# Keys that cannot change what is learned, so that a resumed run may set them anew.
_FREE = {"workers", "save_every_steps", "tensorboard", "gradient_checkpointing"}


def check_run(run: Path, config: Config | None, *, resume: bool, overwrite: bool) -> tuple[Splits, Config]:
    """Give a run's splits and the configuration to train with; changes nothing.

    Raises:
        InputError: no splits, an earlier training in the way, nothing to resume, or another configuration.
        ArtifactError: splits that were edited, or are not those of the training to resume.
    """
    if not (run / "splits.json").is_file():
        raise InputError(f"--run must be a folder with splits.json, got {run}; run `stage1 split --out {run}` first")
    splits = Splits.read(run / "splits.json").verify()
    if not resume:
        if (run / "last.pth").exists() and not overwrite:
            raise InputError(f"{run} has been trained already; go on with --resume or start anew with --overwrite")
        return splits, config or Config()
    if not (run / "config.json").is_file():
        raise InputError(f"--resume needs {run}/config.json, which is not there; start without --resume")
    stored = RunConfig.read(run / "config.json")
    if stored.split_hashes != splits.hashes:
        raise ArtifactError(f"{run}/splits.json has changed since the training began; start anew with --overwrite")
    return splits, stored.config if config is None else _resumed(config, stored.config)


def forget_training(run: Path) -> None:
    """Remove what an earlier training and the stations after it wrote."""
    for name in OWN_FILES:
        (run / name).unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)


def write_config(run: Path, config: Config, splits: Splits) -> None:
    """Write ``config.json`` with the versions of what computes."""
    RunConfig(config=config, split_hashes=splits.hashes, versions=versions()).write(run / "config.json")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy", "pillow")}
    return {**found, "python": ".".join(map(str, sys.version_info[:3]))}


def _resumed(given: Config, stored: Config) -> Config:
    """The run's configuration with the free keys that were named anew; any other change is refused."""
    kept = stored.model_dump()
    if "seed" in given.model_fields_set and given.seed != stored.seed:
        raise _changed("seed", given.seed, stored.seed)
    for name in sorted(given.model_fields_set - {"seed"}):
        section = getattr(given, name)
        for key in sorted(section.model_fields_set):
            value = getattr(section, key)
            if key in _FREE and name == "train":
                kept[name][key] = value
            elif (name, key, value) == ("model", "tap", "auto"):
                continue  # measured when the run began; the block found is stored
            elif value != getattr(getattr(stored, name), key):
                raise _changed(f"{name}.{key}", value, kept[name][key])
    return Config.model_validate(kept)


def _changed(key: str, value: object, kept: object) -> InputError:
    return InputError(
        f"--resume must keep the run's configuration, got {key} = {value} instead of {kept}; "
        "start anew with --overwrite"
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
        for name in OWN_FILES:
            for leftover in run.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
        for name in OWN_FOLDERS:
            recover_directory(run / name)
            for leftover in (*run.glob(f".{name}.*.tmp"), *run.glob(f".{name}.*.old")):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in (run / name).glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        yield
