"""Rows that part two routers which should agree: of every size, with ties, NaN, infinities and where exp ends."""

from __future__ import annotations

import numpy as np

ODD = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 709.0, -745.0, 88.0], np.float32)


def hard_logits(rng, n, k):
    """Logits [n, k] of every size, with ties, NaN and infinities, and differences on either side of where exp ends."""
    logits = rng.normal(size=(n, k)) * 10.0 ** rng.integers(-4, 4, (n, 1))
    logits = np.where(rng.random((n, k)) < 0.1, rng.integers(-2, 3, (n, k)), logits).astype(np.float32)
    odd = rng.random((n, k)) < rng.choice([0, 0.05, 0.6], (n, 1))
    logits[odd] = rng.choice(ODD, int(odd.sum()))
    logits[: n // 50] = -np.inf
    return logits


def hard_gates(rng, n):
    """Gate logits [n] of every size, some not finite."""
    gate = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 3, n)).astype(np.float32)
    odd = rng.random(n) < 0.1
    gate[odd] = rng.choice(ODD, int(odd.sum()))
    return gate
