"""Training: one ``train`` that builds every component itself, survives being killed, and resumes exactly.

An optimizer step is taken on one effective batch, in as many micro-batches as memory needs.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_pro.config import Config
from stage1_pro.data.loader import Batch
from stage1_pro.errors import TrainingError, out_of_memory
from stage1_pro.models.model import Outputs
from stage1_pro.policies.standing import few_groups
from stage1_pro.stopping import Stop, between_steps
from stage1_pro.training.environment import check_environment
from stage1_pro.training.epochs import run_epoch
from stage1_pro.training.losses import Part
from stage1_pro.training.resume import State, begin_leg, legs_of, restore, save_last
from stage1_pro.training.run import check_run, exclusive, forget_training, write_config
from stage1_pro.training.session import Session
from stage1_pro.training.validate import end_epoch, finish

SMALLEST_MICRO_BATCH = 16


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
        resume: go on from ``last.pth`` (or from the start when none was written yet). A finished training goes on
            where the configuration has more epochs than are done: weights, optimizer and average from where they
            ended, with a warm-up and a schedule of their own for the added epochs, which is not the same as as many
            epochs from the beginning.
        overwrite: set an earlier training in this folder aside, in ``RUN/.before``.
        explora: start from the backbone that ``stage1 explora`` left in the run; a resumed training keeps its own.

    Raises:
        InputError: an environment that would change the training, no splits, an earlier training in the way, or a
            resumed configuration that differs.
        ArtifactError: a checkpoint that does not fit.
        TrainingError: out of memory at the smallest batch, or a loss that is not finite.
    """
    run = Path(run)
    check_environment()
    how = {"resume": resume, "overwrite": overwrite, "explora": explora}
    check_run(run, config, **how)
    with exclusive(run) if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext():
        # Again: what a killed `--overwrite` had moved is back.
        splits, config = check_run(run, config, **how)
        legs, added = legs_of(run, config) if resume else ((), False)
        session = Session(run, splits, config, legs)
        if session.main and not added:
            _take_over(session, resuming=resume)
        if warning := few_groups(splits):
            session.say(warning)
        session.accelerator.wait_for_everyone()
        options = session.config.train
        if resume and (run / "last.pth").is_file():
            state = restore(session)
            begin_leg(session, state)
        else:
            state = State(micro_batch=options.micro_batch or options.batch_size // session.world)
        began = time.monotonic()
        try:
            if session.main:
                session.trackers.open()
            # One process of several cannot know at which step the others stop.
            with between_steps(wait=session.world == 1) as stop:
                while not state.finished:
                    _epoch(session, state, stop)
                    if stop:
                        stop.now()
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
    write_config(run, session.config, session.splits, session.legs)
    if not (run / "start.json").is_file():
        session.describe_start().write(run / "start.json")


def _epoch(session: Session, state: State, stop: Stop) -> None:
    session.log(f"epoch {state.epoch} train from step {state.step_in_epoch}")
    session.trained.train()
    if session.config.train.mode == "linear":
        session.model.backbone.eval()
    timings = run_epoch(
        session.source.epoch(state.epoch, state.step_in_epoch),
        lambda batch: learn(session, state, batch),
        lambda: save_last(session, state),
        state, steps=session.source.steps_per_epoch, save_every=session.config.train.save_every_steps, stop=stop,
        processes=session.world, shown=session.main,
    )  # fmt: skip
    end_epoch(session, state, timings)


def learn(session: Session, state: State, batch: Batch) -> None:
    """Take one step on a batch, with smaller micro-batches where memory does not suffice.

    Raises:
        TrainingError: a loss that is not finite, or out of memory at the smallest micro-batch.
    """
    before = torch.get_rng_state()
    while True:
        try:
            loss, correct = _accumulate(session, state, batch)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            _shrink(session, state, error)
            torch.set_rng_state(before)
            session.optimizer.zero_grad(set_to_none=True)
    try:
        for parameters in session.clipped:
            session.accelerator.clip_grad_norm_(parameters, session.config.train.grad_clip)
        session.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory in the optimizer's step, which keeps two more values for every weight that is trained; use "
            "train.mode=lora or linear, or a smaller backbone (last.pth is as it was)"
        ) from error
    session.scheduler.step()
    session.optimizer.zero_grad(set_to_none=True)
    if session.ema is not None:
        session.ema.update_parameters(session.trained)
    state.correct += correct
    state.stepped(loss, len(batch.labels))


