"""Latency as a service sees it: a sample a call, tails with intervals, host and device apart. No torch in here."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.data.images import preprocess, read_image
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import ArtifactError

if TYPE_CHECKING:
    from stage1_pro.deploy.runtime import Runtime
from typing import Literal

from pydantic import Field

from stage1_pro.record import Record


class LatencyQuantile(Record):
    """A quantile of single calls with its interval; null where so few samples have none."""

    q: float
    milliseconds: float | None
    low: float | None
    high: float | None


class LatencySeries(Record):
    """Single calls of one contestant, one part of them, at one batch size."""

    contestant: str
    part: str = Field(description="host, device (between events), decode, resize, model or total")
    batch: int
    deferral_rate: float | None = Field(description="share of rows that Stage B was made to answer; of a cascade alone")
    n: int
    enough: bool = Field(description="1,000 samples or more, which a p99 takes")
    mean: float = Field(description="milliseconds")
    quantiles: list[LatencyQuantile]
    milliseconds: list[float] = Field(description="every sample, in the order it was taken")

    def key(self) -> tuple[str, str, int, float | None]:
        """What it is a series of."""
        return self.contestant, self.part, self.batch, self.deferral_rate

    def quantile(self, q: float) -> LatencyQuantile:
        """One quantile; KeyError when it is not there."""
        for found in self.quantiles:
            if found.q == q:
                return found
        raise KeyError(q)


class ColdStart(Record):
    """A fresh process up to its first answer, milliseconds, medians over repeats."""

    cache: Literal["none", "empty", "kept"] = Field(description="of kernels compiled on this machine")
    repeats: int
    total: float = Field(description="from starting the process to its end")
    load: float = Field(description="verifying the bundle, starting the runtime, parity")
    first: float = Field(description="the first answer, by both stages")


class LatencyRatio(Record):
    """A quantile of one series over that of another; ``q`` null: means."""

    q: float | None
    ratio: float
    low: float
    high: float


QUANTILES = (0.5, 0.9, 0.95, 0.99)
# Fewer samples have no p99 to speak of.
ENOUGH = 1000
_REPLICATES = 1000
_BLOCKS = 50
_ANSWER_ONCE = "from stage1_pro.deploy.latency import answer_once; answer_once()"
Seconds = NDArray[np.float64]
# One call, told its number: the seconds of its parts.
Contestant = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Sampling:
    """How many calls are kept, ``samples`` or what ``limit`` seconds allow (ten always), after ``warmup`` seconds."""

    samples: int
    warmup: float
    limit: float
    seed: int = 0


def sample(contestants: Mapping[str, Contestant], how: Sampling) -> dict[str, dict[str, Seconds]]:
    """Seconds of single calls: contestant, then part, to [n].

    Contestants are called in rounds, each round in another order: a machine that slows down slows all of them, and
    the n-th samples of two contestants are neighbours in time.

    Args:
        contestants: name to call; each is warmed up by three calls at least.
        how: how many, and the seed of the orders.
    """
    for call in contestants.values():
        began, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - began < how.warmup:
            call(calls)
            calls += 1
    names, rng = list(contestants), np.random.default_rng(how.seed)
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(how.samples):
        if number >= 10 and time.perf_counter() - began > how.limit:
            break
        for index in rng.permutation(len(names)):
            found[names[index]].append(contestants[names[index]](number))
    return {name: {part: np.array([one[part] for one in calls]) for part in calls[0]} for name, calls in found.items()}


def quantiles(seconds: Seconds, *, level: float = 0.95, seed: int = 0) -> list[LatencyQuantile]:
    """p50, p90, p95 and p99 in milliseconds with intervals; null where fewer than one sample would lie above.

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
        found.append(
            LatencyQuantile(
                q=q,
                milliseconds=float(np.quantile(values, q)) if known else None,
                low=float(low) if known else None,
                high=float(high) if known else None,
            )
        )
    return found


