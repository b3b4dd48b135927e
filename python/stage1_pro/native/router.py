"""The rule of an exit in float32 on the CPU: which rows exit, and where Stage B's answers go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stage1_pro.arguments import on_grid
from stage1_pro.errors import InputError
from stage1_pro.native.backend import kernels
from stage1_pro.native.rows import MAX_ROWS


class Routed(NamedTuple):
    """What became of rows [N]: views of a Router's buffers, valid until its next call.

    ``exited`` is 0 or 1; ``label`` the most probable class (first on a tie), -1 without an answer; ``probability`` that
    class's, in [1/K, 1]; ``score`` what was compared, in [0, 1]; ``deferred`` [M] the rows that did not exit, in order.
    """

    exited: NDArray[np.uint8]
    score: NDArray[np.float32]
    label: NDArray[np.int32]
    probability: NDArray[np.float32]
    deferred: NDArray[np.int32]


class Router:
    """Decides which rows of Stage A exit, and puts Stage B's answers to the others back; owns its buffers.

    A row exits iff its score is at or above the threshold, in float32. The score is the largest probability of its
    logits or, with ``platt`` = (scale, offset), sigmoid(scale * gate + offset). A row without an answer (NaN or +inf
    among its logits, or nothing but -inf; an infinite single logit) and a gate that is not finite always defer. Both
    backends give the same bits. Not for use from several threads: give each its own.

    Args:
        max_rows: the largest batch; nothing is allocated after this.
        threshold: rounded up to float32, so that nothing exits below it; no NaN.
        platt: None decides by probability.
    """

    def __init__(self, max_rows: int, *, threshold: float, platt: tuple[float, float] | None = None) -> None:
        self.max_rows = max_rows
        self.uses_gate = platt is not None
        self.threshold = check_rule(max_rows, threshold, platt)
        self._rule = (*(platt or (0.0, 0.0)), self.threshold)
        floats, integers = np.empty((2, max_rows), np.float32), np.empty((2, max_rows), np.int32)
        self._buffers = Routed(np.empty(max_rows, np.uint8), floats[0], integers[0], floats[1], integers[1])
        self._views = self._buffers
        self._gathered = np.zeros(0, np.float32)

    def route(self, logits: NDArray[np.float32], gate: NDArray[np.float32] | None = None) -> Routed:
        """Decide rows: logits [N, K] float32 (K = 1: the logit of the second of two classes), gate [N] float32.

        Raises:
            InputError: another dtype or shape, strided memory, more than ``max_rows`` rows, a gate too many or missing.
        """
        _check_floats("logits", logits, 2)
        n = logits.shape[0]
        check_batch(logits.shape, self.max_rows, self.uses_gate, gate)
        if gate is not None:
            _check_floats("gate", gate, 1)
            if gate.size != n:
                raise InputError(f"gate must have shape [{n}] as logits has rows, got [{gate.size}]; one per row")
        if self._views.exited.size != n:
            exited, score, label, probability, deferred = self._buffers
            self._views = Routed(exited[:n], score[:n], label[:n], probability[:n], deferred[:n])
        views = self._views
        count: int = kernels().route(logits, gate, self._rule, views)
        return Routed(views.exited, views.score, views.label, views.probability, views.deferred[:count])

    def gather(self, source: NDArray[np.float32], index: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows ``index`` [M] of source [N, ...] float32, [M, ...]: a view of a buffer, valid until the next call."""
        if source.dtype != np.float32 or source.ndim < 1 or not source.flags.c_contiguous:
            raise InputError(
                f"source must be contiguous float32 [N, ...], got {source.dtype} {list(source.shape)}; copy it first"
            )
        _check_index(index)
        flat = source.reshape(source.shape[0], -1)
        size = index.size * flat.shape[1]
        if self._gathered.size < size:
            self._gathered = np.empty(max(self.max_rows, index.size) * flat.shape[1], np.float32)
        out = self._gathered[:size].reshape(index.size, flat.shape[1])
        try:
            kernels().gather(flat, index, out)
        except ValueError:
            raise _beyond(index, source.shape[0]) from None
        return out.reshape(index.size, *source.shape[1:])

    def merge(
        self, routed: Routed, label: NDArray[np.int32], probability: NDArray[np.float32], score: NDArray[np.float32]
    ) -> None:
        """Write Stage B's answers [M] into ``routed`` at its deferred rows; ``exited`` still tells whose they are."""
        index = routed.deferred
        _check_index(index)
        answers = {"label": label, "probability": probability, "score": score}
        for name, values in answers.items():
            dtype = np.int32 if name == "label" else np.float32
            if values.dtype != dtype or values.shape != index.shape or not values.flags.c_contiguous:
                raise InputError(
                    f"{name} must be contiguous {np.dtype(dtype)} [{index.size}], one per deferred row, got "
                    f"{values.dtype} {list(values.shape)}; convert it first"
                )
        try:
            kernels().merge(index, (label, probability, score), (routed.label, routed.probability, routed.score))
        except ValueError:
            raise _beyond(index, routed.label.size) from None


def check_rule(max_rows: int, threshold: float, platt: tuple[float, float] | None) -> float:
    """The smallest float32 at or above the threshold: a float32 score reaches both or neither."""
    if not 1 <= max_rows <= MAX_ROWS:
        raise InputError(f"max_rows must be 1 to {MAX_ROWS}, got {max_rows}; take the largest batch")
    if math.isnan(threshold):
        raise InputError("threshold must be a number, got NaN; take it from a policy")
    if platt is not None and not all(map(math.isfinite, platt)):
        raise InputError(f"platt must be two finite numbers, got {platt}; fit the gate again")
    return float(on_grid(threshold, "float32"))


def check_batch(shape: Sequence[int], max_rows: int, uses_gate: bool, gate: object) -> None:
    """Raise InputError for logits of a wrong shape, and a gate that is not used or is missing."""
    if shape[0] > max_rows or shape[1] == 0:
        raise InputError(
            f"logits must have at most {max_rows} rows and at least one class, got shape {list(shape)}; "
            "make a router for the largest batch"
        )
    if (gate is not None) != uses_gate:
        raise InputError(
            f"gate must be {'given' if uses_gate else 'None'}, got {'None' if gate is None else 'values'}; "
            "a router with platt decides by gate, one without by probability"
        )


def _check_floats(name: str, values: NDArray[np.float32], ndim: int) -> None:
    if values.dtype != np.float32 or values.ndim != ndim or not values.flags.c_contiguous:
        raise InputError(
            f"{name} must be contiguous float32 {'[N, K]' if ndim == 2 else '[N]'}, got {values.dtype} "
            f"{list(values.shape)}; convert it first"
        )


def _check_index(index: NDArray[np.int32]) -> None:
    if index.dtype != np.int32 or index.ndim != 1 or not index.flags.c_contiguous:
        raise InputError(
            f"index must be contiguous int32 [M], got {index.dtype} {list(index.shape)}; take Routed.deferred"
        )


def _beyond(index: NDArray[np.int32], n: int) -> InputError:
    """What a kernel that refused an index means; kernels look at every one anyway."""
    return InputError(f"index must be from 0 to {n - 1}, got {int(index.min())} to {int(index.max())}; rows of source")
