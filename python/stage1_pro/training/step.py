"""One optimizer step on one effective batch, in as many micro-batches as memory needs."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from stage1_pro.data.loader import Batch
from stage1_pro.errors import TrainingError
from stage1_pro.models.model import Outputs
from stage1_pro.training.losses import Part
from stage1_pro.training.resume import State
from stage1_pro.training.session import Session

SMALLEST_MICRO_BATCH = 16


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
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            _shrink(session, state, error)
            torch.set_rng_state(before)
            session.optimizer.zero_grad(set_to_none=True)
    for parameters in session.clipped:
        session.accelerator.clip_grad_norm_(parameters, session.config.train.grad_clip)
    session.optimizer.step()
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
