"""After every epoch: figures on ``val_select``, the best checkpoints, and when to stop.

After the last: the gate refitted, what ranks answers chosen, and the outputs that calibration reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage1_pro.classes import index_of
from stage1_pro.data.predictions import Predictions
from stage1_pro.errors import TrainingError
from stage1_pro.files import write_bytes
from stage1_pro.metrics.by_class import macro_auroc
from stage1_pro.metrics.figures import BAND_METRICS, risk_band, risk_coverage_png
from stage1_pro.metrics.intervals import Intervals, bootstrap, metric_names
from stage1_pro.metrics.probabilistic import accuracy, auroc, balanced_accuracy
from stage1_pro.metrics.selective import augrc
from stage1_pro.models.adapters import merged_state, replace_trained, save_adapter
from stage1_pro.models.model import Stage1Model, fingerprint
from stage1_pro.policies.ranking import DIFFERENCE, GATE, SOFTMAX, GateChoice, rank_answers
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.training import checkpoint
from stage1_pro.training.gate_head import fit_gate
from stage1_pro.training.inference import Arrays, Draw, infer, named_logits, save_calibration
from stage1_pro.training.resume import State, save_last
from stage1_pro.training.session import Session

# Stage A's suite on val_select, each with the ends of its interval.
SUITE = metric_names(exits=False)
N_REPLICATES = 500
COLUMNS = [
    "epoch", "step", "lr", "train_loss", "train_accuracy", "balanced_accuracy", "auroc",
    *(f"{name}{end}" for name in SUITE for end in ("", "_low", "_high")),
    "accuracy_b", "augrc_b", "gate_augrc", "best", "seconds", "images_per_second",
]  # fmt: skip


def auroc_name(positive: str | None) -> str:
    """What the column ``auroc`` of ``metrics.csv`` is: of the positive class, or the mean over all classes."""
    return "macro AUROC" if positive is None else "AUROC"


def end_epoch(session: Session, state: State, timings: dict[str, float]) -> None:
    """Measure the epoch that was trained, keep what is best so far, and write ``metrics.csv`` and ``last.pth``.

    ``state`` is moved on to the next epoch, or marked as finished.

    Raises:
        TrainingError: logits that are not finite.
    """
    options, epoch = session.config.train, state.epoch
    session.log(f"epoch {epoch} validate begin")
    arrays = _predict(session)
    figures, intervals = _figures(session, arrays)
    session.log(f"epoch {epoch} validate end")
    better = (figures["augrc"], figures["nll"]) < (state.best_augrc, state.best_nll)
    better_acc = figures["accuracy"] > state.best_acc
    row = {**_train_figures(session, state), **figures, "best": int(better), **timings}
    state.history.append(row)
    state.patience_counter = 0 if better else state.patience_counter + 1
    if better:
        state.best_augrc, state.best_nll, state.best_epoch = figures["augrc"], figures["nll"], epoch
    state.best_acc = max(state.best_acc, figures["accuracy"])
    state.begin_next()
    stopped = state.patience_counter >= options.patience
    state.finished = state.epoch == options.epochs or stopped
    # Order matters when killed: best files first, last.pth last. Whatever is lost is made again, the same.
    for name, wanted in (("model_best.pth", better), ("model_best_acc.pth", better_acc)):
        if wanted and session.main:
            _save_best(session, name, epoch, figures)
    if session.main:
        _draw(session, arrays, intervals, f"epoch {epoch + 1}{' (best so far)' if better else ''}")
        state.write(session.run / "metrics.csv", COLUMNS)
    save_last(session, state)
    session.trackers.log(row, state.global_step)
    session.say(
        f"epoch {epoch + 1}/{options.epochs}: loss {row['train_loss']:.4f}, val_select accuracy "
        f"{figures['accuracy']:.4f}, {auroc_name(session.splits.positive)} {figures['auroc']:.4f}, AUGRC "
        f"{figures['augrc']:.5f} "
        f"[{figures['augrc_low']:.5f}, {figures['augrc_high']:.5f}], {timings['images_per_second']:.0f} images/s"
        f"{' *' if better else ''}{'; stopped early' if stopped else ''}"
    )


def _train_figures(session: Session, state: State) -> dict[str, Any]:
    sums = torch.tensor([state.loss_sum, state.correct, state.seen], dtype=torch.float64, device=session.device)
    loss, correct, seen = session.accelerator.reduce(sums, "sum").tolist()
    return {
        "epoch": state.epoch,
        "step": state.global_step,
        "lr": session.scheduler.get_last_lr()[0],
        "train_loss": loss / seen,
        "train_accuracy": correct / seen,
    }


def _predict(session: Session) -> Arrays:
    """Both stages' logits on ``val_select``, every process a share of the rows."""
    module = session.evaluated.eval()
    mine = slice(session.rank, None, session.world)

    def forward(*inputs: Tensor) -> dict[str, Tensor]:
        return named_logits(module(*inputs))

    if session.config.train.mode == "linear":
        features = session.features["val_select"]
        inputs = [torch.from_numpy(features[name][mine]).to(session.device) for name in ("features_a", "features_b")]
        with torch.inference_mode(), session.accelerator.autocast():
            own = {k: v.float().cpu().numpy() for k, v in forward(*inputs).items()}
    else:
        own = session.over(forward, session.photos("val_select")[mine])
    return session.join(own, len(session.rows["val_select"]))


