"""``stage1 export`` and ``stage1 build``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stage1_pro.command import Command, Result, option
from stage1_pro.commands.evaluate import OfRun
from stage1_pro.words import Precision


class Engines(Command):
    """What export and build ask of engines."""

    recipe: Path | None = option(
        None, "engine recipe: a YAML file, or the name of one that comes along, such as rtx-res32"
    )
    precisions: tuple[Precision, ...] = option(
        (),
        "fp32, res32 (fp16 products on an fp32 residual stream), fp16 or bf16: the first is of the "
        "engines, and a runtime steps down to the others; without engines, graphs to write beside fp32",
        name="--precision",
        metavar="PRECISION",
    )

    def _told(self, bundle: Path, after: str) -> Result:
        from stage1_pro.deploy.inspection import inspect

        return Result(f"wrote {bundle}; next: {after}", inspect(bundle))


class Export(OfRun, Engines, topic="engines"):
    """Write the bundle: ONNX per stage, engines, exactly one policy."""

    run: Path = option(..., "trained and calibrated run folder")
    out: Path | None = option(None, "bundle folder; RUN/bundle by default")
    target: Literal["onnx", "rtx", "tensorrt"] | None = option(
        None,
        "rtx also compiles engines, no GPU needed; tensorrt does so for this machine's GPU, data-centre or "
        "other; the run's configuration or onnx by default",
    )
    overwrite: bool = option(False, "replace an existing bundle, which goes to OUT.before")

    def execute(self) -> Result:
        """Print where the bundle is."""
        from stage1_pro.deploy.exporting import export

        with self.settled():
            bundle = export(**self.model_dump(exclude={"images"}))
        return self._told(bundle, f"stage1 predict --bundle {bundle} IMAGES")


class Build(Engines, topic="engines"):
    """Compile engines on this machine from a received bundle's graphs, into a new bundle."""

    bundle: Path = option(..., "bundle folder; it stays as it is")
    out: Path | None = option(None, "folder of the new bundle; BUNDLE-built by default")
    target: Literal["rtx", "tensorrt"] | None = option(None, "engine builder; the recipe's or rtx by default")
    overwrite: bool = option(False, "replace an existing bundle at --out, which goes to OUT.before")

    def execute(self) -> Result:
        """Print where the new bundle is."""
        from stage1_pro.deploy.exporting import build

        bundle = build(**dict(self))
        return self._told(bundle, f"stage1 inspect {bundle}")