def ratios(above: Seconds, below: Seconds, *, paired: bool, level: float = 0.95, seed: int = 0) -> list[LatencyRatio]:
    """Quantiles of one series over those of another, and the ratio of means (``q`` null), with intervals.

    Args:
        above: seconds [N].
        below: seconds [M].
        paired: the n-th samples are neighbours in time (of one ``sample``), and are resampled together.
        level: of the intervals.
        seed: of the resamples.
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


def series(contestant: str, part: str, batch: int, rate: float | None, seconds: Seconds, *, seed: int) -> LatencySeries:
    """The record of one series of samples."""
    return LatencySeries(
        contestant=contestant,
        part=part,
        batch=batch,
        deferral_rate=rate,
        n=len(seconds),
        enough=len(seconds) >= ENOUGH,
        mean=1e3 * float(seconds.mean()),
        quantiles=quantiles(seconds, seed=seed),
        milliseconds=[round(1e3 * float(value), 4) for value in seconds],
    )


# --------------------------------------------------------------------------------------------
# What is called


def deferrals(batch: int, rate: float, number: int, seed: int) -> NDArray[np.bool_]:
    """Which rows of the n-th batch exit: at every number so many have been deferred as the rate says, rounded down."""
    count = math.floor((number + 1) * rate * batch + 1e-9) - math.floor(number * rate * batch + 1e-9)
    exited = np.ones(batch, dtype=bool)
    exited[np.random.default_rng([seed, number]).permutation(batch)[:count]] = False
    return exited


def timed(runtime: Runtime, call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call on the host, and between events on the device where the runtime has one."""
    device = getattr(runtime, "device_seconds", None)
    began = time.perf_counter()
    call()
    seconds = {"host": time.perf_counter() - began}
    if device is not None:
        seconds["device"] = runtime.device_seconds - device  # type: ignore[attr-defined]
    return seconds


def decides(cascade: Cascade, pool: NDArray[np.float32], batch: int, rate: float, seed: int) -> Contestant:
    """The cascade on rotated rows of a pool [M, 3, H, W], with forced deferrals."""

    def call(number: int) -> Mapping[str, float]:
        pixels, exited = _rotated(pool, batch, number), deferrals(batch, rate, number, seed)
        return timed(cascade.runtime, lambda: cascade.decide(pixels, exited=exited))

    return call


def runs_stage_a(cascade: Cascade, pool: NDArray[np.float32], batch: int) -> Contestant:
    """Stage A alone on rotated rows."""

    def call(number: int) -> Mapping[str, float]:
        pixels = _rotated(pool, batch, number)
        return timed(cascade.runtime, lambda: cascade.runtime.run("stage_a", {"pixels": pixels}))

    return call


def passes(run: Callable[[NDArray[np.float32]], object], pool: NDArray[np.float32], batch: int) -> Contestant:
    """Anybody's full pass on rotated rows; the host waits for the answer."""

    def call(number: int) -> Mapping[str, float]:
        pixels = _rotated(pool, batch, number)
        began = time.perf_counter()
        run(pixels)
        return {"host": time.perf_counter() - began}

    return call


def answers(cascade: Cascade, photos: Sequence[bytes], rate: float, seed: int) -> Contestant:
    """One request a call: encoded bytes to a decision, with decoding, resizing and the model apart."""
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
    """JPEG bytes of coloured surfaces with grain: they cost a decoder about what a photo of their size does."""
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
# Cold start


def cold_starts(
    source: Path, runtime: str, *, repeats: int, threads: int, trust_engines: bool, device: str = "cpu"
) -> list[ColdStart]:
    """Start a fresh process that answers once; engines also with the kernels that an earlier start had kept.

    Every process has a cache folder of ours, so the user's own neither helps nor is touched.

    Raises:
        ArtifactError: the process could not answer; its last line says why.
    """
    arguments = json.dumps([str(source), runtime, threads, trust_engines, device])
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "kept") if runtime == "tensorrt_rtx" else ("none",):
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
                    raise ArtifactError(f"a fresh process must answer with {runtime}, got: {reason}")
                times.append([time.perf_counter() - began, *json.loads(done.stdout.splitlines()[-1])])
            total, load, first = (1e3 * float(np.median(column)) for column in np.array(times).T)
            found.append(ColdStart(cache=cache, repeats=repeats, total=total, load=load, first=first))
    return found


def answer_once() -> None:
    """Be the process of ``cold_starts``: load, answer one batch of noise, print both times as JSON."""
    source, runtime, threads, trust_engines, device = json.loads(sys.argv[1])
    began = time.perf_counter()
    if runtime == "torch":
        cascade = Cascade.from_run(source, threads=threads, device=device)
    else:
        cascade = Cascade.load(source, runtime, threads=threads, trust_engines=trust_engines)
    loaded = time.perf_counter()
    spec = cascade.bundle.preprocessing
    pixels = np.random.default_rng(0).normal(size=(1, 3, spec.height, spec.width)).astype(np.float32)
    cascade.decide(pixels, exited=np.zeros(1, dtype=bool))
    print(json.dumps([loaded - began, time.perf_counter() - loaded]))
