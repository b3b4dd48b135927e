"""A certificate for the exits of each answer (Mondrian): cells that can be certified exit, the others never do.

Cells are by Stage A's answer, which is known where it serves; the true class is not. A new photo is one drawn from a
new group, as in a certificate of all exits, and a cell is of those that exit with its answer: all exits are a mixture
of the cells, so that their error keeps the same limit. All classes share delta, whether they can be certified or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.arguments import Grid
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.certify import Certificate
from stage1_pro.policies.counts import count_exits, meets
from stage1_pro.policies.ordering import certify_halves
from stage1_pro.policies.rows import Rows, one_each
from stage1_pro.record import Record

# Scores are scaled so that the threshold of every answer lies here.
COMMON = 0.5
_BELOW = float(np.nextafter(COMMON, 0))


class AnswerCell(Record):
    """The exits with one answer: their threshold, the counts that it was certified by, or why they never exit."""

    name: str = Field(description="Stage A's answer")
    threshold: float | None = Field(ge=0, le=1, description="of the score as it is; null: never exits")
    trials: int = Field(ge=0, description="units that exit so at it, of those kept for the certificate")
    errors: int = Field(ge=0)
    bound: float | None = Field(ge=0, le=1, description="of their error, at 1 - delta; null where nothing is certified")
    delta: float | None = Field(gt=0, lt=1, description="of this cell")
    refused: str = Field("", description="why it never exits")

    def __str__(self) -> str:
        """In words, such as ``'cat' at or above 0.91 (2 of 120 wrong, bound 4.2%)``."""
        if self.threshold is None:
            return f"'{self.name}' never exits: {self.refused}"
        bound = "" if self.bound is None else f", bound {self.bound:.2%}"
        return f"'{self.name}' at or above {self.threshold:.6g} ({self.errors} of {self.trials} wrong{bound})"


def scaled(cells: Sequence[AnswerCell], probs: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [N] in [0, 1] that are at or above ``COMMON`` exactly where those given reach their answer's threshold.

    Below and above it they grow in proportion; NaN stays NaN.

    Args:
        cells: of each class.
        probs: [N, K] of Stage A, whose largest names the answer.
        score: [N] in [0, 1], higher is surer.
    """
    known = np.isfinite(score)
    answer = np.where(known, np.argmax(np.where(known[:, None], probs, 0.0), axis=1), 0)
    limits = np.asarray([2.0 if cell.threshold is None else cell.threshold for cell in cells])[answer]
    over = np.clip((score - limits) / np.where(limits < 1, 1 - limits, 1.0), 0.0, 1.0)
    below = np.minimum(COMMON * score / np.where(limits > 0, limits, 1.0), _BELOW)
    return np.where(known, np.where(score >= limits, COMMON + (1 - COMMON) * over, below), np.nan)


def certify_cells(
    rows: Rows, score: NDArray[np.float64], limit: float, delta: float, *, lowest: float, grid: Grid
) -> tuple[list[AnswerCell], Certificate | None]:
    """Certify the exits with each answer on the rows that chose nothing: the cells, and what they come to together.

    Args:
        rows: with halves.
        score: [N] what decides, higher is surer.
        limit: largest exit error of each.
        delta: largest chance that any of the certificates is false; each has a K-th of it.
        lowest: lower end of the scores' range.
        grid: dtype that scores came in.

    Returns:
        The cells of all classes, and one certificate of the scaled scores; None where no cell could be certified.

    Raises:
        InputError: as ``Rows.kept_half``.
    """
    kept, halves, answer, each = rows.kept_half(), rows.halves, rows.probs.argmax(axis=1), delta / len(rows.classes)
    assert halves is not None
    cells, made = [], []
    for place, name in enumerate(rows.classes):
        own = np.where(answer == place, score, np.nan)
        known = np.isfinite(own)
        cell = AnswerCell(name=name, threshold=None, trials=0, errors=0, bound=None, delta=each)
        if not (known & ~kept).any() or not (known & kept).any():
            where = "fix its order" if not (known & ~kept).any() else "were kept for the certificate"
            cells.append(cell.model_copy(update={"refused": f"none of the rows that {where} is answered so"}))
            continue
        found = certify_halves(
            own, [Risk("exit error", limit, rows.wrong)], halves, delta=each,
            groups=rows.given_groups(), lowest=lowest, grid=grid, rows_independent=rows.independent, alike=rows.halved,
        )  # fmt: skip
        counts = found.risks[0]
        if found.feasible:
            made.append(found)
            seen = {"threshold": found.threshold, "trials": counts.trials, "errors": counts.errors}
            cells.append(cell.model_copy(update={**seen, "bound": counts.bound}))
            continue
        best = found.min_certifiable_alpha
        could = "no exit error could be certified" if best is None else f"at best {best:.4g} could be certified"
        cells.append(cell.model_copy(update={"refused": f"{counts.errors} of {counts.trials} wrong, {could}"}))
    if not made:
        return cells, None
    exited = scaled(cells, rows.probs, score) >= COMMON
    n_kept = rows.where(kept)
    drawn = one_each(n_kept.groups, np.ones(int(kept.sum()), dtype=bool), made[0].seed)
    accepted, tested = int(exited[kept][drawn].sum()), sum(one.candidates.size for one in made)
    first, named = made[0], [cell for cell in cells if cell.threshold is not None]
    images = "new images" if first.unit == "rows" else "images, one drawn from each new group,"
    others = "" if len(named) == len(cells) else "; the others never exit"
    guarantee = (
        f"With probability at least {100 * (1 - delta):g}% over the draw of the {first.n} certify {first.unit}: of "
        f"{images} that exit with any one answer at most {100 * limit:g}% are wrong, for {len(named)} of {len(cells)} "
        f"answers at once{others}."
    )
    together = replace(
        first, threshold=COMMON, coverage=accepted / first.n, accepted=accepted, delta=delta, guarantee=guarantee,
        risk_bound=max(one.risks[0].bound for one in made),
        candidates=np.full(tested, COMMON), p_values=np.full(tested, max(one.risks[0].p_value for one in made)),
        risks=tuple(
            one.risks[0].model_copy(update={"name": f"exit error of '{cell.name}'"})
            for one, cell in zip(made, named, strict=True)
        ),
    )  # fmt: skip
    return cells, together


def best_cells(rows: Rows, score: NDArray[np.float64], limit: float, *, lowest: float, grid: Grid) -> list[AnswerCell]:
    """The laxest threshold of each answer whose exits keep the limit on these very rows; nothing is promised."""
    answer, cells = rows.probs.argmax(axis=1), []
    for place, name in enumerate(rows.classes):
        cell = AnswerCell(name=name, threshold=None, trials=0, errors=0, bound=None, delta=None)
        own = np.where(answer == place, score, np.nan)
        if not np.isfinite(own).any():
            cells.append(cell.model_copy(update={"refused": "no row is answered so"}))
            continue
        counts = count_exits(rows, own, lowest=lowest, grid=grid)
        wrong = counts.n_exited - counts.n_correct
        reached = np.flatnonzero(meets(wrong, counts.n_exited, limit))
        if not reached.size:
            cells.append(cell.model_copy(update={"refused": "at no threshold are so few of them wrong"}))
            continue
        at = int(reached[-1])
        seen = {"threshold": float(counts.threshold[at]), "trials": int(counts.n_exited[at]), "errors": int(wrong[at])}
        cells.append(cell.model_copy(update=seen))
    return cells
