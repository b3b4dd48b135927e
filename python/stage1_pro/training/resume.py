"""``last.pth``: all that a training needs to go on where it stopped, and the return to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from stage1_pro.config import Config
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.models.model import Architecture, check_architecture, check_tensors
from stage1_pro.training import checkpoint
from stage1_pro.training.epochs import TrainingPosition
from stage1_pro.training.run import RunConfig, changed, withdraw, write_config
from stage1_pro.training.session import Session

LAST_KEYS = (
    "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step", "sampler_state",
    "best_acc", "best_augrc", "patience_counter", "ema_state_dict", "rng_state", "world", "split_hashes", "progress",
)  # fmt: skip


@dataclass
class State(TrainingPosition):
    """All that changes while training and is not inside a torch object."""

    correct: int = 0
    best_augrc: float = math.inf
    best_nll: float = math.inf
    best_acc: float = -1.0
    best_epoch: int = -1
    patience_counter: int = 0
    micro_batch: int = 0
    finished: bool = False

    def begin_next(self) -> None:
        """Go to the start of the next epoch."""
        super().begin_next()
        self.correct = 0


def save_last(session: Session, state: State) -> None:
    """Write ``last.pth``: always at an optimizer step, so no half-accumulated gradient exists."""
    session.accelerator.wait_for_everyone()
    rng_states = gather_object([torch.get_rng_state()])
    sums = gather_object([[state.loss_sum, state.correct, state.seen]])
    if not session.main:
        return
    base = {} if session.base_fingerprint is None else {"base_fingerprint": session.base_fingerprint}
    session.log("checkpoint last.pth writing")
    checkpoint.save(
        session.run / "last.pth",
        {
            "architecture": session.architecture.model_dump_json(),
            **base,
            "model_state_dict": _learned(session, session.trained.state_dict()),
            "optimizer_state_dict": session.optimizer.state_dict(),
            "scheduler_state_dict": session.scheduler.state_dict(),
            "epoch": state.epoch,
            "global_step": state.global_step,
            "sampler_state": {
                "epoch": state.epoch,
                "step_in_epoch": state.step_in_epoch,
                "seed": session.config.seed,
                "accumulated_micro_batches": 0,
                "sums": sums,
            },
            "best_acc": state.best_acc,
            "best_augrc": state.best_augrc,
            "patience_counter": state.patience_counter,
            "ema_state_dict": _averaged(session) if session.ema is not None else None,
            "rng_state": rng_states,
            "world": session.world,
            "split_hashes": session.splits.hashes,
            "progress": {
                "best_nll": state.best_nll,
                "best_epoch": state.best_epoch,
                "finished": state.finished,
                "micro_batch": state.micro_batch,
                "history": state.without_timings(),
            },
        },
    )
    session.log("checkpoint last.pth replaced")


def restore(session: Session) -> State:
    """Put a session back where ``last.pth`` stands.

    Raises:
        ArtifactError: a checkpoint of other splits, another base or architecture, or one that misses something.
        InputError: another number of processes.
    """
    path = session.run / "last.pth"
    content = checkpoint.load(path)
    missing = [key for key in LAST_KEYS if key not in content]
    if missing:
        raise ArtifactError(f"{path} must be a checkpoint of this version, missing keys: {', '.join(missing)}")
    if content["split_hashes"] != session.splits.hashes:
        raise ArtifactError(f"{path} was trained on other splits than {session.run}/splits.json; use --overwrite")
    check_architecture(path, Architecture.parse(str(content["architecture"]), str(path)), session.architecture)
    if content.get("base_fingerprint") != session.base_fingerprint:
        raise ArtifactError(
            f"{path} must be resumed on the base it was trained on, got other weights in "
            f"'{session.config.model.backbone}'; put those back or start anew with --overwrite"
        )
    check_tensors(path, _learned(session, session.trained.state_dict()), content["model_state_dict"])
    if content["world"] != session.world:
        raise InputError(
            f"--resume must use the {content['world']} process(es) the run was started with, got {session.world}"
        )
    session.trained.load_state_dict({**session.trained.state_dict(), **content["model_state_dict"]})
    try:
        session.optimizer.load_state_dict(content["optimizer_state_dict"])
        session.scheduler.load_state_dict(content["scheduler_state_dict"])
        if session.ema is not None:
            check_tensors(path, _averaged(session), content["ema_state_dict"])
            session.ema.load_state_dict({**session.ema.state_dict(), **content["ema_state_dict"]})
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{path} must hold this run's optimizer, schedule and average, got: {error}") from None
    torch.set_rng_state(content["rng_state"][session.rank])
    sampler = content["sampler_state"]
    loss_sum, correct, seen = sampler["sums"][session.rank]
    state = State(
        epoch=content["epoch"], step_in_epoch=sampler["step_in_epoch"], global_step=content["global_step"],
        loss_sum=loss_sum, correct=correct, seen=seen, best_acc=content["best_acc"],
        best_augrc=content["best_augrc"], patience_counter=content["patience_counter"], **content["progress"],
    )  # fmt: skip
    state.restore_timings(session.run / "metrics.csv")
    session.say(f"resumed at epoch {state.epoch}, step {state.step_in_epoch}")
    session.log(f"resumed at epoch {state.epoch} step {state.step_in_epoch}")
    return state


def legs_of(run: Path, config: Config) -> tuple[list[int], bool]:
    """The epochs at which a run's training went on after its end, and whether ``config`` adds the last one now.

    Raises:
        InputError: other epochs than the run's, where its training is not finished or has done as many.
    """
    stored = RunConfig.read(run / "config.json")
    asked, planned = config.train.epochs, stored.config.train.epochs
    if asked == planned:
        return stored.legs, False
    content = checkpoint.load(run / "last.pth") if (run / "last.pth").is_file() else {}
    done = content.get("epoch", 0)
    if not content.get("progress", {}).get("finished") or done in stored.legs[-1:]:
        raise InputError(f"{changed('train.epochs', asked, planned)}; more epochs are for a training that is finished")
    if asked <= done:
        raise InputError(
            f"--resume must add epochs to the {done} that are done, got train.epochs = {asked}; name more, or start "
            "anew with --overwrite"
        )
    return [*stored.legs, done], True


def begin_leg(session: Session, state: State) -> None:
    """Let a training that had ended go on, where its run says that it does and it has not begun to."""
    if not (state.finished and session.legs and session.legs[-1] == state.epoch):
        return
    state.finished, state.patience_counter = False, 0
    for group, base in zip(session.optimizer.param_groups, session.scheduler.base_lrs, strict=True):
        group["lr"] = base * session.scheduler.lr_lambdas[0](state.global_step)
    session.scheduler._last_lr = [group["lr"] for group in session.optimizer.param_groups]
    if session.main:
        write_config(session.run, session.config, session.splits, session.legs)
        withdraw(session.run)
    session.say(
        f"going on after {state.epoch} epochs up to {session.config.train.epochs}, with a new warm-up and schedule: "
        "not the same as so many epochs from the beginning"
    )


def _learned(session: Session, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of the trained module's weights ``last.pth`` holds: with an adapter, not the base, which is at hand."""
    return state if session.adaptation is None else session.adaptation.learned(state)


def _averaged(session: Session) -> dict[str, Tensor]:
    """The same of the moving average."""
    assert session.ema is not None
    own = {f"module.{key}": value for key, value in _learned(session, session.ema.module.state_dict()).items()}
    return {"n_averaged": session.ema.n_averaged, **own}
