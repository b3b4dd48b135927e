"""What a GPU does with the router and the cascade; called by benchmarks/gpu.sh, which builds what it measures.

    python benchmarks/gpu.py --out OUT.json [--dry] [--parts parity router ...]

tests: those marked gpu. parity: millions of rows, random and adversarial, against the CPU kernel bit for bit. router:
route, gather and merge beside the same in plain torch; launches, synchronisations, microseconds. runtimes: Stage A, the
full pass and always both in torch, eager and as CUDA graphs. cascade: forced deferral rates beside always both and the
ideal, with the host knowing Stage B's batch and (switch) without. Models are DINOv3 of ViT-S, B and L shapes with
random weights, fp16, tapped in the middle.

Only numpy, torch and transformers are needed beside the package's own router: a GPU machine has what it has.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_pro import native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from kit.hard_rows import hard_gates, hard_logits  # noqa: E402

SHAPES = {
    "ViT-S": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "ViT-B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
TINY = {"tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}}
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
PLATT = (1.0, 0.0)


class HostRouter:
    """The CPU router with the calls of CudaRouter, for --dry."""

    def __init__(self, max_rows: int, **rule: Any) -> None:
        self.router, self.answers = native.Router(max_rows, **rule), native.Router(max_rows, threshold=0.0)

    def route(self, logits, gate=None, **_stream):
        self.routed = self.router.route(logits.numpy(), None if gate is None else gate.numpy())
        return self.routed

    def gather(self, source, out, **_stream):
        rows = self.routed.deferred
        out[: rows.size] = torch.from_numpy(self.router.gather(source.float().numpy(), rows)).to(out.dtype)

    def mark(self, _stream):
        pass

    def wait(self):
        return self.routed.deferred.size

    def merge(self, logits, **_stream):
        found = self.answers.route(logits.numpy()[: self.wait()])
        self.router.merge(self.routed, found.label, found.probability, found.probability)
        return self.routed


class Machine:
    """Where things run: a GPU, or with --dry the CPU with tiny sizes."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.float16
        self.seconds = 0.02 if dry else 1.0
        # Graphs run one after another and leave their results in buffers of their own, so one pool serves all.
        self.pool = None if dry else torch.cuda.graph_pool_handle()

    def router(self, max_rows: int, **rule: Any) -> Any:
        return HostRouter(max_rows, **rule) if self.dry else native.CudaRouter(max_rows, **rule)

    def stream(self) -> Any:
        return 0 if self.dry else torch.cuda.current_stream()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of some work on fixed buffers; the work itself on a CPU."""
        if self.dry:
            return work
        graph = self.graph(work)
        return graph.replay

    def graph(self, work: Callable[[], object], **options: Any) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(**options)
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        return graph

    def once(self, call: Callable[[], object]) -> float:
        """Seconds until all of a call is done, host and device."""
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def rounds(self, calls: dict[str, Callable[[], object]], most: int = 1000) -> dict[str, np.ndarray]:
        """Seconds of each call in each round, all turn about: at least 30 rounds on a GPU, for about `seconds` each."""
        slowest = 0.0
        for call in calls.values():
            warm = [self.once(call) for _ in range(1 if self.dry else 5)]
            slowest = max(slowest, min(warm))
        number = 3 if self.dry else int(min(most, max(30, self.seconds / slowest)))
        found = {name: np.empty(number) for name in calls}
        rng = np.random.default_rng(0)
        names = list(calls)
        for round_ in range(number):
            for place in rng.permutation(len(names)):
                found[names[place]][round_] = self.once(calls[names[place]])
        return found

    def queued(self, call: Callable[[], object], calls: int = 500) -> float:
        """Seconds of one of many calls in a row, waited for once."""
        calls = 5 if self.dry else calls
        for _ in range(min(calls, 50)):
            call()
        return self.once(lambda: [call() for _ in range(calls)]) / calls


def percentiles(seconds: np.ndarray) -> dict[str, float | None]:
    """Quantiles in microseconds; null where fewer than ten samples lie beyond one (a p99 takes 1,000)."""
    found: dict[str, float | None] = {"samples": len(seconds)}
    for name, level in (("p50_us", 0.5), ("p90_us", 0.9), ("p95_us", 0.95), ("p99_us", 0.99)):
        enough = len(seconds) * (1 - level) >= 10 - 1e-9 or level == 0.5
        found[name] = round(1e6 * float(np.quantile(seconds, level)), 2) if enough else None
    return found


class Halves:
    """A DINOv3 with random weights, its blocks parted at the tap, with linear heads: [N, 3, H, W] to logits [N, 2]."""

    def __init__(self, machine: Machine, shape: dict[str, int]) -> None:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        size, patch = (32, 8) if machine.dry else (224, 16)
        torch.manual_seed(0)
        config = DINOv3ViTConfig(
            **shape, intermediate_size=4 * shape["hidden_size"], image_size=size, patch_size=patch,
            num_register_tokens=4,
        )  # fmt: skip
        model = DINOv3ViTModel(config).eval()
        rope = model.rope_embeddings(torch.empty(1, 3, size, size))
        self.rope = [table.to(machine.device, machine.dtype) for table in rope]
        self.model = model.to(machine.device, machine.dtype)
        self.blocks = (self.model.model if hasattr(self.model, "model") else self.model).layer
        self.depth, self.tap = len(self.blocks), len(self.blocks) // 2
        width = shape["hidden_size"]
        self.tokens = 5 + (size // patch) ** 2
        self.size, self.width = size, width
        self.head_a, self.head_b = (
            torch.nn.Linear(width, 2).to(machine.device, machine.dtype).requires_grad_(False) for _ in range(2)
        )

    def run(self, hidden, start, stop):
        for block in self.blocks[start:stop]:
            hidden = block(hidden, position_embeddings=self.rope)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden

    def stage_a(self, pixels):
        hidden = self.run(self.model.embeddings(pixels), 0, self.tap)
        return self.head_a(hidden[:, 0]).float(), hidden

    def stage_b(self, hidden):
        return self.head_b(self.model.norm(self.run(hidden, self.tap, self.depth)[:, 0])).float()

    def full(self, pixels):
        return self.stage_b(self.run(self.model.embeddings(pixels), 0, self.tap))


def part_tests(_machine: Machine) -> dict[str, Any]:
    """The tests marked gpu; with --dry they are collected, and skip where there is no device."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",  # the machine has no xdist
        "-m",
        "gpu",
        str(ROOT / "tests/test_cuda.py"),
        *([str(ROOT / "tests/test_start.py")] if importlib.util.find_spec("pydantic") else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    return {"summary": lines[-1]}


def part_parity(machine: Machine) -> dict[str, Any]:
    """Rows decided alike by the CPU kernel and the GPU, bit for bit (with --dry: by kernel and twin)."""
    rows = 0
    for k in (1, 2, 3, 7, 40):
        n = (1000 if machine.dry else 1_000_000) // (5 if k == 40 else 1)
        rng = np.random.default_rng(k)
        logits, gates = hard_logits(rng, n, k), hard_gates(rng, n)
        for platt in (None, (1.7, -0.3)):
            gate = None if platt is None else gates
            scores = native.Router(n, threshold=0.5, platt=platt).route(logits, gate).score
            exact = float(rng.choice(scores[scores < 1]))
            for threshold in (exact, float(np.nextafter(np.float32(exact), np.float32(1)))):
                rule = {"threshold": threshold, "platt": platt}
                with native.use("reference" if machine.dry else "compiled"):
                    expected = native.Router(n, **rule).route(logits, gate)
                there = [
                    None if values is None else torch.from_numpy(values).to(machine.device) for values in (logits, gate)
                ]
                found = machine.router(n, **rule).route(*there, stream=machine.stream())
                machine.synchronize()
                count = len(found.deferred) if machine.dry else int(torch.as_tensor(found.count, device="cuda")[0])
                if count != len(expected.deferred):
                    raise AssertionError(f"{count} deferred, not {len(expected.deferred)}: K={k}, platt={platt}")
                for name in ("exited", "score", "label", "probability", "deferred"):
                    ours = getattr(found, name)
                    if not machine.dry:
                        ours = torch.as_tensor(ours, device="cuda").cpu().numpy()
                    theirs = getattr(expected, name)
                    if ours[: theirs.size].tobytes() != theirs.tobytes():
                        raise AssertionError(f"{name} differs: K={k}, platt={platt}, threshold={threshold}")
                rows += n
    return {"rows": rows, "differences": 0}


def naive(logits, gate, tokens, logits_b, threshold):
    """The router as plain torch: what a cascade without one does."""
    probability, label = torch.softmax(logits, dim=1).max(dim=1)
    score = torch.sigmoid(gate * PLATT[0] + PLATT[1])
    exited = score >= threshold
    deferred = torch.nonzero(~exited).squeeze(1)  # the host waits here for how many there are
    gathered = tokens.index_select(0, deferred)
    probability_b, label_b = torch.softmax(logits_b[: deferred.shape[0]], dim=1).max(dim=1)
    label[deferred], probability[deferred], score[deferred] = label_b, probability_b, probability_b
    return label, probability, score, exited, gathered


def counted(machine: Machine, call: Callable[[], object]) -> dict[str, Any]:
    """Kernels, copies and synchronisations of one call, by the profiler; operators on a CPU."""
    turns = 10
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([] if machine.dry else [torch.profiler.ProfilerActivity.CUDA])
    call()
    machine.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(turns):
            call()
    kernels, copies, waits, operators = (collections.Counter() for _ in range(4))
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            (copies if event.name.startswith(("Memcpy", "Memset")) else kernels)[event.name] += 1
        elif "Synchronize" in event.name:
            waits[event.name] += 1
        elif event.name.startswith("aten::"):
            operators[event.name] += 1
    # The profiler's own wait at its end is one in ten calls.
    return {
        "launches": sum(kernels.values()) / turns,
        "copies": sum(copies.values()) / turns,
        "synchronisations": sum(waits.values()) // turns,
        "torch_operators": sum(operators.values()) / turns,
        "kernels": sorted(name.split("(")[0][-60:] for name in kernels),
    }


def part_router(machine: Machine) -> dict[str, Any]:
    """Ours beside plain torch at serving batches."""
    found = {}
    for n in (4,) if machine.dry else (1, 32, 256, 1024):
        torch.manual_seed(n)
        tokens = torch.randn(n, 5 if machine.dry else 201, 384, device=machine.device).to(machine.dtype)
        logits, logits_b = torch.randn(2, n, 2, device=machine.device)
        gate = torch.randn(n, device=machine.device)
        router, out = machine.router(n, threshold=0.5, platt=PLATT), torch.zeros_like(tokens)

        def ours(router=router, logits=logits, gate=gate, tokens=tokens, out=out, logits_b=logits_b):
            stream = machine.stream()
            router.route(logits, gate, stream=stream)
            router.gather(tokens, out, stream=stream)
            return router.merge(logits_b, stream=stream)

        def plain(logits=logits, gate=gate, tokens=tokens, logits_b=logits_b):
            return naive(logits, gate, tokens, logits_b, 0.5)

        label = torch.as_tensor(ours().label, device=machine.device)[:n]
        machine.synchronize()
        assert torch.equal(label.long(), plain()[0])
        entry: dict[str, Any] = {}
        for name, call in (("ours", ours), ("torch", plain)):
            alone = machine.rounds({name: call})[name]
            entry[name] = {
                **counted(machine, call), "queued_us": round(1e6 * machine.queued(call), 2), **percentiles(alone),
            }  # fmt: skip
        graph = machine.capture(ours)
        entry["ours_graph_queued_us"] = round(1e6 * machine.queued(graph), 2)
        entry["ratio_p50"] = round(entry["torch"]["p50_us"] / entry["ours"]["p50_us"], 2)
        entry["ratio_queued"] = round(entry["torch"]["queued_us"] / entry["ours"]["queued_us"], 2)
        found[f"batch {n}"] = entry
        if not machine.dry and (entry["ours"]["launches"], entry["ours"]["synchronisations"]) != (3, 0):
            raise AssertionError(f"3 launches and no synchronisation are meant: {json.dumps(found)}")
    return found


def part_runtimes(machine: Machine) -> dict[str, Any]:
    """Stages and passes in torch, eager and as CUDA graphs; microseconds from call to done."""
    found: dict[str, Any] = {}
    for name, shape in (TINY if machine.dry else SHAPES).items():
        model = Halves(machine, shape)
        for n in (2,) if machine.dry else (1, 8, 32, 128):
            pixels = torch.randn(n, 3, model.size, model.size, device=machine.device).to(machine.dtype)
            calls = {
                "stage_a": lambda m=model, x=pixels: m.stage_a(x),
                "full_pass": lambda m=model, x=pixels: m.full(x),
            }
            graphs = {f"{key} graph": machine.capture(call) for key, call in calls.items()}
            seconds = machine.rounds({**calls, **graphs})
            found[f"{name} batch {n}"] = {
                key: {**percentiles(values), "images_per_second": round(n / float(np.median(values)), 1)}
                for key, values in seconds.items()
            }
    return found


def part_cascade(machine: Machine) -> dict[str, Any]:
    """Speed-up over always both by deferral rate, beside the ideal; graphs all through."""
    found: dict[str, Any] = {}
    for name, shape in (TINY if machine.dry else SHAPES).items():
        model = Halves(machine, shape)
        for n in (4,) if machine.dry else (32, 128):
            found[f"{name} batch {n}"] = cascade(machine, model, n)
    return found


def cascade(machine: Machine, model: Halves, n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    device, dtype = machine.device, machine.dtype
    # Inputs rotate, so that no pass finds the last one's in a cache.
    images = [torch.randn(n, 3, model.size, model.size, device=device).to(dtype) for _ in range(4)]
    pixels, gate = torch.empty_like(images[0]), torch.zeros(n, device=device)
    logits_a, hidden = (
        torch.zeros(n, 2, device=device),
        torch.zeros(n, model.tokens, model.width, device=device).to(dtype),
    )
    into, logits_b = torch.zeros_like(hidden), torch.zeros(n, 2, device=device)
    buckets = sorted({min(n, max(1, round(n * step / 16))) for step in range(1, 17)} | {1})

    def stage_a():
        logits, tokens = model.stage_a(pixels)
        logits_a.copy_(logits)
        hidden.copy_(tokens)

    def stage_b(rows):
        return lambda: logits_b[:rows].copy_(model.stage_b(into[:rows]))

    first, bodies = machine.capture(stage_a), {rows: machine.capture(stage_b(rows)) for rows in buckets}
    whole = machine.capture(lambda: logits_b.copy_(model.stage_b(hidden)))
    full = machine.capture(lambda: logits_b.copy_(model.full(pixels)))
    router = machine.router(n, threshold=0.5, platt=PLATT)
    image = itertools.cycle(images)

    def load():
        pixels.copy_(next(image))

    def always_both():
        load()
        first()
        whole()

    def full_pass():
        load()
        full()

    def at(rows, switch=None):
        rows = itertools.cycle(rows)

        def run():
            load()
            gate.copy_(next(rows))
            first()
            stream = machine.stream()
            router.route(logits_a, gate, stream=stream)
            router.mark(stream)
            router.gather(hidden, into, stream=stream)
            if switch is not None:  # the host never waits for the count
                switch.launch(stream)
            elif count := router.wait():
                bodies[next(rows for rows in buckets if rows >= count)]()
            router.merge(logits_b, stream=stream)

        return run

    def forced(count):
        gates = torch.full((4, n), 9.0, device=device)
        for row in gates:
            row[torch.from_numpy(rng.permutation(n)[:count].copy()).to(device)] = -9.0
        return gates

    counts = {rate: round(rate * n) for rate in RATES}
    gates = {rate: forced(count) for rate, count in counts.items()}
    calls: dict[str, Callable[[], object]] = {"always_both": always_both, "full_pass": full_pass}
    calls |= {f"cascade {rate}": at(gates[rate]) for rate in RATES}
    entry: dict[str, Any] = {"tap": model.tap, "blocks": model.depth, "buckets": buckets}
    if not machine.dry:
        try:
            graphs = [machine.graph(stage_b(rows), keep_graph=True) for rows in buckets]
            switch = router.switch(buckets, graphs)
            switched = {f"switch {rate}": at(gates[rate], switch) for rate in RATES}
            machine.once(switched["switch 1.0"])
            calls |= switched
        except Exception:  # noqa: BLE001 - an option that has run on no GPU yet must not cost the rest
            entry["switch_failed"] = traceback.format_exc(limit=3)
    seconds = machine.rounds(calls, most=300)
    entry["samples"] = len(seconds["always_both"])
    base = seconds["always_both"]
    for label, values in seconds.items():
        line: dict[str, Any] = {"p50_us": round(1e6 * float(np.median(values)), 1)}
        line["speedup"] = round(float(np.median(base / values)), 3)
        if " " in label:
            rate = float(label.split()[1])
            share = model.tap / model.depth
            line["ideal"] = round(1 / (share + counts[rate] / n * (1 - share)), 3)
            line["of_ideal"] = round(line["speedup"] / line["ideal"], 3)
        entry[label] = line
    return entry


def facts(machine: Machine) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    there = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "router": native.cuda_why(), "cores": os.cpu_count(),
             "commit": commit.stdout.strip() or None}  # fmt: skip
    if not machine.dry:
        properties = torch.cuda.get_device_properties(0)
        there |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
                  "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}  # fmt: skip
    return there


PARTS = {
    "tests": part_tests,
    "parity": part_parity,
    "router": part_router,
    "cascade": part_cascade,
    "runtimes": part_runtimes,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: no figure of a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--build-seconds", type=float)
    options = parser.parse_args()
    machine = Machine(options.dry)
    result: dict[str, Any] = {"dry": options.dry, "machine": facts(machine), "build_seconds": options.build_seconds}
    failed = []
    for name in options.parts:
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                result[name] = PARTS[name](machine)
        except Exception:  # noqa: BLE001 - a part that fails must not cost what the others measure
            failed.append(name)
            result[name] = {"failed": traceback.format_exc()}
            traceback.print_exc()
        result[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name}: {'FAILED' if name in failed else 'done'} in {result[name]['seconds']} s", flush=True)
        partial = options.out.with_name(options.out.name + ".tmp")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(options.out)
    print(f"wrote {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
