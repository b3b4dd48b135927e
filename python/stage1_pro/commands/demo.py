"""``stage1 demo``: every command on rendered street scenes, start to finish."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any, Literal

from stage1_pro.command import Command, Result, option
from stage1_pro.errors import InputError, NotReachableError

SCENES = 3000
OVERRIDES = ["train.epochs=12", "train.batch_size=32", "augment.rotation=5", "augment.crop_scale=[0.85, 1.0]"]
# A small model on small pictures: the usual .02 would let few exit. Where a target is refused, the demo says so and
# asks for the next one, as a user would.
TARGETS = (0.05, 0.1, 0.2)
MARKER = "demo.json"


class Demo(Command):
    """Run every command on rendered street scenes (minutes, no data needed)."""

    out: Path = option(..., "folder to write; must not exist or be a demo's")
    seed: int = option(0, "seed of scenes, splits and training")

    def execute(self) -> Result:
        """Print where the report is."""
        found = demo(self.out, seed=self.seed)
        return Result(f"open {found['report']}", found)


def demo(out: Path | str, *, seed: int = 0, scenes: int = SCENES, overrides: list[str] | None = None) -> dict[str, Any]:
    """Render scenes, then split, train, calibrate, evaluate, export and predict.

    ``out`` must not exist, be empty, or be an earlier demo's, which is replaced; ``overrides`` of the configuration
    come on top of the demo's own. Gives paths, seconds and the main figures on ``val_test``.
    """
    from stage1_pro.commands.calibrate import calibrate
    from stage1_pro.commands.split import split
    from stage1_pro.config import Config, load_config
    from stage1_pro.data.synthetic import render_pool
    from stage1_pro.deploy.cascade import Cascade
    from stage1_pro.deploy.exporting import export
    from stage1_pro.files import write_text
    from stage1_pro.progress import say
    from stage1_pro.training.evaluation import evaluate
    from stage1_pro.training.loop import train

    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise InputError(f"--out must be a new or empty folder, got {out} with files in it; name another one")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARKER, "{}\n")
    began = time.monotonic()
    config = load_config(None, OVERRIDES + (overrides or []), base=Config(seed=seed))

    say(f"1/7 rendering {scenes} street scenes")
    labels = render_pool(out / "scenes", scenes, seed=seed)
    run = out / "run"
    say("2/7 split")
    splits = split(labels, run, seed=seed, overwrite=True)
    say("3/7 train")
    train(run, config, overwrite=True)
    say("4/7 calibrate")
    for target in TARGETS:
        # A few hundred scenes certify nothing; this is the empirical choice, which says that it promises nothing.
        try:
            policy = calibrate(run, guarantee="none", target_fnr=target)
            break
        except NotReachableError as refusal:
            if target == TARGETS[-1]:
                raise
            say(f"refused: {refusal}")
    say("5/7 evaluate")
    evaluation = evaluate(run)
    builds: Literal["onnx", "rtx"] = "rtx" if importlib.util.find_spec("tensorrt_rtx") else "onnx"
    say(f"6/7 export --target {builds}")
    bundle = export(run, target=builds, overwrite=True)
    say("7/7 predict")
    shown = splits.of("val_test")[:200]
    decisions = Cascade.load(bundle).predict(splits.photos_of(shown))
    exited = sum(bool(value) for value in decisions.exited)
    say(f"{len(shown)} test scenes: {exited} exited at Stage A, {len(shown) - exited} deferred to Stage B")
    result = {
        "run": str(run),
        "bundle": str(bundle),
        "report": str(run / "report.html"),
        "engines": builds == "rtx",
        "exited": exited,
        "deferred": len(shown) - exited,
        "policy": {
            "exit_threshold": policy.exit_threshold,
            "coverage": policy.usual_exit_rate,
            "guarantee": policy.guarantee,
            "target_fnr": policy.fnr_target,
        },
        "evaluation": evaluation.model_dump(mode="json"),
        "seconds": time.monotonic() - began,
    }
    say(f"done in {result['seconds']:.0f} s")
    return result
