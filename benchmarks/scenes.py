"""The same chain on real street scenes: a pretrained DINOv2-small, linear mode, group cross-validation.

    python benchmarks/scenes.py --data ../shared/data/roadwork_scenes \
        --backbone ../shared/weights/dinov2-small --out /tmp/scenes

Every group is in exactly one fold's val_test. Reported per source, since in this set the source predicts the label.
Rows are pooled over folds with the share of stage A's errors; AUROC is given per fold where a source has both classes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.errors import NotReachableError
from stage1_pro.files import write_text

OVERRIDES = ["model.image_size=112", "train.mode=linear", "train.epochs=60", "train.patience=20", "train.lr=0.001"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-fnr", type=float, default=0.02)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    table: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    policies = []
    for fold in range(options.folds):
        run = options.out / f"seed{options.seed}_fold{fold}"
        stage1_pro.split(
            options.data / "labels.csv", run, positive="roadwork", seed=options.seed, folds=options.folds, fold=fold,
            overwrite=True,
        )  # fmt: skip
        config = load_config(None, [*OVERRIDES, f"model.backbone={options.backbone}", *options.overrides])
        stage1_pro.train(run, config, overwrite=True)
        try:
            policy = stage1_pro.calibrate(run, guarantee="none", target_fnr=options.target_fnr)
            policies.append(
                f"fold {fold}: coverage {policy.coverage:.2f}, FNR on exits {policy.fnr_on_exited:.3f} (guarantee none)"
            )
        except NotReachableError as error:
            policies.append(f"fold {fold}: not reachable: {error}")
        evaluation = stage1_pro.evaluate(run)
        sources = sorted({m.source for m in evaluation.measures if m.source})
        for source in [None, *sources]:
            given = evaluation.measure("accuracy", stage="stage_a", source=source)
            table[source or "all"].append(
                {
                    "fold": fold,
                    "rows": given.n,
                    "accuracy": given.value,
                    "auroc": evaluation.value("auroc", stage="stage_a", source=source),
                }
            )
    print("\n".join(policies))
    print(f"{'source':<58}{'rows':>6}{'accuracy':>10}{'AUROC per fold':>20}")
    for source, rows in table.items():
        count = sum(row["rows"] for row in rows)
        accuracy = sum(row["rows"] * row["accuracy"] for row in rows) / count
        aurocs = [row["auroc"] for row in rows if row["auroc"] is not None]
        text = (
            f"{np.mean(aurocs):.3f} ± {np.std(aurocs, ddof=1):.3f} ({len(aurocs)})" if len(aurocs) > 1 else "one class"
        )
        print(f"{source[:56]:<58}{count:>6}{accuracy:>10.3f}{text:>20}")
    write_text(options.out / "results.json", json.dumps({"policies": policies, "sources": table}, indent=1))


if __name__ == "__main__":
    main()
