"""Training overhead: images/s of ``stage1 train`` against a bare PyTorch loop, and the loader alone.

    python benchmarks/overhead.py --run RUN [--rounds 5] [--epochs 1]

RUN holds splits.json. Each round times, one after the other: the loader alone, a bare loop (same model, same
augmented loader, loss, backward, AdamW step, nothing else) and ``train`` itself. Ratios are of one round; their
median is the result, since machines are noisy.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import stage1_pro
from stage1_pro.config import Config, load_config
from stage1_pro.data.loader import TrainLoader
from stage1_pro.data.splits import Splits
from stage1_pro.models.model import create_model
from stage1_pro.training.losses import CrossEntropy, Part, balanced_weights


def make_loader(splits: Splits, config: Config, spec: object) -> TrainLoader:
    rows = splits.of("train")
    labels = np.asarray([splits.classes.index(row.label) for row in rows], dtype=np.int64)
    return TrainLoader(
        splits.photos_of(rows), labels, spec, config.augment, seed=0,
        batch_size=config.train.batch_size, rank=0, world=1, workers=config.train.workers,
    )  # fmt: skip


def epochs_of(loader: TrainLoader, epochs: int) -> Iterator[object]:
    for epoch in range(epochs):
        yield from loader.epoch(epoch, 0)


def bare_rate(splits: Splits, config: Config) -> float:
    """Images/s of a plain loop from a fresh loader: forward, loss, backward, AdamW, nothing else."""
    model = create_model(config.model, splits.classes, splits.positive, 0).train()
    loader = make_loader(splits, config, model.architecture.preprocessing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    labels = torch.from_numpy(splits.indices(splits.of("train")))
    weights = balanced_weights(labels, len(splits.classes))
    entropy = CrossEntropy(config.train.model_copy(update={"classifier_weight": 1.0}))
    began = time.perf_counter()
    images = 0
    for batch in epochs_of(loader, config.train.epochs):
        optimizer.zero_grad(set_to_none=True)
        loss = entropy.of(entropy.sums(Part(model(batch.pixels), batch.labels, weights)))
        (loss / len(batch.labels)).backward()
        optimizer.step()
        images += len(batch.labels)
    seconds = time.perf_counter() - began
    loader.close()
    return images / seconds


def train_rate(run: Path, config: Config) -> float:
    """Images/s of ``stage1 train`` over its epochs, checkpoints inside them included, validation apart."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(run / "splits.json", folder)
        stage1_pro.train(folder, config)
        with (Path(folder) / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        seconds = sum(float(row["seconds"]) for row in rows)
    torch.use_deterministic_algorithms(False)
    return sum(float(row["seconds"]) * float(row["images_per_second"]) for row in rows) / seconds


def loader_rate(splits: Splits, config: Config) -> float:
    """Images/s of the augmented loader alone, from a fresh one."""
    spec = create_model(config.model, splits.classes, splits.positive, 0).architecture.preprocessing
    loader = make_loader(splits, config, spec)
    began = time.perf_counter()
    images = sum(len(batch.labels) for batch in epochs_of(loader, config.train.epochs))
    seconds = time.perf_counter() - began
    loader.close()
    return images / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    splits = Splits.read(options.run / "splits.json")
    config = load_config(None, [f"train.epochs={options.epochs}"])
    ratios = []
    for number in range(options.rounds):
        alone = loader_rate(splits, config)
        # Turn about who goes first: a noisy machine drifts.
        if number % 2:
            ours = train_rate(options.run, config)
            bare = bare_rate(splits, config)
        else:
            bare = bare_rate(splits, config)
            ours = train_rate(options.run, config)
        ratios.append(ours / bare)
        print(
            f"round {number}: loader alone {alone:.0f}, bare loop {bare:.0f}, stage1 train {ours:.0f} images/s; "
            f"ratio {ours / bare:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} rounds (target >= 0.9)")


if __name__ == "__main__":
    main()
