"""Exact bounds on the share of independent trials (Clopper and Pearson 1934)."""

from __future__ import annotations

from scipy.special import betaincinv

from stage1_pro.arguments import number, whole
from stage1_pro.errors import InputError


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share of ``k`` in ``n`` independent trials; n = 0 gives (0, 1)."""
    check_level(level)
    tail = (1 + level) / 2
    return clopper_pearson_lower(k, n, tail), clopper_pearson_upper(k, n, tail)


def clopper_pearson_upper(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided upper bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 1."""
    _check_counts(k, n, level)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, level))


def clopper_pearson_lower(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided lower bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 0."""
    _check_counts(k, n, level)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 1 - level))


def check_level(level: float) -> None:
    """Raise InputError unless the level is inside (0, 1)."""
    if not 0 < number("level", level) < 1:
        raise InputError(f"level must be in (0, 1), got {level}; 0.95 is usual")


def _check_counts(k: int, n: int, level: float) -> None:
    check_level(level)
    if whole("k", k) > whole("n", n, most=2**62):
        raise InputError(f"k must be from 0 to n, got k = {k}, n = {n}; k counts among the n trials")
