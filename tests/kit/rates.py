"""Rates that simulations find, printed beside what is promised: ``pytest -m slow -s`` shows them as rows of a table."""

from __future__ import annotations

import numpy as np


def show(what: str, law: str, promise: str, rates: object, draws: int) -> None:
    """Print one row; a rate stands with its standard error over the draws."""
    found = np.atleast_1d(np.asarray(rates, dtype=np.float64))
    errors = np.sqrt(found * (1 - found) / draws)
    cells = [f"{rate:.3f} ± {error:.3f}" for rate, error in zip(found, errors, strict=True)]
    print(f"\n| {what} | {law} | {promise} | {', '.join(cells)} | {draws} |")
