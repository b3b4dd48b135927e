"""Selective conformal risk control: sets of labels for the images that are accepted, with a promise that is true.

An image is accepted iff its gate score is at or above a selection threshold, and then gets the set of classes whose
nonconformity is at or below a limit; otherwise nobody answers. Promised are a least share accepted (xi) and a largest
risk among the accepted (alpha): that the set misses the label. Xu, Guo & Wei (Selective Conformal Risk Control,
2512.12844) give SCRC-T and SCRC-I; the default, SCRC-PAC, holds for the very thresholds that are shipped. NumPy only.

More than xi is accepted where other rows say that single classes would keep the risk: ``choose_threshold`` looks for
the laxest threshold on rows that certify nothing, and ``calibrate`` takes the laxer one of it and that of xi. Where
those rows were too hopeful the sets grow, and the promise stays true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from stage1_pro.arguments import (
    Grid,
    at_or_above,
    check_share,
    choice,
    flag,
    floats,
    grid_of,
    indices,
    names,
    number,
    on_grid,
    shown,
    sum_slack,
    whole,
)
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies import bounds
from stage1_pro.policies.candidates import ranked
from stage1_pro.policies.certificate import LABELS_RIGHT, Cell, Outcome, SetCheck, why_independent
from stage1_pro.policies.checks import check_claim, mean_size, share_of, unjudged
from stage1_pro.policies.counts import gaps
from stage1_pro.policies.rows import Unit, counting_unit, one_each
from stage1_pro.policies.target import Loss, Score, Variant
from stage1_pro.policies.useful import weigh_sets

# Accepts every row that has a score, and is a number that JSON can write.
ACCEPT_ALL = -float(np.finfo(np.float64).max)
# Single classes are likely to keep the risk where they would in so many of the calibrations to expect.
_LIKELY = 0.9
# Of more thresholds than tell shares of half a percent apart some are left out.
_MOST_ENDS = 256
# Quantiles at which an unknown error rate is looked at.
_QUANTILES = (np.arange(16) + 0.5) / 16


@dataclass(frozen=True)
class SCRC:
    """What is wished: a share accepted of at least ``xi``, a risk among the accepted of at most ``alpha``.

    Variants:

    - ``pac``: with probability 1 - delta over the calibration rows both hold of the thresholds found. Default.
    - ``I``: the coverage with probability 1 - delta[0]; the risk in expectation over calibration and new images.
    - ``T``: both in expectation.
    - ``naive``: what looks best on the calibration rows; promises nothing.

    Cells (``groups``): one risk limit for all, one for each ``stage`` that answered, or one for each true ``class``.
    delta[1] is divided by their number, so all cells hold together. Selection is one for all.

    Args:
        xi: least share accepted, inside (0, 1).
        alpha: largest risk among the accepted, inside (0, 1); taken by its decimal text.
        delta: chance of failure of the selection and of the risk.
        variant: see above.
        loss: ``miscoverage``: P(label not in set | accepted); ``fnr``: the same of positive rows alone.
        score: nonconformity of a class: ``lac`` 1 - p; ``aps`` the mass of classes at least as probable; ``raps`` adds
            ``raps[0]`` for each rank beyond ``raps[1]``.
        groups: None, ``stage`` or ``class``.
        allow_empty: let sets be empty; otherwise the most probable class (or classes) are always in.
        positive: index of the positive class, for ``fnr``; of two classes the second one by default.
        raps: penalty and the rank from which it counts.

    Raises:
        InputError: an argument is not what it must be.
    """

    xi: float
    alpha: float
    delta: tuple[float, float] = (0.01, 0.04)
    variant: Variant = "pac"
    loss: Loss = "miscoverage"
    score: Score = "lac"
    groups: Literal["stage", "class"] | None = None
    allow_empty: bool = False
    positive: int | None = None
    raps: tuple[float, int] = (0.01, 2)

    def __post_init__(self) -> None:
        check_share("xi", self.xi)
        check_share("alpha", self.alpha)
        for name, parts in (
            ("delta", "two shares, of the selection and of the risk"),
            ("raps", "a penalty and a rank"),
        ):
            pair = getattr(self, name)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"{name} must be {parts}, got {shown(pair)}; give a pair")
        for share in self.delta:
            check_share("delta", share)
        check_share("delta", sum(self.delta))
        if number("raps", self.raps[0]) < 0 or whole("raps", self.raps[1], -(2**62)) < 0:
            raise InputError(f"raps must be a penalty and a rank, both at least 0, got {self.raps}")
        object.__setattr__(self, "delta", tuple(self.delta))
        object.__setattr__(self, "raps", (float(self.raps[0]), int(self.raps[1])))
        for name, options in (("variant", Variant), ("loss", Loss), ("score", Score)):
            choice(name, getattr(self, name), get_args(options))
        if self.groups is not None and (not isinstance(self.groups, str) or self.groups not in ("stage", "class")):
            raise InputError(f"groups must be None, 'stage' or 'class', got {shown(self.groups)}")
        flag("allow_empty", self.allow_empty)
        if self.positive is not None:
            whole("positive", self.positive, what="a class index")
        if self.loss == "fnr" and self.groups == "class":
            raise InputError("groups must not be 'class' with loss fnr, which speaks of one class; use miscoverage")

    def choose_threshold(
        self,
        probs: ArrayLike,
        gate: ArrayLike,
        labels: ArrayLike,
        stage: ArrayLike | None = None,
        *,
        n: int,
        groups: ArrayLike | None = None,
        rows_independent: bool = False,
        seed: int = 0,
    ) -> float | None:
        """Give the laxest selection threshold at which sets of one class each are likely to keep the risk; None: none.

        From rows that certify nothing, for ``calibrate`` on others. Likely: in nine of ten calibrations of ``n``
        units, where the error rate of each cell is unknown but for what is seen here (Jeffreys' prior). They must also
        say something: be wrong at most half as often as always giving the commonest class. Where sets may be empty none
        is found: a limit that is as tight as can be is wished for there.

        Args:
            probs: [N, K], rows sum to 1.
            gate: [N], higher is surer.
            labels: [N] class indices.
            stage: [N] name of the stage that answered; needed for stage cells.
            n: units that will calibrate.
            groups: [N] clip or track of every row.
            rows_independent: the caller states that rows of one group are independent.
            seed: of the row that speaks for its group.

        Raises:
            InputError: an argument is not what it must be.
        """
        values, scores = _rows(probs, gate)
        truth = indices("labels", labels, *values.shape, like="probs has rows")
        stages = _stages(stage, truth.size, wanted=self.groups == "stage")
        whole("n", n, most=bounds.MOST_UNITS)
        units = counting_unit(groups, truth.size, "auto", rows_independent)[1]
        drawn = one_each(units, np.ones(truth.size, dtype=bool), seed)
        values, scores, truth = values[drawn], scores[drawn], truth[drawn]
        order = ranked(scores)
        if not order.size:
            return None
        wrong = nonconformity(self, values)[np.arange(truth.size), truth] > 0
        named = self._cells(None if stages is None else stages[drawn], truth, values.shape[1], None)
        last, thresholds = gaps(scores[order], -math.inf, grid_of(gate))
        thresholds[-1] = on_grid(ACCEPT_ALL, grid_of(gate))
        # Between two errors laxer is likelier.
        ends = np.flatnonzero(np.append(np.diff(np.cumsum(wrong[order])[last]) > 0, True))
        ends = ends[np.linspace(0, ends.size - 1, min(ends.size, _MOST_ENDS)).astype(np.int64)]
        by_class = self.groups == "class" or self.loss == "fnr"
        rivals = truth.size - np.bincount(truth).max()
        chance = np.ones(ends.size)
        for _, member in named:
            seen, errors = np.cumsum(member[order])[last[ends]], np.cumsum((member & wrong)[order])[last[ends]]
            trials = seen * n // truth.size
            allowed = np.array([self._budget(int(m), len(named)) for m in trials], dtype=np.float64)
            if not by_class:
                allowed = np.minimum(allowed, trials * rivals // truth.size // 2)
            rates = betaincinv(errors + 0.5, seen - errors + 0.5, _QUANTILES[:, None])
            passed = bounds.binomial_cdf(np.maximum(allowed, 0.0), trials.astype(np.float64), rates).mean(axis=0)
            chance *= np.where(allowed >= 0, passed, 0.0)
        top = values == values.max(axis=1, keepdims=True)
        for end in ends[chance >= _LIKELY][::-1]:
            if not weigh_sets(top, scores >= thresholds[end], truth, by_class=by_class):
                return float(thresholds[end])
        return None

    def calibrate(
        self,
        probs: ArrayLike,
        gate: ArrayLike,
        labels: ArrayLike,
        stage: ArrayLike | None = None,
        *,
        threshold: float | None = None,
        groups: ArrayLike | None = None,
        rows_independent: bool = False,
        seed: int = 0,
        classes: Sequence[str] = (),
    ) -> FittedSCRC:
        """Find both thresholds on calibration rows, or say why there are none: INFEASIBLE is a result.

        Accepted is the least share that certifies xi, or all that ``threshold`` lets in where that is more. It came
        from other rows, so what lies above it are independent draws given their number; where they are too few for xi,
        what lies above the order statistic that decides instead are independent draws given that. The limit is the
        smallest that keeps the risk. So the promises hold whatever ``threshold`` is.

        Where rows share clips or tracks (``groups``) one seeded row speaks for its group, n counts groups, and the
        promise is about one image drawn from a new group.

        Stated answers: a row whose gate score or probabilities are not finite is never accepted and counts for the
        coverage. Rows of one gate score are accepted together or not at all. A limit that only the set of all classes
        could keep is infeasible, as is a cell of which no row is accepted, such as a class that never is.

        Args:
            probs: [N, K], rows sum to 1.
            gate: [N], higher is surer.
            labels: [N] class indices.
            stage: [N] name of the stage that answered; needed for stage cells.
            threshold: accept at least what is at or above it; of other rows, see ``choose_threshold``.
            groups: [N] clip or track of every row.
            rows_independent: the caller states that rows of one group are independent.
            seed: of the row that speaks for its group.
            classes: K different names, which class cells and messages have; indices without them.

        Raises:
            InputError: an argument is not what it must be.
        """
        values, scores = _rows(probs, gate)
        truth = indices("labels", labels, *values.shape, like="probs has rows")
        stages = _stages(stage, truth.size, wanted=self.groups == "stage")
        called = _called(classes, values.shape[1])
        unit, units = counting_unit(groups, truth.size, "auto", rows_independent)
        drawn = one_each(units, np.ones(truth.size, dtype=bool), seed)
        values, scores, truth = values[drawn], scores[drawn], truth[drawn]
        stages = None if stages is None else stages[drawn]
        n = truth.size
        rank, lax = self._rank(n), None if threshold is None else scores >= number("threshold", threshold)
        frozen = lax is not None and rank is not None and int(lax.sum()) >= rank
        if frozen and lax is not None:
            rank, above, tied = int(lax.sum()) + (self.variant in ("I", "T")), lax, False
        else:
            threshold, above, tied = _selection(scores, rank, n, self.variant, grid_of(gate))
        accepted = 0 if threshold is None else int((scores >= threshold).sum())
        losses = nonconformity(self, values)[np.arange(n), truth]
        named = self._cells(stages, truth, values.shape[1], called if self.groups == "class" else None)
        cells = [self._limit(name, losses[above & member], len(named)) for name, member in named]
        feasible = threshold is not None and all(cell.limit is not None for cell in cells)
        reason, needed, smallest = "", None, None
        if not feasible:
            reason, smallest = self._why_not(n, unit, threshold, cells)
            needed = self._needed(n, accepted, cells, accepted / n if frozen else 0.0)
        fitted = FittedSCRC(
            scrc=self, n_classes=values.shape[1], n=n, unit=unit, seed=seed, rank=rank, accepted=accepted,
            threshold=threshold if feasible else None, cells=tuple(cells),
            coverage_bound=None if threshold is None else self._coverage_bound(n, rank, accepted),
            reason=reason, n_needed=needed, min_certifiable_alpha=smallest,
            guarantee=self._sentence(n, unit, len(cells)) if feasible else "none: infeasible",
            assumptions=self._assumptions(
                unit, why_independent(grouped=groups is not None, stated=rows_independent), tied, frozen
            ),
        )  # fmt: skip
        if not feasible or self.variant == "naive":
            return fitted
        by_class = self.groups == "class" or self.loss == "fnr"
        useless = weigh_sets(*fitted.predict_sets(values, scores, stages), truth, by_class=by_class)
        return replace(fitted, useless=useless)

    def _rank(self, n: int) -> int | None:
        """M: rows above the M-th largest score are accepted (pac, naive: the M-th too); None where n is too small."""
        xi = bounds.exact(self.xi)
        if self.variant == "naive":
            return math.ceil(xi * n) if n else None
        if self.variant == "T":
            return math.ceil(xi * (n + 1))
        if self.variant == "pac":
            return bounds.selection_rank(n, self.xi, self.delta[0])
        if n == 0:
            return None
        # Dvoretzky, Kiefer & Wolfowitz with Massart's constant, for every threshold at once.
        above = math.ceil(n * self.xi + math.sqrt(n * math.log(2 / self.delta[0]) / 2))
        return above + 1 if above < n else None

    def _budget(self, trials: int, n_cells: int) -> int:
        """The most losses among the accepted rows of a cell; -1: none is few enough."""
        if self.variant == "naive":
            return math.floor(bounds.exact(self.alpha) * trials) if trials else -1
        if self.variant == "pac":
            return int(bounds.errors_allowed(trials, self.alpha, self.delta[1] / n_cells))
        return bounds.crc_budget(self.alpha, trials)

    def _cells(
        self, stages: NDArray[np.str_] | None, truth: NDArray[np.int64], n_classes: int, names: Sequence[str] | None
    ) -> list[tuple[str, NDArray[np.bool_]]]:
        """Names of the cells, those of stages as given or seen, and which rows [N] their risk is counted on."""
        if self.groups == "class":
            return [(str(k) if names is None else names[k], truth == k) for k in range(n_classes)]
        counted = np.ones(truth.size, dtype=bool)
        if self.loss == "fnr":
            positive = 1 if self.positive is None and n_classes == 2 else self.positive
            if positive is None or not 0 <= positive < n_classes:
                raise InputError(f"positive must be a class index 0 to {n_classes - 1} for loss fnr, got {positive}")
            counted = truth == positive
        if self.groups == "stage" and stages is not None:
            seen = np.unique(stages).tolist() if names is None else names
            return [(name, counted & (stages == name)) for name in seen] or [("all", counted)]
        return [("all", counted)]

    def _limit(self, name: str, losses: NDArray[np.float64], n_cells: int) -> Cell:
        """The smallest limit that leaves no more losses above it than the budget."""
        trials = losses.size
        budget = self._budget(trials, n_cells)
        delta = self.delta[1] / n_cells if self.variant == "pac" else None
        limit = float(np.sort(losses)[trials - 1 - budget]) if 0 <= budget < trials else None
        errors = 0 if limit is None else int((losses > limit).sum())
        if delta is not None:
            bound = clopper_pearson_upper(errors, trials, 1 - delta)
        elif self.variant == "naive":
            bound = errors / trials if trials else 1.0
        else:
            bound = (errors + 1) / (trials + 1)
        return Cell(name=name, limit=limit, trials=trials, errors=errors, budget=budget, delta=delta, bound=bound)

    def _why_not(self, n: int, unit: Unit, threshold: float | None, cells: list[Cell]) -> tuple[str, float | None]:
        """Why there are no thresholds, and the smallest risk that these counts could certify."""
        if threshold is None:
            how = {"T": "on average", "naive": "as seen"}.get(self.variant, f"delta {self.delta[0]:g}")
            return f"too few of {n} {unit} have a gate score to accept a share of {self.xi:g} ({how})", None
        what = "accepted positives" if self.loss == "fnr" else f"accepted {unit}"
        if self.variant == "naive":
            empty = [cell.name for cell in cells if cell.limit is None]
            return f"there are no {what}{'' if len(cells) == 1 else f' of {self.groups} ' + ' or '.join(empty)}", None
        least = self._least_trials(len(cells))
        parts = [
            f"{cell.trials} {what}{'' if len(cells) == 1 else f' of {self.groups} {cell.name}'}, where even no loss at "
            f"all needs {least}"
            for cell in cells
            if cell.limit is None
        ]
        smallest = None
        if all(cell.trials for cell in cells):
            smallest = max(
                1 / (cell.trials + 1) if cell.delta is None else clopper_pearson_upper(0, cell.trials, 1 - cell.delta)
                for cell in cells
            )
        return f"risk {self.alpha:g} cannot be certified by {' and '.join(parts)}", smallest

    def _coverage_bound(self, n: int, rank: int | None, accepted: int) -> float | None:
        """The lower bound of the share accepted at 1 - delta[0]; None where it is no more than expected."""
        if self.variant == "I":
            return accepted / n - math.sqrt(math.log(2 / self.delta[0]) / (2 * n))
        if self.variant != "pac" or rank is None:
            return None
        # Ties and atoms only add to what is accepted.
        return float(betaincinv(rank, n + 1 - rank, self.delta[0]))

    def _least_trials(self, n_cells: int) -> int:
        """Accepted units of a cell with which no loss at all is enough."""
        if self.variant == "pac":
            return bounds.trials_needed(0, self.alpha, self.delta[1] / n_cells)
        return 1 if self.variant == "naive" else math.ceil(1 / bounds.exact(self.alpha)) - 1

    def _needed(self, n: int, accepted: int, cells: list[Cell], share: float) -> int | None:
        """The fewest units that would do, with cells in the shares seen; None when a cell never is accepted.

        ``share`` of the units is accepted at a threshold that is known.
        """
        least = self._least_trials(len(cells))
        shares = [cell.trials / accepted for cell in cells] if accepted else [1.0]
        if min(shares) == 0:
            return None

        def enough(units: int) -> bool:
            rank = self._rank(units)
            trials = 0 if rank is None else max(rank - (self.variant != "pac"), math.floor(share * units))
            return rank is not None and math.floor(trials * min(shares)) >= least

        found = bounds.first_enough(enough, max(1, least), 10**7)
        # Enough rows alone do not mend scores that are missing.
        return found if found is None or found > n else None

    def _sentence(self, n: int, unit: Unit, n_cells: int) -> str:
        if self.variant == "naive":
            return (
                f"none: thresholds that met coverage {self.xi:g} and risk {self.alpha:g} on the {n} calibration "
                f"{unit}; nothing is promised of new images"
            )
        image = "a new image" if unit == "rows" else "one image drawn from a new group"
        label = "the label is not in the set" if self.loss == "miscoverage" else "a positive's set lacks the positive"
        risk = f"among those accepted {label} at most {100 * self.alpha:g}% of the time"
        if n_cells > 1:
            how = "together" if self.variant == "pac" else "separately"
            risk += f", in each of the {n_cells} cells by {self.groups} {how}"
        share = f"at least {100 * self.xi:g}% are accepted"
        over = f"over the draw of the {n} calibration {unit}"
        if self.variant == "pac":
            sure = f"With probability at least {100 * (1 - sum(self.delta)):g}% {over}"
            return f"{sure}, of {image}: {share}, and {risk}."
        sure = "On average"
        if self.variant == "I":
            sure = f"With probability at least {100 * (1 - self.delta[0]):g}%"
        return (
            f"{sure} {over}, of {image}: {share}; on average over draws of the {n} calibration {unit} and of {image} "
            f"(an expectation, nothing about these thresholds alone), {risk}."
        )

    def _assumptions(self, unit: Unit, why: str, tied: bool, frozen: bool) -> tuple[str, ...]:
        if self.variant == "naive":
            return ()
        fixed = "model, gate, wish and the selection threshold" if frozen else "model, gate and wish"
        found = [
            f"calibration {unit} are independent draws of what will be seen later, and nothing shifts",
            LABELS_RIGHT,
            f"{fixed} were fixed before anybody looked at the calibration rows",
        ]
        if unit == "rows":
            found.append(why)
        if unit == "groups":
            found.append("one row speaks for its group, drawn without a look at anything; large groups count no more")
        if tied:
            found.append(
                "gate scores tie at the selection threshold: their whole tie group is accepted, and the risk does not "
                "fall as the selection gets laxer"
            )
        return tuple(found)


@dataclass(frozen=True)
class FittedSCRC:
    """Thresholds that keep the wish, with what they come from, or why there are none.

    ``accepts`` and ``predict_sets`` are how to apply them. ``threshold`` is None when infeasible, and otherwise a
    number of the dtype that the gate came in, so that ``gate >= threshold`` accepts the same rows in it; a gate that
    was rounded to a narrower dtype since is another gate. ``min_certifiable_alpha`` is the smallest risk these counts
    could certify; ``n_needed`` the units that would do, None where no number would (or none is needed).
    """

    scrc: SCRC
    n_classes: int
    n: int
    unit: Unit
    seed: int
    rank: int | None
    accepted: int
    threshold: float | None  # accept iff gate >= it; see ``accepts``
    cells: tuple[Cell, ...]  # one for all, one for each stage, or one for each class in their order
    coverage_bound: float | None = None
    reason: str = ""
    n_needed: int | None = None
    min_certifiable_alpha: float | None = None
    guarantee: str = ""
    assumptions: tuple[str, ...] = ()
    useless: str = ""  # why the sets tell nothing, however true they are; empty: they do. ``fit_policy`` refuses those

    @property
    def feasible(self) -> bool:
        """Whether there are thresholds."""
        return self.threshold is not None

    @property
    def coverage(self) -> float:
        """Share of the calibration units that is accepted."""
        return self.accepted / max(self.n, 1)

    @property
    def limits(self) -> NDArray[np.float64]:
        """The limit of each cell, NaN where there is none."""
        return np.array([np.nan if cell.limit is None else cell.limit for cell in self.cells])

    def infeasible(self) -> NotReachableError:
        """Build the error of a wish that cannot be certified: why, what could be, and how many units it takes."""
        must = f"certifiable on the calibration {self.unit}, but it is INFEASIBLE:"
        if self.scrc.variant == "naive":
            must = f"reachable on the calibration {self.unit}, but"
        said = f"coverage >= {self.scrc.xi:g} with risk <= {self.scrc.alpha:g} must be {must} {self.reason}"
        if self.min_certifiable_alpha is not None:
            said += f". The smallest risk that could be certified is {self.min_certifiable_alpha:.4g}"
        if self.n_needed is not None:
            said += f". About {self.n_needed} {self.unit} would do (there are {self.n})"
        return NotReachableError(f"{said}. Bring more of them. No policy was written")

    def accepts(self, gate: ArrayLike) -> NDArray[np.bool_]:
        """Say which gate scores [N] are accepted: compared as float64, whatever their dtype; only finite ones are.

        Raises:
            InputError: scores that are no numbers.
            NotReachableError: infeasible: there is no threshold.
        """
        if self.threshold is None:
            raise self.infeasible()
        scores = floats("gate", gate)
        return at_or_above("gate", scores, self.threshold) & np.isfinite(scores)

    def predict_sets(
        self, probs: ArrayLike, gate: ArrayLike, stage: ArrayLike | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Give the classes in each image's set, bool [N, K], and which images are accepted, bool [N].

        Nobody answers where it is not: the set is empty there. A row whose gate score or probabilities are not finite
        is not accepted.

        Args:
            probs: [N, K], rows sum to 1.
            gate: [N].
            stage: [N] name of the stage that answered, for stage cells.

        Raises:
            InputError: an argument is not what it must be, or a stage was not calibrated.
            NotReachableError: infeasible: there is nothing to predict with.
        """
        if self.threshold is None:
            raise self.infeasible()
        values, scores = _rows(probs, gate, self.n_classes)
        accepted = self.accepts(scores)
        stages = _stages(stage, len(values), wanted=self.scrc.groups == "stage")
        if self.scrc.groups == "stage" and stages is not None:
            known = np.array([cell.name for cell in self.cells])
            other = np.flatnonzero(~np.isin(stages, known))
            if other.size:
                raise InputError(
                    f"stage must be one of {', '.join(known)}, got '{stages[other[0]]}' in row {other[0]}; calibrate "
                    "on rows of every stage"
                )
            limit = self.limits[(stages[:, None] == known).argmax(axis=1)][:, None]
        else:
            limit = self.limits[None, :]  # one for all, or one a class
        return (nonconformity(self.scrc, values) <= limit) & accepted[:, None], accepted

    def verify(
        self,
        probs: ArrayLike,
        gate: ArrayLike,
        labels: ArrayLike,
        stage: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
        rows_independent: bool = False,
        seed: int = 0,
    ) -> SetCheck:
        """Hold each certified promise against rows that calibrated nothing: PASS, FAIL or INCONCLUSIVE.

        A promise on average (``T``, and the risk of ``I``) has no outcome: one calibration does not refute an average.
        FAIL: Clopper and Pearson's 99% bound breaks the promise; PASS: their 95% bound keeps it; else INCONCLUSIVE,
        with the units that would settle it if rates stay as seen. ``rate <= alpha`` is no test: a system at true 0.8%
        fails it at alpha = 1% every third time on 500 rows. One seeded row speaks for its group, as in ``calibrate``.

        Args:
            probs: [N, K], rows sum to 1.
            gate: [N].
            labels: [N] class indices.
            stage: [N] name of the stage that answered, for stage cells.
            groups: [N] clip or track of every row.
            rows_independent: the caller states that rows of one group are independent.
            seed: of the row that speaks for its group.

        Raises:
            InputError: an argument is not what it must be.
            NotReachableError: infeasible.
        """
        sets, accepted = self.predict_sets(probs, gate, stage)
        truth = indices("labels", labels, *sets.shape, like="probs has rows")
        unit, units = counting_unit(groups, truth.size, "auto", rows_independent)
        drawn = one_each(units, np.ones(truth.size, dtype=bool), seed)
        stages = _stages(stage, truth.size, wanted=False)
        sets, accepted, truth = sets[drawn], accepted[drawn], truth[drawn]
        stages = None if stages is None else stages[drawn]
        n, missed = truth.size, ~sets[np.arange(truth.size), truth]
        of = 1 + len(self.cells)
        most = float(1 - bounds.exact(self.scrc.xi))
        found = [check_claim("rejection rate", int((~accepted).sum()), n, most, n, of)]
        members = self.scrc._cells(stages, truth, self.n_classes, [cell.name for cell in self.cells])
        for cell, (_, member) in zip(self.cells, members, strict=True):
            trials = accepted & member
            name = "risk" if len(self.cells) == 1 else f"risk of {self.scrc.groups} {cell.name}"
            found.append(check_claim(name, int((missed & trials).sum()), int(trials.sum()), self.scrc.alpha, n, of))
        if self.scrc.variant == "T":
            found = unjudged(found)
        elif self.scrc.variant == "I":
            found[1:] = unjudged(found[1:])
        outcomes = {one.outcome for one in found} - {None}
        judged: Outcome = "FAIL" if "FAIL" in outcomes else "INCONCLUSIVE" if "INCONCLUSIVE" in outcomes else "PASS"
        sizes = sets[accepted].sum(axis=1)
        return SetCheck(
            outcome=judged if outcomes else None,
            statement="", promises=found, n=n, unit=unit, accepted=sizes.size,
            average_set_size=mean_size(
                sizes, self.n_classes, np.random.default_rng(seed), smallest=0 if self.scrc.allow_empty else 1
            ),
            ambiguous_rate=share_of(int((sizes > 1).sum()), sizes.size),
            empty_rate=share_of(int((sizes == 0).sum()), sizes.size),
            rejection_rate=share_of(n - sizes.size, n),
        )  # fmt: skip


def _selection(
    scores: NDArray[np.float64], rank: int | None, n: int, variant: Variant, grid: Grid
) -> tuple[float | None, NDArray[np.bool_], bool]:
    """The selection threshold (None: there is none), which rows [N] calibrate the risk, and whether scores tie there.

    What lies strictly above an order statistic are independent draws, so the risk is calibrated on those. ``pac``
    accepts the ``rank``-th largest score too, by a threshold just above the next lower one: where that score is an atom
    of the law, also one that was drawn once, a threshold above it would lose all of it, and the coverage with it. So do
    the others in a tie group. ``T`` accepts a new image at the score itself, and calibrates on what is above. The
    threshold is a number of the dtype that scores came in.
    """

    def above(score: float) -> float:
        return float(on_grid(np.nextafter(score, np.inf), grid))

    accept_all = float(on_grid(ACCEPT_ALL, grid))
    known = np.sort(scores[~np.isnan(scores)])[::-1]
    nothing = np.zeros(scores.size, dtype=bool)
    if rank is None:
        return None, nothing, False
    if rank > n:
        return (accept_all, ~nothing, False) if known.size == n else (None, nothing, False)
    if rank > known.size:
        return None, nothing, False
    value = known[rank - 1]
    tied = bool(np.count_nonzero(known == value) > 1)
    if variant == "naive":
        return float(value), scores >= value, False
    if variant == "pac" or tied:
        lower = known[known < value]
        return above(lower[0]) if lower.size else accept_all, scores >= value, tied
    return float(value if variant == "T" else above(value)), scores > value, False


def nonconformity(scrc: SCRC, probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """How ill each class fits each image, [N, K] for probs [N, K]; 0 for the most probable unless sets may be empty."""
    if scrc.score == "lac":
        scores = np.maximum(1 - probs, 0.0)  # rows sum to 1 but for rounding
    else:
        order = np.argsort(-probs, axis=1, kind="stable")
        ranked = np.take_along_axis(probs, order, axis=1)
        mass = np.cumsum(ranked, axis=1)
        if scrc.score == "raps":
            mass += scrc.raps[0] * np.maximum(np.arange(1, probs.shape[1] + 1) - scrc.raps[1], 0)
        # Classes of one probability are one tie group, with the value at its end.
        for k in range(probs.shape[1] - 2, -1, -1):
            mass[:, k] = np.where(ranked[:, k] == ranked[:, k + 1], mass[:, k + 1], mass[:, k])
        scores = np.empty_like(mass)
        np.put_along_axis(scores, order, mass, axis=1)
    if not scrc.allow_empty:
        scores[probs == probs.max(axis=1, keepdims=True)] = 0.0
    return scores


def _rows(
    probs: ArrayLike, gate: ArrayLike, n_classes: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities [N, K] and gate scores [N], NaN where a row cannot be accepted."""
    values, scores = floats("probs", probs).copy(), floats("gate", gate).copy()
    if values.ndim != 2 or values.shape[1] < 2 or (n_classes is not None and values.shape[1] != n_classes):
        wanted = "K >= 2" if n_classes is None else str(n_classes)
        raise InputError(f"probs must have shape [N, {wanted}], got {list(values.shape)}; give a column for each class")
    if scores.shape != values.shape[:1]:
        raise InputError(f"gate must have shape [{len(values)}] as probs has rows, got {list(scores.shape)}")
    finite = np.isfinite(values).all(axis=1)
    bad = np.flatnonzero(finite & ((values < 0).any(axis=1) | (np.abs(values.sum(axis=1) - 1) > sum_slack(probs))))
    if bad.size:
        raise InputError(f"probs must be probabilities whose rows sum to 1, got others in row {bad[0]}; take softmax")
    scores[~finite | ~np.isfinite(scores)] = np.nan
    values[~finite] = 1 / values.shape[1]
    return values, scores


def _called(classes: Sequence[str], n_classes: int) -> list[str] | None:
    """Names of the classes; None where none were given."""
    if isinstance(classes, list | tuple) and not classes:
        return None
    called = [str(one) for one in names("classes", classes, n_classes, like="probs has columns")]
    if len(set(called)) != n_classes:
        raise InputError(f"classes must be different names, got {shown(called)}; name each class once")
    return called


def _stages(stage: ArrayLike | None, n: int, *, wanted: bool) -> NDArray[np.str_] | None:
    if stage is None:
        if wanted:
            raise InputError("stage must be given where groups is 'stage', got None; name the stage of every row")
        return None
    return names("stage", stage, n, like="probs has rows").astype(np.str_)
