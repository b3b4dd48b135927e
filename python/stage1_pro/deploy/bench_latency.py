"""bench latency and bench compare: what a service would see on this machine, and two results side by side."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stage1_pro.commands.doctor import gpus
from stage1_pro.data.listing import gather
from stage1_pro.deploy.bench import full_pass, machine
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.latency import (
    Contestant,
    LatencyQuantile,
    LatencySeries,
    Sampling,
    answers,
    cold_starts,
    decides,
    draw_photos,
    passes,
    ratios,
    runs_stage_a,
    sample,
    series,
)
from stage1_pro.deploy.start import RUNTIMES
from stage1_pro.errors import InputError, nearest
from stage1_pro.files import write_bytes
from stage1_pro.metrics.figures import latency_png
from stage1_pro.policies.softmax import softmax
from stage1_pro.progress import say

if TYPE_CHECKING:
    from rich.table import Table
from typing import Literal

from pydantic import Field

from stage1_pro.deploy.latency import ColdStart, LatencyRatio
from stage1_pro.record import Record


class LatencyPeer(Record):
    """Another runtime's full pass on the same inputs at the same moment, over the cascade's time; above 1: slower."""

    name: str
    batch: int | None = Field(description="null where it was skipped")
    skipped: str | None
    logit: float | None = Field(None, description="largest difference from the cascade's own Stage B")
    prob: float | None = None
    flips: int | None = Field(None, description="rows it labels otherwise")
    to_cascade: list[LatencyRatio] = Field([])
    to_full_pass: list[LatencyRatio] = Field([], description="over this runtime's own full pass")


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
    cold: list[ColdStart]
    throughput: list[LatencyThroughput]
    peers: list[LatencyPeer]


class LatencyDifference(Record):
    """One series of two results: the second over the first."""

    contestant: str
    part: str
    batch: int
    deferral_rate: float | None
    n: tuple[int, int]
    ratios: list[LatencyRatio]


class LatencyComparison(Record):
    """What ``stage1 bench compare`` found: below 1 the second result is faster."""

    format_version: Literal[1] = 1
    first: str
    second: str
    level: float
    differences: list[LatencyDifference]
    cautions: list[str]


BATCHES = (1, 8, 64)
RATES = (0.0, 0.1, 0.3, 0.5, 1.0)
PEERS = ("onnxruntime", "torch-eager", "torch-compile")
QUICK = 50
PHOTO_SIZE = (1280, 720)
Full = Callable[[NDArray[np.float32]], object]


def bench_latency(
    bundle: Path | str | None = None,
    *,
    run: Path | str | None = None,
    runtime: str | None = None,
    batch: Sequence[int] = BATCHES,
    rates: Sequence[float] = RATES,
    samples: int = 1000,
    warmup: float = 200,
    limit: float = 30,
    quick: bool = False,
    deferral: float = 0.3,
    budget: float = 50,
    photos: Path | str | None = None,
    against: Sequence[str] = (),
    threads: int = 0,
    seed: int = 0,
    trust_engines: bool = False,
    device: str = "cpu",
    out: Path | str | None = None,
) -> LatencyBench:
    """Measure latency by single calls: stages, deferral rates, requests from bytes on, cold starts, peers.

    Every series is of single calls on rotated inputs after warming up; contestants of one batch size are called turn
    about. Rows that defer are forced, exactly as many as the rate says over time, through the code that decides.

    Args:
        bundle: bundle folder; with ``run`` as well, torch peers take that run's weights.
        run: trained and calibrated run folder; alone, it is measured in torch, or on its bundle by ``runtime``.
        runtime: as ``Cascade.load`` takes it, or ``torch``; onnxruntime for a bundle, torch for a run by default.
        batch: batch sizes.
        rates: deferral rates in [0, 1].
        samples: calls of each; a p99 takes 1,000.
        warmup: milliseconds of each before the first call that counts.
        limit: seconds after which the contestants of one batch size are through, though samples are missing.
        quick: 50 samples and one cold start, and no p99.
        deferral: rate of requests, of the throughput and of peers.
        budget: milliseconds that the p99 of a batch may take.
        photos: image, folder or CSV of encoded photos to answer from; drawn JPEGs of 1280 x 720 when None.
        against: of ``PEERS``: their full passes on the same inputs at the same time.
        threads: threads of an operator; 0 = as the runtime has them.
        seed: of orders, noise, drawn photos, deferred rows and resamples.
        trust_engines: run engines that were neither built here nor signed by a trusted key.
        device: of torch, ``cpu`` or ``cuda``, for a run as for torch peers.
        out: folder for ``latency.json`` and ``latency.png``.

    Raises:
        InputError: neither bundle nor run, or a value out of range.
        ArtifactError: a damaged bundle, or nothing gives its reference outputs.
        DependencyError: the named runtime lacks a library, a driver or a GPU.
    """
    samples = min(samples, QUICK) if quick else samples
    _check(bundle, run, batch, rates, samples, warmup, limit, deferral, budget, against, threads, out)
    name, source = _what(bundle, run, runtime)
    facts = machine(name, threads) | {"gpu": ", ".join(gpus()) or None}
    if name == "torch":
        cascade = Cascade.from_run(source, threads=threads, device=device)
    else:
        cascade = Cascade.load(source, name, threads=threads, trust_engines=trust_engines)
    spec = cascade.bundle.preprocessing
    # Twice the largest batch: what a call reads is not what the last one left in the caches.
    shape = (max(16, 2 * max(batch)), 3, spec.height, spec.width)
    pool = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    encoded, what = _photos(photos, seed)
    say(f"cold start with {cascade.runtime.name}")
    cold = cold_starts(
        source,
        cascade.runtime.name,
        repeats=1 if quick else 3,
        threads=threads,
        trust_engines=trust_engines,
        device=device,
    )
    found: list[LatencySeries] = []
    peers: list[LatencyPeer] = []
    how = Sampling(samples, warmup / 1e3, limit, seed)
    for size in dict.fromkeys(batch):
        say(f"batch {size}")
        contestants: dict[tuple[str, float | None], Contestant] = {("stage_a", None): runs_stage_a(cascade, pool, size)}
        contestants |= {("cascade", rate): decides(cascade, pool, size, rate, seed) for rate in dict.fromkeys(rates)}
        # Sampled under names, which orders are drawn over.
        names = {f"{kind} {rate}": (kind, rate) for kind, rate in contestants}
        measured = sample({label: contestants[key] for label, key in names.items()}, how)
        for label, (kind, rate) in names.items():
            found += [series(kind, part, size, rate, values, seed=seed) for part, values in measured[label].items()]
        peers += list(_against(cascade, run, against, pool, size, deferral, threads, device, how))
    say("bytes to decision")
    request = sample({"request": answers(cascade, encoded, deferral, seed)}, how)["request"]
    found += [series("request", part, 1, deferral, values, seed=seed) for part, values in request.items()]
    result = LatencyBench(
        source=source.resolve().name,
        runtime=cascade.runtime.name,
        steps=[str(step) for step in cascade.steps],
        backbone=cascade.bundle.backbone.source,
        tap=cascade.bundle.tap,
        n_blocks=cascade.bundle.backbone.n_blocks,
        height=spec.height,
        width=spec.width,
        quick=quick,
        samples=samples,
        limit=limit,
        warmup=warmup,
        deferral=deferral,
        budget=budget,
        inputs=f"noise of seed {seed}, rotated",
        photos=what,
        seed=seed,
        machine=facts,
        series=found,
        cold=cold,
        throughput=_throughput(found, deferral, budget),
        peers=peers,
    )
    if out is not None:
        result.write(Path(out) / "latency.json")
        write_bytes(Path(out) / "latency.png", draw(result))
        say(f"wrote {Path(out) / 'latency.json'} and {Path(out) / 'latency.png'}")
    return result


def compare_latency(
    first: Path | str, second: Path | str, *, level: float = 0.95, seed: int = 0, out: Path | str | None = None
) -> LatencyComparison:
    """Say how many times the time of one result another takes: quantiles and means, with bootstrap intervals.

    Args:
        first: ``latency.json`` of what is compared with.
        second: ``latency.json`` that is judged; below 1 it is faster.
        level: of the intervals.
        seed: of the resamples.
        out: JSON file to write.

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
            ratios=ratios(
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
    names = (f"{Path(path).name}: {one.source}, {one.runtime}" for path, one in ((first, a), (second, b)))
    found = LatencyComparison(
        first=next(names), second=next(names), level=level, differences=differences, cautions=cautions
    )
    if out is not None:
        found.write(out)
        say(f"wrote {out}")
    return found


def draw(found: LatencyBench) -> bytes:
    """The cascade's p50 and p99 against the deferral rate, a line a batch size; PNG bytes."""
    measured: dict[str, list[tuple[float, float, float, float, float | None]]] = {}
    for one in found.series:
        middle = one.quantile(0.5)
        if one.contestant == "cascade" and one.part == "host" and one.deferral_rate is not None:
            p50, low, high = (value or 0.0 for value in (middle.milliseconds, middle.low, middle.high))
            point = one.deferral_rate, p50, low, high, one.quantile(0.99).milliseconds
            measured.setdefault(f"batch {one.batch}", []).append(point)
    return latency_png(measured)


def render(found: LatencyBench) -> str:
    """Tables for people."""
    buffer = io.StringIO()
    console = _console(buffer)
    console.print(
        f"{found.source}: {found.backbone} at {found.height} x {found.width}, tap {found.tap} of {found.n_blocks} "
        f"blocks; {found.runtime}, {found.inputs}"
    )
    for step in found.steps:
        console.print(f"  {step}")
    short = sorted({one.n for one in found.series if not one.enough})
    if found.quick:
        console.print(f"quick: {found.samples} samples each, too few for a p99")
    elif short:
        console.print(
            f"some series have {short[0]} to {short[-1]} of {found.samples} samples: --limit {found.limit:g} s was up"
        )
    table = _table("milliseconds [95% interval]", ("what", "batch", "deferred", "n"), ("p50", "p90", "p95", "p99"))
    for one in found.series:
        rate = "" if one.deferral_rate is None else f"{one.deferral_rate:.0%}"
        cells = [_cell(one.quantile(q)) for q in (0.5, 0.9, 0.95, 0.99)]
        table.add_row(f"{one.contestant}, {one.part}", str(one.batch), rate, str(one.n), *cells)
    console.print(table)
    console.print(f"requests are single photos from encoded bytes on: {found.photos}")
    table = _table("cold start, ms", ("cached kernels",), ("fresh process", "load, parity", "first answer"))
    for cold in found.cold:
        table.add_row(cold.cache, f"{cold.total:.0f}", f"{cold.load:.0f}", f"{cold.first:.1f}")
    console.print(table)
    table = _table(
        f"throughput at {found.deferral:.0%} deferred, p99 within {found.budget:g} ms", ("batch",),
        ("images/s", "p99, ms", "within"),
    )  # fmt: skip
    for rate_at in found.throughput:
        p99 = "-" if rate_at.p99 is None else f"{rate_at.p99:.2f}"
        within = {True: "yes", False: "no", None: "not known"}[rate_at.within]
        table.add_row(str(rate_at.batch), f"{rate_at.images_per_second:.1f}", p99, within)
    console.print(table)
    if found.peers:
        table = _table(
            "peers' full pass on the same inputs, their time over ours", ("peer", "batch"),
            ("to cascade, p50", "to full pass, p50", "logit", "prob", "flips"),
        )  # fmt: skip
        for peer in found.peers:
            if peer.skipped is not None:
                table.add_row(peer.name, f"skipped: {peer.skipped}")
                continue
            both = [
                next((f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in one if r.q == 0.5), "-")
                for one in (peer.to_cascade, peer.to_full_pass)
            ]
            table.add_row(
                peer.name, str(peer.batch), *both, f"{peer.logit:.1g}", f"{peer.prob:.1g}", str(peer.flips)
            )  # fmt: skip
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in found.machine.items()))
    return buffer.getvalue().rstrip()


