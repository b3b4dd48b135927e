"""``stage1 bench``: what an exit saves, what a service sees, and two results side by side, measured on this machine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.data.labels import gather
from stage1_pro.data.photos import read_file
from stage1_pro.data.splits import Splits
from stage1_pro.deploy import timing
from stage1_pro.deploy.bundle import MANIFEST
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.runtime import OF_RUNS, RUNTIMES, Arrays, FullPass, How, Runtime
from stage1_pro.errors import InputError, Stage1Error, nearest
from stage1_pro.files import write_bytes
from stage1_pro.metrics.figures import latency_png, speedup_png
from stage1_pro.metrics.selective import relative_cost
from stage1_pro.policies.softmax import softmax
from stage1_pro.progress import say
from stage1_pro.record import Record
from stage1_pro.words import StageName

if TYPE_CHECKING:
    from stage1_pro.commands.bench import BenchCascade, BenchLatency

QUICK = 50
PHOTO_SIZE = (1280, 720)
# A sample of bench cascade repeats its call for about this long.
VISIT_SECONDS = 0.02


# --------------------------------------------------------------------------------------------
# Records


class BenchTiming(Record):
    """One contestant of ``stage1 bench cascade`` at one batch size: medians over rounds, with quartiles."""

    contestant: Literal["stage_a", "stage_b", "always_both", "full_pass", "cascade"]
    n_deferred: int | None = Field(description="rows of the batch that Stage B was made to answer; of a cascade alone")
    deferral_rate: float | None
    milliseconds: float = Field(description="of one batch")
    milliseconds_low: float
    milliseconds_high: float
    images_per_second: float
    speedup: float = Field(description="time of the full pass in the same round / own time; higher is better")
    speedup_low: float
    speedup_high: float
    processor_speedup: float = Field(
        description="the same of processor time over all threads, which neighbours on a busy machine stretch less"
    )
    ideal: float | None = Field(description="speed-up if only blocks took time; null where nothing is left to run")
    of_ideal: float | None = Field(description="speed-up / ideal")


class BenchBatch(Record):
    """What ``stage1 bench cascade`` measured at one batch size."""

    batch: int
    timings: list[BenchTiming]
    shares: dict[str, float] = Field(
        description="of a full pass's time: embedding, blocks and heads; python: deciding and gathering of a batch "
        "with half its rows deferred, which comes on top"
    )


class CascadeBench(Record):
    """What ``stage1 bench cascade`` found: latency and throughput over batch sizes and deferral rates."""

    format_version: Literal[1] = 1
    source: str = Field(description="last name of the bundle's or run's folder")
    runtime: str
    backbone: str
    tap: int
    n_blocks: int
    height: int
    width: int
    inputs: str = Field(description="what the pixels were")
    rounds: int
    warmup: int = Field(description="calls of each before the first round")
    seed: int
    machine: dict[str, str | int | float | None]
    batches: list[BenchBatch]


class LatencyPart(Record):
    """One part of one contestant's calls at one batch size."""

    contestant: str
    part: str = Field(description="host, device (between events), decode, resize, model or total")
    batch: int
    deferral_rate: float | None = Field(description="share of rows that Stage B was made to answer; of a cascade alone")

    def key(self) -> tuple[str, str, int, float | None]:
        """What it is of, to find it in another result."""
        return self.contestant, self.part, self.batch, self.deferral_rate


class LatencySeries(LatencyPart):
    """Its single calls."""

    n: int
    enough: bool = Field(description="1,000 samples or more, which a p99 takes")
    mean: float = Field(description="milliseconds")
    quantiles: list[timing.LatencyQuantile]
    milliseconds: list[float] = Field(description="every sample, in the order it was taken")

    def quantile(self, q: float) -> timing.LatencyQuantile:
        """One quantile; KeyError when it is not there."""
        return {one.q: one for one in self.quantiles}[q]


