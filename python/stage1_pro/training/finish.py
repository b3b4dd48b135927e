"""After the last epoch: the gate refitted, what ranks answers chosen, and the outputs that calibration reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage1_pro.data.predictions import Predictions
from stage1_pro.models.adapters import replace_trained
from stage1_pro.models.model import Stage1Model, fingerprint
from stage1_pro.policies.ranking import DIFFERENCE, GATE, SOFTMAX, GateChoice, rank_answers
from stage1_pro.training import checkpoint
from stage1_pro.training.gate_head import fit_gate
from stage1_pro.training.inference import infer, save_calibration
from stage1_pro.training.resume import State
from stage1_pro.training.session import Session
from stage1_pro.training.validate import COLUMNS


def finish(session: Session, state: State) -> None:
    """Write ``gate.json``, ``val_select.npz`` and ``val_calib.npz`` from the best checkpoint as it stands on disk."""
    run, workers = session.run, session.config.train.workers
    state.write(run / "metrics.csv", COLUMNS)
    if session.config.gate.fit == "out_of_fold":
        refit_gate(session)
    model, _ = checkpoint.load_run_model(run)
    joint = checkpoint.load_joint_gate(run / "model_best.pth", model)
    session.log("gate.json begin")
    selected = infer(model, session.splits, "val_select", workers=workers, joint_gate=joint)
    _choose_confidence(session, selected)
    selected.save(run / "val_select.npz")
    session.log("val_calib begin")
    save_calibration(run, infer(model, session.splits, "val_calib", workers=workers))
    session.log("finished")
    best = state.history[state.best_epoch]
    session.say(
        f"best epoch {state.best_epoch + 1}: AUGRC {best['augrc']:.5f}, accuracy {best['accuracy']:.4f}; "
        f"wrote {run}/model_best.pth, metrics.csv, val_calib.npz"
    )


def refit_gate(session: Session) -> None:
    """Refit the gate in ``model_best.pth`` on train rows. Idempotent."""
    path = session.run / "model_best.pth"
    content = checkpoint.load(path)
    if "joint_gate_state_dict" in content:
        return
    session.log("gate refit begin")
    model = checkpoint.load_model(path, session.architecture).to(session.device)
    with torch.inference_mode():
        views = _views(session, model)
        inputs = [torch.from_numpy(x).to(session.device) for x in views]
        logits = [model.heads.classifier(x).float().cpu().numpy() for x in inputs]
    fit = fit_gate(
        views, logits, session.labels["train"], [row.group for row in session.rows["train"]],
        session.class_weights.cpu().numpy(), folds=session.config.gate.folds, seed=session.config.seed,
    )  # fmt: skip
    state = content["model_state_dict"]
    joint = {k: state[f"heads.gate.{k}"] for k in model.heads.gate.state_dict()}
    fitted = {
        "heads.gate.linear.weight": torch.from_numpy(fit.weight.astype(np.float32)[None]),
        "heads.gate.linear.bias": torch.tensor([fit.bias], dtype=torch.float32),
    }
    whole = {**state, **fitted}
    facts = {k: getattr(fit, k) for k in ("form", "reason", "strength", "n_rows", "n_groups", "n_errors")}
    content |= {
        "model_state_dict": whole,
        "joint_gate_state_dict": joint,
        "gate_fit": {**facts, "folds": session.config.gate.folds, "views": len(views)},
    }
    if session.adaptation is not None:
        # First: while model_best.pth is as it was, all of this is done again, to the same bytes.
        replace_trained(session.run / "adapter", fitted, fingerprint(session.architecture, whole))
    checkpoint.save(path, content)
    session.log(f"gate refitted: {fit.form}, {fit.n_errors} errors of {fit.n_rows}{fit.reason and '; ' + fit.reason}")
    if fit.reason:
        session.say(f"the gate reads the margin alone: {fit.reason}")


def _views(session: Session, model: Stage1Model) -> list[np.ndarray[Any, Any]]:
    """Features of the train rows at the tap [N, F], once per view; clean rows where the backbone is frozen."""
    if session.config.train.mode == "linear":
        return [session.features["train"]["features_a"]]
    augment, options = session.config.augment, session.config.gate
    draws = options.views if augment.enabled else 0
    # Epochs that training cannot have drawn.
    first = session.config.train.epochs
    epochs: list[int | None] = [*range(first, first + draws)] or [None]

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": model.features(pixels)[0]}

    return [
        session.over(
            forward,
            session.photos("train"),
            "train rows for the gate",
            draw=None if epoch is None else (augment, session.config.seed, epoch),
        )["features"]
        for epoch in epochs
    ]


def _choose_confidence(session: Session, predictions: Predictions) -> None:
    """Write ``gate.json``: what ranks answers better on ``val_select``."""
    found = rank_answers(predictions, seed=session.config.seed)
    facts = checkpoint.load(session.run / "model_best.pth").get("gate_fit", {"form": "joint"})
    options = session.config.gate
    record = GateChoice.of(found, predictions, options.confidence, **{"fit": options.fit, **facts})
    record.write(session.run / "gate.json")
    gate, sure, difference = found[GATE], found[SOFTMAX], found[DIFFERENCE]
    session.say(
        f"AUGRC on val_select: gate {gate.value:.5f}, max softmax {sure.value:.5f}, difference "
        f"{difference.value:+.5f} [{difference.low:+.5f}, {difference.high:+.5f}]; confidence: {record.confidence}"
    )
