"""What the manual's pages speak of: photos, a calibrated run with its bundle, two models' predictions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

import stage1_pro
from stage1_pro.config import load_config


def draw(rng: np.random.Generator, positive: bool) -> Image.Image:
    """A noisy grey street, with an orange board where there is roadwork."""
    pixels = rng.integers(60, 140, (48, 56, 3), dtype=np.uint8)
    if positive:
        top, left = rng.integers(4, 24, 2)
        pixels[top : top + 20, left : left + 24] = (240, 130, 20)
    return Image.fromarray(pixels)


def make_world(root: Path) -> None:
    """Labelled photos, new ones, a calibrated run and its bundle, two models' predictions."""
    photos = root / "photos"
    for folder in ("new", "unlabelled"):
        (photos / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (photos / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "group"])
        for index in range(240):
            draw(rng, index // 2 % 2 == 1).save(photos / f"{index}.png")
            table.writerow([f"{index}.png", index // 2 % 2, f"clip{index // 2}"])
    for index, name in enumerate("ab"):
        draw(rng, index == 1).save(photos / "new" / f"{name}.png")
    for index in range(24):
        draw(rng, index % 2 == 1).save(photos / "unlabelled" / f"{index}.png")
    truth = rng.integers(0, 2, 300)
    for name, strength in (("predictions", 3.0), ("older", 1.0)):
        probs = 1 / (1 + np.exp(-strength * (2 * truth - 1) - rng.normal(size=300)))
        with (root / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["label", "prob", "group"])
            table.writerows((int(a), f"{p:.6f}", i // 3) for i, (a, p) in enumerate(zip(truth, probs, strict=True)))
    run = root / "run"
    stage1_pro.split(photos / "labels.csv", run)
    stage1_pro.train(run, load_config(None, ["train.epochs=2", "train.workers=0", "model.tap=2"]))
    stage1_pro.calibrate(run, guarantee="none", target_fnr=0.5)
    stage1_pro.export(run)