def render_comparison(found: LatencyComparison) -> str:
    """A table for people."""
    buffer = io.StringIO()
    console = _console(buffer)
    console.print(f"{found.second}\nover\n{found.first}; below 1 the former is faster")
    title = f"ratio [{found.level:.0%} interval]"
    table = _table(title, ("what", "batch", "deferred"), ("mean", "p50", "p95", "p99"))
    for one in found.differences:
        cells = {r.q: f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in one.ratios}
        rate = "" if one.deferral_rate is None else f"{one.deferral_rate:.0%}"
        shown = [cells.get(q, "-") for q in (None, 0.5, 0.95, 0.99)]
        table.add_row(f"{one.contestant}, {one.part}", str(one.batch), rate, *shown)
    console.print(table)
    for caution in found.cautions:
        console.print(f"caution: {caution}")
    return buffer.getvalue().rstrip()


def _console(buffer: io.StringIO):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from rich.console import Console

    return Console(file=buffer, width=130, color_system=None, highlight=False, markup=False)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell(found: LatencyQuantile) -> str:
    if found.milliseconds is None:
        return "-"
    return f"{found.milliseconds:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _check(
    bundle: Path | str | None,
    run: Path | str | None,
    batch: Sequence[int],
    rates: Sequence[float],
    samples: int,
    warmup: float,
    limit: float,
    deferral: float,
    budget: float,
    against: Sequence[str],
    threads: int,
    out: Path | str | None,
) -> None:
    if bundle is None and run is None:
        raise InputError("bench must get --bundle or --run, got neither; name one")
    check_sizes(batch, rates)
    if not 0 <= deferral <= 1:
        raise InputError(f"deferral must be a share in [0, 1], got {deferral}; .3 is usual")
    for name, value, least in (("samples", samples, 10), ("warmup", warmup, 0), ("threads", threads, 0)):
        if not value >= least:
            raise InputError(f"{name} must be {least} or more, got {value}")
    for name, number in (("limit", limit), ("budget", budget)):
        if not number > 0:
            raise InputError(f"{name} must be above 0, got {number}")
    for peer in against:
        if peer not in PEERS:
            raise InputError(f"against must be among {', '.join(PEERS)}, got '{peer}'{nearest(peer, PEERS)}")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {out}")


