"""Checks and records of trainings and adaptations; no torch, so that mistakes are told at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field

from stage1_pro.config import Config
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError, Stage1Error
from stage1_pro.files import locked, recover_directory, sha256_file, sweep, sync_directory, write_bytes
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.policies.claims import CLAIMS_FILE
from stage1_pro.policies.policy import coming_files, policy_files
from stage1_pro.progress import say
from stage1_pro.record import Record


class Start(Record):
    """``start.json``: what a training drew and started from, as hashes; arms of a comparison must have the same.

    Written before the first step and left alone by ``--resume``. The batches are those of all processes together.
    """

    format_version: Literal[1] = 1
    seed: int
    split_hashes: dict[str, str]
    head_shapes: dict[str, list[int]] = Field(description="shape of every tensor of the heads")
    heads: str = Field(description="sha256 of the heads' starting weights")
    order: str = Field(description="sha256 of the row ids of the first epochs, in the order they are gone through")
    batch_size: int
    batch_rows: str = Field(description="sha256 of row ids and labels of the first batches")
    batch_inputs: str | None = Field(
        description="sha256 of their augmented pixels; null where a frozen backbone's cached features are read"
    )
    preprocessing: str = Field(description="fingerprint of what made the pixels, before augmentation")
    augmentation: str = Field(description="fingerprint of the augmentation's settings")
    n_trainable: int
    n_parameters: int
    base_fingerprint: str = Field(description="sha256 of the backbone's starting weights")
    versions: dict[str, str]
    environment: dict[str, str] = Field(
        {}, description="device, torch's switches and variables of its libraries that may change results"
    )


class RunConfig(Record):
    """``config.json``: the resolved configuration, the splits it was trained on, library versions."""

    config: Config
    split_hashes: dict[str, str]
    versions: dict[str, str]
    legs: list[int] = Field(
        [], description="epochs at which a training that had ended went on, each with a schedule of its own"
    )


class ProbeFigure(Record):
    """A figure of one probe on held-out groups of train rows: with the base, with the adapted backbone, and apart."""

    probe: Literal["linear", "knn"]
    metric: Literal["accuracy", "balanced_accuracy", "auroc"]
    before: float | None = Field(description="null where it is undefined")
    after: float | None
    difference: float | None = Field(description="after minus before; higher is better")
    low: float | None = Field(description="of the difference, on the same resamples of groups")
    high: float | None
    method: str


class PoolInfo(Record):
    """The unlabelled images a backbone was adapted to."""

    contents_sha256: str = Field(description="of the contents of all images used, in the order of their names")
    n_trained: int
    n_held_out: int = Field(description="not trained on; their loss is in metrics.csv")
    n_quarantined: int = Field(description="unreadable, see quarantine.csv")
    n_copies: int = Field(description="of an image that is in the pool already, byte for byte")
    n_left_out: int = Field(
        description="images of val_select, val_calib or val_test, near-duplicates of them, and images of their groups"
    )
    n_not_compared: int | None = Field(
        None, description="rows of those splits that could not be read, whose near-duplicates may be in the pool"
    )


class ExploraRecord(Record):
    """``explora/explora.json``: how a backbone was adapted to unlabelled images, and whether that made it better."""

    format_version: Literal[1] = 1
    kept: Literal["base", "adapted"] = Field(description="whose weights are in backbone/")
    better: bool = Field(description="by linear probe and neighbours, on held-out groups of train rows")
    reason: str
    objective: Literal["mae", "simmim", "latent", "diet"]
    train: Literal["explora", "full"]
    blocks: int = Field(description="last blocks that were trained whole")
    rank: int | None = Field(description="of LoRA on the other blocks; null without")
    n_parameters: int = Field(description="of the encoder")
    n_trained: int = Field(description="of them, LoRA's own counted in")
    share: float = Field(description="n_trained / n_parameters")
    steps: int
    loss: list[float] = Field(description="per epoch, on what was trained on")
    held_out_loss: list[float | None] = Field(description="per epoch, on pool images that were not; null without any")
    figures: list[ProbeFigure] = Field(description="both probes on held-out groups of train rows")
    n_rows: int
    n_groups: int
    pool: PoolInfo
    base: BackboneInfo
    base_fingerprint: str
    backbone_fingerprint: str = Field(description="of the weights in backbone/")
    weights_sha256: str = Field(description="of backbone/model.safetensors")
    preprocessing: PreprocessSpec
    split_hashes: dict[str, str]
    seed: int
    versions: dict[str, str]
    environment: dict[str, str] = Field({}, description="as in ``start.json``")


# What one training writes; a new one in the same folder starts without them. A bundle is its own thing and stays.
OWN_FILES = ("last.pth", "model_best.pth", "model_best_acc.pth", "metrics.csv", "train.log", "config.json",
             "val_calib.npz", "val_calib_logits.pt", "val_calib_labels.pt", "val_calib_gate_logits.pt",
             "gate.json", "tap.json", "start.json", "val_select.npz",
             *policy_files(), *coming_files(), "report.html")  # fmt: skip
OWN_FOLDERS = ("adapter", "certify", "evaluation", "metrics")
# What they wrote of the best model, once it was chosen.
_OF_THE_MODEL = ("val_calib.npz", "val_calib_logits.pt", "val_calib_labels.pt", "val_calib_gate_logits.pt", "gate.json",
                 "val_select.npz", *policy_files(), *coming_files(), "report.html", "certify",
                 "evaluation")  # fmt: skip
# What makes a run of what was set aside.
_BESIDE = ("splits.json", "quarantine.csv", CLAIMS_FILE)
# What was set aside last; on its way there; and what lay there before.
_BACKUPS = (".before", ".before.coming", ".before.older")
# Some of it is there where the work was finished: a training writes the first of these last.
_FINISHED = {"val_calib_gate_logits.pt", "explora.json", "evaluation", *policy_files()}
# What `stage1 explora` leaves in a run; trainings come and go beside it.
EXPLORA = "explora"
# Keys that cannot change what is learned, so that a resumed run may set them anew.
_FREE = {"workers", "save_every_steps", "trackers", "gradient_checkpointing"}


def check_run(
    run: Path, config: Config | None, *, resume: bool, overwrite: bool, explora: bool = False, adapts: bool = False
) -> tuple[Splits, Config]:
    """Give a run's splits and the configuration to train, or to adapt, with; changes nothing and loads no torch.

    Args:
        run: folder with ``splits.json``.
        config: as given; with ``resume`` only what it names must agree with the stored one.
        resume: go on with what was begun.
        overwrite: an earlier one may be given up.
        explora: the backbone is the run's adapted one; a resumed training must have begun with it.
        adapts: the work is an adaptation, in the folder ``explora`` of the run, not a training.

    Raises:
        InputError: no splits, an earlier training in the way, nothing to resume, or another configuration.
        ArtifactError: splits that were edited, or are not those of the training to resume.
    """
    folder, written, what = (run / EXPLORA, "config.json", "adaptation") if adapts else (run, "last.pth", "training")
    if not (run / "splits.json").is_file():
        raise InputError(f"--run must be a folder with splits.json, got {run}; run `stage1 split --out {run}` first")
    if resume and overwrite:
        raise InputError("--resume and --overwrite must not be given together, got both; choose one")
    splits = Splits.read(run / "splits.json").verify()
    if not resume:
        if (folder / written).exists() and not overwrite:
            raise InputError(f"{folder} holds an earlier {what}; go on with --resume or start anew with --overwrite")
        config = config or Config()
        return splits, use_adapted(run, splits, config) if explora else config
    if not (folder / "config.json").is_file():
        raise InputError(f"--resume needs {folder}/config.json, which is not there; start without --resume")
    stored = RunConfig.read(folder / "config.json")
    if stored.split_hashes != splits.hashes:
        raise ArtifactError(f"{run}/splits.json has changed since the {what} began; start anew with --overwrite")
    if explora and use_adapted(run, splits, stored.config).model.backbone != stored.config.model.backbone:
        raise changed("model.backbone", str(run / EXPLORA / "backbone"), stored.config.model.backbone)
    return splits, stored.config if config is None else resumed(config, stored.config, more_epochs=not adapts)


def forget_training(run: Path) -> None:
    """Set aside what an earlier training and the commands after it wrote; say what that is, before."""
    set_aside(run, [*OWN_FILES, *OWN_FOLDERS], beside=_BESIDE)


def withdraw(run: Path) -> None:
    """Set aside what was made of the best model, which may become another; the model itself stays."""
    # A link to the log would grow with it; everything else is replaced, never changed.
    stays = [name for name in (*OWN_FILES, *OWN_FOLDERS) if name not in (*_OF_THE_MODEL, "train.log")]
    set_aside(run, _OF_THE_MODEL, beside=[*_BESIDE, *stays])
    if (run / "bundle").exists():
        say(f"{run / 'bundle'} stays, of the model before; `stage1 export --overwrite` makes one of the new model")


def set_aside(folder: Path, names: Sequence[str], *, beside: Sequence[str] = ()) -> None:
    """Move what is there of ``names`` to ``FOLDER/.before``, in place of what lay there; say so, before.

    Files and folders of ``beside`` stay and are there as well, as links. Unfinished work takes nobody's place: it goes
    for good where ``.before`` is taken, or where it has no model yet. Killed half-way, ``exclusive`` undoes it.
    """
    gone = [name for name in names if (folder / name).exists()]
    if not gone:
        return
    before, coming, older = (folder / name for name in _BACKUPS)
    if _FINISHED.isdisjoint(gone) and (before.exists() or "model_best.pth" not in gone):
        say(f"removed {', '.join(gone)}")
        for name in gone:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        return
    say(f"moved to {before}{', in place of what lay there' * before.exists()}: {', '.join(gone)}")
    coming.mkdir()
    for name in beside:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, coming / name, copy_function=_link)
        elif (folder / name).exists():
            _link(folder / name, coming / name)
    for name in gone:
        if name == "splits.json":
            _link(folder / name, coming / name)
            (folder / name).unlink()
        else:
            (folder / name).replace(coming / name)
    if before.exists():
        before.replace(older)
    coming.replace(before)
    sync_directory(folder)
    shutil.rmtree(older, ignore_errors=True)


def _link(one: Path | str, to: Path | str) -> None:
    if Path(one).name == "splits.json":  # the way to the photos is another from there
        Splits.read(one).write(to)
        return
    try:
        os.link(one, to)
    except OSError:  # a disk without links
        shutil.copy2(one, to)


def _undo(folder: Path) -> None:
    """Put back what a killed ``set_aside`` had moved."""
    before, coming, older = (folder / name for name in _BACKUPS)
    if coming.is_dir():
        for one in coming.iterdir():
            if one.suffix != ".tmp" and not (folder / one.name).exists():
                one.replace(folder / one.name)
        shutil.rmtree(coming)
    if older.is_dir():
        shutil.rmtree(older) if before.exists() else older.replace(before)


def write_config(run: Path, config: Config, splits: Splits, legs: Sequence[int] = ()) -> None:
    """Write ``config.json`` with the versions of what computes."""
    RunConfig(config=config, split_hashes=splits.hashes, versions=versions(), legs=list(legs)).write(
        run / "config.json"
    )


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy", "pillow")}
    return {**found, "python": ".".join(map(str, sys.version_info[:3]))}


def use_adapted(run: Path, splits: Splits, config: Config) -> Config:
    """The configuration with the backbone that ``stage1 explora`` left in a run, checked against its record.

    The base's own weights are there when adaptation was not kept.

    Raises:
        InputError: the run has none.
        ArtifactError: it was adapted beside other splits, or its weights are not those of the record.
    """
    folder = run / EXPLORA
    if not (folder / "explora.json").is_file():
        raise InputError(
            f"--explora needs {folder}/explora.json, which is not there; run `stage1 explora --run {run}` first"
        )
    record = ExploraRecord.read(folder / "explora.json")
    if record.split_hashes != splits.hashes:
        raise ArtifactError(
            f"{folder} was adapted beside other splits than {run}/splits.json: its pool may hold images that are tests "
            "now; run `stage1 explora --overwrite` again"
        )
    weights = folder / "backbone" / "model.safetensors"
    if not weights.is_file() or sha256_file(weights) != record.weights_sha256:
        raise ArtifactError(f"{weights} must be as explora.json says, but it is missing or changed; adapt again")
    model = config.model.model_copy(
        update={"backbone": str(weights.parent), "image_size": config.model.image_size or record.preprocessing.height}
    )
    return config.model_copy(update={"model": model})


def resumed(given: Config, stored: Config, *, more_epochs: bool = False) -> Config:
    """The run's configuration with the free keys that were named anew.

    With ``more_epochs`` those of a training are free, too; whether it can have them, ``last.pth`` says.

    Raises:
        InputError: any other key was named with another value.
    """
    kept = stored.model_dump()
    if "seed" in given.model_fields_set and given.seed != stored.seed:
        raise changed("seed", given.seed, stored.seed)
    for name in sorted(given.model_fields_set - {"seed"}):
        section = getattr(given, name)
        for key in sorted(section.model_fields_set):
            value = getattr(section, key)
            if key in _FREE or (more_epochs and (name, key) == ("train", "epochs")):
                kept[name][key] = value
            elif (name, key, value) == ("model", "tap", "auto"):
                continue  # measured when the run began; the block found is stored
            elif value != getattr(getattr(stored, name), key):
                raise changed(f"{name}.{key}", value, kept[name][key])
    return Config.model_validate(kept)


def changed(key: str, value: object, kept: object) -> InputError:
    """The refusal of another value than the run's."""
    return InputError(
        f"--resume must keep the run's configuration, got {key} = {value} instead of {kept}; "
        "start anew with --overwrite"
    )


