"""Selective metrics of any number of rows from counts on a fixed grid: 1 MiB, merged by addition, on any machine.

The grid has 2^16 confidences in [0, 1]: 1,024 per halving of the distance from 0 or from 1, whichever is nearer, down
to 2^-33. It follows from the bits of the number alone, so every machine counts alike. Counts are all that a file holds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import array
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import load_npz, save_npz
from stage1_pro.metrics.binomial import check_level
from stage1_pro.metrics.estimate import Estimate, Events, Interval, Sizes
from stage1_pro.metrics.intervals import Intervals
from stage1_pro.metrics.selective import RiskCoverage
from stage1_pro.metrics.table import lookup, names
from stage1_pro.metrics.thresholds import Walk

Floats = NDArray[np.float64]
BINS = 1 << 16
_HALF = BINS // 2
# Of a float64 the exponent and 10 bits of the mantissa make a bin; the first is that of 2^-33.
_SHIFT = 42
_FIRST = int(np.float64(2.0**-33).view(np.int64)) >> _SHIFT
# Shares that differ by rounding alone are the same share.
_ROUNDING = 1e-12
# Rows that are looked at at once: memory is the same whatever comes.
_AT_ONCE = 1 << 16


class ConfidenceHistogram:
    """Counts of right and wrong rows by confidence; ``add`` rows, ``+`` merges, ``measure`` gives metrics.

    ``counts`` int64 [2, 65536]: right, then wrong, from the least sure bin to the surest; ``n`` rows in all. Rows of
    one bin count as tied. Their intervals take rows for independent: of clips or tracks add one row each.
    """

    def __init__(self, counts: ArrayLike | None = None) -> None:
        self.counts: NDArray[np.int64] = np.zeros((2, BINS), dtype=np.int64)
        if counts is not None:
            given = array("counts", counts)
            if given.shape != (2, BINS) or given.dtype.kind not in "iu" or given.min() < 0:
                raise InputError(
                    f"counts must be whole numbers of shape [2, {BINS}] and not negative; add rows instead"
                )
            self.counts += given.astype(np.int64)

    @property
    def n(self) -> int:
        """Rows in all."""
        return int(self.counts.sum())

    def __add__(self, other: object) -> ConfidenceHistogram:
        if not isinstance(other, ConfidenceHistogram):
            return NotImplemented
        return ConfidenceHistogram(self.counts + other.counts)

    def __repr__(self) -> str:
        wrong = int(self.counts[1].sum())
        return f"ConfidenceHistogram of {self.n} rows, {wrong} of them wrong, in {np.count_nonzero(self.counts)} cells"

    def add(self, confidence: ArrayLike, error: ArrayLike) -> Self:
        """Count rows; gives the histogram itself.

        Args:
            confidence: [N] in [0, 1], higher is surer.
            error: [N] 0/1.

        Raises:
            InputError: another shape, a NaN, or a value out of range; then nothing is counted.
        """
        sure, wrong = array("confidence", confidence), array("error", error)
        if sure.ndim != 1 or wrong.shape != sure.shape:
            raise InputError(
                f"confidence and error must have one shape [N], got {list(sure.shape)} and {list(wrong.shape)}; "
                "pass one value per row"
            )
        counts = np.zeros((2, BINS), dtype=np.int64)
        for start in range(0, sure.size, _AT_ONCE):
            rows, errors = sure[start : start + _AT_ONCE].astype(np.float64), wrong[start : start + _AT_ONCE]
            for name, off in (
                ("confidence must be numbers in [0, 1]", ~((rows >= 0) & (rows <= 1))),
                ("error must be 0 or 1", (errors != 0) & (errors != 1)),
            ):
                if off.any():
                    row = int(off.argmax())
                    value = (rows if name.startswith("confidence") else errors)[row]
                    raise InputError(f"{name}, got {value:g} at row {start + row}; drop or mend the row")
            counts += np.bincount(errors.astype(np.int64) * BINS + _places(rows), minlength=2 * BINS).reshape(2, BINS)
        self.counts += counts
        return self

    def measure(self, *, level: float = 0.95) -> Intervals:
        """``augrc``, ``aurc``, ``accuracy``, risk at coverage and coverage at risk with closed-form intervals.

        The first three have a normal interval on the logit scale, from the influence of every row; the others exact
        ends that hold for all thresholds of the grid at once. The grid moves AUGRC by at most Σ right · wrong / (2 n²)
        over its bins, AURC by what any order within bins could; the ends are moved apart by as much, and a note says
        where that is more than a thousandth of the standard error. Accuracy is exact. Metrics are those of
        ``bootstrap_errors``.

        Raises:
            InputError: no row was counted, or a level that is none.
        """
        check_level(level)
        rows, errors = self._through()
        n, wrong = int(rows[-1]), int(errors[-1])
        events = Events(wrong, n, "no" if wrong == 0 else "nothing but" if wrong == n else None, n)
        smooth, moves = _closed_forms(rows, errors), _moves(rows, errors)
        walk = Walk(rows, errors)
        found: dict[str, Interval] = {}
        for name in names("rows", without=("probabilities", "threshold", "positive")):
            spec, target = lookup(name)
            if name in smooth:
                value, square = smooth[name]
                one = Estimate(spec, value, np.empty(0), n, Sizes(n, n), (square, 0.0), events, scale=abs(value))
                found[name] = _apart(one.interval(level, "logit", "rows"), moves.get(name, 0.0), spec.top)
            elif spec.exact is not None and target is not None:
                value = _at(rows, errors, spec.name, target)
                one = Estimate(spec, value, np.empty(0), n, Sizes(n, n))
                found[name] = one.exactly(spec.exact(walk, target, level), level, "rows")
        return Intervals(found, n_rows=n, n_units=n)

    def curve(self) -> RiskCoverage:
        """The risk-coverage curve at every bin that holds a row; a row is accepted iff it is at or above a threshold.

        Raises:
            InputError: no row was counted.
        """
        rows, errors = self._through()
        held = np.flatnonzero(self.counts.any(axis=0))[::-1]
        return RiskCoverage(_least(held), rows / rows[-1], errors / rows, errors / rows[-1])

    def write(self, path: Path | str) -> None:
        """Write the counts as an ``.npz``, atomically; equal counts give equal bytes."""
        save_npz(path, {"counts": self.counts})

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read what ``write`` wrote.

        Raises:
            InputError: no such file, or no ``.npz``.
            ArtifactError: it holds other arrays than counts.
        """
        arrays = load_npz(path, most=4 << 20)
        try:
            return cls(arrays["counts"])
        except (KeyError, InputError):
            raise ArtifactError(f"{path} must hold the counts of a ConfidenceHistogram, got others") from None

    def _through(self) -> tuple[Floats, Floats]:
        """Rows and errors at or above every bin that holds a row, the surest first, [M] each."""
        held = np.flatnonzero(self.counts.any(axis=0))[::-1]
        if not held.size:
            raise InputError("the histogram must hold at least one row, got none; a metric of no rows is undefined")
        errors = np.cumsum(self.counts[1, held])
        return (np.cumsum(self.counts[0, held]) + errors).astype(np.float64), errors.astype(np.float64)