class LatencyPeer(Record):
    """Another runtime's full pass on the same inputs at the same moment, over the cascade's time; above 1: slower."""

    name: str
    batch: int | None = Field(description="null where it was skipped")
    skipped: str | None
    logit: float | None = Field(None, description="largest difference from the cascade's own Stage B")
    prob: float | None = None
    flips: int | None = Field(None, description="rows it labels otherwise")
    to_cascade: list[timing.LatencyRatio] = Field([])
    to_full_pass: list[timing.LatencyRatio] = Field([], description="over this runtime's own full pass")


class LatencyThroughput(Record):
    """The cascade's throughput at one batch size, and whether its p99 keeps the budget; null without enough samples."""

    batch: int
    images_per_second: float
    p99: float | None
    within: bool | None


class LatencyBench(Record):
    """What ``stage1 bench latency`` found."""

    format_version: Literal[1] = 1
    source: str = Field(description="last name of the bundle's or run's folder")
    runtime: str = Field(description="what answered")
    steps: list[str] = Field(description="what was tried for it and why it stepped down")
    backbone: str
    tap: int
    n_blocks: int
    height: int
    width: int
    quick: bool = Field(description="fewer samples than a p99 takes, on purpose")
    samples: int = Field(description="asked for")
    limit: float = Field(description="seconds after which a series ends early")
    warmup: float = Field(description="milliseconds")
    deferral: float = Field(description="rate of requests, throughput and peers")
    budget: float = Field(description="milliseconds that p99 may take")
    inputs: str
    photos: str
    seed: int
    machine: dict[str, str | int | float | None]
    series: list[LatencySeries]
    cold: list[timing.ColdStart]
    throughput: list[LatencyThroughput]
    peers: list[LatencyPeer]


class LatencyDifference(LatencyPart):
    """One series of two results: the second over the first."""

    n: tuple[int, int]
    ratios: list[timing.LatencyRatio]


class LatencyComparison(Record):
    """What ``stage1 bench compare`` found: below 1 the second result is faster."""

    format_version: Literal[1] = 1
    first: str
    second: str
    level: float
    differences: list[LatencyDifference]
    cautions: list[str]


# --------------------------------------------------------------------------------------------
# bench cascade


def bench_cascade(asked: BenchCascade) -> CascadeBench:
    """Measure latency and throughput of both stages, always both, a full pass and the cascade beside its ideal.

    A speed-up is the time of the full pass (one graph, pixels to Stage B's answer) over the contestant's own in the
    same round; the ideal counts blocks only: 1 / (k/L + (1 - exit rate)(1 - k/L)). Pixels are ``val_select`` images of
    the run where they can be read, else noise by seed.

    Raises:
        InputError: both or neither of bundle and run, or a number out of range.
        ArtifactError: a damaged bundle or an incomplete run.
        DependencyError: torch, or onnx to join the graphs, is missing.
    """
    if asked.bundle is not None and asked.run is not None:
        raise InputError("bench must get --bundle or --run, got both; name one")
    _check(asked, rounds=(asked.rounds, 1), threads=(asked.threads, 0))
    cascade = _subject(asked).load()
    pixels, inputs = _pixels(cascade, asked.run, max(asked.batch), asked.seed)
    facts = timing.machine(cascade.runtime.name, asked.threads)
    batches = []
    for size in dict.fromkeys(asked.batch):
        say(f"batch {size}: {asked.rounds} rounds")
        batches.append(bench_batch(cascade, pixels[:size], asked.rates, rounds=asked.rounds, seed=asked.seed))
    found = CascadeBench(
        **_what(asked, cascade), inputs=inputs, rounds=asked.rounds, warmup=timing.WARMUP_CALLS, seed=asked.seed,
        machine=facts, batches=batches,
    )  # fmt: skip
    if asked.out is not None:
        _keep(found, Path(asked.out), "cascade", draw_cascade(found))
    return found


