"""Both stages' outputs of a trained run on one split, in row order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stage1_pro.config import AugmentConfig
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import iterate
from stage1_pro.data.photos import ImageFile
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import TemporaryError, out_of_memory
from stage1_pro.models.model import Gate, Outputs, Stage1Model
from stage1_pro.training.checkpoint import load_joint_gate, load_run_model, save
from stage1_pro.words import SplitName

Arrays = dict[str, NDArray[np.float32]]
# (augmentation, seed, epoch): the images as that epoch of training draws them.
Draw = tuple[AugmentConfig, int, int]


def run_over(
    forward: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    photos: Sequence[ImageFile],
    spec: PreprocessSpec,
    *,
    device: torch.device,
    workers: int,
    description: str = "",
    draw: Draw | None = None,
) -> Arrays:
    """Apply ``forward`` to every image in order; each output is gathered to [N, ...] float32.

    It takes pixels [B, 3, H, W] on ``device`` and gives named outputs, rows first. A bar is shown under a description.
    With ``draw`` the images are as an epoch of training draws them, without as evaluation sees them.
    """
    parts: dict[str, list[NDArray[np.float32]]] = {}
    with torch.inference_mode():
        for pixels in iterate(photos, spec, workers=workers, description=description, draw=draw):
            for name, value in _outputs(forward, pixels, device).items():
                parts.setdefault(name, []).append(value)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _outputs(
    forward: Callable[[torch.Tensor], dict[str, torch.Tensor]], pixels: torch.Tensor, device: torch.device
) -> Arrays:
    """The outputs on a batch; half of it at a time where memory does not suffice for the whole."""
    try:
        return {name: value.float().cpu().numpy() for name, value in forward(pixels.to(device)).items()}
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(pixels) == 1:
            raise TemporaryError(
                "memory ran out at a single image; free some of it, or use a smaller model.image_size or backbone"
            ) from error
    # Out of the handler, so that what the failed pass held is free.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    halves = [_outputs(forward, half, device) for half in pixels.chunk(2)]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def named_logits(outputs: Outputs) -> dict[str, torch.Tensor]:
    """The part of the outputs that policies and metrics read."""
    return {"logits_a": outputs.logits_a, "logits_b": outputs.logits_b, "gate_logits": outputs.gate_logit}


def pick_device() -> torch.device:
    """The first GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def infer(
    model: Stage1Model, splits: Splits, split: SplitName, *, workers: int = 2, joint_gate: Gate | None = None
) -> Predictions:
    """Run a model over one split, on the first GPU where there is one; ``workers`` processes decode.

    A ``joint_gate`` is the gate as training left it, to be shown beside the refitted one.
    """
    device, spec, rows = pick_device(), model.architecture.preprocessing, splits.of(split)
    model = model.to(device).eval()
    joint = None if joint_gate is None else joint_gate.to(device).eval()

    def forward(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = model(pixels)
        found = named_logits(outputs)
        return found if joint is None else {**found, "joint_gate": joint(outputs.features_a, outputs.logits_a)}

    arrays = run_over(forward, splits.photos_of(rows), spec, device=device, workers=workers, description=split)
    return Predictions(
        row_ids=np.asarray([row.id for row in rows], dtype=np.str_),
        groups=np.asarray([row.group for row in rows], dtype=np.str_),
        sources=np.asarray([row.source for row in rows], dtype=np.str_),
        halves=np.asarray([row.half or "" for row in rows], dtype=np.str_),
        labels=splits.indices(rows),
        logits_a=arrays["logits_a"],
        logits_b=arrays["logits_b"],
        gate_logits=arrays["gate_logits"],
        classes=list(splits.classes),
        positive=splits.positive,
        split=split,
        split_hash=splits.hashes[split],
        model_fingerprint=model.fingerprint(),
        preprocessing_fingerprint=spec.fingerprint(),
        joint_gate_logits=arrays.get("joint_gate"),
    )


def infer_split(run: Path, split: SplitName) -> Predictions:
    """Run the best model of a run over one of its splits.

    Raises:
        ArtifactError: the run has no checkpoint, or one that does not belong to it.
    """
    run = Path(run)
    model, config = load_run_model(run)
    gate = load_joint_gate(run / "model_best.pth", model)
    splits = Splits.read(run / "splits.json")
    return infer(model, splits, split, workers=config.config.train.workers, joint_gate=gate)


def save_calibration(run: Path, predictions: Predictions) -> None:
    """Write ``val_calib.npz`` and the plain tensors other tools read."""
    predictions.save(run / "val_calib.npz")
    save(run / "val_calib_logits.pt", torch.tensor(predictions.logits_a))
    save(run / "val_calib_labels.pt", torch.tensor(predictions.labels))
    save(run / "val_calib_gate_logits.pt", torch.tensor(predictions.gate_logits))