def _figures(session: Session, arrays: Arrays) -> tuple[dict[str, float], Intervals]:
    """Both stages' figures on ``val_select``, and Stage A's suite with its intervals by group."""
    labels = session.labels["val_select"]
    probs_a, probs_b = softmax(arrays["logits_a"]), softmax(arrays["logits_b"])
    if not np.isfinite(probs_a).all() or not np.isfinite(probs_b).all():
        raise TrainingError("logits on val_select must be finite, got NaN; lower train.lr (last.pth is as it was)")
    given_a, given_b = probs_a.argmax(1), probs_b.argmax(1)
    positive = index_of(session.splits.classes, session.splits.positive)
    intervals = bootstrap(
        probs_a, labels, confidence=confidence(probs_a),
        groups=np.asarray([row.group for row in session.rows["val_select"]]),
        metrics=[*SUITE, *BAND_METRICS], n_replicates=N_REPLICATES, seed=session.config.seed, positive=positive,
    )  # fmt: skip
    figures = {
        "balanced_accuracy": balanced_accuracy(given_a, labels),
        "auroc": macro_auroc(probs_a, labels) if positive is None else auroc(probs_a[:, positive], labels == positive),
        "accuracy_b": accuracy(given_b, labels),
        "augrc_b": augrc(confidence(probs_b), given_b != labels),
        "gate_augrc": augrc(arrays["gate_logits"], given_a != labels),
    }
    for name in SUITE:
        one = intervals[name]
        figures |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return figures, intervals


def _draw(session: Session, arrays: Arrays, intervals: Intervals, when: str) -> None:
    """Refresh the run's own risk-coverage curve: Stage A on ``val_select``."""
    probs = softmax(arrays["logits_a"])
    png = risk_coverage_png(
        confidence(probs), probs.argmax(1) != session.labels["val_select"], band=risk_band(intervals),
        title=f"Stage A on val_select, {when}",
    )  # fmt: skip
    write_bytes(session.run / "metrics" / "risk_coverage_curve.png", png)


def _save_best(session: Session, name: str, epoch: int, figures: dict[str, float]) -> None:
    module = session.evaluated
    weights = own = module.state_dict()
    if session.config.train.mode == "linear":
        weights = {**session.model.state_dict(), **{f"heads.{k}": v for k, v in own.items()}}
    elif session.adaptation is not None:
        weights = merged_state(module)
    session.log(f"checkpoint {name} writing")
    checkpoint.save_model(
        session.run / name, session.model, weights, split_hashes=session.splits.hashes, epoch=epoch, figures=figures
    )
    session.log(f"checkpoint {name} replaced")
    if session.adaptation is not None and name == "model_best.pth":
        session.log("adapter writing")
        save_adapter(
            session.run / "adapter", session.adaptation, session.architecture, own, epoch=epoch,
            split_hashes=session.splits.hashes, model_fingerprint=fingerprint(session.architecture, weights),
        )  # fmt: skip
        session.log("adapter replaced")


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
    config = session.config
    # Epochs that training cannot have drawn.
    epochs = range(config.train.epochs, config.train.epochs + config.gate.views) if config.augment.enabled else ()
    draws: list[Draw | None] = [*((config.augment, config.seed, epoch) for epoch in epochs)] or [None]

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": model.features(pixels)[0]}

    photos = session.photos("train")
    return [session.over(forward, photos, "train rows for the gate", draw=draw)["features"] for draw in draws]


def _choose_confidence(session: Session, predictions: Predictions) -> None:
    """Write ``gate.json``: what ranks answers better on ``val_select``."""
    found = rank_answers(predictions, seed=session.config.seed)
    options = session.config.gate
    facts = checkpoint.load(session.run / "model_best.pth").get("gate_fit", {"form": "joint"})
    record = GateChoice.of(found, predictions, options.confidence, **{"fit": options.fit, **facts})
    record.write(session.run / "gate.json")
    gate, sure, difference = found[GATE], found[SOFTMAX], found[DIFFERENCE]
    session.say(
        f"AUGRC on val_select: gate {gate.value:.5f}, max softmax {sure.value:.5f}, difference "
        f"{difference.value:+.5f} [{difference.low:+.5f}, {difference.high:+.5f}]; confidence: {record.confidence}"
    )
