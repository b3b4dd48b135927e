"""Engines of ViT-S, B and L in every precision: error, size, fused layers, fused attentions, seconds to build.

    OMP_NUM_THREADS=1 python benchmarks/engines.py --shapes S B L

Stage A of a DINOv3 of that shape with random weights and its heads, tap at the last block, 224 px, built by TensorRT
for RTX for Ampere and later; nothing is executed on a GPU. Error and flips are against torch in fp32, on seeded
noise, through onnxruntime (bf16: in torch). With `--cls` the heads read the CLS token alone, so that the last block
of res32 computes nothing else.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.deploy.engine import EngineRecipe, build_engine
from stage1_pro.deploy.onnx import export_onnx, export_variants
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.models.backbone import backbone_from_config
from stage1_pro.models.model import Architecture, Stage1Model

SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
SIDE = 224


def make_model(shape: str) -> Stage1Model:
    """A DINOv3 of this shape with random weights, and heads that are not at their zeros."""
    width, depth, heads = SHAPES[shape]
    values = {
        "model_type": "dinov3_vit", "image_size": SIDE, "patch_size": 16, "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_register_tokens": 4,
    }  # fmt: skip
    backbone = backbone_from_config(values, SIDE)
    architecture = Architecture(
        backbone=BackboneInfo(
            source=f"random ViT-{shape}", family="dinov3", licence="trained from scratch: the owner's own",
            hidden_size=width, n_blocks=depth, patch_size=16,
        ),
        hf_config=values, image_size=SIDE, tap=depth, classes=["none", "roadwork"], positive="roadwork",
        auxiliary_hidden=256, dropout=0.0,
        preprocessing=PreprocessSpec(height=SIDE, width=SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )  # fmt: skip
    model = Stage1Model(architecture, backbone).eval()
    torch.nn.init.normal_(model.heads.gate.linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def measure(shape: str, precisions: list[str], images: int, *, cls: bool) -> list[dict[str, object]]:
    """A row per precision."""
    model, rows = make_model(shape), []
    pixels = np.random.default_rng(1).normal(size=(images, 3, SIDE, SIDE)).astype(np.float32)
    if cls:
        width = model.backbone.hidden_size
        for layer in (model.heads.classifier[1], model.heads.gate.linear, model.heads.auxiliary[0]):
            torch.nn.init.zeros_(layer.weight[:, width : 2 * width])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stages = export_onnx(model, model.architecture.preprocessing, folder, pixels=pixels)
        entry = export_variants(model, stages, folder, precisions, pixels=pixels, calibration=pixels)["stage_a"]
        del model
        for precision in precisions:
            variant = entry.variants[precision]
            engine = build_engine(folder / variant.onnx, folder, EngineRecipe(precision=precision), "stage_a")
            rows.append(
                {
                    "shape": shape, "precision": precision + " cls" * cls, "max_dlogit": variant.parity,
                    "flips": variant.flips, "images": images, "onnx_mb": (folder / variant.onnx).stat().st_size / 1e6,
                    "engine_mb": (folder / engine.path).stat().st_size / 1e6, "layers": engine.layers,
                    "mha": engine.attention_layers, "build_s": engine.build_seconds,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16", "res32"])
    parser.add_argument("--cls", action="store_true", help="heads that read the CLS token alone")
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for shape in options.shapes for row in measure(shape, options.precisions, options.images, cls=options.cls)
    ]
    print("\n| ViT | precision | max Δlogit | flips | ONNX MB | engine MB | fused layers | MHA | build s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['shape']} | {row['precision']} | {row['max_dlogit']:.1e} | {row['flips']} of {row['images']} | "
            f"{row['onnx_mb']:.1f} | {row['engine_mb']:.1f} | {row['layers']} | {row['mha']} | {row['build_s']:.1f} |"
        )


if __name__ == "__main__":
    main()
