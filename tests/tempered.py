"""A policy of another package, in one module: Stage A answers where its tempered confidence is high enough."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.command import Share
from stage1_pro.errors import NotReachableError
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.counts import ExitCounts, meets
from stage1_pro.policies.exiting import ExitPolicy, assumed, choose_exits
from stage1_pro.policies.policy import Origin
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import Promise, Target


class Calm(Target):
    """Exit by tempered confidence, with few wrong answers among exits."""

    policy: Literal["tempered"] = "tempered"
    max_exit_error: Share = 0.05

    def promises(self, positive: str) -> tuple[Promise, ...]:
        return (self._promise("exit error", self.max_exit_error),)

    def watched(self) -> float | None:
        return self.max_exit_error

    def key(self) -> str:
        return f"exit error <= {self.max_exit_error!r}"


class Tempered(ExitPolicy):
    """``tempered.json``."""

    file: ClassVar[str] = "tempered.json"
    asks: ClassVar[type[Calm]] = Calm
    needs_gate: ClassVar[bool] = False
    score_title: ClassVar[str] = "Stage A's tempered confidence"

    format_version: Literal[1] = 1
    policy: Literal["tempered"] = "tempered"
    classes: list[str]
    positive: str
    temperature: float
    exit_threshold: float
    coverage: float
    max_exit_error: float
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None
    statement: str
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None
    preprocessing_fingerprint: str | None

    @classmethod
    def fit(cls, target: Calm, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        fit = rows.where(rows.fit_half())
        likely = [np.log(np.take_along_axis(_cool(fit.probs, t), fit.labels[:, None], 1)).sum() for t in _TEMPERATURES]
        temperature = float(_TEMPERATURES[int(np.argmax(likely))])

        def best(counts: ExitCounts) -> int:
            good = np.flatnonzero(meets(counts.n_exited - counts.n_correct, counts.n_exited, target.max_exit_error))
            if not good.size:
                raise NotReachableError(f"{target.key()} must be reachable on the calibration rows, but it is not")
            return int(good[-1])

        found = choose_exits(target, rows, _cool(rows.probs, temperature).max(1), best=best)
        return cls(
            classes=rows.classes, positive=rows.positive, temperature=temperature, exit_threshold=found.row.threshold,
            coverage=found.row.coverage, max_exit_error=target.max_exit_error, guarantee=target.guarantee,
            certificate=found.record(target.claims, use), sweep_results=found.sweep,
            statement="nothing is promised" if found.certificate is None else assumed(found.certificate),
            **(origin or Origin()).fields(),
        )  # fmt: skip

    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        largest: NDArray[np.float64] = _cool(self.check_probs(probs), self.temperature).max(axis=1)
        return largest

    def rule(self) -> str:
        return f"exit when the confidence at temperature {self.temperature:g} is at or above {self.exit_threshold:.6g}"

    @property
    def target(self) -> Calm:
        return Calm(max_exit_error=self.max_exit_error, guarantee=self.guarantee, **self.own_delta)


_TEMPERATURES = np.geomspace(0.25, 4, 33)


def _cool(probs: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    powers = np.maximum(probs, 1e-300) ** (1 / temperature)
    cooled: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return cooled
