"""What an exit saves: ``stage1 bench cascade`` on a run, or end to end on freshly built random models.

    python benchmarks/cascade.py [--run RUN] [--backbone ../shared/weights/dinov2-small] [--rounds 20] [--out FOLDER]

Without RUN two models with random heads are built into runs and exported: the preset ``tiny`` (4 blocks at 48 px) and,
with ``--backbone``, that one at ``--size`` px, each with the tap at half its blocks; heads need not have learned
anything to be timed. Measured on rendered scenes with onnxruntime and, with ``--torch``, in torch as well. Last comes
the verdict: at batch 64 the cascade's throughput is to reach .93 of the ideal, and 1.4 times a full pass where 70% of
images exit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stage1_pro.commands.bench import BenchCascade, render_cascade
from stage1_pro.commands.split import split
from stage1_pro.config import Config, ModelConfig
from stage1_pro.data.splits import Splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.deploy.bench import CascadeBench, bench_cascade
from stage1_pro.deploy.exporting import export
from stage1_pro.models.backbone import load_backbone
from stage1_pro.models.model import Stage1Model, create_model
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.run import write_config


def make_policy(model: Stage1Model, splits: Splits) -> Thresholds:
    """Some policy of this model: which rows defer is forced, only what asking it costs counts."""
    return Thresholds(
        classes=splits.classes, positive=splits.positive, exit_threshold=0.8, exit_upper_threshold=0.8,
        fnr_on_exited=0, coverage=0.5, exit_accuracy=1, target_fnr=0.02, guarantee="none",
        statement="Random heads, for timing alone.", fnr_upper_bound=1, bound_level=0.95, bound_method="none", n_rows=1,
        n_exited=1, n_positive_exited=1, n_false_negative=0, n_positive_groups=1, grouped=False, sweep_results=[],
        split_hashes={"val_calib": splits.hashes["val_calib"]}, model_fingerprint=model.fingerprint(),
        preprocessing_fingerprint=model.architecture.preprocessing.fingerprint(),
    )  # fmt: skip


def build_run(run: Path, pool: Path, backbone: str, size: int | None) -> Path:
    """A run of an untrained model with the tap at half its blocks, as training would leave it, and its bundle."""
    n_blocks = load_backbone(backbone, size, pos_embed_rescale=None, seed=0).n_blocks
    config = Config(model=ModelConfig(backbone=backbone, image_size=size, tap=n_blocks // 2))
    splits = split(pool, run)
    model = create_model(config.model, splits.classes, splits.positive, 0).eval()
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"image_size": model.architecture.image_size})}
    )
    write_config(run, config, splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch\n0\n", encoding="utf-8")
    make_policy(model, splits).write(run / "thresholds.json")
    export(run)
    return run


def verdict(found: CascadeBench) -> str:
    """The two targets at batch 64, on the smallest deferral that leaves 70% of exits."""
    lines = []
    for one in found.batches:
        cascades = [t for t in one.timings if t.contestant == "cascade" and t.deferral_rate is not None]
        kept = [t for t in cascades if 0.7 <= 1 - (t.deferral_rate or 0) < 1]
        if one.batch != 64 or not kept:
            continue
        worst = min(t.of_ideal or 0 for t in kept)
        last = max(kept, key=lambda t: t.deferral_rate or 0)
        lines.append(
            f"{found.source}, {found.runtime}, batch 64, 70% exits or more: at least {worst:.3f} of the ideal (target "
            f".93); with {1 - (last.deferral_rate or 0):.1%} exits {last.speedup:.3f} times a full pass (target 1.4)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="trained, calibrated and exported run; random models otherwise")
    parser.add_argument("--backbone", help="folder or hub id of a second random model's backbone")
    parser.add_argument("--size", type=int, default=112, help="its input side in pixels")
    parser.add_argument("--torch", action="store_true", help="measure in torch as well")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=BenchCascade.model_fields["rates"].default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [options.run]
        if options.run is None:
            pool = render_pool(Path(folder) / "pool", 640, seed=0, size=64)
            runs = [build_run(Path(folder) / "tiny", pool, "tiny", None)]
            if options.backbone:
                name = Path(options.backbone).name
                runs.append(build_run(Path(folder) / name, pool, options.backbone, options.size))
        verdicts = []
        for run in runs:
            for runtime in ("onnxruntime", "torch") if options.torch else ("onnxruntime",):
                out = options.out / f"{run.name}-{runtime}" if options.out else None
                found = bench_cascade(
                    BenchCascade(
                        run=run, runtime=runtime, rounds=options.rounds, batch=options.batch, rates=options.rates,
                        out=out,
                    )
                )  # fmt: skip
                print(render_cascade(found), flush=True)
                verdicts.append(verdict(found))
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
