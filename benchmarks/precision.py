"""res32, fp16 and bf16 against fp32 over a run's real val_test, as the bundle would decide.

    python benchmarks/precision.py --run RUN [--rows 400] [--precisions res32 fp16 bf16]

RUN is trained and calibrated. Reads photos of val_test, never its labels: the figures say how often another precision
decides otherwise than fp32 under the run's own policy, and how many of those rows lie within 1e-3 of a threshold.
fp32, fp16 and res32 run through onnxruntime on the CPU, bf16 in torch. Exit code 1 when res32 flips any other row.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from stage1_pro.data.images import ImageError, preprocess, read_image
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.onnx import export_onnx, export_variants
from stage1_pro.policies.policy import read_policy
from stage1_pro.training.checkpoint import load_run_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10**9, help="the first rows of val_test alone")
    parser.add_argument("--precisions", nargs="+", default=["res32", "fp16", "bf16"])
    options = parser.parse_args()
    model, _ = load_run_model(options.run)
    splits, spec = Splits.read(options.run / "splits.json"), model.architecture.preprocessing
    shown = load(splits, spec, "val_test", options.rows)
    seen = load(splits, spec, "train", 64)
    policy = read_policy(options.run)
    with tempfile.TemporaryDirectory() as scratch:
        stages = export_onnx(model, spec, Path(scratch), pixels=shown[:8])
        entries = export_variants(
            model, stages, Path(scratch), options.precisions, pixels=shown, calibration=seen, policy=policy
        )
        print(
            "| precision | stage A, max Δlogit | stage B, max Δlogit | flips | of them near | block maximum | ONNX MB |"
        )
        print("|---|---|---|---|---|---|---|")
        for precision, first in entries["stage_a"].variants.items():
            second = entries["stage_b"].variants[precision]
            size = sum((Path(scratch) / v.onnx).stat().st_size for v in (first, second)) / 1e6
            print(
                f"| {precision} | {first.parity:.1e} | {second.parity:.1e} | {first.flips} of {first.images} | "
                f"{first.near_threshold} | {max((*first.block_maxima, *second.block_maxima)):.3g} | {size:.1f} |"
            )
    held = entries["stage_a"].variants.get("res32")
    raise SystemExit(int(held is not None and held.flips > held.near_threshold))


def load(splits: Splits, spec: object, split: str, rows: int) -> np.ndarray:
    """Preprocessed images [N, 3, H, W] of a split; those that cannot be read are left out."""
    found = []
    for photo in splits.photos_of(splits.of(split)[:rows]):
        try:
            found.append(preprocess(read_image(photo), spec))
        except ImageError:
            continue
    return np.stack(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