def check_sizes(batch: Sequence[int], rates: Sequence[float]) -> None:
    """Raise InputError unless there are batch sizes of 1 or more, and deferral rates that are shares."""
    if not batch or min(batch) < 1:
        raise InputError(f"batch must be one or more sizes of 1 or more, got {list(batch)}; 1 8 64 is usual")
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"rates must be one or more shares in [0, 1], got {list(rates)}; 0 .3 1, for example")


def _what(bundle: Path | str | None, run: Path | str | None, runtime: str | None) -> tuple[str, Path]:
    """The runtime's name and the folder it starts from."""
    name = runtime or ("onnxruntime" if bundle is not None else "torch")
    if name not in RUNTIMES:
        raise InputError(f"runtime must be one of {', '.join(RUNTIMES)}, got '{name}'{nearest(name, RUNTIMES)}")
    if name == "torch":
        if run is None:
            raise InputError("runtime must not be torch for a bundle, which holds no weights for it; name --run")
        return name, Path(run)
    return name, Path(bundle) if bundle is not None else Path(str(run)) / "bundle"


def _photos(source: Path | str | None, seed: int) -> tuple[list[bytes], str]:
    """Encoded photos and what they are."""
    if source is None:
        width, height = PHOTO_SIZE
        return draw_photos(8, PHOTO_SIZE, seed), f"8 drawn JPEGs of {width} x {height}, quality 90, seed {seed}"
    files = [path for _, path in gather([source])][:64]
    return [path.read_bytes() for path in files], f"{len(files)} of {Path(source).resolve().name}"