def _closed_forms(rows: Floats, errors: Floats) -> dict[str, tuple[float, float]]:
    """AUGRC, AURC and accuracy, and the sum of squares of all rows' influences on each.

    Of a bin whose rows have the influence a where right and a + b where wrong that is right a² + wrong (a + b)².
    """
    n, share = rows[-1], errors[-1] / rows[-1]
    found = {"accuracy": (float(1 - share), float(share * (1 - share) / n))}
    size, wrong = np.diff(rows, prepend=0), np.diff(errors, prepend=0)

    def squared(right: Floats, more: Floats) -> float:
        return float(((size - wrong) * right**2).sum() + (wrong * (right + more) ** 2).sum())

    # What a row pays for errors at or above it, and an error for the rows at or below it.
    as_row = 2 * errors - wrong
    value = float((size / n * (as_row / n)).sum()) / 2
    found["augrc"] = value, squared(as_row / (2 * n * n) - 2 * value / n, (2 * (n - rows) + size) / (2 * n * n))
    # Each risk has the weight of the trapezoids on both sides; the first is repeated down to coverage 0.
    risk, weight = errors / rows, np.append(size[:-1] + size[1:], size[-1]) / 2
    weight[0] += size[0] / 2
    value = float((weight * risk).sum() / n)
    right = (risk + np.append(risk[:1], risk[:-1])) / 2 - value - _onward(weight * risk / rows)
    right /= n
    found["aurc"] = value, squared(right, _onward(weight / rows) / n)
    return found


def _onward(values: Floats) -> Floats:
    """Sums from each place to the end."""
    return np.asarray(np.cumsum(values[::-1])[::-1])


def _at(rows: Floats, errors: Floats, family: str, target: float) -> float:
    """Risk at a coverage, or coverage at a risk, of the thresholds of the grid."""
    if family == "risk_at_coverage_":
        at = int(np.argmax(rows >= target * rows[-1] * (1 - _ROUNDING)))
        return float(errors[at] / rows[at])
    met = np.flatnonzero(errors <= target * rows * (1 + _ROUNDING))
    return float(rows[met[-1]] / rows[-1]) if met.size else 0.0


def _moves(rows: Floats, errors: Floats) -> dict[str, float]:
    """The most that an order of the rows within bins could change."""
    size, wrong = np.diff(rows, prepend=0), np.diff(errors, prepend=0)
    pairs = float((wrong / rows[-1] * ((size - wrong) / rows[-1])).sum()) / 2
    # Right rows first give the least risk within a bin, wrong rows first the largest.
    least, last = rows - wrong, rows - size + wrong
    high = np.divide(errors, last, out=np.zeros(rows.size), where=last > 0)
    low = np.divide(errors - wrong, least, out=high.copy(), where=least > 0)
    return {"augrc": pairs, "aurc": float((size * (high - low)).sum() / rows[-1])}


def _places(confidence: Floats) -> NDArray[np.int64]:
    """The bin of each confidence [N], 0 to 65535; a larger confidence is never in a lower bin."""
    upper = confidence >= 0.5
    # 1 - c is exact from a half on.
    distance = np.where(upper, 1 - confidence, confidence)
    key = np.clip((distance.view(np.int64) >> _SHIFT) - _FIRST, 0, _HALF - 1)
    places: NDArray[np.int64] = np.where(upper, BINS - 1 - key, key)
    return places


def _least(place: NDArray[np.int64]) -> Floats:
    """The smallest confidence of each bin."""
    upper = place >= _HALF
    key = np.where(upper, BINS - place, place)
    distance = ((key + _FIRST) << _SHIFT).view(np.float64)
    # A bin above a half ends short of where the next lower one begins.
    inner = np.where(place == _HALF, 0.5, np.nextafter(1 - distance, 1.0))
    least: Floats = np.where(upper, inner, np.where(place == 0, 0.0, distance))
    return least


def _apart(one: Interval, by: float, top: float) -> Interval:
    """The interval with its ends moved apart by what the grid may hide."""
    note = one.note
    if by > 1e-3 * one.std:
        note = "; ".join(filter(None, [note, f"the grid of confidences moves it by at most {by:.1e}"]))
    return replace(one, low=max(one.low - by, 0.0), high=min(one.high + by, top), note=note)
