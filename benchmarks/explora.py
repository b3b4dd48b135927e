"""ExPLoRA against none: a small DINOv3 pretrained on one domain, adapted to street scenes, then trained on few labels.

    python benchmarks/explora.py --pool ../shared/data/street_pool --data ../shared/data/roadwork_scenes --out explora

1. The preset `narrow` is pretrained from scratch by MAE on rendered scenes (or --source: images of another domain).
2. The scenes are cut into --folds parts by group. For each part ExPLoRA adapts the pretrained backbone to the pool,
   without the images and clips that are not train rows there. The guard's verdict is recorded and overruled: the study
   asks what adaptation does, not what the guard lets through.
3. For each part and seed, --groups train groups that show roadwork and as many that do not are kept, and heads (or what
   --modes names) are trained on them, from the pretrained and from the adapted backbone. Every row is answered once a
   seed, by a model that saw no row of its group.

Finished steps are read again, killed ones go on. Writes results.json and results.md: accuracy and MCC of Stage A with
and without ExPLoRA, and the difference with its interval: groups are resampled, with the same draws for both arms and
all seeds. On roadwork_scenes the source gives the label away; the rows of --honest are the ones to read.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import stage1_pro
from stage1_pro import native
from stage1_pro.config import load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Row, Splits, hash_splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.files import write_text
from stage1_pro.metrics.probabilistic import mcc
from stage1_pro.training.run import ExploraRecord

ARMS = ("none", "explora")
METRICS = ("accuracy", "mcc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="unlabelled images to adapt to")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv of the few-label task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="labelled images to pretrain on; rendered scenes by default")
    parser.add_argument("--scenes", type=int, default=3000, help="how many scenes are rendered")
    parser.add_argument("--base", default="narrow", help="preset or folder; a folder is not pretrained")
    parser.add_argument("--pretrain-epochs", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=30, help="of adaptation")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--groups", type=int, default=3, help="train groups of either kind")
    parser.add_argument("--rows", type=int, default=20, help="labelled rows of a group")
    parser.add_argument("--modes", nargs="+", default=["linear"], help="values of train.mode")
    parser.add_argument("--honest", default="rw_", help="beginning of the names of the groups to read")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="of every explora and train")
    options = parser.parse_args()
    began = time.monotonic()
    base = pretrain(options)
    folds = [adapt(options, base, fold) for fold in range(options.folds)]
    results = [study(options, mode, [run for run, _ in folds]) for mode in options.modes]
    record = {
        "base": base,
        "folds": [
            {
                "better": found.better, "reason": found.reason, "share": found.share, "pool": found.pool.model_dump(),
                "held_out_loss": [found.held_out_loss[0], found.held_out_loss[-1]],
                "figures": [one.model_dump() for one in found.figures],
            }
            for _, found in folds
        ],
        "results": results,
        "options": {name: str(value) for name, value in vars(options).items()},
        "seconds_of_this_start": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_text(options.out / "results.json", json.dumps(record, indent=1))
    text = table(results, [found for _, found in folds], options)
    write_text(options.out / "results.md", text)
    print(text)


# --------------------------------------------------------------------------------------------
# Backbones


def pretrain(options: argparse.Namespace) -> str:
    """The folder of the backbone that both arms start from."""
    if Path(options.base).is_dir():
        return str(options.base)
    run = options.out / "source"
    labels = options.source / "labels.csv" if options.source else options.out / "scenes" / "labels.csv"
    if not labels.is_file():
        render_pool(labels.parent, options.scenes, seed=0)
    if not (run / "splits.json").is_file():
        # The guard's probes need a few hundred train rows; what is not train is not pretrained on.
        stage1_pro.split(
            labels, run, seed=0, fractions={"train": 0.85, "val_select": 0.05, "val_calib": 0.05, "val_test": 0.05}
        )
    flip = ["explora.horizontal_flip=0"] if options.source else []
    explore(
        options, labels.parent / "images", run, options.base,
        [
            f"explora.epochs={options.pretrain_epochs}", "explora.train=full", "explora.lr=1e-3",
            "explora.decoder_warmup_epochs=0", *flip,
        ],
    )  # fmt: skip
    return str(run / "explora" / "backbone")


def adapt(options: argparse.Namespace, base: str, fold: int) -> tuple[Path, ExploraRecord]:
    """A run whose val_test is one part of the data, with the backbone adapted beside it."""
    run = options.out / f"fold{fold}"
    if not (run / "splits.json").is_file():
        # CamVid and Udacity clips are long: what near-duplicates tie together may be much of the set.
        stage1_pro.split(
            options.data / "labels.csv", run, positive="roadwork", folds=options.folds, fold=fold, max_component=0.5
        )
    warmup = min(4, options.epochs // 2)
    return run, explore(
        options, options.pool, run, base,
        [f"explora.epochs={options.epochs}", f"explora.decoder_warmup_epochs={warmup}"],
    )  # fmt: skip


def explore(options: argparse.Namespace, images: Path, run: Path, base: str, given: list[str]) -> ExploraRecord:
    resume = (run / "explora" / "config.json").is_file()
    config = load_config(None, [f"model.backbone={base}", "explora.keep=adapted", *given, *options.overrides])
    return stage1_pro.explora(images, run, config, resume=resume)


# --------------------------------------------------------------------------------------------
# Few labels


@dataclass(frozen=True)
class Answers:
    """What one arm answered: rows of all folds [N], the same order in every arm and seed."""

    groups: NDArray[np.str_]
    labels: NDArray[np.int64]
    given: NDArray[np.int64]


def study(options: argparse.Namespace, mode: str, runs: list[Path]) -> dict[str, object]:
    answers = {
        arm: [join([few(options, mode, run, arm, seed) for run in runs]) for seed in options.seeds] for arm in ARMS
    }
    first = answers["none"][0]
    result: dict[str, object] = {"mode": mode}
    for name, rows in (
        (f"{options.honest}*", np.char.startswith(first.groups, options.honest)),
        ("all", np.ones(first.labels.size, dtype=bool)),
    ):
        if rows.any():
            result[name] = measure(answers, rows)
    return result


def few(options: argparse.Namespace, mode: str, run: Path, arm: str, seed: int) -> Predictions:
    """Train on few labels of a fold's train rows; the answers on its val_test."""
    from stage1_pro.training.inference import infer_split

    small = options.out / f"few_{mode}" / f"{run.name}_seed{seed}_{arm}"
    done = small / "answers.npz"
    if done.is_file():
        return Predictions.load(done)
    splits = Splits.read(run / "splits.json")
    few_labels(splits, options, seed).write(small / "splits.json")
    record = ExploraRecord.read(run / "explora" / "explora.json")
    folder = run / "explora" / "backbone" if arm == "explora" else pretrained(options)
    config = load_config(
        None,
        [
            f"seed={seed}", f"model.backbone={folder}", f"model.image_size={record.preprocessing.height}",
            f"train.mode={mode}", "train.epochs=60", "train.patience=20", "train.batch_size=32", "gate.fit=joint",
            *options.overrides,
        ],
    )  # fmt: skip
    stage1_pro.train(small, config, resume=(small / "config.json").is_file())
    found = infer_split(small, "val_test")
    found.save(done)
    return found