def bench_batch(
    cascade: Cascade, pixels: NDArray[np.float32], rates: Sequence[float], *, rounds: int, seed: int
) -> BenchBatch:
    """Time the stages, always both, a full pass and the cascade at forced deferral rates on one batch.

    The full pass is one graph from pixels to Stage B's answer; the cascade is ``Cascade.decide`` with the rows that
    exit forced upon it: exactly ``round(rate * N)`` others of pixels [N, 3, H, W] are deferred, drawn once by seed.
    Rates that defer as many rows are measured once.
    """
    runtime, n = cascade.runtime, len(pixels)
    first = runtime.run("stage_a", {"pixels": pixels})
    rng = np.random.default_rng([seed, n])
    exited = {count: timing.all_but(count, n, rng) for count in sorted({math.floor(rate * n + 0.5) for rate in rates})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full = runtime.full_pass(folder)
        calls: dict[str, Callable[[], object]] = {
            "stage_a": partial(runtime.run, "stage_a", {"pixels": pixels}),
            "stage_b": partial(runtime.run, "stage_b", {"hidden": first["hidden"]}),
            "always_both": lambda: runtime.run(
                "stage_b", {"hidden": runtime.run("stage_a", {"pixels": pixels})["hidden"]}
            ),
            "full_pass": partial(full, pixels),
            **{f"cascade {count}": partial(cascade.decide, pixels, exited=rows) for count, rows in exited.items()},
        }
        how = timing.Sampling(rounds, visit=VISIT_SECONDS, seed=seed)
        seconds = timing.sample({name: timing.clocks(call) for name, call in calls.items()}, how, f"batch {n}")
        whole = float(np.median(seconds["full_pass"]["wall"]))
        shares = runtime.shares(pixels, folder, whole)
    if shares:
        shares["blocks"] = 1 - shares["embedding"] - shares["heads"]
    replayed = Cascade(cascade.bundle, _Replay(first, runtime.run("stage_b", {"hidden": first["hidden"]})["logits"]))
    shares["python"] = timing.median_seconds(partial(replayed.decide, pixels, exited=np.arange(n) % 2 == 1), 50) / whole
    tap, n_blocks = cascade.bundle.tap, cascade.bundle.backbone.n_blocks
    timings = [_timing(name, n, parts, seconds["full_pass"], tap, n_blocks) for name, parts in seconds.items()]
    return BenchBatch(batch=n, timings=timings, shares=shares)


def _timing(
    label: str, n: int, own: Mapping[str, timing.Seconds], base: Mapping[str, timing.Seconds], tap: int, n_blocks: int
) -> BenchTiming:
    """One contestant's medians and quartiles, and what blocks alone would allow it."""
    name, _, number = label.partition(" ")
    count = int(number) if number else None
    if count is not None:
        ideal: float | None = float(1 / relative_cost(1 - count / n, tap, n_blocks))
    elif name == "stage_b":
        # It has nothing to do when both stages share the last block.
        ideal = n_blocks / (n_blocks - tap) if tap < n_blocks else None
    else:
        ideal = n_blocks / tap if name == "stage_a" else 1.0
    low, middle, high = (float(value) for value in np.quantile(own["wall"], (0.25, 0.5, 0.75)))
    slow, ratio, fast = (float(value) for value in np.quantile(base["wall"] / own["wall"], (0.25, 0.5, 0.75)))
    return BenchTiming.model_validate({
        "contestant": name,
        "n_deferred": count, "deferral_rate": None if count is None else count / n,
        "milliseconds": 1e3 * middle, "milliseconds_low": 1e3 * low, "milliseconds_high": 1e3 * high,
        "images_per_second": n / middle, "speedup": ratio, "speedup_low": slow, "speedup_high": fast,
        "processor_speedup": float(np.median(base["processor"] / own["processor"])),
        "ideal": ideal, "of_ideal": None if ideal is None else ratio / ideal,
    })  # fmt: skip


class _Replay(Runtime):
    """A runtime that gives stored outputs at once: what is left of a batch is Python and NumPy."""

    name = "replay"

    def __init__(self, first: Arrays, logits_b: NDArray[np.float32]) -> None:
        self._first, self._logits_b = first, logits_b

    @classmethod
    def open(cls, model: Any, how: How) -> _Replay:
        del how
        return cls(*model)

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Outputs by name; Stage B's are of as many rows as came in."""
        return self._first if stage == "stage_a" else {"logits": self._logits_b[: len(inputs["hidden"])]}


def draw_cascade(found: CascadeBench) -> bytes:
    """The cascade's speed-up against its exit rate, a line a batch size, beside the ideal; PNG bytes."""
    measured = {
        f"batch {one.batch}": [(1 - (t.deferral_rate or 0), t.speedup, t.speedup_low, t.speedup_high)
                               for t in one.timings if t.contestant == "cascade"]
        for one in found.batches
    }  # fmt: skip
    return speedup_png(measured, tap=found.tap, n_blocks=found.n_blocks)


# --------------------------------------------------------------------------------------------
# bench latency


def bench_latency(asked: BenchLatency) -> LatencyBench:
    """Measure latency by single calls: stages, deferral rates, requests from bytes on, cold starts, peers.

    Every series is of single calls on rotated inputs after warming up; contestants of one batch size are called turn
    about. Rows that defer are forced, exactly as many as the rate says over time, through the code that decides.

    Raises:
        InputError: neither bundle nor run, or a value out of range.
        ArtifactError: a damaged bundle, or nothing gives its reference outputs.
        DependencyError: the named runtime lacks a library, a driver or a GPU.
    """
    samples = min(asked.samples, QUICK) if asked.quick else asked.samples
    _check_latency(asked, samples)
    subject = _subject(asked, asked.trust_engines, asked.device)
    from stage1_pro.commands.doctor import gpus

    facts = timing.machine(subject.runtime, asked.threads) | {"gpu": ", ".join(gpus()) or None}
    cascade = subject.load()
    spec = cascade.bundle.preprocessing
    # Twice the largest batch: what a call reads is not what the last one left in the caches.
    shape = (max(16, 2 * max(asked.batch)), 3, spec.height, spec.width)
    pool = np.random.default_rng(asked.seed).normal(size=shape).astype(np.float32)
    encoded, photos = _photos(asked.photos, asked.seed)
    say(f"cold start with {cascade.runtime.name}")
    cold = timing.cold_starts(replace(subject, runtime=cascade.runtime.name), repeats=1 if asked.quick else 3)
    how = timing.Sampling(samples, asked.warmup / 1e3, asked.limit, seed=asked.seed)
    found: list[LatencySeries] = []
    peers: list[LatencyPeer] = []
    for size in dict.fromkeys(asked.batch):
        found += _of_batch(cascade, pool, size, asked.rates, how)
        peers += _against(cascade, asked, pool, size, how)
    say("bytes to decision")
    requests = {"request": timing.answers(cascade, encoded, asked.deferral, asked.seed)}
    for part, values in timing.sample(requests, how, "requests")["request"].items():
        found.append(_series("request", part, 1, asked.deferral, values, how.seed))
    result = LatencyBench(
        **_what(asked, cascade), steps=[str(step) for step in cascade.steps], quick=asked.quick, samples=samples,
        limit=asked.limit, warmup=asked.warmup, deferral=asked.deferral, budget=asked.budget,
        inputs=f"noise of seed {asked.seed}, rotated", photos=photos, seed=asked.seed, machine=facts, series=found,
        cold=cold, throughput=_throughput(found, asked.deferral, asked.budget), peers=peers,
    )  # fmt: skip
    if asked.out is not None:
        _keep(result, Path(asked.out), "latency", draw_latency(result))
    return result


def _of_batch(
    cascade: Cascade, pool: NDArray[np.float32], size: int, rates: Sequence[float], how: timing.Sampling
) -> list[LatencySeries]:
    """Stage A and the cascade at every deferral rate, called turn about at one batch size."""
    say(f"batch {size}")
    runtime = cascade.runtime
    contestants = {"stage_a": timing.passes(lambda rows: runtime.run("stage_a", {"pixels": rows}), pool, size, runtime)}
    rate_of = {f"cascade {rate}": rate for rate in rates}
    for label, rate in rate_of.items():
        contestants[label] = timing.decides(cascade, pool, size, rate, how.seed)
    return [
        _series(label.split()[0], part, size, rate_of.get(label), values, how.seed)
        for label, parts in timing.sample(contestants, how, f"batch {size}").items()
        for part, values in parts.items()
    ]


def _series(
    contestant: str, part: str, batch: int, rate: float | None, seconds: timing.Seconds, seed: int
) -> LatencySeries:
    return LatencySeries(
        contestant=contestant, part=part, batch=batch, deferral_rate=rate, n=len(seconds),
        enough=len(seconds) >= timing.ENOUGH, mean=1e3 * float(seconds.mean()),
        quantiles=timing.quantiles(seconds, seed=seed),
        milliseconds=[round(1e3 * float(value), 4) for value in seconds],
    )  # fmt: skip


def _throughput(found: Sequence[LatencySeries], deferral: float, budget: float) -> list[LatencyThroughput]:
    """Of the cascade at the measured rate that is nearest to the one asked for."""
    hosts = [one for one in found if one.contestant == "cascade" and one.part == "host"]
    nearest_rate = min((one.deferral_rate or 0.0 for one in hosts), key=lambda rate: abs(rate - deferral))
    result = []
    for one in hosts:
        if one.deferral_rate == nearest_rate:
            p99 = one.quantile(0.99).milliseconds if one.enough else None
            within, rate = None if p99 is None else p99 <= budget, 1e3 * one.batch / one.mean
            result.append(LatencyThroughput(batch=one.batch, images_per_second=rate, p99=p99, within=within))
    return result


def peers() -> list[str]:
    """Whose full pass can be measured beside the cascade: every runtime of bundles, torch eager and compiled."""
    return [*(name for name in RUNTIMES if name != OF_RUNS), "torch-eager", "torch-compile"]


def _against(
    cascade: Cascade, asked: BenchLatency, pool: NDArray[np.float32], size: int, how: timing.Sampling
) -> Iterator[LatencyPeer]:
    """Peers on the same rotated inputs, called turn about with the cascade and its own full pass."""
    if not asked.against:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls: dict[str, FullPass] = {}
        for peer in dict.fromkeys(asked.against):
            try:
                calls[peer] = _peer(peer, cascade, asked, folder / peer)
                calls[peer](pool[:size])
            except Exception as error:  # noqa: BLE001 - a compiler that fails is a result here, whatever it raises
                lines = str(error).strip().splitlines() or [type(error).__name__]
                calls.pop(peer, None)
                yield LatencyPeer(name=peer, batch=None, skipped=lines[0][:200])
        ours = cascade.runtime.full_pass(folder)
        contestants = {name: timing.passes(call, pool, size) for name, call in calls.items()}
        contestants["full_pass"] = timing.passes(ours, pool, size)
        contestants["cascade"] = timing.decides(cascade, pool, size, asked.deferral, how.seed)
        measured = {
            name: parts["host"] for name, parts in timing.sample(contestants, how, f"peers, batch {size}").items()
        }
        expected = np.asarray(ours(pool[:size]))
        for peer, call in calls.items():
            logits = np.asarray(call(pool[:size]))
            yield LatencyPeer(
                name=peer, batch=size, skipped=None,
                logit=float(np.abs(logits - expected).max()),
                prob=float(np.abs(softmax(logits) - softmax(expected)).max()),
                flips=int((logits.argmax(1) != expected.argmax(1)).sum()),
                to_cascade=timing.ratios(measured[peer], measured["cascade"], paired=True),
                to_full_pass=timing.ratios(measured[peer], measured["full_pass"], paired=True),
            )  # fmt: skip


def _peer(name: str, cascade: Cascade, asked: BenchLatency, folder: Path) -> FullPass:
    """A full pass from pixels to Stage B's logits; Stage1Error says why there is none."""
    folder.mkdir()
    if not name.startswith("torch-"):
        here = cascade
        if cascade.runtime.name != name:
            own = cascade.bundle.path
            path = own if (own / MANIFEST).is_file() else Path(str(asked.run)) / "bundle"
            here = timing.Subject(path, name, asked.threads, asked.trust_engines).load()
        return here.runtime.full_pass(folder)
    if asked.run is None:
        raise InputError("a bundle holds no weights torch could load; name --run as well")
    trained = timing.Subject(Path(asked.run), OF_RUNS, asked.threads, device=asked.device).load()
    from stage1_pro.deploy.trained import TorchRuntime

    assert isinstance(trained.runtime, TorchRuntime)
    if trained.bundle.positive != cascade.bundle.positive or trained.bundle.tap != cascade.bundle.tap:
        raise InputError(f"the run {asked.run} holds another model than the bundle; name the one it was exported from")
    return trained.runtime.full_pass(folder) if name == "torch-eager" else trained.runtime.compiled_full_pass()


def draw_latency(found: LatencyBench) -> bytes:
    """The cascade's p50 and p99 against the deferral rate, a line a batch size; PNG bytes."""
    measured: dict[str, list[tuple[float, float, float, float, float | None]]] = {}
    for one in found.series:
        middle = one.quantile(0.5)
        if one.contestant == "cascade" and one.part == "host" and one.deferral_rate is not None:
            p50, low, high = (value or 0.0 for value in (middle.milliseconds, middle.low, middle.high))
            point = one.deferral_rate, p50, low, high, one.quantile(0.99).milliseconds
            measured.setdefault(f"batch {one.batch}", []).append(point)
    return latency_png(measured)


# --------------------------------------------------------------------------------------------
# bench compare


def compare_latency(
    first: Path | str, second: Path | str, *, level: float = 0.95, seed: int = 0, out: Path | str | None = None
) -> LatencyComparison:
    """Say how many times the time of one result another takes: quantiles and means, with bootstrap intervals.

    ``first`` and ``second`` are ``latency.json`` files; below 1 the second is faster. ``out`` is a JSON file to write.

    Raises:
        InputError: nothing was measured in both, or ``level`` is outside (0, 1).
        ArtifactError: one of them is no latency result.
    """
    if not 0 < level < 1:
        raise InputError(f"level must be in (0, 1), got {level}; .95 is usual")
    a, b = (LatencyBench.read(path) for path in (first, second))
    theirs = {one.key(): one for one in b.series}
    differences = [
        LatencyDifference(
            contestant=one.contestant, part=one.part, batch=one.batch, deferral_rate=one.deferral_rate,
            n=(one.n, theirs[one.key()].n),
            ratios=timing.ratios(
                np.array(theirs[one.key()].milliseconds), np.array(one.milliseconds),
                paired=False, level=level, seed=seed,
            ),
        )
        for one in a.series
        if one.key() in theirs
    ]  # fmt: skip
    if not differences:
        raise InputError("results must have a series in common, got none; measure the same batches and rates")
    cautions = [
        f"{name} differs: {ours} and {others}"
        for name, ours, others in (
            ("processor", a.machine.get("processor"), b.machine.get("processor")),
            ("threads", a.machine.get("threads"), b.machine.get("threads")),
            ("input", f"{a.width} x {a.height}", f"{b.width} x {b.height}"),
            ("photos", a.photos, b.photos),
            ("backbone", f"{a.backbone}, tap {a.tap}", f"{b.backbone}, tap {b.tap}"),
        )
        if ours != others
    ]
    cautions.append("measured one after the other: intervals know nothing of a machine that was busier the second time")
    names = [f"{Path(path).name}: {one.source}, {one.runtime}" for path, one in ((first, a), (second, b))]
    found = LatencyComparison(first=names[0], second=names[1], level=level, differences=differences, cautions=cautions)
    if out is not None:
        found.write(out)
        say(f"wrote {out}")
    return found


# --------------------------------------------------------------------------------------------
# Shared


def _subject(asked: BenchCascade | BenchLatency, trust_engines: bool = False, device: str = "cpu") -> timing.Subject:
    """What is measured: the bundle, or the run in torch, or the run's bundle in the runtime that is named."""
    bundle, run = asked.bundle, asked.run
    if bundle is None and run is None:
        raise InputError("bench must get --bundle or --run, got neither; name one")
    name = asked.runtime or (OF_RUNS if bundle is None else "onnxruntime")
    RUNTIMES.check(name, also=("auto",))
    if name == OF_RUNS and run is None:
        raise InputError("runtime must not be torch for a bundle, which holds no weights torch could load; name --run")
    source = Path(str(bundle if bundle is not None else run))
    if name == OF_RUNS:
        source = Path(str(run))
    elif bundle is None:
        source /= "bundle"
        if not source.is_dir():
            raise InputError(
                f"runtime must be torch for the run {run}, got '{name}', which needs its bundle; "
                f"run `stage1 export --run {run}` first"
            )
    return timing.Subject(source, name, asked.threads, trust_engines, device)


def _what(asked: BenchCascade | BenchLatency, cascade: Cascade) -> dict[str, Any]:
    """What both results say of what was measured."""
    spec, source = cascade.bundle.preprocessing, Path(str(asked.run if asked.bundle is None else asked.bundle))
    return {
        "source": source.resolve().name,
        "runtime": cascade.runtime.name,
        "backbone": cascade.bundle.backbone.source,
        "tap": cascade.bundle.tap,
        "n_blocks": cascade.bundle.backbone.n_blocks,
        "height": spec.height,
        "width": spec.width,
    }


def _check(asked: BenchCascade | BenchLatency, **least: tuple[float, float]) -> None:
    """Check batch sizes, rates, the folder to write, and numbers by name with the least each may be."""
    batch, rates, out = asked.batch, asked.rates, asked.out
    if not batch or min(batch) < 1:
        raise InputError(f"batch must be one or more sizes of 1 or more, got {list(batch)}; 1 8 64 is usual")
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"rates must be one or more shares in [0, 1], got {list(rates)}; 0 .3 1, for example")
    for name, (value, smallest) in least.items():
        if not value >= smallest:
            raise InputError(f"{name} must be {smallest} or more, got {value}")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {out}")


