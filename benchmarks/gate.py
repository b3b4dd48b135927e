"""Does the gate rank answers at least as well as max softmax? Real traffic signs, three split seeds, val_test.

    python benchmarks/gate.py --data ../shared/data/roadwork_signs --out /tmp/gate [--seeds 0 1 2] [--set gate.views=1]

Each seed is a run folder; finished ones are read again, killed ones resume. Prints a table and writes gate.json: AUGRC
of the refitted gate, of max softmax, of the gate as joint training left it, and gate minus softmax, paired, by group.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.files import write_text
from stage1_pro.policies.ranking import GateChoice

OVERRIDES = ["augment.horizontal_flip=0", "train.epochs=16"]
TARGET = 0.005
NAMES = ("gate_augrc", "softmax_augrc", "joint_gate_augrc", "gate_minus_softmax_augrc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    results = [one_seed(options.data, options.out / f"seed{seed}", seed, options.overrides) for seed in options.seeds]
    write_text(options.out / "gate.json", json.dumps(results, indent=1))
    print("AUGRC x 1000 on val_test, 95% intervals by group")
    print(f"{'seed':>4}  {'gate':^22}  {'max softmax':^22}  {'joint gate':^22}  {'gate - softmax':^22}  target")
    for result in results:
        words = [show(result[name]) for name in NAMES]
        met = "met" if result[NAMES[-1]]["high"] < TARGET else "not met"
        print(f"{result['seed']:>4}  {'  '.join(f'{word:^22}' for word in words)}  {met}")


def show(found: dict[str, float]) -> str:
    """A figure and its interval, in thousandths."""
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**{name: 1000 * number for name, number in found.items()})


def one_seed(data: Path, run: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Split, train and evaluate one split seed; a finished run is read again, not trained again."""
    if not (run / "splits.json").exists():
        stage1_pro.split(data / "labels.csv", run, positive="roadwork", seed=seed)
    config = load_config(None, [*OVERRIDES, f"seed={seed}", *overrides])
    stage1_pro.train(run, config, resume=(run / "config.json").exists())
    evaluation = stage1_pro.evaluate(run)
    choice = GateChoice.read(run / "gate.json")
    result: dict[str, Any] = {"seed": seed, "accuracy": evaluation.value("accuracy", "stage_a")}
    for name in NAMES:
        found = evaluation.measure(name, "stage_a")
        result[name] = {"value": found.value, "low": found.low, "high": found.high}
    result |= {
        "form": choice.form,
        "strength": choice.strength,
        "errors": choice.n_errors,
        "rows": choice.n_rows,
        "confidence": choice.confidence,
        "select_difference": choice.difference.value,
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