def _accumulate(session: Session, state: State, batch: Batch) -> tuple[float, int]:
    """Gradients of one effective batch; gives this process's summed loss and right answers."""
    objective, rows, total, correct = session.objective, len(batch.labels), 0.0, 0
    labels = batch.labels.to(session.device)
    # A ratio over the whole batch needs its sums before the first step back: with several micro-batches, one forward
    # pass more.
    whole = _whole_sums(session, state, batch, labels) if objective.ratios and state.micro_batch < rows else None
    for part in _parts(state, rows):
        with contextlib.nullcontext() if part.stop >= rows else session.accelerator.no_sync(session.net):
            seen = _forward(session, state, session.net, batch, labels, part)
            added = objective.added(seen)
            value = float(added.detach())
            # DDP averages over processes: a sum over rows divided by this process's rows is the mean over all.
            loss = added / rows
            if objective.ratios:
                own = objective.sums(seen)
                value += 0.0 * sum(float(sums.detach().sum()) for sums in own)  # NaN is this part's, not another's
                _check_finite(session, state, value, batch.files[part])
                if whole is None:
                    whole = [session.accelerator.reduce(sums.detach(), "sum") for sums in own]
                shared = objective.shared(own, whole)
                value += float(shared.detach()) * len(seen.labels)
                loss = loss + session.world * shared
            _check_finite(session, state, value, batch.files[part])
            session.accelerator.backward(loss)
        total += value
        correct += int((seen.outputs.logits_a.argmax(1) == seen.labels).sum())
    return total, correct


def _parts(state: State, rows: int) -> Iterator[slice]:
    for start in range(0, rows, state.micro_batch):
        yield slice(start, start + state.micro_batch)


def _forward(session: Session, state: State, net: nn.Module, batch: Batch, labels: Tensor, part: slice) -> Part:
    """The outputs on a part of a batch, as losses see them."""
    with session.accelerator.autocast():
        outputs: Outputs = net(*(x[part].to(session.device) for x in batch.inputs))
    return Part(outputs, labels[part], session.class_weights, state.global_step / session.total_steps)


def _whole_sums(session: Session, state: State, batch: Batch, labels: Tensor) -> list[Tensor]:
    """Sums of the whole effective batch over micro-batches and processes, with the draws of the real pass."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        found = [
            session.objective.sums(_forward(session, state, session.trained, batch, labels, part))
            for part in _parts(state, len(labels))
        ]
    return [session.accelerator.reduce(torch.stack(sums).sum(0), "sum") for sums in zip(*found, strict=True)]


def _check_finite(session: Session, state: State, value: float, files: list[str]) -> None:
    if not math.isfinite(value):
        names = ", ".join(files)
        session.log(f"loss {value} at step {state.global_step}: {names}")
        raise TrainingError(
            f"loss must be finite, got {value} at epoch {state.epoch}, step {state.global_step}; "
            f"the batch was: {names}; lower train.lr or look at these images (last.pth is as it was)"
        )


def _shrink(session: Session, state: State, error: Exception) -> None:
    size = state.micro_batch
    if session.world > 1:
        raise TrainingError(
            f"out of memory at {size} rows a process; set train.micro_batch to {max(SMALLEST_MICRO_BATCH, size // 2)}"
        ) from error
    if size <= SMALLEST_MICRO_BATCH:
        raise TrainingError(
            f"out of memory at {size} rows, the smallest micro-batch; use a smaller model.image_size or backbone"
        ) from error
    state.micro_batch = max(SMALLEST_MICRO_BATCH, size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    session.log(f"out of memory at {size} rows; micro-batch {state.micro_batch}")
    session.say(
        f"out of memory at {size} rows; going on with micro-batches of {state.micro_batch}, same effective batch"
    )


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU's allocator, or this process's resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss of a started process begins at the size of the one that started it; VmHWM is this program's own.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10