def pretrained(options: argparse.Namespace) -> Path:
    return Path(options.base) if Path(options.base).is_dir() else options.out / "source" / "explora" / "backbone"


def few_labels(splits: Splits, options: argparse.Namespace, seed: int) -> Splits:
    """The same splits with few train rows: of so many groups that hold the positive class, and that hold the others.

    They are honest rows where a class has any: otherwise nearly all negatives would be of another source.
    """
    rng = np.random.default_rng(seed)
    kept: list[Row] = []
    for positive in (True, False):
        rows = [row for row in splits.of("train") if (row.label == splits.positive) == positive]
        rows = [row for row in rows if row.group.startswith(options.honest)] or rows
        names = sorted({row.group for row in rows})
        for name in rng.permutation(names)[: options.groups]:
            own = [row for row in rows if row.group == name]
            kept += [own[i] for i in sorted(rng.permutation(len(own))[: options.rows])]
    rows = sorted([*kept, *(row for row in splits.rows if row.split != "train")], key=lambda row: row.file)
    counts = {name: sum(row.label == name for row in kept) for name in splits.classes}
    return splits.model_copy(
        update={
            "rows": rows, "hashes": hash_splits(rows), "counts": {**splits.counts, "train": counts},
            "groups": {**splits.groups, "train": len({row.group for row in kept})},
        }
    ).verify()  # fmt: skip


