"""The contestants of peers.py, each run in a process (and venv) of its own; not meant to be called by hand.

    python benchmarks/contestants.py NAME DATA.npz THREADS

answers one JSON line when it is ready (or says why it cannot be), then one for every line {"replicates": B, "seed": s,
"repeats": r} it reads: seconds and processor seconds of one interval, peak extra memory, value and interval.

A contestant is a function (data, threads) -> (replicates, seed) -> (value, low, high): what is prepared outside the
inner function (tensors, say) is not timed, and the sort is always inside. None imports stage1_pro but our own.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAILS = (0.025, 0.975)
WARM_ROWS = 96
BATCH_ROWS = 300_000

Answer = tuple[float, float, float]
Run = Callable[[int, int], Answer]


class UnavailableError(Exception):
    """A peer cannot be run here; the text says why."""


@dataclass(frozen=True)
class Data:
    """Rows to measure: confidence float32 [N] in (.5, 1], error bool [N], in no order."""

    confidence: NDArray[np.float32]
    error: NDArray[np.bool_]

    def first(self, n: int) -> Data:
        return Data(self.confidence[:n].copy(), self.error[:n].copy())

    def labels(self) -> NDArray[np.int64]:
        """Labels of a binary classifier that calls every row class 1 with its confidence."""
        return 1 - self.error.astype(np.int64)

    def probabilities(self) -> NDArray[np.float32]:
        return np.stack([1 - self.confidence, self.confidence], axis=1)


def make_data(n: int, error_rate: float, seed: int) -> Data:
    """Confidence uniform, and errors the rarer the higher it is; ``error_rate`` is their mean."""
    rng = np.random.default_rng(seed)
    height = rng.random(n)
    error = rng.random(n) < 2 * error_rate * (1 - height)
    # Just above .5: at .5 itself an argmax would call class 0.
    confidence = np.maximum(0.5 + 0.5 * height.astype(np.float32), np.nextafter(np.float32(0.5), np.float32(1)))
    return Data(confidence, error)


def _percentile(value: float, replicates: NDArray[np.float64]) -> Answer:
    low, high = np.quantile(replicates, TAILS)
    return float(value), float(low), float(high)


# --- ours


def _ours(data: Data, threads: int, **options: Any) -> Run:
    from stage1_pro.metrics import bootstrap_augrc

    def run(replicates: int, seed: int) -> Answer:
        interval = bootstrap_augrc(
            data.confidence, data.error, n_replicates=replicates, seed=seed, threads=threads, **options
        )
        return interval.value, interval.low, interval.high

    return run


def ours(data: Data, threads: int) -> Run:
    from stage1_pro import native

    if native.backend() != "compiled":
        raise UnavailableError(f"the compiled core is not in use: {native.why()}")
    return _ours(data, threads)


def ours_percentile(data: Data, threads: int) -> Run:
    from stage1_pro.metrics import bootstrap_augrc

    if "method" not in inspect.signature(bootstrap_augrc).parameters:
        raise UnavailableError("bootstrap_augrc takes no method")
    ours(data, threads)
    return _ours(data, threads, method="percentile")


def ours_reference(data: Data, threads: int) -> Run:
    from stage1_pro import native

    inner = _ours(data, threads)

    def run(replicates: int, seed: int) -> Answer:
        with native.use("reference"):
            return inner(replicates, seed)

    return run


def ours_suite(data: Data, threads: int) -> Run:
    """Every metric that needs no probabilities, at a threshold, in one pass; the answer is AUGRC's."""
    from stage1_pro import metrics

    if not hasattr(metrics, "bootstrap_errors"):
        raise UnavailableError("stage1_pro.metrics.bootstrap_errors is not there yet")

    def run(replicates: int, seed: int) -> Answer:
        intervals = metrics.bootstrap_errors(
            data.confidence, data.error, threshold=0.8, n_replicates=replicates, seed=seed, threads=threads
        )
        return intervals["augrc"].value, intervals["augrc"].low, intervals["augrc"].high

    return run


def ours_suite_probs(data: Data, threads: int) -> Run:
    """Every metric, NLL and Brier among them, from probabilities and labels; the answer is AUGRC's."""
    from stage1_pro import metrics

    if not hasattr(metrics, "bootstrap"):
        raise UnavailableError("stage1_pro.metrics.bootstrap is not there yet")
    probabilities, labels = data.probabilities(), data.labels()

    def run(replicates: int, seed: int) -> Answer:
        intervals = metrics.bootstrap(
            probabilities, labels, threshold=0.8, n_replicates=replicates, seed=seed, threads=threads
        )
        return intervals["augrc"].value, intervals["augrc"].low, intervals["augrc"].high

    return run


# --- the same algorithm in numba


