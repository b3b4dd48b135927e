"""A 95% bootstrap interval of AUGRC, ours beside every peer, in one run: time, processor time, memory, and the answer.

    benchmarks/peers_venv.sh PEERS                     # once: the peers' venvs
    python benchmarks/peers.py --out DIR --venvs PEERS [--quick] [--rounds 5] [--full] [--sizes 1e3 1e5]

Each contestant lives in a process of its own and is warm (imports, compilation) before it is timed; rounds go through
all of them in turn, forwards and backwards, so that a drifting machine touches all alike. Ratios are of one round, and
their medians are the result. Memory is the highest resident size during an interval over that before it, at the first
timed call. The sort is inside every time; making tensors is outside.

Slow peers draw fewer than the 1,000 replicates and are extrapolated: a + b * 1000 from the time of 2 and of the stated
number. The table says so ("from N"), and then the memory is that of N replicates; --full draws all 1,000 up to n = 1e5.
A contestant that cannot be run is named with its reason.

Targets are checked at n = 1e5 alone. There are three numba versions (numba_presort.py): "plain" is what one writes
first, "blocked" has what numba was found to gain from, "poisson" draws as the fast exact construction does.

Not here: fd-shifts, which is not on the registry (and needs NumPy < 2).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contestants import CONTESTANTS, make_data

HERE = Path(__file__).resolve().parent
OURS = "stage1_pro"
BASELINE = "NumPy presort"  # timed in every venv, and so pairs them
REPLICATES = 1000
NOT_HERE = {"fd-shifts": "not on the package registry, and needs NumPy < 2"}
VENVS = {"torch": ("torch-uncertainty loop", "torchmetrics BootStrapper"), "intervals": ("confidenceinterval",)}
# The most replicates by n; a contestant that is not named draws all. None leaves it out, with the reason.
FEWER: dict[str, dict[int, int | None]] = {
    "stage1_pro NumPy twin": {100_000: 100, 1_000_000: 20},
    "NumPy presort": {1_000_000: 100},
    "NumPy presort, 2 threads": {1_000_000: 100},
    "NumPy presort, kept heap": {1_000_000: 100},
    "scipy percentile": {100_000: 100, 1_000_000: 20},
    "scipy BCa": {100_000: None, 1_000_000: None},
    "torch-uncertainty loop": {100_000: 50, 1_000_000: 10},
    "torchmetrics BootStrapper": {100_000: 50, 1_000_000: 10},
    "confidenceinterval": {100_000: 100, 1_000_000: 20},
}
# Beside other work torch's waiting threads would hold the processor for long.
SPIN = {"GOMP_SPINCOUNT": "10000"}
# By default glibc gives a replicate's arrays back and faults them in again, half NumPy's time at n = 1e5. What a user
# gets depends on what the process did before, so NumPy is timed both ways; the plain name is a process as it comes.
KEPT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
LEFT_OUT = {"scipy BCa": "its jackknife is n evaluations of n - 1 rows, O(n^2)"}


@dataclass
class Round:
    """One timing; ``scaled`` is seconds for all replicates."""

    seconds: float
    cpu_seconds: float
    scaled: float
    scaled_cpu: float


@dataclass
class Result:
    """What one contestant did at one n."""

    name: str
    venv: str
    n: int
    replicates: int = REPLICATES
    unavailable: str = ""
    rounds: list[Round] = field(default_factory=list)
    extra_bytes: int = 0
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name if self.venv == "main" else f"{self.name} [{self.venv}]"

    def median(self, of: str) -> float:
        return statistics.median(getattr(one, of) for one in self.rounds) if self.rounds else float("nan")

    @property
    def least(self) -> float:
        return min((one.scaled for one in self.rounds), default=float("nan"))

    def ratio(self, other: Result) -> float:
        """How many times as long as ``other``, the median over rounds."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine.scaled / theirs.scaled for mine, theirs in pairs)


