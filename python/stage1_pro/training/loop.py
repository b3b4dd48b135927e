"""Training: one ``train`` that builds every component itself, survives being killed, and resumes exactly."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage1_pro.config import Config
from stage1_pro.training.epochs import run_epoch
from stage1_pro.training.finish import finish
from stage1_pro.training.resume import State, restore, save_last
from stage1_pro.training.run import check_run, exclusive, forget_training, write_config
from stage1_pro.training.session import Session
from stage1_pro.training.step import learn, peak_memory
from stage1_pro.training.validate import end_epoch


@dataclass(frozen=True)
class TrainResult:
    """What a finished training gives: where it is and its best epoch's figures on ``val_select``.

    ``peak_memory`` is in bytes: what the GPU's allocator held at most, or without one the largest resident size of
    this process; processes that decode images are not in it.
    """

    run: Path
    epochs: int
    best_epoch: int
    best: dict[str, Any]
    seconds: float
    peak_memory: int
    device: str


def train(
    run: Path | str,
    config: Config | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    explora: bool = False,
) -> TrainResult:
    """Train the configured model on the splits in a run folder.

    Builds model, loaders, heads, optimizer and schedule itself. Reads ``train`` rows for learning and
    ``val_select`` rows for choosing; writes ``val_calib``'s outputs at the end; never touches ``val_test``.

    Args:
        run: folder with ``splits.json``.
        config: the configuration; with ``resume`` it defaults to the run's own.
        resume: go on from ``last.pth`` (or from the start when none was written yet).
        overwrite: forget an earlier training in this folder.
        explora: start from the backbone that ``stage1 explora`` left in the run; a resumed training keeps its own.

    Raises:
        InputError: no splits, an earlier training in the way, or a resumed configuration that differs.
        ArtifactError: a checkpoint that does not fit.
        TrainingError: out of memory at the smallest batch, or a loss that is not finite.
    """
    run = Path(run)
    splits, config = check_run(run, config, resume=resume, overwrite=overwrite, explora=explora)
    with exclusive(run) if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext():
        session = Session(run, splits, config)
        if session.main:
            _take_over(session, resuming=resume)
        session.accelerator.wait_for_everyone()
        options = session.config.train
        if resume and (run / "last.pth").is_file():
            state = restore(session)
        else:
            state = State(micro_batch=options.micro_batch or options.batch_size // session.world)
        began = time.monotonic()
        try:
            if session.main:
                session.trackers.open()
            while not state.finished:
                _epoch(session, state)
        finally:
            session.source.close()
            session.trackers.close()
        if session.main:
            finish(session, state)
        session.accelerator.wait_for_everyone()
        return TrainResult(
            run=run, epochs=len(state.history), best_epoch=state.best_epoch, best=state.history[state.best_epoch],
            seconds=time.monotonic() - began, peak_memory=peak_memory(session.device), device=session.device.type,
        )  # fmt: skip


def _take_over(session: Session, *, resuming: bool) -> None:
    """Take over the folder, once everything is built: an earlier training is given up no sooner."""
    run = session.run
    if not resuming:
        forget_training(run)
    if session.tap_choice is not None:
        session.tap_choice.write(run / "tap.json")
    write_config(run, session.config, session.splits)
    if not (run / "start.json").is_file():
        session.describe_start().write(run / "start.json")


def _epoch(session: Session, state: State) -> None:
    session.log(f"epoch {state.epoch} train from step {state.step_in_epoch}")
    session.trained.train()
    if session.config.train.mode == "linear":
        session.model.backbone.eval()
    timings = run_epoch(
        session.source.epoch(state.epoch, state.step_in_epoch),
        lambda batch: learn(session, state, batch),
        lambda: save_last(session, state),
        state, steps=session.source.steps_per_epoch, save_every=session.config.train.save_every_steps,
        processes=session.world, shown=session.main,
    )  # fmt: skip
    end_epoch(session, state, timings)
