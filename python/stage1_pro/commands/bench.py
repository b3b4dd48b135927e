"""``stage1 bench``: cascade, latency, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stage1_pro.command import Command, Flag, Result, Words

Batches = Annotated[tuple[int, ...], Flag(metavar="N")]
Rates = Annotated[tuple[float, ...], Flag(metavar="R")]
RUNTIME = (
    "what executes: onnxruntime (of a bundle by default), tensorrt_rtx, tensorrt, auto, or torch (of a run by default)"
)
THREADS = "threads of an operator; 0 = as the runtime has them"


class Cascade(Command):
    """Time both stages, always both, a full pass and the cascade, by deferral rate."""

    topic: ClassVar[str] = "bench"

    bundle: Annotated[Path | None, Flag(one_of="source")] = Field(None, description="bundle folder")
    run: Annotated[Path | None, Flag(one_of="source")] = Field(
        None, description="trained and calibrated run folder; its val_select images are the input"
    )
    runtime: str | None = Field(None, description=RUNTIME)
    batch: Batches = Field((1, 8, 64), description="batch sizes")
    rates: Rates = Field(
        tuple(step / 10 for step in range(11)),
        description="deferral rates to force: exactly round(R * N) rows of a batch go to Stage B",
    )
    rounds: int = Field(20, description="visits to each contestant, in shuffled order")
    threads: int = Field(0, description=THREADS)
    seed: int = Field(0, description="seed of orders, of deferred rows and of noise")
    out: Path | None = Field(None, description="folder for cascade.json and cascade.png")

    def execute(self) -> Result:
        """Print times and speed-ups of every contestant."""
        from stage1_pro.deploy.benching import bench_cascade, render

        found = bench_cascade(**dict(self))
        return Result(render(found), found.model_dump(mode="json"))


class Latency(Command):
    """Time single calls, p50 to p99: bytes to decision, cold start, peers."""

    topic: ClassVar[str] = "bench"

    bundle: Path | None = Field(None, description="bundle folder")
    run: Path | None = Field(
        None, description="run folder; alone it is measured in torch, beside --bundle it is for torch peers"
    )
    runtime: str | None = Field(None, description=RUNTIME)
    batch: Batches = Field((1, 8, 64), description="batch sizes")
    rates: Rates = Field(
        (0.0, 0.1, 0.3, 0.5, 1.0),
        description="deferral rates to force; over the calls exactly this share of rows goes to Stage B",
    )
    samples: int = Field(1000, description="calls of each; a p99 takes 1,000")
    warmup: Annotated[float, Flag(metavar="MS")] = Field(200, description="milliseconds before the first call")
    limit: Annotated[float, Flag(metavar="S")] = Field(30, description="seconds a batch size may take at most")
    quick: bool = Field(False, description="50 samples and one cold start: a look, not a measurement")
    deferral: float = Field(0.3, description="rate of requests, of throughput and of peers")
    budget: Annotated[float, Flag(metavar="MS")] = Field(50, description="milliseconds the p99 of a batch may take")
    photos: Path | None = Field(None, description="encoded photos to answer from; drawn JPEGs of 1280 x 720 otherwise")
    against: Annotated[Words, Flag(metavar="PEER[,PEER]")] = Field(
        (),
        description="full passes on the same inputs: onnxruntime, torch-eager, torch-compile; one that cannot run says "
        "why",
    )
    threads: int = Field(0, description=THREADS)
    seed: int = Field(0, description="seed of orders, noise, deferred rows and resamples")
    device: Literal["cpu", "cuda"] = Field("cpu", description="of torch; cuda replays CUDA graphs")
    trust_engines: bool = Field(False, description="run engines neither built here nor signed")
    out: Path | None = Field(None, description="folder for latency.json and latency.png")

    def execute(self) -> Result:
        """Print quantiles of every series."""
        from stage1_pro.deploy.bench_latency import bench_latency, render

        found = bench_latency(**dict(self))
        return Result(render(found), found.model_dump(mode="json"))


class CompareLatency(Command):
    """Compare two results of bench latency by ratios of quantiles."""

    topic: ClassVar[str] = "bench"

    first: Annotated[Path, Flag(positional=True, metavar="A.json")] = Field(
        description="latency.json that is compared with"
    )
    second: Annotated[Path, Flag(positional=True, metavar="B.json")] = Field(
        description="latency.json that is judged; below 1 it is faster"
    )
    level: float = Field(0.95, description="level of the intervals")
    out: Path | None = Field(None, description="JSON file to write")

    def execute(self) -> Result:
        """Print the ratios."""
        from stage1_pro.deploy.bench_latency import compare_latency, render_comparison

        found = compare_latency(**dict(self))
        return Result(render_comparison(found), found.model_dump(mode="json"))
