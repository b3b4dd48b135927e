"""``stage1 bench``: cascade, latency, compare, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from stage1_pro.command import Command, Flag, Result, Words, option
from stage1_pro.deploy.runtime import NAMES
from stage1_pro.tables import Sheet, grid, interval

if TYPE_CHECKING:
    from rich.table import Table

    from stage1_pro.deploy.bench import (
        CascadeBench,
        LatencyBench,
        LatencyComparison,
        LatencyDifference,
        LatencyPeer,
        LatencySeries,
    )

Batches = Annotated[tuple[int, ...], Flag(metavar="N")]
Rates = Annotated[tuple[float, ...], Flag(metavar="R")]
RUNTIME = f"what executes: {NAMES}, or torch; onnxruntime for a bundle and torch for a run by default"
THREADS = "threads of an operator; 0 = as the runtime has them"


class BenchCascade(Command, topic="latency"):
    """Time both stages, a full pass and the cascade, by deferral rate."""

    bundle: Path | None = option(None, "bundle folder", one_of="source")
    run: Path | None = option(
        None, "trained and calibrated run folder; its val_select images are the input", one_of="source"
    )
    runtime: str | None = option(None, RUNTIME)
    batch: Batches = option((1, 8, 64), "batch sizes")
    rates: Rates = option(
        tuple(step / 10 for step in range(11)),
        "deferral rates to force: exactly round(R * N) rows of a batch go to Stage B",
    )
    rounds: int = option(20, "visits to each contestant, in shuffled order")
    threads: int = option(0, THREADS)
    seed: int = option(0, "seed of orders, of deferred rows and of noise")
    out: Path | None = option(None, "folder for cascade.json and cascade.png")

    def execute(self) -> Result:
        """Print times and speed-ups of every contestant."""
        from stage1_pro.deploy.bench import bench_cascade

        found = bench_cascade(self)
        return Result(render_cascade(found), found.model_dump(mode="json"))


class BenchLatency(Command, topic="latency"):
    """Time single calls, p50 to p99: bytes to decision, cold start, peers."""

    bundle: Path | None = option(None, "bundle folder")
    run: Path | None = option(None, "run folder; alone it is measured in torch, beside --bundle it is for torch peers")
    runtime: str | None = option(None, RUNTIME)
    batch: Batches = option((1, 8, 64), "batch sizes")
    rates: Rates = option(
        (0.0, 0.1, 0.3, 0.5, 1.0), "deferral rates to force; over the calls exactly this share of rows goes to Stage B"
    )
    samples: int = option(1000, "calls of each; a p99 takes 1,000")
    warmup: float = option(200, "milliseconds before the first call", metavar="MS")
    limit: float = option(30, "seconds a batch size may take at most", metavar="S")
    quick: bool = option(False, "50 samples and one cold start: a look, not a measurement")
    deferral: float = option(0.3, "rate of requests, of throughput and of peers")
    budget: float = option(50, "milliseconds the p99 of a batch may take", metavar="MS")
    photos: Path | None = option(None, "encoded photos to answer from; drawn JPEGs of 1280 x 720 otherwise")
    against: Words = option(
        (),
        "full passes on the same inputs: runtimes, torch-eager, torch-compile; one that cannot run says why",
        metavar="PEER[,PEER]",
    )
    threads: int = option(0, THREADS)
    seed: int = option(0, "seed of orders, noise, deferred rows and resamples")
    device: Literal["cpu", "cuda"] = option("cpu", "of torch; cuda replays CUDA graphs")
    trust_engines: bool = option(False, "run engines neither built here nor signed")
    out: Path | None = option(None, "folder for latency.json and latency.png")

    def execute(self) -> Result:
        """Print quantiles of every series."""
        from stage1_pro.deploy.bench import bench_latency

        found = bench_latency(self)
        return Result(render_latency(found), found.model_dump(mode="json"))


class CompareLatency(Command, topic="latency"):
    """Compare two results of bench latency by ratios of quantiles."""

    first: Path = option(..., "latency.json that is compared with", positional=True, metavar="A.json")
    second: Path = option(..., "latency.json that is judged; below 1 it is faster", positional=True, metavar="B.json")
    level: float = option(0.95, "level of the intervals")
    out: Path | None = option(None, "JSON file to write")

    def execute(self) -> Result:
        """Print the ratios."""
        from stage1_pro.deploy.bench import compare_latency

        found = compare_latency(**dict(self))
        return Result(render_comparison(found), found.model_dump(mode="json"))


def render_cascade(found: CascadeBench) -> str:
    """Show a table a batch size, the shares of a full pass, and the machine."""
    sheet = Sheet(120)
    sheet.add(f"{_title(found)}, medians of {found.rounds} rounds")
    names = {"stage_a": "Stage A alone", "stage_b": "Stage B from A's tokens", "always_both": "always both",
             "full_pass": "one full pass"}  # fmt: skip
    for one in found.batches:
        columns = ("ms", "images/s", "speed-up (quartiles)", "CPU", "ideal", "of ideal")
        table = _table(f"batch {one.batch}", ("what",), columns)
        for t in one.timings:
            table.add_row(
                names.get(t.contestant) or f"cascade, {t.n_deferred} of {one.batch} deferred",
                f"{t.milliseconds:.2f}",
                f"{t.images_per_second:.0f}",
                f"{t.speedup:.3f} [{t.speedup_low:.3f}, {t.speedup_high:.3f}]",
                f"{t.processor_speedup:.3f}",
                *("-" if value is None else f"{value:.3f}" for value in (t.ideal, t.of_ideal)),
            )
        sheet.add(table)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in one.shares.items() if name != "python")
        sheet.add(
            f"Of a full pass: {shares or 'not known'}; deciding and gathering in Python comes to "
            f"{one.shares['python']:.1%} of one. "
            "The ideal counts blocks only. CPU: the speed-up by processor time, less moved by neighbours."
        )
    sheet.add(", ".join(f"{name} {value}" for name, value in found.machine.items()))
    return sheet.text()


def render_latency(found: LatencyBench) -> str:
    """Tables for people."""
    sheet = Sheet(130)
    sheet.add(_title(found))
    for step in found.steps:
        sheet.add(f"  {step}")
    short = sorted({one.n for one in found.series if not one.enough})
    if found.quick:
        sheet.add(f"quick: {found.samples} samples each, too few for a p99")
    elif short:
        sheet.add(
            f"some series have {short[0]} to {short[-1]} of {found.samples} samples: --limit {found.limit:g} s was up"
        )
    table = _table("milliseconds [95% interval]", ("what", "batch", "deferred", "n"), ("p50", "p90", "p95", "p99"))
    for one in found.series:
        cells = [
            interval(*one.quantile(q).model_dump(exclude={"q"}).values(), digits=2) for q in (0.5, 0.9, 0.95, 0.99)
        ]
        table.add_row(*_name(one), str(one.n), *cells)
    sheet.add(table)
    sheet.add(f"requests are single photos from encoded bytes on: {found.photos}")
    table = _table("cold start, ms", ("cached kernels",), ("fresh process", "load, parity", "first answer"))
    for cold in found.cold:
        table.add_row(cold.cache, f"{cold.total:.0f}", f"{cold.load:.0f}", f"{cold.first:.1f}")
    sheet.add(table)
    title = f"throughput at {found.deferral:.0%} deferred, p99 within {found.budget:g} ms"
    table = _table(title, ("batch",), ("images/s", "p99, ms", "within"))
    for rate_at in found.throughput:
        p99 = "-" if rate_at.p99 is None else f"{rate_at.p99:.2f}"
        within = {True: "yes", False: "no", None: "not known"}[rate_at.within]
        table.add_row(str(rate_at.batch), f"{rate_at.images_per_second:.1f}", p99, within)
    sheet.add(table)
    if found.peers:
        sheet.add(_peers_table(found.peers))
    sheet.add(", ".join(f"{name} {value}" for name, value in found.machine.items()))
    return sheet.text()


def _peers_table(found: Sequence[LatencyPeer]) -> Table:
    columns = ("to cascade, p50", "to full pass, p50", "logit", "prob", "flips")
    table = _table("peers' full pass on the same inputs, their time over ours", ("peer", "batch"), columns)
    for peer in found:
        if peer.skipped is not None:
            table.add_row(peer.name, f"skipped: {peer.skipped}")
            continue
        medians = [
            next((interval(r.ratio, r.low, r.high, digits=2) for r in one if r.q == 0.5), "-")
            for one in (peer.to_cascade, peer.to_full_pass)
        ]
        table.add_row(peer.name, str(peer.batch), *medians, f"{peer.logit:.1g}", f"{peer.prob:.1g}", str(peer.flips))
    return table


def render_comparison(found: LatencyComparison) -> str:
    """A table for people."""
    sheet = Sheet(130)
    sheet.add(f"{found.second}\nover\n{found.first}; below 1 the former is faster")
    title = f"ratio [{found.level:.0%} interval]"
    table = _table(title, ("what", "batch", "deferred"), ("mean", "p50", "p95", "p99"))
    for one in found.differences:
        cells = {r.q: interval(r.ratio, r.low, r.high, digits=3) for r in one.ratios}
        table.add_row(*_name(one), *(cells.get(q, "-") for q in (None, 0.5, 0.95, 0.99)))
    sheet.add(table)
    for caution in found.cautions:
        sheet.add(f"caution: {caution}")
    return sheet.text()


def _title(found: CascadeBench | LatencyBench) -> str:
    return (
        f"{found.source}: {found.backbone} at {found.height} x {found.width}, tap {found.tap} of {found.n_blocks} "
        f"blocks; {found.runtime}, {found.inputs}"
    )


def _name(one: LatencySeries | LatencyDifference) -> tuple[str, str, str]:
    """The cells that name a series: contestant and part, batch size, deferral rate."""
    rate = "" if one.deferral_rate is None else f"{one.deferral_rate:.0%}"
    return f"{one.contestant}, {one.part}", str(one.batch), rate


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    return grid((*left, *right), left=left, no_wrap=right, title=title)
