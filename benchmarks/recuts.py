"""How often does exit error certify on real signs? Groups of one run's val_select and val_calib, cut anew 100 times.

    python benchmarks/recuts.py --data ../shared/data/roadwork_signs --out DIR \
        --backbone ../shared/weights/dinov2-small [--run RUN] [--cuts 100]

Stage A is a linear head on the backbone at 56 px, trained once unless ``--run`` is given. Every cut deals all groups of
both splits to an order and a certificate, as many to each as the run has; exits are ranked by the largest probability,
delta is .05. Two ways: the first part gives the order and all of the second certifies, or the second is halved, as
without val_select. Prints the share of cuts that deploy, and their mean coverage (0 where none does), of groups and of
photos; writes recuts.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from resplits import DELTA, alike

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.files import write_text
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.ordering import certify_halves
from stage1_pro.policies.rows import cut_halves
from stage1_pro.policies.softmax import softmax

OVERRIDES = ["augment.horizontal_flip=0", "train.mode=linear", "model.image_size=56"]
ALPHAS = (0.03, 0.04, 0.05, 0.08)


def recut(
    score: np.ndarray, wrong: np.ndarray, groups: np.ndarray, n_order: int, alpha: float, seed: int
) -> dict[str, tuple[float, float, float]]:
    """By way: whether one cut deploys (1 or 0), and its coverage of the groups and of the photos that are not ordered.

    Args:
        score: [N], higher is surer.
        wrong: bool [N].
        groups: [N] names.
        n_order: groups that give the order.
        alpha: largest exit error.
        seed: of the cut.
    """
    first = np.isin(groups, np.random.default_rng(seed).permutation(np.unique(groups))[:n_order])
    rest = np.flatnonzero(~first)
    ways = {
        "halves": (rest, cut_halves(rest.size, groups[rest], seed)),
        "order from val_select": (np.arange(groups.size), np.where(first, "fit", "certify")),
    }
    found = {}
    for way, (rows, halves) in ways.items():
        certificate = certify_halves(
            score[rows], [Risk("exit error", alpha, wrong[rows])], halves, delta=DELTA, groups=groups[rows],
            lowest=0.0, smallest=False,
        )  # fmt: skip
        exits = np.zeros(rest.size) if certificate.threshold is None else score[rest] >= certificate.threshold
        of_groups = np.average(exits, weights=alike(groups[rest]))
        found[way] = (float(certificate.feasible), float(of_groups), float(exits.mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv")
    parser.add_argument("--backbone", type=Path, help="dinov2-small, where no --run is given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a trained run on the same data")
    parser.add_argument("--cuts", type=int, default=100)
    options = parser.parse_args()
    run = options.run
    if run is None:
        if options.backbone is None:
            parser.error("--backbone must be given where there is no --run")
        run = options.out / "run"
        if not (run / "splits.json").exists():
            stage1_pro.split(options.data / "labels.csv", run, positive="roadwork")
        config = load_config(None, [*OVERRIDES, f"model.backbone={options.backbone}"])
        stage1_pro.train(run, config, resume=(run / "config.json").exists())
    parts = [Predictions.load(run / f"{split}.npz") for split in ("val_select", "val_calib")]
    probs, labels, groups = (
        np.concatenate([one(part) for part in parts])
        for one in (lambda part: softmax(part.logits_a), lambda part: part.labels, lambda part: part.groups)
    )
    wrong, n_order = probs.argmax(axis=1) != labels, np.unique(parts[0].groups).size
    print(f"{n_order} groups order, {np.unique(groups).size - n_order} certify; {wrong.mean():.1%} of photos wrong")
    table: dict[str, dict[str, list[float]]] = {}
    for alpha in ALPHAS:
        cuts = [recut(probs.max(axis=1), wrong, groups, n_order, alpha, seed) for seed in range(options.cuts)]
        table[f"{alpha:g}"] = {way: np.mean([cut[way] for cut in cuts], axis=0).tolist() for way in cuts[0]}
        said = [
            f"{way}: {deployed:.0%}, {of_groups:.3f} of groups, {of_photos:.3f} of photos"
            for way, (deployed, of_groups, of_photos) in table[f"{alpha:g}"].items()
        ]
        print(f"exit error <= {alpha:g}; " + "; ".join(said), flush=True)
    write_text(options.out / "recuts.json", json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
