"""The latency harness: contestants timed turn about, and what the cascade's are. No torch, no transformers."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.runtime import Arrays, OnnxRuntime, open_session
from stage1_pro.errors import need
from stage1_pro.metrics.selective import relative_cost
from stage1_pro.progress import track

if TYPE_CHECKING:
    from stage1_pro.words import StageName
from typing import Literal

from pydantic import Field

from stage1_pro.record import Record


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

    def cascade(self, n_deferred: int) -> BenchTiming:
        """The cascade with so many rows deferred; KeyError when it was not measured."""
        for found in self.timings:
            if found.n_deferred == n_deferred:
                return found
        raise KeyError(n_deferred)


# A visit repeats its call for about this long: single calls of a millisecond mostly measure the scheduler.
VISIT_SECONDS = 0.02
Pass = Callable[[], object]


def time_rounds(
    contestants: Mapping[str, Pass], *, rounds: int, warmup: int = 2, seed: int = 0, description: str = ""
) -> dict[str, NDArray[np.float64]]:
    """Seconds of one call of each contestant in each round, wall clock and processor: name to [2, rounds].

    Every round visits all of them, each time in another order, so that a machine that slows down slows all of them
    and ratios within a round stay fair. A visit of a short call repeats it and gives the mean.

    Args:
        contestants: name to what is timed.
        rounds: visits to each, 1 or more.
        warmup: calls of each before the first round.
        seed: of the orders.
        description: for the progress bar.
    """
    repeats = {}
    for name, call in contestants.items():
        seconds = math.inf
        for _ in range(max(warmup, 1)):
            seconds = min(seconds, _seconds(call, 1)[0])
        repeats[name] = max(1, round(VISIT_SECONDS / max(seconds, 1e-9)))
    names, rng = list(contestants), np.random.default_rng(seed)
    found = {name: np.empty((2, rounds)) for name in names}
    for number in track(range(rounds), description, total=rounds):
        for index in rng.permutation(len(names)):
            name = names[index]
            found[name][:, number] = _seconds(contestants[name], repeats[name])
    return found


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


def bench_batch(
    cascade: Cascade, pixels: NDArray[np.float32], rates: Sequence[float], *, rounds: int, warmup: int, seed: int
) -> BenchBatch:
    """Time the stages, always both, a full pass and the cascade at forced deferral rates on one batch.

    The full pass is one graph from pixels to Stage B's answer; the cascade is ``Cascade.decide`` with the rows that
    exit forced upon it: exactly ``round(rate * N)`` others are deferred, drawn once by seed.

    Args:
        cascade: what is measured.
        pixels: [N, 3, H, W] preprocessed.
        rates: deferral rates in [0, 1]; those that defer as many rows are measured once.
        rounds: visits to each contestant.
        warmup: calls of each before.
        seed: of deferred rows and of orders.
    """
    runtime, n = cascade.runtime, len(pixels)
    hidden = runtime.run("stage_a", {"pixels": pixels})["hidden"]
    counts = sorted({math.floor(rate * n + 0.5) for rate in rates})
    rng = np.random.default_rng([seed, n])
    exited = {}
    for count in counts:
        exited[count] = np.ones(n, dtype=bool)
        exited[count][rng.permutation(n)[:count]] = False

    def both() -> object:
        handed = runtime.run("stage_a", {"pixels": pixels})["hidden"]
        return runtime.run("stage_b", {"hidden": handed})

    with tempfile.TemporaryDirectory() as folder:
        full = full_pass(cascade, Path(folder))
        contestants: dict[str, Pass] = {
            "stage_a": lambda: runtime.run("stage_a", {"pixels": pixels}),
            "stage_b": lambda: runtime.run("stage_b", {"hidden": hidden}),
            "always_both": both,
            "full_pass": lambda: full(pixels),
            **{f"cascade {count}": _forced(cascade, pixels, exited[count]) for count in counts},
        }
        seconds = time_rounds(contestants, rounds=rounds, warmup=warmup, seed=seed, description=f"batch {n}")
        shares = _parts(cascade, pixels, Path(folder), float(np.median(seconds["full_pass"][0])))
    tap, n_blocks = cascade.bundle.tap, cascade.bundle.backbone.n_blocks
    base = seconds["full_pass"]
    # Stage B alone has nothing to do when both stages share the last block.
    ideal = {"stage_a": n_blocks / tap, "stage_b": n_blocks / (n_blocks - tap) if tap < n_blocks else None,
             "always_both": 1.0, "full_pass": 1.0}  # fmt: skip
    timings = []
    for name, values in seconds.items():
        kind, _, number = name.partition(" ")
        deferred = int(number) if number else None
        best = ideal.get(name) if deferred is None else float(1 / relative_cost(1 - deferred / n, tap, n_blocks))
        timings.append(_timing(kind, deferred, n, values[0], base / values, best))
    return BenchBatch(batch=n, timings=timings, shares=shares)


def _forced(cascade: Cascade, pixels: NDArray[np.float32], exited: NDArray[np.bool_]) -> Pass:
    return lambda: cascade.decide(pixels, exited=exited)


def _timing(
    name: str,
    count: int | None,
    n: int,
    seconds: NDArray[np.float64],
    speedups: NDArray[np.float64],
    ideal: float | None,
) -> BenchTiming:
    low, middle, high = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    slow, ratio, fast = (float(value) for value in np.quantile(speedups[0], (0.25, 0.5, 0.75)))
    return BenchTiming(
        contestant=name,
        n_deferred=count, deferral_rate=None if count is None else count / n,
        milliseconds=1e3 * middle, milliseconds_low=1e3 * low, milliseconds_high=1e3 * high,
        images_per_second=n / middle, speedup=ratio, speedup_low=slow, speedup_high=fast,
        processor_speedup=float(np.median(speedups[1])), ideal=ideal, of_ideal=None if ideal is None else ratio / ideal,
    )  # fmt: skip


class _Replay:
    """A runtime that gives stored outputs at once: what is left of a batch is Python and NumPy."""

    name = "replay"

    def __init__(self, first: Arrays, logits_b: NDArray[np.float32]) -> None:
        self._first, self._logits_b = first, logits_b

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Outputs by name; Stage B's are of as many rows as came in."""
        return self._first if stage == "stage_a" else {"logits": self._logits_b[: len(inputs["hidden"])]}


