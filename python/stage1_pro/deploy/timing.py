"""The timing engine: contestants called turn about, every visit a sample, quantiles and ratios with intervals.

What is called, what a service sees from bytes on, and the start of a fresh process are here as well. No torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from stage1_pro.data.images import preprocess, read_image
from stage1_pro.errors import ArtifactError
from stage1_pro.progress import track
from stage1_pro.record import Record

if TYPE_CHECKING:
    from stage1_pro.deploy.cascade import Cascade
    from stage1_pro.deploy.runtime import Runtime

QUANTILES = (0.5, 0.9, 0.95, 0.99)
# Fewer samples have no p99 to speak of.
ENOUGH = 1000
WARMUP_CALLS = 3
# Kept whatever the time limit says.
_LEAST = 10
_REPLICATES = 1000
_BLOCKS = 50
_ANSWER_ONCE = "from stage1_pro.deploy.timing import answer_once; answer_once()"
Seconds = NDArray[np.float64]
# One call, told its number: the seconds of its parts.
Contestant = Callable[[int], Mapping[str, float]]


class LatencyQuantile(Record):
    """A quantile of single calls with its interval; null where so few samples have none."""

    q: float
    milliseconds: float | None
    low: float | None
    high: float | None


class LatencyRatio(Record):
    """A quantile of one series over that of another; ``q`` null: means."""

    q: float | None
    ratio: float
    low: float
    high: float


class ColdStart(Record):
    """A fresh process up to its first answer, milliseconds, medians over repeats."""

    cache: Literal["none", "empty", "kept"] = Field(description="of kernels compiled on this machine")
    repeats: int
    total: float = Field(description="from starting the process to its end")
    load: float = Field(description="verifying the bundle, starting the runtime, parity")
    first: float = Field(description="the first answer, by both stages")


# --------------------------------------------------------------------------------------------
# The engine


@dataclass(frozen=True)
class Sampling:
    """How contestants are called.

    Attributes:
        samples: samples of each, 1 or more.
        warmup: seconds that each is called before the first sample, three calls at least.
        limit: seconds after which sampling ends with fewer samples, ten at least.
        visit: seconds that a sample repeats a short call for, and is the mean of; 0: a sample is one call. A single
            call of a millisecond mostly measures the scheduler.
        seed: of the orders.
    """

    samples: int
    warmup: float = 0.0
    limit: float = math.inf
    visit: float = 0.0
    seed: int = 0


def sample(
    contestants: Mapping[str, Contestant], how: Sampling, description: str = ""
) -> dict[str, dict[str, Seconds]]:
    """Seconds of calls: contestant, then part, to [n]; ``description`` is the progress bar's.

    Contestants are called in rounds, each round in another order: a machine that slows down slows all of them, and
    the n-th samples of two contestants are neighbours in time.
    """
    repeats = {name: _warm_up(call, how) for name, call in contestants.items()}
    names, rng = list(contestants), np.random.default_rng(how.seed)
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in track(range(how.samples), description, total=how.samples):
        if number >= _LEAST and time.perf_counter() - began > how.limit:
            break
        for index in rng.permutation(len(names)):
            name = names[index]
            calls = [contestants[name](number) for _ in range(repeats[name])]
            found[name].append({part: sum(one[part] for one in calls) / len(calls) for part in calls[0]})
    return {name: {part: np.array([one[part] for one in calls]) for part in calls[0]} for name, calls in found.items()}


def _warm_up(call: Contestant, how: Sampling) -> int:
    """Call it often enough; gives the calls of a visit."""
    began, calls, fastest = time.perf_counter(), 0, math.inf
    while calls < WARMUP_CALLS or time.perf_counter() - began < how.warmup:
        started = time.perf_counter()
        call(calls)
        fastest = min(fastest, time.perf_counter() - started)
        calls += 1
    return max(1, round(how.visit / max(fastest, 1e-9)))


def quantiles(seconds: Seconds, *, level: float = 0.95, seed: int = 0) -> list[LatencyQuantile]:
    """p50, p90, p95 and p99 of seconds [N] in milliseconds with intervals; null where no sample would lie above.

    Intervals are of a bootstrap over blocks of neighbouring samples: what slows one call slows the next, and
    resampling single calls would make intervals too narrow.
    """
    values = seconds * 1e3
    drawn = np.quantile(values[_resamples(len(values), seed)], QUANTILES, axis=1)
    tails = (50 * (1 - level), 100 - 50 * (1 - level))
    found = []
    for q, replicates in zip(QUANTILES, drawn, strict=True):
        known = len(values) * (1 - q) >= 1
        low, high = np.percentile(replicates, tails)
        told = {"milliseconds": np.quantile(values, q), "low": low, "high": high}
        found.append(LatencyQuantile(q=q, **{name: float(x) if known else None for name, x in told.items()}))
    return found


def ratios(above: Seconds, below: Seconds, *, paired: bool, level: float = 0.95, seed: int = 0) -> list[LatencyRatio]:
    """Quantiles of seconds [N] over those of seconds [M], and the ratio of means (``q`` null), with intervals.

    Paired, the n-th samples are neighbours in time (of one ``sample``), and are resampled together.
    """
    if paired:
        above, below = above[: len(below)], below[: len(above)]
    first = _resamples(len(above), seed)
    second = first if paired else _resamples(len(below), seed + 1)
    found = []
    for q in (None, *QUANTILES):
        if q is not None and min(len(above), len(below)) * (1 - q) < 1:
            continue

        def value(one: Seconds, q: float | None = q) -> Seconds:
            return np.asarray(one.mean(axis=-1) if q is None else np.quantile(one, q, axis=-1))

        drawn = value(above[first]) / value(below[second])
        low, high = np.percentile(drawn, (50 * (1 - level), 100 - 50 * (1 - level)))
        found.append(LatencyRatio(q=q, ratio=float(value(above) / value(below)), low=float(low), high=float(high)))
    return found


def _resamples(n: int, seed: int) -> NDArray[np.intp]:
    """Indices [R, n] of a circular block bootstrap with about fifty blocks."""
    length = max(1, n // _BLOCKS)
    rng = np.random.default_rng([seed, n])
    starts = rng.integers(0, n, (_REPLICATES, math.ceil(n / length), 1))
    return ((starts + np.arange(length)) % n).reshape(_REPLICATES, -1)[:, :n]


def median_seconds(call: Callable[[], object], times: int = 7) -> float:
    """Median wall-clock seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


