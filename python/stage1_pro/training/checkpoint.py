"""Checkpoints: atomic, byte-reproducible, loaded without running code, checked before use."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError
from stage1_pro.files import write_bytes
from stage1_pro.models.model import Architecture, Gate, Stage1Model, check_architecture, check_tensors, rebuild_model
from stage1_pro.training.run import RunConfig


def canonical(value: Any) -> Any:
    """Rebuild a nested structure so that equal content pickles to equal bytes.

    Pickle writes a string or tensor once and refers back to it by identity; a resumed process shares
    other objects than an undisturbed one, so identity is made to follow equality here.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone().contiguous()
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {canonical(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def save(path: Path, content: Mapping[str, Any] | Tensor) -> None:
    """Write a checkpoint, or a tensor, atomically; equal content gives equal bytes."""
    buffer = io.BytesIO()
    torch.save(canonical(content), buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package on the CPU; nothing in it can run code.

    Raises:
        ArtifactError: no file, not a checkpoint, or one of another program.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} must exist, but there is no such file; run `stage1 train` first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on damaged zips and refused pickles
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"{path} must be a checkpoint that loads with weights_only, got: {first}") from None
    if not isinstance(content, dict) or "model_state_dict" not in content or "architecture" not in content:
        found = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(
            f"{path} must be a stage1_pro checkpoint (keys architecture, model_state_dict), got {found}"
        )
    return content


def save_model(path: Path, model: Stage1Model, state: Mapping[str, Tensor], **facts: Any) -> None:
    """Write ``model_best.pth`` or its like: the architecture as JSON text, the weights, some plain facts."""
    save(path, {"architecture": model.architecture.model_dump_json(), "model_state_dict": state, **facts})


def load_model(path: Path, wanted: Architecture | None = None) -> Stage1Model:
    """Rebuild a model from a checkpoint, in evaluation mode."""
    content = load(path)
    architecture = Architecture.parse(str(content["architecture"]), f"{path} (architecture)")
    if wanted is not None:
        check_architecture(path, architecture, wanted)
    model = rebuild_model(architecture)
    check_tensors(path, model.state_dict(), content["model_state_dict"])
    model.load_state_dict(content["model_state_dict"])
    return model.eval()


def load_joint_gate(path: Path, model: Stage1Model) -> Gate | None:
    """The gate as joint training left it, where a checkpoint's own has been refitted since; else None."""
    state = load(path).get("joint_gate_state_dict")
    if state is None:
        return None
    gate = Gate(model.heads.gate.linear.in_features - 1)
    check_tensors(path, gate.state_dict(), state)
    gate.load_state_dict(state)
    return gate.eval()


def load_run_model(run: Path) -> tuple[Stage1Model, RunConfig]:
    """The best model of a run and its configuration, checked against ``config.json`` and ``splits.json``.

    Raises:
        ArtifactError: a checkpoint of another run, architecture or set of classes.
    """
    run = Path(run)
    for name, station in (("splits.json", f"split --out {run}"), ("model_best.pth", f"train --run {run}")):
        if not (run / name).is_file():
            raise ArtifactError(f"{run} must hold {name}, but it does not; run `stage1 {station}` first")
    run_config = RunConfig.read(run / "config.json")
    splits = Splits.read(run / "splits.json").verify()
    path = run / "model_best.pth"
    content = load(path)
    if content.get("split_hashes") != splits.hashes:
        raise ArtifactError(f"{path} was trained on other splits than {run}/splits.json; train again on the new ones")
    model = load_model(path)
    architecture, wanted = model.architecture, run_config.config.model
    if splits.hashes != run_config.split_hashes:
        raise ArtifactError(f"{run}/splits.json has changed since training; train again on the new splits")
    asked = {"classes": splits.classes, "positive": splits.positive}
    asked |= {f"model.{key}": getattr(wanted, key) for key in ("image_size", "tap", "auxiliary_hidden")}
    found = {key: getattr(architecture, key.removeprefix("model.")) for key in asked}
    differences = [f"{key}: {found[key]} instead of {asked[key]}" for key in asked if found[key] != asked[key]]
    if differences:
        raise ArtifactError(f"{path} must be of this run's architecture; it differs in " + "; ".join(differences))
    return model, run_config