def _parts(cascade: Cascade, pixels: NDArray[np.float32], folder: Path, full_seconds: float) -> dict[str, float]:
    """Shares of a full pass: ``embedding, heads, blocks`` of its own time, and ``python`` of a half-deferred batch."""
    runtime, n = cascade.runtime, len(pixels)
    if isinstance(runtime, OnnxRuntime):
        shares = _profile(folder, runtime, pixels) if (folder / "full.onnx").is_file() else {}
    else:
        pieces = runtime.parts(pixels) if hasattr(runtime, "parts") else {}
        shares = {name: float(np.median(_repeat(call))) / full_seconds for name, call in pieces.items()}
    if shares:
        shares["blocks"] = 1 - shares["embedding"] - shares["heads"]
    first = runtime.run("stage_a", {"pixels": pixels})
    logits_b = runtime.run("stage_b", {"hidden": first["hidden"]})["logits"]
    replayed = Cascade(cascade.bundle, _Replay(first, logits_b))
    half = np.arange(n) % 2 == 1
    shares["python"] = float(np.median(_repeat(_forced(replayed, pixels, half), 50))) / full_seconds
    return shares


def full_pass(cascade: Cascade, folder: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What gives Stage B's logits [N, K] of pixels with nothing of Stage A's own on the way.

    For onnxruntime both graphs are joined in ``folder``; engines are compiled a stage each, theirs is both.

    Raises:
        DependencyError: onnx, which joins graphs, is not installed.
    """
    runtime = cascade.runtime
    if isinstance(runtime, OnnxRuntime):
        join_graphs(runtime, folder / "full.onnx")
        session = open_session(folder / "full.onnx", runtime.threads)

        def joined(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, {"a/pixels": pixels})[0]
            return logits

        return joined
    if hasattr(runtime, "full_pass"):
        own: Callable[[NDArray[np.float32]], NDArray[np.float32]] = runtime.full_pass
        return own

    def both(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return runtime.run("stage_b", {"hidden": runtime.run("stage_a", {"pixels": pixels})["hidden"]})["logits"]

    return both


def join_graphs(runtime: OnnxRuntime, out: Path) -> None:
    """Write one ONNX graph from pixels to Stage B's logits, without Stage A's heads.

    Raises:
        DependencyError: onnx is not installed.
    """
    try:
        import onnx
        from onnx import compose
    except ImportError as error:
        raise need("train", "onnx") from error
    a = compose.add_prefix(onnx.load(str(runtime.bundle.graph("stage_a"))), "a/")
    b = compose.add_prefix(onnx.load(str(runtime.bundle.graph("stage_b"))), "b/")
    joined = compose.merge_models(a, b, io_map=[("a/hidden", "b/hidden")], outputs=["b/logits"])
    onnx.save(joined, str(out))


def _profile(folder: Path, runtime: OnnxRuntime, pixels: NDArray[np.float32]) -> dict[str, float]:
    """Shares of the operators before the first and after the last LayerNorm of the joined graph, by its own clock."""
    session = open_session(folder / "full.onnx", runtime.threads, folder / "profile")
    for _ in range(8):
        session.run(None, {"a/pixels": pixels})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    kernels.sort(key=lambda event: event["ts"])
    norms = [i for i, event in enumerate(kernels) if "LayerNorm" in event["args"]["op_name"]]
    # Parts by the node that opens them; the last LayerNorm still belongs to the blocks.
    opens = {kernels[0]["name"]: "embedding", kernels[norms[0]]["name"]: "blocks"}
    last = kernels[norms[-1]]["name"]
    passes: list[dict[str, float]] = []
    part = "embedding"
    for event in kernels:
        part = opens.get(event["name"], part)
        if event["name"] == kernels[0]["name"]:
            passes.append({"embedding": 0.0, "blocks": 0.0, "heads": 0.0})
        passes[-1][part] += event["dur"]
        part = "heads" if event["name"] == last else part
    # Medians: the first pass is cold, and any may be interrupted.
    shares = [{name: spent / (sum(one.values()) or 1.0) for name, spent in one.items()} for one in passes]
    return {name: float(np.median([one[name] for one in shares])) for name in ("embedding", "heads")}


def _seconds(call: Pass, repeats: int) -> tuple[float, float]:
    """Wall clock and processor time of one call."""
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats, (time.process_time() - spent) / repeats


def _repeat(call: Pass, times: int = 7) -> list[float]:
    call()
    return [_seconds(call, 1)[0] for _ in range(times)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
