"""``stage1 streetvision``: tune, answer and launch a miner."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stage1_pro.command import Command, Count, Flag, Result
from stage1_pro.errors import InputError, Stage1Error


class Tune(Command):
    """Pick threshold and abstain band by the simulated reward."""

    topic: ClassVar[str] = "streetvision"

    run: Annotated[Path | None, Flag(one_of="source")] = Field(None, description="calibrated run folder")
    bundle: Annotated[Path | None, Flag(one_of="source")] = Field(
        None, description="bundle folder; needs --labels and --out"
    )
    labels: Path | None = Field(None, description="with --bundle: CSV with file,label[,group] of photos not trained on")
    train_prior: float | None = Field(None, description="share of positives in training; the run's own by default")
    serve_prior: float = Field(0.5, description="share of positives that is asked")
    out: Path | None = Field(None, description="record to write; RUN/streetvision.json by default")
    settings: Path | None = Field(None, description="YAML of the miner to write")
    n_replicates: Annotated[Count, Flag("--replicates")] = Field(
        300, description="resamples of groups for the intervals"
    )
    seed: int = Field(0, description="seed of folds, resamples and simulated rounds")

    def execute(self) -> Result:
        """Print what the settings earn in simulation, and the miner's YAML."""
        from stage1_pro.integrations.streetvision.tuning import render, tune, yaml_of

        found = tune(self)
        return Result(render(found), {**found.model_dump(mode="json"), "yaml": yaml_of(found)})


class Answer(Command):
    """Answer for photos as the miner would, to try its YAML."""

    topic: ClassVar[str] = "streetvision"

    settings: Path = Field(description="YAML of the miner")
    images: Annotated[tuple[Path, ...], Flag(positional=True, metavar="IMAGE")] = Field(description="photos")

    def execute(self) -> Result:
        """Print P(roadwork) of every photo, -1 for no answer."""
        from stage1_pro.integrations.streetvision import Settings, StreetVision

        absent = [path for path in self.images if not path.is_file()]
        if absent:
            raise InputError(f"images must be files, got {absent[0]}, which is none; nothing was answered")
        miner = StreetVision(Settings.read(self.settings))
        answers = {str(path): miner.answer(path.read_bytes()) for path in self.images}
        return Result("\n".join(f"{value:>9.6f}  {path}" for path, value in answers.items()), answers)


class Launch(Command):
    """Register the detector, then run the miner's own entry point."""

    topic: ClassVar[str] = "streetvision"

    repo: Path = Field(description="checkout of the miner's code")
    layout: Literal["auto", "base_miner", "natix"] = Field("auto", description="where its registry is; auto looks")
    settings: Path | None = Field(None, description="YAML of the miner; names detector and YAML to the miner, too")
    entry: str = Field("neurons/miner.py", description="the miner's script, within its checkout")
    arguments: Annotated[tuple[str, ...], Flag(positional=True, metavar="-- ARGUMENT")] = Field(
        (), description="the miner's own"
    )

    def execute(self) -> Result:
        """Run the miner in this process until it ends."""
        from stage1_pro.integrations.streetvision import launch

        try:
            launch(self.repo, self.arguments, layout=self.layout, settings=self.settings, entry=self.entry)
        except Stage1Error:
            raise
        except Exception:  # noqa: BLE001  the miner's own, which no message of ours explains
            traceback.print_exc()
            return Result("", None, 1)
        return Result("", None)
