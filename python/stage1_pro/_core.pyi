"""
Compiled kernels of stage1_pro; call them through stage1_pro.native
"""

from __future__ import annotations
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "augrc",
    "bootstrap_augrc",
    "bootstrap_suite",
    "gather",
    "measure_suite",
    "merge",
    "order",
    "resample_counts",
    "route",
    "search_dual",
    "sweep",
]

@typing.overload
def augrc(confidence: numpy.typing.NDArray[numpy.float32], error: numpy.typing.NDArray[numpy.uint8]) -> float:
    """
    AUGRC of rows [N]
    """

@typing.overload
def augrc(confidence: numpy.typing.NDArray[numpy.float32], error: numpy.typing.NDArray[numpy.float64]) -> float:
    """
    AUGRC of rows [N]
    """

@typing.overload
def augrc(confidence: numpy.typing.NDArray[numpy.float64], error: numpy.typing.NDArray[numpy.uint8]) -> float:
    """
    AUGRC of rows [N]
    """

@typing.overload
def augrc(confidence: numpy.typing.NDArray[numpy.float64], error: numpy.typing.NDArray[numpy.float64]) -> float:
    """
    AUGRC of rows [N]
    """

@typing.overload
def bootstrap_augrc(
    confidence: numpy.typing.NDArray[numpy.float32],
    error: numpy.typing.NDArray[numpy.uint8],
    unit: numpy.typing.NDArray[numpy.uint32],
    n_units: typing.SupportsInt | typing.SupportsIndex,
    table: numpy.typing.NDArray[numpy.uint64],
    reach: numpy.typing.NDArray[numpy.uint64],
    starts: numpy.typing.NDArray[numpy.uint32],
    lowest: numpy.typing.NDArray[numpy.uint32],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[numpy.typing.NDArray[numpy.float64], float, float, float]:
    """
    AUGRC of resampled units [n_replicates] (rows, or clusters of rows), AUGRC itself, and the sums of squares and of cubes of the units' influences on it; with laws for cells their counts are drawn
    """

@typing.overload
def bootstrap_augrc(
    confidence: numpy.typing.NDArray[numpy.float32],
    error: numpy.typing.NDArray[numpy.float64],
    unit: numpy.typing.NDArray[numpy.uint32],
    n_units: typing.SupportsInt | typing.SupportsIndex,
    table: numpy.typing.NDArray[numpy.uint64],
    reach: numpy.typing.NDArray[numpy.uint64],
    starts: numpy.typing.NDArray[numpy.uint32],
    lowest: numpy.typing.NDArray[numpy.uint32],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[numpy.typing.NDArray[numpy.float64], float, float, float]:
    """
    AUGRC of resampled units [n_replicates] (rows, or clusters of rows), AUGRC itself, and the sums of squares and of cubes of the units' influences on it; with laws for cells their counts are drawn
    """

@typing.overload
def bootstrap_augrc(
    confidence: numpy.typing.NDArray[numpy.float64],
    error: numpy.typing.NDArray[numpy.uint8],
    unit: numpy.typing.NDArray[numpy.uint32],
    n_units: typing.SupportsInt | typing.SupportsIndex,
    table: numpy.typing.NDArray[numpy.uint64],
    reach: numpy.typing.NDArray[numpy.uint64],
    starts: numpy.typing.NDArray[numpy.uint32],
    lowest: numpy.typing.NDArray[numpy.uint32],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[numpy.typing.NDArray[numpy.float64], float, float, float]:
    """
    AUGRC of resampled units [n_replicates] (rows, or clusters of rows), AUGRC itself, and the sums of squares and of cubes of the units' influences on it; with laws for cells their counts are drawn
    """

@typing.overload
def bootstrap_augrc(
    confidence: numpy.typing.NDArray[numpy.float64],
    error: numpy.typing.NDArray[numpy.float64],
    unit: numpy.typing.NDArray[numpy.uint32],
    n_units: typing.SupportsInt | typing.SupportsIndex,
    table: numpy.typing.NDArray[numpy.uint64],
    reach: numpy.typing.NDArray[numpy.uint64],
    starts: numpy.typing.NDArray[numpy.uint32],
    lowest: numpy.typing.NDArray[numpy.uint32],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[numpy.typing.NDArray[numpy.float64], float, float, float]:
    """
    AUGRC of resampled units [n_replicates] (rows, or clusters of rows), AUGRC itself, and the sums of squares and of cubes of the units' influences on it; with laws for cells their counts are drawn
    """

@typing.overload
def bootstrap_suite(
    error: numpy.typing.NDArray[numpy.uint8],
    tie_ends: numpy.typing.NDArray[numpy.uint32],
    unit: numpy.typing.NDArray[numpy.uint32],
    sizes: numpy.typing.NDArray[numpy.uint32],
    tables: numpy.typing.NDArray[numpy.uint64],
    kind: numpy.typing.NDArray[numpy.uint8],
    n_exit: typing.SupportsInt | typing.SupportsIndex | None,
    nll: numpy.typing.NDArray[numpy.float64],
    brier: numpy.typing.NDArray[numpy.float64],
    coverages: numpy.typing.NDArray[numpy.float64],
    risks: numpy.typing.NDArray[numpy.float64],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> numpy.typing.NDArray[numpy.float64]:
    """
    Every metric of resampled sorted rows [n_replicates, 8 + coverages + risks]
    """

@typing.overload
def bootstrap_suite(
    error: numpy.typing.NDArray[numpy.float64],
    tie_ends: numpy.typing.NDArray[numpy.uint32],
    unit: numpy.typing.NDArray[numpy.uint32],
    sizes: numpy.typing.NDArray[numpy.uint32],
    tables: numpy.typing.NDArray[numpy.uint64],
    kind: numpy.typing.NDArray[numpy.uint8],
    n_exit: typing.SupportsInt | typing.SupportsIndex | None,
    nll: numpy.typing.NDArray[numpy.float64],
    brier: numpy.typing.NDArray[numpy.float64],
    coverages: numpy.typing.NDArray[numpy.float64],
    risks: numpy.typing.NDArray[numpy.float64],
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> numpy.typing.NDArray[numpy.float64]:
    """
    Every metric of resampled sorted rows [n_replicates, 8 + coverages + risks]
    """

def gather(source: numpy.ndarray, index: numpy.ndarray, out: numpy.ndarray) -> None:
    """
    Rows index [M] of source [N, D] into out [M, D]
    """

@typing.overload
def measure_suite(
    error: numpy.typing.NDArray[numpy.uint8],
    tie_ends: numpy.typing.NDArray[numpy.uint32],
    kind: numpy.typing.NDArray[numpy.uint8],
    n_exit: typing.SupportsInt | typing.SupportsIndex | None,
    nll: numpy.typing.NDArray[numpy.float64],
    brier: numpy.typing.NDArray[numpy.float64],
    coverages: numpy.typing.NDArray[numpy.float64],
    risks: numpy.typing.NDArray[numpy.float64],
) -> numpy.typing.NDArray[numpy.float64]:
    """
    Every metric of sorted rows [8 + coverages + risks]
    """

@typing.overload
def measure_suite(
    error: numpy.typing.NDArray[numpy.float64],
    tie_ends: numpy.typing.NDArray[numpy.uint32],
    kind: numpy.typing.NDArray[numpy.uint8],
    n_exit: typing.SupportsInt | typing.SupportsIndex | None,
    nll: numpy.typing.NDArray[numpy.float64],
    brier: numpy.typing.NDArray[numpy.float64],
    coverages: numpy.typing.NDArray[numpy.float64],
    risks: numpy.typing.NDArray[numpy.float64],
) -> numpy.typing.NDArray[numpy.float64]:
    """
    Every metric of sorted rows [8 + coverages + risks]
    """

def merge(
    index: numpy.ndarray,
    answers: tuple[
        typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    ],
    out: tuple[
        typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    ],
) -> None:
    """
    Writes (label, probability, score) [M] to rows index [M] of the same three [N]
    """

@typing.overload
def order(
    confidence: numpy.typing.NDArray[numpy.float32], error: numpy.typing.NDArray[numpy.uint8]
) -> tuple[numpy.typing.NDArray[numpy.uint32], numpy.typing.NDArray[numpy.uint32]]:
    """
    Rows [N] by descending confidence, then error, then index, and where tie groups end [M]
    """

@typing.overload
def order(
    confidence: numpy.typing.NDArray[numpy.float32], error: numpy.typing.NDArray[numpy.float64]
) -> tuple[numpy.typing.NDArray[numpy.uint32], numpy.typing.NDArray[numpy.uint32]]:
    """
    Rows [N] by descending confidence, then error, then index, and where tie groups end [M]
    """

@typing.overload
def order(
    confidence: numpy.typing.NDArray[numpy.float64], error: numpy.typing.NDArray[numpy.uint8]
) -> tuple[numpy.typing.NDArray[numpy.uint32], numpy.typing.NDArray[numpy.uint32]]:
    """
    Rows [N] by descending confidence, then error, then index, and where tie groups end [M]
    """

@typing.overload
def order(
    confidence: numpy.typing.NDArray[numpy.float64], error: numpy.typing.NDArray[numpy.float64]
) -> tuple[numpy.typing.NDArray[numpy.uint32], numpy.typing.NDArray[numpy.uint32]]:
    """
    Rows [N] by descending confidence, then error, then index, and where tie groups end [M]
    """

def resample_counts(
    sizes: numpy.typing.NDArray[numpy.uint32],
    tables: numpy.typing.NDArray[numpy.uint64],
    first: typing.SupportsInt | typing.SupportsIndex,
    n_replicates: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    How often each unit is in each resample [n_replicates, units]
    """

def route(
    logits: numpy.ndarray,
    gate: typing.Any,
    rule: tuple[
        typing.SupportsFloat | typing.SupportsIndex,
        typing.SupportsFloat | typing.SupportsIndex,
        typing.SupportsFloat | typing.SupportsIndex,
    ],
    out: tuple[
        typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    ],
) -> int:
    """
    Decides rows [N, K] by (scale, offset, threshold) into the five arrays [N], and returns how many are deferred
    """

def search_dual(
    rows: numpy.typing.NDArray[numpy.int64],
    positives: numpy.typing.NDArray[numpy.int64],
    exit_error: bool,
    fnr_numerator: typing.SupportsInt | typing.SupportsIndex,
    fnr_denominator: typing.SupportsInt | typing.SupportsIndex,
    second_numerator: typing.SupportsInt | typing.SupportsIndex,
    second_denominator: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[int, int, int, int]:
    """
    Tie groups above the upper and before the lower threshold: of the best pair, of the nearest one
    """

@typing.overload
def sweep(
    confidence: numpy.typing.NDArray[numpy.float32],
    error: numpy.typing.NDArray[numpy.uint8],
    answer: numpy.typing.NDArray[numpy.uint8],
) -> tuple[
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
]:
    """
    At every distinct threshold [M]: itself, then rows, errors, positives, false negatives, negatives and false positives accepted
    """

@typing.overload
def sweep(
    confidence: numpy.typing.NDArray[numpy.float32],
    error: numpy.typing.NDArray[numpy.float64],
    answer: numpy.typing.NDArray[numpy.uint8],
) -> tuple[
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
]:
    """
    At every distinct threshold [M]: itself, then rows, errors, positives, false negatives, negatives and false positives accepted
    """

@typing.overload
def sweep(
    confidence: numpy.typing.NDArray[numpy.float64],
    error: numpy.typing.NDArray[numpy.uint8],
    answer: numpy.typing.NDArray[numpy.uint8],
) -> tuple[
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
]:
    """
    At every distinct threshold [M]: itself, then rows, errors, positives, false negatives, negatives and false positives accepted
    """

@typing.overload
def sweep(
    confidence: numpy.typing.NDArray[numpy.float64],
    error: numpy.typing.NDArray[numpy.float64],
    answer: numpy.typing.NDArray[numpy.uint8],
) -> tuple[
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.float64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
    numpy.typing.NDArray[numpy.int64],
]:
    """
    At every distinct threshold [M]: itself, then rows, errors, positives, false negatives, negatives and false positives accepted
    """

__version__: str = "0.1.0"