# --------------------------------------------------------------------------------------------
# What is called


def clocks(call: Callable[[], object]) -> Contestant:
    """A call by two clocks: ``wall``, and ``processor`` over all threads, which neighbours stretch less."""

    def one(_number: int) -> Mapping[str, float]:
        began, spent = time.perf_counter(), time.process_time()
        call()
        return {"wall": time.perf_counter() - began, "processor": time.process_time() - spent}

    return one


def timed(runtime: Runtime | None, call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call on the host, and between events on the device where there is a runtime that has one."""
    before = None if runtime is None else runtime.device_seconds
    began = time.perf_counter()
    call()
    seconds = {"host": time.perf_counter() - began}
    if before is not None and runtime is not None and runtime.device_seconds is not None:
        seconds["device"] = runtime.device_seconds - before
    return seconds


def deferrals(batch: int, rate: float, number: int, seed: int) -> NDArray[np.bool_]:
    """Which rows [batch] of the n-th batch exit, drawn by seed and number.

    Over the calls so far as many have been deferred as the rate, in [0, 1], says; it is rounded down over all calls,
    not in each.
    """
    count = math.floor((number + 1) * rate * batch + 1e-9) - math.floor(number * rate * batch + 1e-9)
    return all_but(count, batch, np.random.default_rng([seed, number]))


def all_but(count: int, n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """All of n rows but ``count`` that are drawn."""
    chosen = np.ones(n, dtype=bool)
    chosen[rng.permutation(n)[:count]] = False
    return chosen


def decides(cascade: Cascade, pool: NDArray[np.float32], batch: int, rate: float, seed: int) -> Contestant:
    """The cascade on rotated rows of a pool of pixels [M, 3, H, W], with deferrals forced as ``deferrals`` says."""

    def call(number: int) -> Mapping[str, float]:
        pixels, exited = _rotated(pool, batch, number), deferrals(batch, rate, number, seed)
        return timed(cascade.runtime, lambda: cascade.decide(pixels, exited=exited))

    return call


def passes(
    run: Callable[[NDArray[np.float32]], object], pool: NDArray[np.float32], batch: int, runtime: Runtime | None = None
) -> Contestant:
    """Anybody's pass on rotated rows of a pool [M, 3, H, W], timed as by ``timed``; the host waits for the answer."""

    def call(number: int) -> Mapping[str, float]:
        pixels = _rotated(pool, batch, number)
        return timed(runtime, lambda: run(pixels))

    return call


def answers(cascade: Cascade, photos: Sequence[bytes], rate: float, seed: int) -> Contestant:
    """One request a call, deferred at a rate: encoded bytes to a decision; decoding, resizing and the model apart."""
    spec = cascade.bundle.preprocessing

    def call(number: int) -> Mapping[str, float]:
        photo, exited = photos[number % len(photos)], deferrals(1, rate, number, seed)
        began = time.perf_counter()
        image = read_image(photo)
        decoded = time.perf_counter()
        pixels = preprocess(image, spec)[None]
        resized = time.perf_counter()
        cascade.decide(pixels, exited=exited)
        done = time.perf_counter()
        return {"decode": decoded - began, "resize": resized - decoded, "model": done - resized, "total": done - began}

    return call


def _rotated(pool: NDArray[np.float32], batch: int, number: int) -> NDArray[np.float32]:
    return pool[(np.arange(batch) + number * batch) % len(pool)]


def draw_photos(n: int, size: tuple[int, int], seed: int) -> list[bytes]:
    """Some JPEGs of coloured surfaces with grain, width and height in pixels: they cost a decoder what a photo does."""
    rng = np.random.default_rng(seed)
    photos = []
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.integers(-10, 11, smooth.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


# --------------------------------------------------------------------------------------------
# Machine and cold start


def machine(runtime: str, threads: int) -> dict[str, Any]:
    """Facts that figures of time depend on: processor, cores, threads, load, versions."""
    packages = ("stage1_pro", "numpy", "torch" if runtime == "torch" else "onnxruntime")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or "all cores",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Subject:
    """What a bench measures: a bundle or run folder in a runtime, with how many threads, on which device."""

    source: Path | str
    runtime: str
    threads: int = 0
    trust_engines: bool = False
    device: str = "cpu"

    def load(self) -> Cascade:
        """The cascade; raises as ``Cascade.load`` and ``Cascade.from_run`` do."""
        from stage1_pro.deploy.cascade import Cascade
        from stage1_pro.deploy.runtime import OF_RUNS

        if self.runtime == OF_RUNS:
            return Cascade.from_run(self.source, threads=self.threads, device=self.device)
        return Cascade.load(self.source, self.runtime, threads=self.threads, trust_engines=self.trust_engines)


def cold_starts(subject: Subject, *, repeats: int) -> list[ColdStart]:
    """Start a fresh process that answers once; engines also with the kernels that an earlier start had kept.

    Every process has a cache folder of ours, so the user's own neither helps nor is touched.

    Raises:
        ArtifactError: the process could not answer; its last line says why.
    """
    arguments = json.dumps(asdict(subject), default=str)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "kept") if subject.runtime == "tensorrt_rtx" else ("none",):
            times = []
            for number in range(repeats):
                # What is kept is what the last start without it left.
                home = Path(folder) / (str(number) if cache != "kept" else str(repeats - 1))
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", _ANSWER_ONCE, arguments],
                    env={**os.environ, "XDG_CACHE_HOME": str(home)}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                    raise ArtifactError(f"a fresh process must answer with {subject.runtime}, got: {reason}")
                times.append([time.perf_counter() - began, *json.loads(done.stdout.splitlines()[-1])])
            total, load, first = (1e3 * float(np.median(column)) for column in np.array(times).T)
            found.append(ColdStart(cache=cache, repeats=repeats, total=total, load=load, first=first))
    return found


def answer_once() -> None:
    """Be the process of ``cold_starts``: load, answer one batch of noise, print both times as JSON."""
    subject = Subject(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    cascade = subject.load()
    loaded = time.perf_counter()
    spec = cascade.bundle.preprocessing
    pixels = np.random.default_rng(0).normal(size=(1, 3, spec.height, spec.width)).astype(np.float32)
    cascade.decide(pixels, exited=np.zeros(1, dtype=bool))
    print(json.dumps([loaded - began, time.perf_counter() - loaded]))