def _check_latency(asked: BenchLatency, samples: int) -> None:
    _check(asked, samples=(samples, 10), warmup=(asked.warmup, 0), threads=(asked.threads, 0))
    if not 0 <= asked.deferral <= 1:
        raise InputError(f"deferral must be a share in [0, 1], got {asked.deferral}; .3 is usual")
    for name, number in (("limit", asked.limit), ("budget", asked.budget)):
        if not number > 0:
            raise InputError(f"{name} must be above 0, got {number}")
    for peer in asked.against:
        if peer not in peers():
            raise InputError(f"against must be among {', '.join(peers())}, got '{peer}'{nearest(peer, peers())}")


def _pixels(cascade: Cascade, run: Path | str | None, n: int, seed: int) -> tuple[NDArray[np.float32], str]:
    """Inputs [n, 3, H, W] and what they are: the run's ``val_select`` images, going round, or noise."""
    spec = cascade.bundle.preprocessing
    images: list[NDArray[np.float32]] = []
    if run is not None:
        try:
            splits = Splits.read(Path(run) / "splits.json")
            images = [cascade.pixels(photo) for photo in splits.photos_of(splits.of("val_select")[:n])]
        except Stage1Error as error:
            say(f"measuring on noise: {error}")
    if images:
        chosen = np.arange(n) % len(images)
        return np.stack(images)[chosen], f"{min(n, len(images))} val_select images"
    shape = (n, 3, spec.height, spec.width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32), f"noise of seed {seed}"


def _photos(source: Path | str | None, seed: int) -> tuple[list[bytes], str]:
    """Encoded photos and what they are."""
    if source is None:
        width, height = PHOTO_SIZE
        return timing.draw_photos(8, PHOTO_SIZE, seed), f"8 drawn JPEGs of {width} x {height}, quality 90, seed {seed}"
    files = [file for _, file in gather([source]).files][:64]
    return [read_file(file) for file in files], f"{len(files)} of {Path(source).resolve().name}"


def _keep(found: Record, folder: Path, name: str, picture: bytes) -> None:
    found.write(folder / f"{name}.json")
    write_bytes(folder / f"{name}.png", picture)
    say(f"wrote {folder / f'{name}.json'} and {folder / f'{name}.png'}")
