"""What every training has in common: seed, precision, rate, weight decay, one pass over an epoch, table of epochs."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from stage1_pro.files import write_csv
from stage1_pro.progress import console, on_terminal
from stage1_pro.stopping import Stop

# They differ from run to run, so no checkpoint holds them.
TIMINGS = ("seconds", "images_per_second")
Item = TypeVar("Item")


@dataclass
class TrainingPosition:
    """Where a training stands, always between two steps, with the sums and rows of the epoch at hand."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def stepped(self, loss: float, rows: int) -> None:
        """Count one step: its summed loss and how many rows it learned from."""
        self.loss_sum += loss
        self.seen += rows
        self.step_in_epoch += 1
        self.global_step += 1

    def begin_next(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.step_in_epoch, self.loss_sum, self.seen = self.epoch + 1, 0, 0.0, 0

    def without_timings(self) -> list[dict[str, Any]]:
        """The history as checkpoints hold it: a resumed training ends in the same bytes."""
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in self.history]

    def restore_timings(self, path: Path) -> None:
        """Take earlier epochs' timings from ``metrics.csv``."""
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row, stored in zip(self.history, csv.DictReader(file), strict=False):
                    row.update({k: float(stored[k]) for k in TIMINGS if stored.get(k)})

    def write(self, path: Path, columns: Sequence[str]) -> None:
        """Write ``metrics.csv``, a row an epoch."""
        write_csv(path, self.history, columns)


def run_epoch(
    batches: Iterable[Item],
    learn: Callable[[Item], None],
    save: Callable[[], None],
    position: TrainingPosition,
    *,
    steps: int,
    save_every: int,
    stop: Stop,
    processes: int = 1,
    shown: bool = True,
) -> dict[str, float]:
    """Learn from the rest of an epoch's batches and save between steps; gives seconds and images per second.

    Args:
        batches: of the epoch, from ``position.step_in_epoch`` on.
        learn: takes one step and counts it in ``position``.
        save: writes ``last.pth``, every ``save_every`` steps but the last, whose epoch is not validated yet.
        position: where the training stands.
        steps: of an epoch.
        save_every: steps between two calls of ``save``.
        stop: asked, the step at hand is saved and the epoch stops.
        processes: how many learn from as many rows each.
        shown: whether this process shows a bar where there is a terminal.

    Raises:
        KeyboardInterrupt: the epoch was stopped.
    """
    began, before = time.monotonic(), position.seen
    with _bar(position, steps, processes, shown=shown) as advance:
        for batch in batches:
            learn(batch)
            advance()
            # After the last step the epoch is validated first, and its end is saved.
            if position.step_in_epoch < steps and (stop or position.step_in_epoch % save_every == 0):
                save()
                if stop:
                    stop.now()
    seconds = time.monotonic() - began
    rate = (position.seen - before) * processes / max(seconds, 1e-9)
    return {"seconds": round(seconds, 3), "images_per_second": round(rate, 1)}


@contextlib.contextmanager
def _bar(position: TrainingPosition, steps: int, processes: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar with loss and images/s on a terminal; nothing elsewhere."""
    if not (shown and on_terminal()):
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}, {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        name, done = f"epoch {position.epoch + 1}", position.step_in_epoch
        task = bar.add_task(name, total=steps, completed=done, loss=0.0, rate=0.0)
        began, seen = time.monotonic(), position.seen

        def advance() -> None:
            rate = (position.seen - seen) * processes / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=position.step_in_epoch, loss=position.loss_sum / position.seen, rate=rate)

        yield advance


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], prefix: str
) -> list[tuple[bool, bool, list[nn.Parameter]]]:
    """Parameters that learn, by whether their name starts with ``prefix`` and whether weight decay acts on them."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(("_token", "register_tokens", "position_embeddings"))
            groups.setdefault((name.startswith(prefix), decays), []).append(parameter)
    return [(*key, found) for key, found in sorted(groups.items())]


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed torch's global generator; with ``deterministic`` refuse operations whose result depends on timing."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def warm_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Linear warm-up, then a cosine down to ``floor``; a share of the peak, in (0, 1]. Steps count from 0."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def uses_bf16(precision: Literal["auto", "fp32", "bf16"]) -> bool:
    """Whether forward passes run under bf16 autocast; ``auto`` does where a GPU has it."""
    return precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
