"""The CPU router at serving batches against its NumPy twin and against torch on the CPU: route, then gather.

    python benchmarks/route.py [--batch 256] [--width 384] [--rounds 15]

All three do the same: softmax, largest probability and class, comparison, indices of the deferred rows, their features
[M, D]. Torch runs on one thread (at these sizes more only cost) and in inference mode. Each round times all in turn;
figures are medians over rounds of a call's mean time, with the fastest in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from stage1_pro import native


def timed(work: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def on_twin(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with native.use("reference"):
            return work()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n = options.batch
    features = rng.normal(size=(n, options.width)).astype(np.float32)
    gate = rng.normal(size=n).astype(np.float32)
    torch_features, torch_gate = torch.from_numpy(features), torch.from_numpy(gate)
    for k in (1, 2, 7):
        logits = (3 * rng.normal(size=(n, k))).astype(np.float32)
        torch_logits = torch.from_numpy(logits)
        for rule in ("probability", "gate"):
            gated = rule == "gate"
            router = native.Router(n, threshold=0.7 if gated else 0.9, platt=(1.5, 0.2) if gated else None)

            def ours(router=router, logits=logits, gated=gated):
                routed = router.route(logits, gate if gated else None)
                return router.gather(features, routed.deferred)

            def torchs(logits=torch_logits, gated=gated, k=k, threshold=router.threshold):
                with torch.inference_mode():
                    if k == 1:
                        positive = torch.sigmoid(logits[:, 0])
                        label = positive > 0.5
                        probability = torch.where(label, positive, 1 - positive)
                    else:
                        probability, label = torch.softmax(logits, dim=1).max(dim=1)
                    score = torch.sigmoid(torch_gate * 1.5 + 0.2) if gated else probability
                    deferred = torch.nonzero(~(score >= threshold)).squeeze(1)
                    return torch_features.index_select(0, deferred)

            assert ours().shape == tuple(torchs().shape)
            runs = {"compiled": ours, "twin": on_twin(ours), "torch": torchs}
            seconds: dict[str, list[float]] = {label: [] for label in runs}
            for _ in range(options.rounds):
                for label, work in runs.items():
                    seconds[label].append(timed(work, 200))
            base = statistics.median(seconds["compiled"])
            for label, values in seconds.items():
                middle = statistics.median(values)
                print(
                    f"K={k} {rule:11} {label:9} {1e6 * middle:8.1f} us ({1e6 * min(values):.1f})  x{middle / base:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