def join(parts: list[Predictions]) -> Answers:
    groups, labels, given, ids = (
        np.concatenate([getattr(part, name) if name else part.logits_a.argmax(1) for part in parts])
        for name in ("groups", "labels", "", "row_ids")
    )
    positive = parts[0].classes.index(parts[0].positive)
    order = np.argsort(ids)
    return Answers(groups[order], (labels[order] == positive).astype(int), (given[order] == positive).astype(int))


def measure(answers: dict[str, list[Answers]], rows: NDArray[np.bool_], n_replicates: int = 2000) -> dict[str, object]:
    """Mean over seeds of each arm's figures on some rows, and the paired difference with a 95% interval by group."""
    first = answers["none"][0]
    names, member = np.unique(first.groups[rows], return_inverse=True)
    # One draw of groups for both arms and every seed [B, G].
    times = native.resample_counts([names.size], n_replicates, seed=0).astype(np.float64)
    counts = {
        arm: [cells(one.labels[rows], one.given[rows], member, names.size) for one in found]
        for arm, found in answers.items()
    }
    result: dict[str, object] = {"n_rows": int(rows.sum()), "n_groups": int(names.size)}
    for k, metric in enumerate(METRICS):
        value = {
            arm: [float(figures(one.sum(0, keepdims=True))[k][0]) for one in found] for arm, found in counts.items()
        }
        spread = {arm: np.mean([figures(times @ one)[k] for one in found], axis=0) for arm, found in counts.items()}
        apart = spread["explora"] - spread["none"]
        result[metric] = {
            **{arm: float(np.mean(value[arm])) for arm in ARMS},
            "per_seed": value,
            "difference": float(np.mean(value["explora"]) - np.mean(value["none"])),
            "interval": np.quantile(apart, (0.025, 0.975)).tolist(),
        }
    one = answers["explora"][0]
    assert np.isclose(result["mcc"]["per_seed"]["explora"][0], mcc(one.given[rows], one.labels[rows]))  # type: ignore[index]
    return result


def cells(labels: NDArray[np.int64], given: NDArray[np.int64], member: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """Confusion counts per group [G, 4]: true negatives, false positives, false negatives, true positives."""
    return np.bincount(member * 4 + labels * 2 + given, minlength=4 * n).reshape(n, 4).astype(np.float64)


def figures(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy and MCC of confusion counts [B, 4]; MCC is 0 where a row or column is empty."""
    tn, fp, fn, tp = counts.T
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    safe = np.where(product > 0, product, 1)
    return (tn + tp) / counts.sum(1), np.where(product > 0, (tp * tn - fp * fn) / np.sqrt(safe), 0.0)


def table(results: list[dict[str, object]], records: list[ExploraRecord], options: argparse.Namespace) -> str:
    title = (
        f"ExPLoRA ({records[0].objective}, {records[0].share:.1%} trained) against none, {len(options.seeds)} seeds, "
        f"{options.folds} folds by group, {options.groups} train groups of either kind"
    )
    lines = [
        title,
        "",
        "| mode | rows | figure | none | ExPLoRA | difference | 95% by group |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, found in result.items():
            if not isinstance(found, dict):
                continue
            for metric in METRICS:
                one = found[metric]
                low, high = one["interval"]
                cells = (
                    f"{one['none']:.4f} | {one['explora']:.4f} | {one['difference']:+.4f} | [{low:+.4f}, {high:+.4f}]"
                )
                rows = f"{name} ({found['n_rows']}, {found['n_groups']} groups)"
                lines.append(f"| {result['mode']} | {rows} | {metric} | {cells} |")
    for k, record in enumerate(records):
        lines += ["", f"fold {k}: {'better' if record.better else 'not better'} to the guard: {record.reason}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