@contextlib.contextmanager
def settled(run: Path, images: str | None) -> Iterator[None]:
    """Have a run look for its photos at another place from now on, unless what is done then is refused.

    None: at the same place.

    Raises:
        InputError: no run, a photo of it that is not there, or one of several processes.
    """
    if images is None:
        yield
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--images must be said by one process, got several; say it first by stage1 infer --split")
    if not (run / "splits.json").is_file():
        raise InputError(f"--run must be a folder with splits.json, got {run}; run `stage1 split --out {run}` first")
    with exclusive(run):
        before = (run / "splits.json").read_bytes()
        Splits.read(run / "splits.json").verify().moved_to(images).write(run / "splits.json")
        after = (run / "splits.json").read_bytes()
    try:
        yield
    except Stage1Error:
        # A refusal changes nothing.
        if (run / "splits.json").read_bytes() == after:
            write_bytes(run / "splits.json", before)
        raise
    say(f"{run} looks for its photos in {images} from now on")


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, and sweep up what killed writers left behind.

    The lock goes with the process, also when it is killed.

    Raises:
        InputError: another process is at work in this folder.
    """
    busy = f"{run} must not be in use, but another process is at work in it (training or calibrating); wait for it"
    with locked(run / ".lock", wait=0, busy=busy):
        for name in OWN_FOLDERS:
            recover_directory(run / name)
            sweep(run / name)
        sweep(run)
        _undo(run)
        yield