def _numba(variant: str) -> Callable[[Data, int], Run]:
    def contestant(data: Data, threads: int) -> Run:
        try:
            import numba_presort
        except ImportError as error:
            raise UnavailableError(
                f"numba is not installed ({error}); pip install -c constraints.txt '.[bench]'"
            ) from None

        def run(replicates: int, seed: int) -> Answer:
            rows = numba_presort.presort(data.confidence, data.error)
            drawn = numba_presort.bootstrap_augrc(rows, replicates, seed=seed, threads=threads, variant=variant)
            return _percentile(numba_presort.augrc(rows), drawn)

        return run

    return contestant


# --- NumPy


def _numpy_presort(data: Data, workers: int) -> Run:
    """Sort once; per replicate integers, bincount, a cumulative sum, and sums over the wrong rows alone."""

    def run(replicates: int, seed: int) -> Answer:
        keys = _packed(data)
        keys.sort()
        score = keys >> np.uint64(32)
        wrong = np.flatnonzero(keys & np.uint64(1))
        before = np.searchsorted(score, score[wrong], side="left")
        through = np.searchsorted(score, score[wrong], side="right")
        n = keys.size

        def augrc(counts: NDArray[np.int64]) -> float:
            # 2 n^2 AUGRC pairs a wrong row with every row ranked lower, twice, and with its own tie once.
            rows = np.zeros(n + 1, np.int64)
            np.cumsum(counts, out=rows[1:])
            return int(counts[wrong] @ (2 * n - rows[before] - rows[through])) / (2 * n * n)

        def draw(stream: np.random.SeedSequence, times: int) -> list[float]:
            rng = np.random.Generator(np.random.SFC64(stream))
            return [augrc(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(times)]

        streams = np.random.SeedSequence(seed).spawn(workers)
        shares = [len(part) for part in np.array_split(np.arange(replicates), workers)]
        if workers == 1:
            drawn = draw(streams[0], replicates)
        else:
            with ThreadPoolExecutor(workers) as pool:
                drawn = [value for part in pool.map(draw, streams, shares) for value in part]
        return _percentile(augrc(np.ones(n, np.int64)), np.array(drawn))

    return run


def numpy_presort(data: Data, _threads: int) -> Run:
    return _numpy_presort(data, 1)


def numpy_presort_threads(data: Data, threads: int) -> Run:
    return _numpy_presort(data, threads)


def _packed_augrc(keys: NDArray[np.uint64], axis: int = -1) -> NDArray[np.float64]:
    """AUGRC of packed rows along the last axis, [...]: sorted anew, since a resample comes in no order."""
    assert axis in (-1, keys.ndim - 1)
    keys = np.sort(keys, axis=-1)
    n = keys.shape[-1]
    wrong = (keys & np.uint64(1)).astype(np.float64)
    # Each wrong row pairs with itself once and with every row behind it twice; whole numbers below 2^53 are exact.
    pairs = np.atleast_1d(wrong @ np.arange(2.0 * n - 1, 0, -2))
    # Keys that differ in the error bit alone: a tie of right and wrong rows, right ones first, whose pairs are missed.
    for place in np.argwhere(np.atleast_2d(keys[..., 1:] ^ keys[..., :-1]) == 1):
        row, meet = np.atleast_2d(keys)[place[0]], place[1] + 1
        right = meet - np.searchsorted(row, row[meet - 1], side="left")
        pairs[place[0]] += right * (np.searchsorted(row, row[meet], side="right") - meet)
    return (pairs if keys.ndim > 1 else pairs[0]) / (2.0 * n * n)


def _packed(data: Data) -> NDArray[np.uint64]:
    return (~data.confidence.view(np.uint32)).astype(np.uint64) << np.uint64(32) | data.error.astype(np.uint64)


def _scipy(method: str) -> Callable[[Data, int], Run]:
    def contestant(data: Data, _threads: int) -> Run:
        from scipy.stats import bootstrap

        def run(replicates: int, seed: int) -> Answer:
            keys = _packed(data)
            # A whole batch is held several times over: one of all replicates takes gigabytes, and longer.
            batch = max(1, min(replicates, BATCH_ROWS // keys.size))
            result = bootstrap(
                (keys,), _packed_augrc, vectorized=True, axis=-1, n_resamples=replicates, batch=batch, method=method,
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            interval = result.confidence_interval
            return float(_packed_augrc(keys)), float(interval.low), float(interval.high)

        return run

    return contestant


def confidenceinterval(data: Data, _threads: int) -> Run:
    """Its ``bootstrap_ci`` around a metric of its two arguments; percentile, as its BCa leaves each row out once."""
    try:
        from confidenceinterval.bootstrap import bootstrap_ci
    except ImportError as error:
        raise UnavailableError(f"confidenceinterval cannot be imported: {error}") from None

    def metric(error: NDArray[np.bool_], confidence: NDArray[np.float32]) -> float:
        return float(_packed_augrc(_packed(Data(confidence, error))))

    def run(replicates: int, seed: int) -> Answer:
        value, (low, high) = bootstrap_ci(
            data.error, data.confidence, metric, n_resamples=replicates, method="bootstrap_percentile",
            random_state=np.random.RandomState(seed),
        )  # fmt: skip
        return value, float(low), float(high)

    return run


# --- torch


def _torch_uncertainty_augrc() -> type:
    """torch-uncertainty's AUGRC from its own file: importing the package takes lightning, for a CLI."""
    package = importlib.util.find_spec("torch_uncertainty")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("torch-uncertainty is not installed in this venv")
    path = Path(package.submodule_search_locations[0]) / "metrics" / "classification" / "risk_coverage.py"
    spec = importlib.util.spec_from_file_location("torch_uncertainty_risk_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UnavailableError(f"torch-uncertainty's risk_coverage.py cannot be imported: {error}") from None
    return module.AUGRC


def torch_uncertainty(data: Data, threads: int) -> Run:
    augrc = _torch_uncertainty_augrc()
    import torch

    torch.set_num_threads(threads)
    probabilities, labels = torch.from_numpy(data.probabilities()), torch.from_numpy(data.labels())

    def run(replicates: int, seed: int) -> Answer:
        generator = torch.Generator().manual_seed(seed)
        n = len(labels)
        metric = augrc()
        metric.update(probabilities, labels)
        value = float(metric.compute())
        drawn = np.empty(replicates)
        for replicate in range(replicates):
            rows = torch.randint(n, (n,), generator=generator)
            metric.reset()
            metric.update(probabilities[rows], labels[rows])
            drawn[replicate] = float(metric.compute())
        return _percentile(value, drawn)

    return run


def torchmetrics(data: Data, threads: int) -> Run:
    """torchmetrics has no AUGRC, so its BootStrapper resamples torch-uncertainty's."""
    augrc = _torch_uncertainty_augrc()
    import torch
    from torchmetrics.wrappers import BootStrapper

    torch.set_num_threads(threads)
    probabilities, labels = torch.from_numpy(data.probabilities()), torch.from_numpy(data.labels())
    tails = torch.tensor(TAILS)

    def run(replicates: int, seed: int) -> Answer:
        torch.manual_seed(seed)
        metric = augrc()
        metric.update(probabilities, labels)
        many = BootStrapper(
            augrc(), num_bootstraps=replicates, mean=False, std=False, quantile=tails, sampling_strategy="multinomial"
        )
        many.update(probabilities, labels)
        low, high = many.compute()["quantile"]
        return float(metric.compute()), float(low), float(high)

    return run


CONTESTANTS: dict[str, Callable[[Data, int], Run]] = {
    "stage1_pro": ours,
    "stage1_pro percentile": ours_percentile,
    "stage1_pro suite": ours_suite,
    "stage1_pro suite+probs": ours_suite_probs,
    "stage1_pro NumPy twin": ours_reference,
    "numba plain": _numba("plain"),
    "numba blocked": _numba("blocked"),
    "numba poisson": _numba("poisson"),
    "NumPy presort": numpy_presort,
    "NumPy presort, 2 threads": numpy_presort_threads,
    "NumPy presort, kept heap": numpy_presort,
    "scipy percentile": _scipy("percentile"),
    "scipy BCa": _scipy("BCa"),
    "torch-uncertainty loop": torch_uncertainty,
    "torchmetrics BootStrapper": torchmetrics,
    "confidenceinterval": confidenceinterval,
}
PACKAGES = ("numpy", "scipy", "numba", "torch", "torchmetrics", "torch-uncertainty", "confidenceinterval", "stage1_pro")


# --- the process


def _memory(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _forget_peak() -> int:
    """Give freed memory back, let the kernel forget the peak, and return the memory held: the baseline."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Results go to the standard output that was; whatever a peer prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    with np.load(path) as file:
        data = Data(file["confidence"], file["error"])
    try:
        CONTESTANTS[name](data.first(WARM_ROWS), threads)(20, 0)  # imports, compilation, pools
        run = CONTESTANTS[name](data, threads)
    except (UnavailableError, ModuleNotFoundError) as error:
        say(unavailable=str(error))
        return
    say(ready=True, versions=_versions())
    for line in sys.stdin:
        order = json.loads(line)
        baseline = _forget_peak()
        processor, began = time.process_time(), time.perf_counter()
        for _ in range(order["repeats"]):
            answer = run(order["replicates"], order["seed"])
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        say(
            seconds=seconds / order["repeats"],
            cpu_seconds=processor / order["repeats"],
            extra_bytes=max(0, _memory("VmHWM") - baseline),
            value=answer[0],
            low=answer[1],
            high=answer[2],
        )


if __name__ == "__main__":
    main()
