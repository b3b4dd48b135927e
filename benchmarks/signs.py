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
from stage1_pro.config import load_config
from stage1_pro.data.splits import Splits
from stage1_pro.errors import NotReachableError
from stage1_pro.files import write_text

OVERRIDES = ["augment.horizontal_flip=0", "train.epochs=16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    results = [one_seed(options.data, options.out / f"seed{seed}", seed, options.overrides) for seed in options.seeds]
    write_text(options.out / "results.json", json.dumps(results, indent=1))
    for stage in ("stage_a", "stage_b"):
        values = np.array([result[stage] for result in results])
        print(
            f"{stage}: mean val_test AUROC {values.mean():.4f}, SD {values.std(ddof=1) if len(values) > 1 else 0:.4f} "
            f"over {len(values)} split seeds; training {np.mean([r['seconds'] for r in results]):.0f} s "
            f"(longest {max(r['seconds'] for r in results):.0f} s)"
        )


def one_seed(data: Path, run: Path, seed: int, overrides: list[str]) -> dict[str, object]:
    """Split, train, calibrate and evaluate one split seed; a finished run is read again, not trained again."""
    if not (run / "splits.json").exists():
        stage1_pro.split(data / "labels.csv", run, positive="roadwork", seed=seed)
    config = load_config(None, [*OVERRIDES, f"seed={seed}", *overrides])
    began = time.monotonic()
    trained = stage1_pro.train(run, config, resume=(run / "config.json").exists())
    clock = run / "train_seconds.json"
    if not clock.exists():
        write_text(clock, json.dumps(time.monotonic() - began))
    try:
        policy = stage1_pro.calibrate(run, guarantee="none")
        words = f"exits at {policy.exit_threshold:.3f}, coverage {policy.coverage:.3f} on val_calib"
    except NotReachableError as error:
        words = f"not reachable: {error}"
    evaluation = stage1_pro.evaluate(run)
    result: dict[str, object] = {
        "seed": seed,
        "seconds": json.loads(clock.read_text()),
        "best_epoch": trained.best_epoch,
        "stage_a": evaluation.value("auroc", "stage_a"),
        "stage_b": evaluation.value("auroc", "stage_b"),
        "accuracy_a": evaluation.value("accuracy", "stage_a"),
        "augrc_a": evaluation.value("augrc", "stage_a"),
        "val_test": Splits.read(run / "splits.json").counts["val_test"],
        "policy": words,
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