def _throughput(found: Sequence[LatencySeries], deferral: float, budget: float) -> list[LatencyThroughput]:
    """Of the cascade at the measured rate that is nearest to the one asked for."""
    hosts = [one for one in found if one.contestant == "cascade" and one.part == "host"]
    nearest_rate = min((one.deferral_rate or 0.0 for one in hosts), key=lambda rate: abs(rate - deferral))
    result = []
    for one in hosts:
        if one.deferral_rate == nearest_rate:
            p99 = one.quantile(0.99).milliseconds if one.enough else None
            result.append(
                LatencyThroughput(
                    batch=one.batch, images_per_second=1e3 * one.batch / one.mean, p99=p99,
                    within=None if p99 is None else p99 <= budget,
                )
            )  # fmt: skip
    return result


def _against(
    cascade: Cascade,
    run: Path | str | None,
    against: Sequence[str],
    pool: NDArray[np.float32],
    size: int,
    deferral: float,
    threads: int,
    device: str,
    how: Sampling,
) -> Iterator[LatencyPeer]:
    """Peers on the same rotated inputs, called turn about with the cascade and its own full pass."""
    if not against:
        return
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Full] = {}
        for name in dict.fromkeys(against):
            try:
                calls[name] = _peer(name, cascade, run, Path(folder), threads, device)
                calls[name](pool[:size])
            except Exception as error:  # noqa: BLE001 - a compiler that fails is a result here, whatever it raises
                lines = str(error).strip().splitlines() or [type(error).__name__]
                calls.pop(name, None)
                yield LatencyPeer(name=name, batch=None, skipped=lines[0][:200])
        ours = full_pass(cascade, Path(folder))
        contestants = {name: passes(call, pool, size) for name, call in calls.items()}
        contestants["full_pass"] = passes(ours, pool, size)
        contestants["cascade"] = decides(cascade, pool, size, deferral, how.seed)
        measured = sample(contestants, how)
        expected = np.asarray(ours(pool[:size]))
        for name, call in calls.items():
            logits = np.asarray(call(pool[:size]))
            probs = softmax(logits), softmax(expected)
            host = measured[name]["host"]
            yield LatencyPeer(
                name=name, batch=size, skipped=None,
                logit=float(np.abs(logits - expected).max()), prob=float(np.abs(probs[0] - probs[1]).max()),
                flips=int((logits.argmax(1) != expected.argmax(1)).sum()),
                to_cascade=ratios(host, measured["cascade"]["host"], paired=True),
                to_full_pass=ratios(host, measured["full_pass"]["host"], paired=True),
            )  # fmt: skip


def _peer(name: str, cascade: Cascade, run: Path | str | None, folder: Path, threads: int, device: str) -> Full:
    """A full pass from pixels to Stage B's logits; Stage1Error says why there is none."""
    if name == "onnxruntime":
        here = cascade
        if cascade.runtime.name != name:
            path = cascade.bundle.path if (cascade.bundle.path / "bundle.json").is_file() else Path(str(run)) / "bundle"
            here = Cascade.load(path, name, threads=threads)
        own = folder / "peer"
        own.mkdir(exist_ok=True)
        return full_pass(here, own)
    if run is None:
        raise InputError("a bundle holds no weights torch could load; name --run as well")
    trained = Cascade.from_run(run, threads=threads, device=device)
    from stage1_pro.deploy.trained import TorchRuntime

    assert isinstance(trained.runtime, TorchRuntime)
    if trained.bundle.positive != cascade.bundle.positive or trained.bundle.tap != cascade.bundle.tap:
        raise InputError(f"the run {run} holds another model than the bundle; name the one it was exported from")
    return trained.runtime.full_pass if name == "torch-eager" else trained.runtime.compiled_full_pass()