class Worker:
    """A contestant's process."""

    def __init__(self, result: Result, python: Path, data: Path, threads: int) -> None:
        self.result = result
        limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        heap = KEPT_HEAP if result.name.endswith("kept heap") else {}
        self.process = subprocess.Popen(
            [python, HERE / "contestants.py", result.name, data, str(threads)],
            env=os.environ | limits | SPIN | heap, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.repeats = 1
        self.fixed: dict[str, Any] = {}

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"unavailable": f"its process ended with code {self.process.wait()}"}
        return json.loads(line)

    def ready(self) -> bool:
        message = self.answer()
        self.result.unavailable = message.get("unavailable", "")
        self.result.versions = message.get("versions", {})
        return not self.result.unavailable

    def order(self, replicates: int, seed: int, repeats: int = 1) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"replicates": replicates, "seed": seed, "repeats": repeats}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def first(self, seed: int) -> None:
        """The first interval: its memory, its answer, and how often to repeat it so that a clock can see it."""
        message = self.order(self.result.replicates, seed)
        if "unavailable" in message:
            self.result.unavailable = message["unavailable"]
            return
        self.result.extra_bytes = message["extra_bytes"]
        self.result.value, self.result.low, self.result.high = message["value"], message["low"], message["high"]
        self.repeats = max(1, min(20, int(0.2 / message["seconds"])))
        if self.result.replicates < REPLICATES:
            # What does not grow with the replicates (a sort, say) must not be multiplied.
            self.fixed = min((self.order(2, seed, self.repeats) for _ in range(3)), key=lambda one: one["seconds"])

    def round(self, seed: int) -> None:
        replicates = self.result.replicates
        message = self.order(replicates, seed, self.repeats)
        if "unavailable" in message:
            self.result.unavailable = message["unavailable"]
            return
        scaled, scaled_cpu = message["seconds"], message["cpu_seconds"]
        if replicates < REPLICATES:
            share = (REPLICATES - 2) / (replicates - 2)
            scaled = self.fixed["seconds"] + (scaled - self.fixed["seconds"]) * share
            scaled_cpu = self.fixed["cpu_seconds"] + (scaled_cpu - self.fixed["cpu_seconds"]) * share
        self.result.rounds.append(Round(message["seconds"], message["cpu_seconds"], scaled, scaled_cpu))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def line_up(n: int, options: argparse.Namespace) -> list[tuple[Result, Path]]:
    """Who runs at this n, and with which Python."""
    away = {name: venv for venv, names in VENVS.items() for name in names}
    places = [(name, away.get(name, "main")) for name in CONTESTANTS] + [(BASELINE, venv) for venv in VENVS]
    entries = []
    for name, venv in places:
        result = Result(name, venv, n)
        python = Path(sys.executable)
        if venv != "main":
            python = (options.venvs or Path()) / venv / "bin" / "python"
            if options.venvs is None or not python.exists():
                result.unavailable = f"no venv '{venv}': benchmarks/peers_venv.sh DIR, then --venvs DIR"
        most = FEWER.get(name, {}).get(n, REPLICATES)
        if most is None:
            result.unavailable = LEFT_OUT[name]
        elif options.quick and name in FEWER and name != "scipy BCa":
            result.replicates = min(most, 50)
        elif not (options.full and n <= 100_000):
            result.replicates = most
        entries.append((result, python))
    return entries


def compete(n: int, options: argparse.Namespace, scratch: Path) -> list[Result]:
    """All rounds at one n."""
    data = make_data(n, options.error_rate, seed=n)
    path = scratch / f"{n}.npz"
    np.savez(path, confidence=data.confidence, error=data.error)
    entries = line_up(n, options)
    workers = [Worker(result, python, path, options.threads) for result, python in entries if not result.unavailable]
    workers = [worker for worker in workers if worker.ready()]
    for worker in workers:
        worker.first(options.seed)
    for number in range(options.rounds):
        began = time.perf_counter()
        for worker in workers[:: -1 if number % 2 else 1]:
            if not worker.result.unavailable:
                worker.round(options.seed + number)
        print(f"n = {n}, round {number}: {time.perf_counter() - began:.1f} s", flush=True)
    for worker in workers:
        worker.close()
    return [result for result, _ in entries]


def find(results: Iterable[Result], name: str, n: int, venv: str = "main") -> Result | None:
    """The result of a contestant that was run."""
    return next((one for one in results if (one.name, one.n, one.venv) == (name, n, venv) and one.rounds), None)


