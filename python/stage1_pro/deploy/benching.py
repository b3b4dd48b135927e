"""bench: what an exit saves, measured on this machine."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.data.splits import Splits
from stage1_pro.deploy.bench import BenchBatch, BenchTiming, bench_batch, machine
from stage1_pro.deploy.bench_latency import check_sizes
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.start import RUNTIMES
from stage1_pro.errors import InputError, Stage1Error, nearest
from stage1_pro.files import write_bytes
from stage1_pro.metrics.figures import speedup_png
from stage1_pro.progress import say
from stage1_pro.record import Record


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
    warmup: int
    seed: int
    machine: dict[str, str | int | float | None]
    batches: list[BenchBatch]


RATES = tuple(step / 10 for step in range(11))
BATCHES = (1, 8, 64)


def bench_cascade(
    bundle: Path | str | None = None,
    *,
    run: Path | str | None = None,
    runtime: str | None = None,
    batch: Sequence[int] = BATCHES,
    rates: Sequence[float] = RATES,
    rounds: int = 20,
    warmup: int = 2,
    threads: int = 0,
    seed: int = 0,
    out: Path | str | None = None,
) -> CascadeBench:
    """Measure latency and throughput of both stages, always both, a full pass and the cascade beside its ideal.

    A speed-up is the time of the full pass (one graph, pixels to Stage B's answer) over the contestant's own in the
    same round; the ideal counts blocks only: 1 / (k/L + (1 - exit rate)(1 - k/L)). Pixels are ``val_select`` images of
    the run where they can be read, else noise by seed.

    Args:
        bundle: bundle folder; or
        run: trained and calibrated run folder.
        runtime: what executes; onnxruntime for a bundle (or a run's ``bundle``), torch for a run by default.
        batch: batch sizes.
        rates: deferral rates in [0, 1] to force; exactly ``round(rate * batch)`` rows are deferred.
        rounds: visits to each contestant.
        warmup: calls of each before.
        threads: threads of an operator; 0 = as the runtime has them.
        seed: of orders, of deferred rows and of noise.
        out: folder for ``cascade.json`` and ``cascade.png``.

    Raises:
        InputError: both or neither of bundle and run, or a number out of range.
        ArtifactError: a damaged bundle or an incomplete run.
        DependencyError: torch, or onnx to join the graphs, is missing.
    """
    _check(bundle, run, batch, rates, rounds, warmup, threads, out)
    cascade = _load(bundle, run, runtime, threads)
    source = Path(str(run if bundle is None else bundle))
    pixels, inputs = _pixels(cascade, run, max(batch), seed)
    facts = machine(cascade.runtime.name, threads)
    batches = []
    for size in dict.fromkeys(batch):
        say(f"batch {size}: {rounds} rounds")
        batches.append(bench_batch(cascade, pixels[:size], rates, rounds=rounds, warmup=warmup, seed=seed))
    spec = cascade.bundle.preprocessing
    found = CascadeBench(
        source=source.resolve().name,
        runtime=cascade.runtime.name,
        backbone=cascade.bundle.backbone.source,
        tap=cascade.bundle.tap,
        n_blocks=cascade.bundle.backbone.n_blocks,
        height=spec.height,
        width=spec.width,
        inputs=inputs,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        machine=facts,
        batches=batches,
    )
    if out is not None:
        found.write(Path(out) / "cascade.json")
        write_bytes(Path(out) / "cascade.png", draw(found))
        say(f"wrote {Path(out) / 'cascade.json'} and {Path(out) / 'cascade.png'}")
    return found


def draw(found: CascadeBench) -> bytes:
    """The cascade's speed-up against its exit rate, a line a batch size, beside the ideal; PNG bytes."""
    measured = {
        f"batch {one.batch}": [(1 - (t.deferral_rate or 0), t.speedup, t.speedup_low, t.speedup_high)
                               for t in one.timings if t.contestant == "cascade"]
        for one in found.batches
    }  # fmt: skip
    return speedup_png(measured, tap=found.tap, n_blocks=found.n_blocks)


def render(found: CascadeBench) -> str:
    """Show a table a batch size, the shares of a full pass, and the machine."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, highlight=False, markup=False)
    console.print(
        f"{found.source}: {found.backbone} at {found.height} x {found.width}, tap {found.tap} of {found.n_blocks} "
        "blocks; "
        f"{found.runtime}, {found.inputs}, medians of {found.rounds} rounds"
    )
    for one in found.batches:
        table = Table(box=box.SIMPLE_HEAD, title=f"batch {one.batch}", title_justify="left")
        table.add_column("what", no_wrap=True)
        for name in ("ms", "images/s", "speed-up (quartiles)", "CPU", "ideal", "of ideal"):
            table.add_column(name, justify="right", no_wrap=True)
        for timing in one.timings:
            table.add_row(*_cells(timing, one.batch))
        console.print(table)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in one.shares.items() if name != "python")
        console.print(
            f"Of a full pass: {shares or 'not known'}; deciding and gathering in Python comes to "
            f"{one.shares['python']:.1%} of one. "
            "The ideal counts blocks only. CPU: the speed-up by processor time, less moved by neighbours."
        )
    console.print(", ".join(f"{name} {value}" for name, value in found.machine.items()))
    return buffer.getvalue().rstrip()


def _cells(timing: BenchTiming, batch: int) -> list[str]:
    names = {"stage_a": "Stage A alone", "stage_b": "Stage B from A's tokens", "always_both": "always both",
             "full_pass": "one full pass"}  # fmt: skip
    name = names.get(timing.contestant) or f"cascade, {timing.n_deferred} of {batch} deferred"
    return [
        name,
        f"{timing.milliseconds:.2f}",
        f"{timing.images_per_second:.0f}",
        f"{timing.speedup:.3f} [{timing.speedup_low:.3f}, {timing.speedup_high:.3f}]",
        f"{timing.processor_speedup:.3f}",
        "-" if timing.ideal is None else f"{timing.ideal:.3f}",
        "-" if timing.of_ideal is None else f"{timing.of_ideal:.3f}",
    ]


def _check(
    bundle: Path | str | None,
    run: Path | str | None,
    batch: Sequence[int],
    rates: Sequence[float],
    rounds: int,
    warmup: int,
    threads: int,
    out: Path | str | None,
) -> None:
    if (bundle is None) == (run is None):
        raise InputError(f"bench must get --bundle or --run, got {'neither' if run is None else 'both'}; name one")
    check_sizes(batch, rates)
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"{name} must be {least} or more, got {value}")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {out}")


def _load(bundle: Path | str | None, run: Path | str | None, runtime: str | None, threads: int) -> Cascade:
    if runtime is not None and runtime not in RUNTIMES:
        raise InputError(f"runtime must be one of {', '.join(RUNTIMES)}, got '{runtime}'{nearest(runtime, RUNTIMES)}")
    if bundle is not None:
        return Cascade.load(bundle, runtime or "onnxruntime", threads=threads)
    assert run is not None
    if runtime in (None, "torch"):
        return Cascade.from_run(run, threads=threads)
    exported = Path(run) / "bundle"
    if not exported.is_dir():
        raise InputError(
            f"runtime must be torch for the run {run}, got '{runtime}', which needs its bundle; "
            f"run `stage1 export --run {run}` first"
        )
    return Cascade.load(exported, str(runtime), threads=threads)


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
