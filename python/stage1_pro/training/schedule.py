"""What every training has in common: seeding, precision, and how the learning rate goes."""

from __future__ import annotations

import math
import os
from typing import Literal

import torch


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
    """Linear warm-up, then a cosine down to ``floor``; a share of the peak, in (0, 1].

    Args:
        step: from 0.
        warmup: steps of the warm-up.
        total: steps of the training.
        floor: share at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def uses_bf16(precision: Literal["auto", "fp32", "bf16"]) -> bool:
    """Whether forward passes run under bf16 autocast; ``auto`` does where a GPU has it."""
    return precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