def ratio_text(result: Result, ours: Result | None) -> str:
    if ours is None:
        return "?"
    ratio = result.ratio(ours)
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def table(results: list[Result]) -> str:
    """Markdown: a table for each n, the fastest first."""
    parts = []
    for n in sorted({result.n for result in results}):
        here = [result for result in results if result.n == n]
        ours = find(here, OURS, n)
        parts.append(
            f"### n = {n:,}\n\n"
            "| contestant | seconds (least) | x ours | processor s | extra MB | value | interval | replicates |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for one in sorted((one for one in here if one.rounds), key=lambda one: one.median("scaled")):
            drawn = f"{REPLICATES}" if one.replicates == REPLICATES else f"from {one.replicates}"
            parts.append(
                f"| {one.label} | {one.median('scaled'):.3g} ({one.least:.3g}) | {ratio_text(one, ours)} "
                f"| {one.median('scaled_cpu'):.3g} | {one.extra_bytes / 1e6:.1f} | {one.value:.7f} "
                f"| {one.low:.5f} to {one.high:.5f} | {drawn} |"
            )
        parts.extend(f"| {one.label} | not run: {one.unavailable} | | | | | | |" for one in here if not one.rounds)
        parts.append("")
    parts.extend(f"{name}: not run; {why}." for name, why in NOT_HERE.items())
    return "\n".join(parts) + "\n"


def verdicts(results: list[Result]) -> list[str]:
    """What was promised at n = 1e5, and what came out."""
    n = 100_000
    ours = find(results, OURS, n)
    if ours is None:
        return [f"no verdict: {OURS} was not run at n = {n:,}"]
    lines = [f"peak extra memory {ours.extra_bytes / 1e6:.1f} MB (target <= 16)"]
    for name, target in (
        ("numba plain", ">= 4"), ("numba blocked", ">= 4"), ("numba poisson", ">= 4"), ("NumPy presort", ">= 30"),
        ("NumPy presort, kept heap", ">= 30"),
        ("torch-uncertainty loop", ">= 350"), ("stage1_pro suite", "<= 4"), ("stage1_pro suite+probs", "<= 4"),
    ):  # fmt: skip
        venv = next((venv for venv, names in VENVS.items() if name in names), "main")
        other = find(results, name, n, venv)
        if other is None:
            why = next((one.unavailable for one in results if (one.name, one.n) == (name, n)), "")
            lines.append(f"{name}: not run ({why})")
            continue
        line = f"{name}: {other.ratio(ours):.2f} x ours (target {target})"
        base, base_there = find(results, BASELINE, n), find(results, BASELINE, n, venv)
        if venv != "main" and base is not None and base_there is not None:
            paired = other.ratio(base_there) * base.ratio(ours)
            line += f"; {paired:.0f} paired through {BASELINE}"
        lines.append(line)
    return lines


def plot(results: list[Result], path: Path) -> None:
    """Seconds against n, both logarithmic; colours of Okabe and Ito, and a marker for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    markers = [*"osD^vPX*<>hpd8H", (4, 1, 0), (3, 1, 0)]
    figure, axes = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    for number, name in enumerate(CONTESTANTS):
        mine = [one for one in results if one.name == name and one.rounds and (name != BASELINE or one.venv == "main")]
        mine.sort(key=lambda one: one.n)
        if not mine:
            continue
        marker = markers[number % len(markers)]
        colour, thick = colours[number % len(colours)], 2.5 if name == OURS else 1.2
        seconds = [one.median("scaled") for one in mine]
        axes.plot(
            [one.n for one in mine], seconds, color=colour, linewidth=thick, linestyle="-" if number < 7 else "--"
        )
        for one, value in zip(mine, seconds, strict=True):
            whole = one.replicates == REPLICATES
            axes.plot(
                one.n, value, marker=marker, linestyle="", color=colour, markerfacecolor=colour if whole else "white",
                label=name if one is mine[0] else None,
            )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="rows n", ylabel="seconds, sort included",
        title=f"95% interval of AUGRC, {REPLICATES} replicates (open marker: extrapolated)",
    )  # fmt: skip
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """Where and of what this was measured."""

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    model = [line.split(":", 1)[1].strip() for line in output("lscpu").splitlines() if line.startswith("Model name")]
    return {
        "commit": output("git", "describe", "--always", "--dirty"),
        "processor": model[0] if model else platform.processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, help="where benchmarks/peers_venv.sh made the peers' venvs")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e3, 1e4, 1e5, 1e6])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--error-rate", type=float, default=0.1, help="mean error of the rows, up to .5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="all replicates for every peer up to n = 1e5")
    parser.add_argument("--quick", action="store_true", help="n = 1e3 and 1e4, two rounds, 50 replicates")
    options = parser.parse_args()
    if options.venvs is not None:
        options.venvs = options.venvs.resolve()
    sizes = [int(size) for size in options.sizes]
    if options.quick:
        sizes, options.rounds = [1_000, 10_000], 2
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        for n in sizes:
            results += compete(n, options, Path(scratch))
    about["load_after"] = os.getloadavg()
    settings = {
        "threads": options.threads,
        "error_rate": options.error_rate,
        "rounds": options.rounds,
        "seed": options.seed,
    }
    lines = verdicts(results)
    summary = []
    for one in results:
        ours = find(results, OURS, one.n)
        summary.append(
            asdict(one)
            | {name: one.median(name) for name in ("seconds", "scaled", "scaled_cpu")}
            | {"least": one.least, "ratio_to_ours": one.ratio(ours) if ours is not None and one.rounds else None}
        )
    (options.out / "peers.json").write_text(
        json.dumps(
            {"machine": about, "settings": settings, "verdicts": lines, "not_run": NOT_HERE, "results": summary},
            indent=1,
        )
        + "\n"
    )
    text = table(results) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    (options.out / "peers.md").write_text(text)
    plot(results, options.out / "peers.png")
    print(text)
    print(f"{about}\nwritten: {options.out}/peers.json, peers.md, peers.png")


if __name__ == "__main__":
    main()
