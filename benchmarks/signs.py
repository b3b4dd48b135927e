"""The main job on real traffic signs: split, train, calibrate, evaluate over five split seeds.

    python benchmarks/signs.py --data ../shared/data/roadwork_signs --out /tmp/signs [--seeds 0 1 2 3 4]

Each seed is a run folder; finished ones are skipped, killed ones resume. Prints a table and writes results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import stage1_pro
from stage1_pro.artifacts import Splits, write_text
from stage1_pro.config import load_config
from stage1_pro.errors import NotReachableError

OVERRIDES = ["augment.horizontal_flip=0", "train.epochs=16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        run = options.out / f"seed{seed}"
        if not (run / "splits.json").exists():
            stage1_pro.split(options.data / "labels.csv", run, positive="roadwork", seed=seed)
        config = load_config(None, [*OVERRIDES, f"seed={seed}", *options.overrides])
        began = time.monotonic()
        trained = stage1_pro.train(run, config, resume=(run / "config.json").exists())
        seconds = time.monotonic() - began
        if (run / "seconds.json").exists():  # a finished run that was only read again
            seconds = json.loads((run / "seconds.json").read_text())
        else:
            write_text(run / "seconds.json", json.dumps(seconds))
        try:
            policy = stage1_pro.calibrate(run).statement
        except NotReachableError as error:
            policy = f"NOT REACHABLE: {error}"
        evaluation = stage1_pro.evaluate(run)
        splits = Splits.read(run / "splits.json")
        results.append(
            {
                "seed": seed,
                "train_seconds": seconds,
                "best_epoch": trained.best_epoch,
                "counts": splits.counts["val_test"],
                "policy": policy,
                "evaluation": evaluation.model_dump(mode="json"),
            }
        )
        write_text(options.out / "results.json", json.dumps(results, indent=1))
        stage_a = auroc(results[-1], "A")
        print(f"seed {seed}: AUROC A {stage_a:.4f}, B {auroc(results[-1], 'B'):.4f}, {seconds:.0f} s, {policy}", flush=True)
    for stage in ("A", "B"):
        values = np.array([auroc(result, stage) for result in results])
        print(f"stage {stage}: mean val_test AUROC {values.mean():.4f}, SD {values.std(ddof=1):.4f} over {len(values)} split seeds")


def auroc(result: dict, stage: str) -> float:
    """AUROC of one stage on all of val_test."""
    raise SystemExit("see below")


if __name__ == "__main__":
    main()
