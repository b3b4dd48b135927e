"""The tiny model that tests share, with photos, policies, a run without a training, and ways to damage a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import stage1_pro
from stage1_pro.config import Config, ModelConfig
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Merging, Row, Splits, hash_splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.files import sha256_file
from stage1_pro.models.model import Stage1Model, create_model
from stage1_pro.policies.gate import GateConstraints, GateParams
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.inference import infer_split, run_over
from stage1_pro.training.run import write_config
from stage1_pro.words import SPLITS

CLASSES = ["none", "roadwork"]


def make_model(tap: int = 2, seed: int = 0, backbone: str = "tiny", image_size: int | None = None) -> Stage1Model:
    """A tiny model whose heads and norms are random enough for every output to depend on the pixels."""
    model = create_model(ModelConfig(backbone=backbone, tap=tap, image_size=image_size), CLASSES, "roadwork", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (model.heads, model.norm_a):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Photos of coloured noise at several scales and sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        coarse = rng.integers(0, 256, (2 + index % 5, 3 + index % 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((60 + index, 50 + 2 * index), Image.Resampling.BICUBIC)
        paths.append(folder / f"{index:02d}.png")
        image.save(paths[-1])
    return paths


def make_policy(model: Stage1Model, hashes: dict[str, str], threshold: float = 0.8) -> Thresholds:
    """A policy as `stage1 calibrate` would write for this model."""
    return Thresholds(
        classes=CLASSES,
        positive="roadwork",
        exit_threshold=threshold,
        exit_lower_threshold=1 - threshold,
        exit_upper_threshold=threshold,
        fnr_on_exited=0.0,
        coverage=0.5,
        exit_accuracy=1.0,
        target_fnr=0.02,
        guarantee="none",
        statement="Chosen on val_calib; nothing is promised about other images.",
        fnr_upper_bound=0.2,
        bound_level=0.95,
        bound_method="test",
        n_rows=10,
        n_exited=5,
        n_positive_exited=3,
        n_false_negative=0,
        n_positive_groups=3,
        grouped=True,
        sweep_results=[],
        split_hashes={"val_calib": hashes["val_calib"]},
        model_fingerprint=model.fingerprint(),
        preprocessing_fingerprint=model.architecture.preprocessing.fingerprint(),
    )


def make_gate_policy(model: Stage1Model, hashes: dict[str, str], threshold: float) -> GateParams:
    """A gate policy as `stage1 calibrate` would write for this model."""
    return GateParams(
        classes=CLASSES, positive="roadwork", a=1.5, b=-0.2, fitted=True, platt="test", threshold=threshold,
        coverage=0.5, exit_error=0.0, fnr_on_exited=None, guarantee="none", certificate=None, certify_uses=None,
        constraints=GateConstraints(min_coverage=0.4, max_exit_error=0.01), statement="Chosen on val_calib.",
        exit_error_upper_bound=0.4, fnr_upper_bound=None, bound_level=0.95, bound_method="test", n_rows=10, n_exited=5,
        n_errors=0, n_positive_exited=0, n_false_negative=0, n_exited_groups=5, n_positive_groups=0, n_fit_rows=5,
        grouped=False, sweep_results=[], split_hashes={"val_calib": hashes["val_calib"]},
        model_fingerprint=model.fingerprint(),
        preprocessing_fingerprint=model.architecture.preprocessing.fingerprint(),
    )  # fmt: skip


def make_run(run: Path, model: Stage1Model, seed: int = 0) -> Path:
    """A trained and calibrated run without the training; the threshold splits its images in two."""
    paths = make_images(run / "images", 16, seed)
    rows = [
        Row(
            id=str(i), file=path.name, label=CLASSES[i % 2], group=f"secret-street-{i}", split=SPLITS[i // 2 % 4],
            half="fit" if SPLITS[i // 2 % 4] == "val_calib" else None, sha256=sha256_file(path),
        )
        for i, path in enumerate(paths)
    ]  # fmt: skip
    splits = Splits(
        root=str(run / "images"),
        classes=CLASSES,
        positive="roadwork",
        seed=0,
        fractions={"train": 0.25, "val_select": 0.25, "val_calib": 0.25, "val_test": 0.25},
        counts={name: {"none": 2, "roadwork": 2} for name in SPLITS},
        groups=dict.fromkeys(SPLITS, 4),
        hashes=hash_splits(rows),
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0.0, largest_groups=[]),
        rows=rows,
    )
    splits.write(run / "splits.json")
    a = model.architecture
    config = Config(model=ModelConfig(backbone="tiny", tap=a.tap, image_size=a.image_size))
    write_config(run, config, splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    make_policy(model, splits.hashes).write(run / "thresholds.json")
    return run


def bright(folder: Path, count: int, seed: int) -> list[tuple[Path, str]]:
    """Noise whose brightness is its class."""
    found = []
    for index, path in enumerate(make_images(folder, count, seed)):
        with Image.open(path) as image:
            pixels = np.asarray(image) // 2 + 127 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        found.append((path, CLASSES[index % 2]))
    return found


def make_bright_run(run: Path) -> Path:
    """A calibrated run on bright photos whose heads know nothing."""
    model = make_model(tap=4)
    rows = [
        Row(
            id=str(i), file=path.name, label=label, group=str(i), split=SPLITS[i // 2 % 4], sha256=sha256_file(path),
            half=("fit", "certify")[i // 8 % 2] if SPLITS[i // 2 % 4] == "val_calib" else None,
        )
        for i, (path, label) in enumerate(bright(run / "images", 96, seed=5))
    ]  # fmt: skip
    splits = Splits(
        root=str(run / "images"), classes=CLASSES, positive="roadwork", seed=0,
        fractions=dict.fromkeys(SPLITS, 0.25), counts={name: dict.fromkeys(CLASSES, 12) for name in SPLITS},
        groups=dict.fromkeys(SPLITS, 24), hashes=hash_splits(rows), rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0.0, largest_groups=[]),
    )  # fmt: skip
    splits.write(run / "splits.json")
    a = model.architecture
    write_config(run, Config(model=ModelConfig(backbone="tiny", tap=a.tap, image_size=a.image_size)), splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    policy = make_policy(model, splits.hashes, 0.6).model_copy(update={"target_fnr": 0.5})
    policy.write(run / "thresholds.json")
    return run


def make_solved_run(run: Path) -> Path:
    """A run on bright photos whose Stage A reads their brightness, by least squares; its answers lie beside it."""
    make_bright_run(run)
    splits = Splits.read(run / "splits.json")
    model = make_model(tap=4)
    spec, kept = model.architecture.preprocessing, splits.of("train")
    found = run_over(
        lambda pixels: {"features": model.features(pixels)[0]}, splits.photos_of(kept), spec,
        device=torch.device("cpu"), workers=0,
    )["features"]  # fmt: skip
    signs = 2.0 * splits.indices(kept) - 1
    wide = np.hstack([found, np.ones((len(found), 1))])
    weights = np.linalg.solve(wide.T @ wide + 0.1 * np.eye(wide.shape[1]), wide.T @ (2 * signs))
    with torch.no_grad():
        last = model.heads.classifier[-1]
        last.weight.copy_(torch.tensor(np.stack([-weights[:-1], weights[:-1]]), dtype=torch.float32))
        last.bias.copy_(torch.tensor([-weights[-1], weights[-1]], dtype=torch.float32))
    a = model.architecture
    config = Config.model_validate({"model": {"backbone": "tiny", "tap": a.tap, "image_size": a.image_size},
                                    "train": {"workers": 0}})  # fmt: skip
    write_config(run, config, splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    for name in ("val_select", "val_calib"):
        infer_split(run, name).save(run / f"{name}.npz")
    (run / "thresholds.json").unlink()
    return run


def untrained_run(run: Path, pool: Path, fractions: dict[str, float], size: int) -> Predictions:
    """A split run of 160 street scenes and a model with its starting weights; gives its answers on val_calib."""
    splits = stage1_pro.split(render_pool(pool, 160, seed=3, size=size), run, seed=0, fractions=fractions)
    config = Config(model=ModelConfig(backbone="tiny", tap=2, image_size=48))
    model = create_model(config.model, splits.classes, splits.positive, 0)
    write_config(run, config, splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    return infer_split(run, "val_calib")


def copy_run(run: Path, to: Path) -> Path:
    """A copy of a run with its bundle and photos, to change."""
    shutil.copytree(run, to)
    splits = Splits.read(to / "splits.json")
    if Path(splits.root).is_relative_to(run):
        splits.model_copy(update={"root": str(to / Path(splits.root).relative_to(run))}).write(to / "splits.json")
    return to


def set_policy(bundle: Path, policy: Thresholds | GateParams, file: str = "thresholds.json") -> None:
    """Put another policy of the same kind into a bundle."""
    policy.write(bundle / file)
    rehash(bundle, file)


def torch_answers(model: Stage1Model, pixels: np.ndarray[Any, Any], threshold: float) -> tuple[Any, Any, Any]:
    """Labels, P(roadwork) and exits from plain torch in float64 over the float32 logits."""
    with torch.no_grad():
        outputs = model(torch.from_numpy(pixels))
    first, second = (torch.softmax(x.double(), 1) for x in (outputs.logits_a, outputs.logits_b))
    exited = first.max(1).values >= threshold
    probs = torch.where(exited[:, None], first, second)
    return np.array(CLASSES)[probs.argmax(1).numpy()], probs[:, 1].numpy(), exited.numpy()


def rewrite(bundle: Path, change: Any) -> None:
    """Edit bundle.json as plain JSON."""
    path = bundle / "bundle.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rehash(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file again, as somebody who means harm would."""
    file = bundle / name
    rewrite(bundle, lambda v: v["files"].update({name: {"sha256": sha256_file(file), "size": file.stat().st_size}}))
