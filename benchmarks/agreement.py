"""How many photos exit at a certified disagreement with Stage B, and does it hold on other groups? No labels are used.

    python benchmarks/agreement.py --data ../shared/data --backbone ../shared/weights/dinov2-small --out DIR \
        [--tap 8] [--recuts 200]

Heads on a frozen backbone learn from three tenths of the signs' groups; Stage A reads block ``tap``. The other groups
are photos without labels: they come as a table of files and groups. ``val_select`` fixes the order of thresholds.

- The curve: each limit certified on all photos without labels, delta .05, every limit by itself.
- Re-cuts: nine tenths of their groups certify, and the disagreement of exits is measured on the last tenth. A few
  other groups are a noisy judge: how often their rate is above the limit is shown, and how often it is so by their
  exact 95% bound. Parts of one pool are no independent data either, so the same is done with the pool as the world:
  groups are drawn with replacement, and the true disagreement is that of the pool, exactly.

The same for ``street_pool``, whose 14 clips are the groups, and once more as if its frames were independent, which is
false: its re-cuts are of clips all the same. Photos of groups count as groups do: one drawn from each.
Writes agreement.json, agreement.png and, once, what both stages say (``DIR/*.npz``).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import matplotlib as mpl
import numpy as np
from resplits import alike

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.data.labels import read_list
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import NotReachableError
from stage1_pro.files import write_text
from stage1_pro.metrics.binomial import clopper_pearson_lower
from stage1_pro.policies.rows import Rows, one_each
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.policies.target import Softmax
from stage1_pro.training.unlabelled import read_unlabelled

OVERRIDES = ["augment.horizontal_flip=0", "train.mode=linear", "model.image_size=56"]
LIMITS = (0.005, 0.01, 0.02, 0.05)
DELTA = 0.05
LABELLED = 0.3


def cut_signs(data: Path, out: Path, seed: int) -> None:
    """Two folders of signs, of other groups each: ``labelled`` with labels, ``signs`` without."""
    rows = read_list(data / "labels.csv", None)
    names = sorted({row["group"] for row in rows})
    chosen = set(np.random.default_rng(seed).permutation(names)[: round(LABELLED * len(names))].tolist())
    for name, columns, kept in (
        ("labelled", ("file", "label_name", "group"), [row for row in rows if row["group"] in chosen]),
        ("signs", ("file", "group"), [row for row in rows if row["group"] not in chosen]),
    ):
        folder = out / name
        if (folder / "labels.csv").is_file():
            continue
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for row in kept:
            shutil.copyfile(data / row["file"], folder / row["file"])
        heading = ",".join(columns).replace("label_name", "label")
        lines = [",".join(row[column] for column in columns) for row in kept]
        write_text(folder / "labels.csv", "\n".join([heading, *lines]) + "\n")


def train(data: Path, out: Path, backbone: Path, tap: int, seed: int) -> Path:
    """A run on the labelled signs, trained once."""
    cut_signs(data, out, seed)
    run = out / "run"
    if not (run / "splits.json").exists():
        fractions = {"train": 0.5, "val_select": 0.4, "val_calib": 0.05, "val_test": 0.05}
        stage1_pro.split(out / "labelled" / "labels.csv", run, positive="roadwork", fractions=fractions)
    config = load_config(None, [*OVERRIDES, f"model.backbone={backbone}", f"model.tap={tap}"])
    stage1_pro.train(run, config, resume=(run / "config.json").exists())
    return run


def seen(run: Path, images: Path, kept: Path, *, rows_independent: bool) -> Rows:
    """What both stages say of ``val_select`` and of photos without labels, looked at once."""
    if not kept.is_file():
        order, splits = Predictions.load(run / "val_select.npz"), Splits.read(run / "splits.json")
        found = read_unlabelled(run, images, splits, order, columns=None, rows_independent=rows_independent).rows
        values = {one.name: getattr(found, one.name) for one in fields(found)}
        with kept.open("wb") as file:
            np.savez(file, **{name: value for name, value in values.items() if value is not None})
    with np.load(kept) as file:
        values = {name: value if value.ndim else value.item() for name, value in file.items()}
    return Rows(**{**values, "classes": values["classes"].tolist()})


def some(rows: Rows, drawn: list[np.ndarray]) -> Rows:
    """Rows of ``val_select`` and of the clips drawn, each draw a clip of its own."""
    assert rows.groups is not None
    first = np.flatnonzero(rows.halves == "fit")
    at = np.concatenate([first, *drawn])
    place = np.repeat(np.arange(1 + len(drawn)), [first.size, *(clip.size for clip in drawn)])
    cut = {one.name: getattr(rows, one.name) for one in fields(rows)}
    cut = {name: value[at] if isinstance(value, np.ndarray) else value for name, value in cut.items()}
    names = [f"{draw} {name}" for draw, name in zip(place, cut["groups"], strict=True)]
    return Rows(**{**cut, "groups": np.array(names)})


def certify(rows: Rows, limit: float) -> Thresholds | None:
    """The policy that these photos certify; None: refused."""
    try:
        return Thresholds.fit(Softmax(disagreement=limit, delta=DELTA), rows)
    except NotReachableError:
        return None


def measure(policy: Thresholds | None, rows: Rows, clips: list[np.ndarray]) -> tuple[float, float, int, int]:
    """Share that exits, disagreement of exits, and of one photo from each clip how many exit and differ, and exit.

    Clips count alike, and zeros stand where nothing was certified.
    """
    if policy is None:
        return 0.0, 0.0, 0, 0
    at = np.concatenate(clips)
    names = np.repeat(np.arange(len(clips)), [clip.size for clip in clips])
    weights, exits = alike(names), policy.exits(rows.probs[at])
    differ = exits & (rows.probs[at].argmax(axis=1) != rows.answers_b[at])
    out, one = weights @ exits, one_each(names, np.ones(at.size, dtype=bool), 0)
    return out / len(clips), weights @ differ / max(out, 1e-12), int(differ[one].sum()), int(exits[one].sum())


def study(rows: Rows, names: np.ndarray, recuts: int, seed: int) -> dict[str, dict[str, float]]:
    """By limit: the certificate on all photos, and shares of re-cuts.

    Args:
        rows: of ``val_select`` and of photos without labels.
        names: [M] clip of each photo without labels, by which re-cuts go.
        recuts: their number.
        seed: of them.
    """
    photos, table = np.flatnonzero(rows.halves == "certify"), {}
    clips = [photos[names == one] for one in np.unique(names)]
    for limit in LIMITS:
        rng, found = np.random.default_rng(seed), []
        whole = certify(rows, limit)
        for _ in range(recuts):
            mixed = rng.permutation(len(clips))
            n = round(0.9 * mixed.size)
            policy = certify(some(rows, [clips[one] for one in mixed[:n]]), limit)
            out, rate, k, m = measure(policy, rows, [clips[one] for one in mixed[n:]])
            drawn = rng.integers(0, len(clips), len(clips))
            again = certify(some(rows, [clips[one] for one in drawn]), limit)
            found.append((
                policy is not None, out, rate > limit, m > 0 and clopper_pearson_lower(k, m, 0.95) > limit,
                again is not None, measure(again, rows, clips)[1] > limit,
            ))  # fmt: skip
        certified, out, above, beyond, again, false = np.mean(np.array(found, dtype=float), axis=0).tolist()
        coverage, rate, _, _ = measure(whole, rows, clips)
        table[f"{limit:g}"] = {
            "certified": float(whole is not None), "exit rate": coverage, "disagreement": rate,
            "re-cuts certified": certified, "exit rate there": out, "above the limit there": above,
            "above it by its bound": beyond, "worlds certified": again, "truly above": false,
        }  # fmt: skip
    return table


def show(name: str, n_photos: int, n_clips: int, table: dict[str, dict[str, float]], recuts: int) -> None:
    """Print one table."""
    print(
        f"\n{name}: {n_photos} photos in {n_clips} groups; {recuts} re-cuts, SE of 5%: {math.sqrt(0.0475 / recuts):.1%}"
    )
    print("| limit | all: exit rate, disagreement | re-cuts certified, exit rate there | above there, by its bound "
          "| worlds certified, truly above |\n|---|---|---|---|---|")  # fmt: skip
    for limit, one in table.items():
        whole = f"{one['exit rate']:.1%}, {one['disagreement']:.2%}" if one["certified"] else "refused"
        print(
            f"| {float(limit):.1%} | {whole} | {one['re-cuts certified']:.1%}, {one['exit rate there']:.1%} "
            f"| {one['above the limit there']:.1%}, {one['above it by its bound']:.1%} "
            f"| {one['worlds certified']:.1%}, {one['truly above']:.1%} |",
            flush=True,
        )


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw the exit rate against the certified disagreement."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, table in results.items():
        values = [100 * one["exit rate"] for one in table.values()]
        axis.plot([100 * limit for limit in LIMITS], values, marker="o", markersize=4, label=name)
    axis.set(xscale="log", xlabel="certified disagreement with Stage B, %", ylabel="photos that exit, %", ylim=(0, 102))
    axis.set_xticks([100 * limit for limit in LIMITS], [f"{100 * limit:g}" for limit in LIMITS])
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of roadwork_signs and street_pool")
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tap", type=int, default=8)
    parser.add_argument("--recuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, results = options.out, {}
    run = train(options.data / "roadwork_signs", out, options.backbone, options.tap, options.seed)
    streets, clips = options.data / "street_pool", np.empty(0)
    for name, images, independent in (
        ("signs", out / "signs", False),
        ("streets", streets, False),
        ("streets as if frames were independent", streets / "images", True),
    ):
        rows = seen(run, images, out / f"{name}.npz", rows_independent=independent)
        assert rows.groups is not None
        groups = rows.groups[rows.halves == "certify"]
        clips = clips if independent else groups
        results[name] = study(rows, clips, options.recuts, options.seed)
        show(name, groups.size, np.unique(groups).size, results[name], options.recuts)
        write_text(out / "agreement.json", json.dumps(results, indent=1))
    plot({name: table for name, table in results.items() if "independent" not in name}, out / "agreement.png")


if __name__ == "__main__":
    main()
